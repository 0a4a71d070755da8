"""Lend a model a memory: every forward pass then predicts with both, until it is given back.

The mixture is made of the model's final logits, after soft caps, scalings and biases. It is made in
`forward`, not in a logits processor: those run after the ones that ban tokens, and see only the
last position, while assisted decoding scores several.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep

from nearest.encode.forward import encode_and_score
from nearest.encode.layers import captured_input
from nearest.errors import NearestError
from nearest.memory.memory import Memory
from nearest.models.match import matching_key_layer, refuse_attached
from nearest.retrieval.distribution import target_probs
from nearest.retrieval.knn import MEMORY_METHODS, KnnLM, KnnSettings, check_method


@dataclass(frozen=True)
class Source:
    """An entry that spoke for a token: where it stands, and its share of the memory's say."""

    entry: int
    document: int
    document_id: str
    metadata: Mapping[str, Any]
    position: int  # of the entry in its document's tokens; the token it gave stands one later
    weight: float


@dataclass(frozen=True)
class TokenSources:
    """A generated token, how much of its probability the memory gave, and which entries did.

    The sources' weights sum to 1, or there are none where the memory gave the token nothing.
    """

    token: int
    memory_weight: float
    sources: list[Source]


@dataclass(frozen=True)
class _Generated:
    """What the last `generate` returned, with what is needed to read it again."""

    sequences: Tensor
    prompt_length: int
    first: list[int]  # of each prompt: where its tokens start after left padding
    stops: set[int]
    pad: int | None


def attach(
    model: PreTrainedModel,
    memory: Memory,
    method: str = "knn",
    *,
    tokenizer: Any = None,
    force: bool = False,
    **settings: Any,
) -> "Session":
    """Attach a memory to a Hugging Face causal language model; use as a context manager.

    Greedy search, sampling, beams, left-padded batches, assisted decoding and plain calls of the
    model then predict with the memory. Leaving the context gives the model back unchanged.

    Args:
        model: the model that built the memory, in evaluation mode.
        memory: what to look up.
        method: "knn" (kNN-LM).
        tokenizer: checked against the memory's where given.
        force: accept another model than the one that built the memory.
        **settings: lam, temperature, k, distances; what is not given comes from `tune`'s result in
            the memory, else from the paper's defaults.

    Raises:
        ModelError: the model does not fit the memory.
        SettingError: a setting is unknown or out of range, or the model has a memory attached.
    """
    check_method(method, MEMORY_METHODS)
    return Session(model, KnnLM(memory, KnnSettings.resolve(memory, **settings)), tokenizer, force)


