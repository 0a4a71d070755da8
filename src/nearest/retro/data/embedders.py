"""From the text of a chunk to a vector: the same embedder for what is stored and what is asked."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearest.encode.dtype import chosen_device
from nearest.errors import ModelError, SettingError, require

Encode = Callable[[list[str]], Any]
"""Texts → array (texts, dim)."""
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class EmbedderIdentity:
    """What must be equal for two vectors to be comparable.

    Attributes:
        name: of the model, or what the caller calls a function.
        weights: SHA-256 of the weights, or the version that the caller gives a function.
        pooling: how vectors of tokens become one; "" where the model itself says so.
        prefix: put before each text.
        normalised: vectors have length 1.
        dim: of a vector.
    """

    name: str
    weights: str
    pooling: str
    prefix: str
    normalised: bool
    dim: int

    @property
    def has_model(self) -> bool:
        """Whether a model made the vectors, which its name leads to; else a function did."""
        return len(self.weights) == hashlib.sha256().digest_size * 2

    def check_same(self, other: "EmbedderIdentity", of: str) -> None:
        """Refuse to compare vectors of two embedders (ModelError names what differs)."""
        mine, theirs = asdict(self), asdict(other)
        if differing := [name for name in mine if mine[name] != theirs[name]]:
            first = differing[0]
            raise ModelError(
                f"{of} was embedded with {first} {theirs[first]!r}, this embedder has "
                f"{mine[first]!r}: their vectors cannot be compared; use the embedder "
                f"{other.name!r}, or embed {of} anew"
            )


class Embedder:
    """Embeds texts in batches of similar length.

    >>> lengths = Embedder.of(lambda texts: [[len(text), 1.0] for text in texts], "length", dim=2)
    >>> lengths(["abc", "a"]).tolist()
    [[3.0, 1.0], [1.0, 1.0]]
    """

    def __init__(self, encode: Encode, identity: EmbedderIdentity, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise SettingError(f"batch_size must be at least 1 text, got {batch_size}")
        self._encode = encode
        self.identity = identity
        self.batch_size = batch_size

    @classmethod
    def of(
        cls,
        encode: Encode,
        name: str,
        dim: int,
        *,
        version: str = "",
        prefix: str = "",
        normalise: bool = False,
        batch_size: int = 64,
    ) -> "Embedder":
        """Any function of texts; `name` and `version` are all that tells it from others."""
        identity = EmbedderIdentity(name, version, "", prefix, normalise, dim)
        return cls(encode, identity, batch_size)

    @classmethod
    def sentence_transformers(
        cls,
        name: str,
        *,
        prefix: str = "",
        normalise: bool = True,
        device: str = "auto",
        batch_size: int = 64,
    ) -> "Embedder":
        """A model of the sentence-transformers library, by its folder or hub name.

        Raises:
            NearestError: the library is not installed.
            ModelError: there is no such model.
        """
        require("sentence_transformers", "retro")
        from sentence_transformers import SentenceTransformer

        place = chosen_device(device)
        try:
            model = SentenceTransformer(name, device=str(place))
        except Exception as error:  # of many libraries
            raise ModelError(
                f"no sentence-transformers model can be loaded from {name!r} "
                f"({str(error).strip().splitlines()[0]}): give a folder, or a name on the hub"
            ) from error

        def encode(texts: list[str]) -> Any:
            return model.encode(texts, batch_size=len(texts), show_progress_bar=False)

        dim = len(encode(["a"])[0])
        identity = EmbedderIdentity(
            name, weights_digest(model.state_dict()), "", prefix, normalise, dim
        )
        return cls(encode, identity, batch_size)

    @classmethod
    def bert(
        cls,
        name: str,
        pooling: Pooling = "mean",
        *,
        prefix: str = "",
        normalise: bool = False,
        device: str = "auto",
        batch_size: int = 64,
    ) -> "Embedder":
        """The last hidden states of a BERT, pooled as the retro-pytorch code does.

        A text is read as [CLS] and its tokens, without [SEP]. "mean" is over the tokens after
        [CLS]; "cls" takes the state of [CLS].

        Raises:
            ModelError: there is no such model, or its tokenizer has no [CLS].
            SettingError: the pooling is unknown.
        """
        if pooling not in ("mean", "cls"):
            raise SettingError(f"pooling {pooling!r} is unknown: choose mean or cls")
        from transformers import AutoModel, AutoTokenizer

        place = chosen_device(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModel.from_pretrained(name).eval().to(place)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no encoder can be loaded from {name!r} ({str(error).strip().splitlines()[0]}): "
                "give a folder, or a name on the hub"
            ) from error
        start = tokenizer.cls_token_id
        if start is None:
            raise ModelError(
                f"the tokenizer of {name!r} has no [CLS] token: take an encoder as BERT"
            )
        limit = int(getattr(model.config, "max_position_embeddings", 512))

        @torch.no_grad()
        def encode(texts: list[str]) -> Any:
            rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            rows = [[start, *row[: limit - 1]] for row in rows]
            width = max(map(len, rows))
            ids = torch.zeros((len(rows), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for number, row in enumerate(rows):
                ids[number, : len(row)] = torch.tensor(row)
                mask[number, : len(row)] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            if pooling == "cls":
                return states[:, 0].float().cpu().numpy()
            kept = mask[:, 1:, None]
            mean = (states[:, 1:] * kept).sum(1) / (kept.sum(1) + 1e-8)
            return mean.float().cpu().numpy()

        identity = EmbedderIdentity(
            name,
            weights_digest(model.state_dict()),
            pooling,
            prefix,
            normalise,
            int(model.config.hidden_size),
        )
        return cls(encode, identity, batch_size)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """A float32 vector for each text.

        Raises:
            ModelError: the function gives other than (texts, dim) finite numbers.
        """
        dim = self.identity.dim
        order = np.argsort([len(text) for text in texts], kind="stable")
        found = np.empty((len(texts), dim), np.float32)
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = [self.identity.prefix + texts[row] for row in rows.tolist()]
            vectors = np.asarray(self._encode(batch), dtype=np.float32)
            if vectors.shape != (len(batch), dim):
                raise ModelError(
                    f"the embedder {self.identity.name!r} gives an array of {vectors.shape} for "
                    f"{len(batch)} texts, not ({len(batch)}, {dim}): one vector a text"
                )
            if not np.isfinite(vectors).all():
                raise ModelError(
                    f"the embedder {self.identity.name!r} gives a number that is not finite: "
                    "compute in float32"
                )
            found[rows] = vectors
        if self.identity.normalised:
            lengths = np.linalg.norm(found, axis=1, keepdims=True)
            found /= np.maximum(lengths, np.finfo(np.float32).tiny)
        return found


def embedder_named(
    spec: str, *, prefix: str = "", device: str = "auto", batch_size: int = 64
) -> Embedder:
    """The embedder that the command line names: NAME, bert:NAME or bert-cls:NAME."""
    kind, colon, name = spec.partition(":")
    options: dict[str, Any] = {"prefix": prefix, "device": device, "batch_size": batch_size}
    if colon and kind in ("bert", "bert-cls"):
        return Embedder.bert(name, "cls" if kind == "bert-cls" else "mean", **options)
    return Embedder.sentence_transformers(spec, **options)


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of all weights in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        weight = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