class Session:
    """An attached memory; see `attach`."""

    def __init__(
        self, model: PreTrainedModel, knn: KnnLM, tokenizer: Any = None, force: bool = False
    ) -> None:
        refuse_attached(model)
        self.model = model
        self.knn = knn
        self._layer = matching_key_layer(knn.memory, model, tokenizer, force=force)
        self._base_only = threading.local()
        self._forward_lock = threading.Lock()
        self._generate_lock = threading.Lock()
        self._generated: _Generated | None = None
        self._replaced = {name: vars(model).get(name) for name in ("forward", "generate")}
        vars(model)["forward"] = self._wrap_forward(model.forward)
        vars(model)["generate"] = self._wrap_generate(cast(Any, model.generate))

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.detach()

    @property
    def settings(self) -> KnnSettings:
        """λ, temperature, k and the distances in use."""
        return self.knn.settings

    def detach(self) -> None:
        """Give the model back as it was; harmless when done twice."""
        for name, original in self._replaced.items():
            vars(self.model).pop(name, None)
            if original is not None:
                vars(self.model)[name] = original
        self._replaced = {}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model alone in this thread, for as long as the context lasts."""
        before = getattr(self._base_only, "here", False)
        self._base_only.here = True
        try:
            yield
        finally:
            self._base_only.here = before

    def sources(self, row: int = 0) -> list[TokenSources]:
        """Where each new token of a row of the last `generate` came from.

        Computed from the finished sequence by one pass of the base model over it: a prediction
        depends on its prefix alone, so this is what was mixed while generating, whichever way.

        Raises:
            NearestError: nothing was generated yet, or the prompt was given as embeddings.
            IndexError: there is no such row.
        """
        if self._generated is None:
            raise NearestError(
                "nothing to name sources of: call model.generate with input_ids first (embeddings "
                "cannot be read again)"
            )
        tokens, prompt_length = self._row(self._generated, row)
        if len(tokens) == prompt_length:
            return []
        inputs = tokens[None, :-1]
        wanted = torch.zeros(inputs.shape, dtype=torch.bool)
        wanted[:, prompt_length - 1 :] = True
        targets = tokens[prompt_length:]
        with self.disabled():
            keys, lm_log_probs = encode_and_score(
                self.model, self._layer, inputs.numpy(), wanted.numpy(), targets.numpy()
            )
        memory, retrieved = self.knn.memory, self.knn.retrieve(keys)
        lam = self.knn.lams(retrieved)
        from_memory = lam * target_probs(retrieved.weights, retrieved.values, targets)
        share = from_memory / (from_memory + (1 - lam) * lm_log_probs.exp())
        spoke = (retrieved.values == targets[:, None]) & (retrieved.weights > 0)
        places = {entry: memory.place(entry) for entry in retrieved.ids[spoke].unique().tolist()}
        numbers = sorted({place.document for place in places.values()})
        documents = {number: memory.document(number) for number in numbers}  # in the file's order
        named = []
        for i, token in enumerate(targets.tolist()):
            weights, order = retrieved.weights[i][spoke[i]].sort(descending=True)
            entries = retrieved.ids[i][spoke[i]][order].tolist()
            sources = [
                Source(
                    entry,
                    places[entry].document,
                    documents[places[entry].document].id,
                    documents[places[entry].document].metadata,
                    places[entry].position,
                    weight,
                )
                for entry, weight in zip(entries, (weights / weights.sum()).tolist(), strict=True)
            ]
            named.append(TokenSources(token, float(share[i].nan_to_num()), sources))
        return named

    @staticmethod
    def _row(generated: _Generated, row: int) -> tuple[Tensor, int]:
        """A row's tokens without padding at either end, and how many of them are the prompt."""
        rows = len(generated.sequences)
        if not 0 <= row < rows:
            raise IndexError(f"row {row} is outside the {rows} generated")
        first = generated.first[row * len(generated.first) // rows]
        new = generated.sequences[row, generated.prompt_length :].tolist()
        stops = [i for i, token in enumerate(new) if token in generated.stops]
        length = stops[0] + 1 if stops else len(new)
        while not stops and length and new[length - 1] == generated.pad:
            length -= 1  # a row ended by something else, such as a stop string, is padded too
        prompt = generated.prompt_length - first
        return generated.sequences[row, first:][: prompt + length].cpu(), prompt

    def _wrap_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)  # generate() reads the signature to decide what to pass
        def forward(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._base_only, "here", False):
                return original(*args, **kwargs)
            named = signature.bind_partial(*args, **kwargs).arguments
            rest = named.pop("kwargs", {})
            tokens = named.get("input_ids")
            shape = (named["inputs_embeds"] if tokens is None else tokens).shape[:2]
            as_tuple = kwargs.pop("return_dict", None) is False
            # Hooks on one module would mix up two threads' keys.
            with self._forward_lock, captured_input(self._layer.module) as seen:
                output = original(*args, return_dict=True, **kwargs)
            keep = named.get("logits_to_keep", 0)
            output.logits = self._mix(self._queries(seen[0], shape, keep), output.logits)
            if named.get("labels") is not None:
                output.loss = self.model.loss_function(
                    logits=output.logits,
                    labels=named["labels"],
                    vocab_size=output.logits.shape[-1],
                    **rest,
                )
            return output.to_tuple() if as_tuple else output

        forward.nearest_session = self  # type: ignore[attr-defined]
        return forward

    def _queries(
        self, hidden: Tensor, shape: torch.Size, keep: int | Tensor
    ) -> Float[Tensor, "q dim"]:
        """Captured states of the positions that get logits, in their order."""
        if self._layer.name == "last_ffn_input":  # the head's own input is cut already
            hidden = slice_logits_to_keep(hidden.reshape(*shape, -1), keep)
        return hidden.reshape(-1, hidden.shape[-1])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _mix(
        self, queries: Float[Tensor, "q dim"], logits: Float[Tensor, "*shape vocab"]
    ) -> Float[Tensor, "*shape vocab"]:
        """Log-probabilities of base and memory together, for every position that has logits."""
        keys = queries.float().cpu()
        lm_log_probs = logits.float().log_softmax(-1)
        mixed = self.knn.log_probs(lm_log_probs.reshape(len(keys), -1), keys)
        return mixed.reshape(logits.shape)

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._generate_lock.acquire(blocking=False):
                raise NearestError(
                    "this attached model is generating already: wait for it, or attach the memory "
                    "to another copy of the model"
                )
            try:
                self._generated = None
                output = original(*args, **kwargs)
                named = signature.bind_partial(*args, **kwargs).arguments
                self._generated = self._remember(output, named | named.pop("kwargs", {}))
                return output
            finally:
                self._generate_lock.release()

        return generate

    def _remember(self, output: Any, named: dict[str, Any]) -> _Generated | None:
        prompt = named.get("inputs") if named.get("input_ids") is None else named["input_ids"]
        sequences = getattr(output, "sequences", output)
        if not isinstance(prompt, Tensor) or not isinstance(sequences, Tensor):
            return None
        stops = _token_ids(self._generation_option(named, "eos_token_id"))
        pad = next(iter(_token_ids(self._generation_option(named, "pad_token_id"))), None)
        mask = named.get("attention_mask")
        if mask is None and pad is not None and pad not in stops:
            mask = prompt != pad  # as generate() infers it
        first = [0] * len(prompt) if mask is None else mask.int().argmax(dim=1).tolist()
        return _Generated(sequences, prompt.shape[1], first, set(stops), pad)

    def _generation_option(self, named: dict[str, Any], name: str) -> Any:
        """What generate() goes by: its argument, else the configuration given, else the model's."""
        if name in named:
            return named[name]
        given = getattr(named.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name) if given is None else given


def _token_ids(value: int | list[int] | Tensor | None) -> list[int]:
    """Zero, one or several token ids, however they were given, as a list."""
    ids: list[int] = torch.as_tensor([] if value is None else value).reshape(-1).tolist()
    return ids
