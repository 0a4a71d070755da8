"""RETROfit: neighbours for a language model that was trained without (arXiv:2112.04426, §4.2)."""

import copy
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from nearest.encode.fingerprint import model_fingerprint
from nearest.encode.identity import model_name, vocabulary_size
from nearest.encode.layers import blocks_of
from nearest.errors import FolderError, ModelError, SettingError
from nearest.folder import disk_errors_explained, write_atomically
from nearest.retro.base_encoder import NextTokenAttention, read_as_texts
from nearest.retro.blocks import Residual
from nearest.retro.cache import RetroCache
from nearest.retro.chunked import ChunkedCrossAttention, Encoded
from nearest.retro.config import RetroConfig
from nearest.retro.encoder import Encoder
from nearest.retro.generation import RetroGenerationMixin
from nearest.retro.layout import ChunkLayout
from nearest.retro.reading import (
    Encode,
    NeighbourReader,
    check_call,
    chunks_seen,
    encoding,
    layout_of,
    no_padding,
)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_OF_THE_BASE = {
    *("vocab_size", "bos_token_id", "eos_token_id", "use_cache", "cca_layers", "deepnet"),
    *("decoder_dim", "decoder_layers", "decoder_heads", "decoder_attention_dim"),
    *("decoder_ffn_dim", "decoder_buckets", "absolute_positions", "max_position_embeddings"),
    *("memorizing_layers", "memorizing_k", "memorizing_capacity", "memorizing_initial_gate"),
    *("share_embeddings", "embedding_std", "head_bias", "tie_word_embeddings"),
    "zero_init_retrieval",
    *("mask_input_pads", "shift_labels", "ignore_pad_labels"),
}  # settings of RetroConfig without effect on an adapter
_OF_ITS_ENCODER = {
    *("encoder_dim", "encoder_layers", "encoder_heads", "encoder_attention_dim"),
    *("encoder_ffn_dim", "encoder_cross_layers", "encoder_buckets", "encoder_cross_buckets"),
    *("feed_forward", "activation", "feed_forward_dropout"),
    *("project_encoder_output", "mask_encoder_context"),
}  # and without effect where the base is the encoder


class Adapter(nn.Module):
    """What a retrofit adds to a model."""

    def __init__(self, config: RetroConfig, embedding_dim: int) -> None:
        super().__init__()
        own = config.encoder == "own"
        dim = config.encoder_dim if own else config.decoder_dim
        self.embed: nn.Module = nn.Identity()
        if own or embedding_dim != dim:
            self.embed = nn.Linear(embedding_dim, dim)
        self.encoder = Encoder(config) if own else None
        self.layers = nn.ModuleDict()
        for number in config.cca_layers:
            layer = (ChunkedCrossAttention if own else NextTokenAttention)(config, number)
            for weight in layer.out.parameters():  # training starts from the base's predictions
                nn.init.zeros_(weight)
            self.layers[str(number)] = Residual(config, "decoder", layer)


class RetrofitForCausalLM(RetroGenerationMixin, PreTrainedModel):
    """A frozen language model with new layers that attend to neighbours; see `retrofit`.

    It predicts, generates and is trained like `RetroForCausalLM`; only the new weights have
    gradients, and only they are saved. Without neighbours it is the model it was made of.
    """

    supports_gradient_checkpointing = True

    def __init__(self, base: PreTrainedModel, retro_config: RetroConfig) -> None:
        config = copy.deepcopy(base.config)
        config._attn_implementation_internal = "eager"  # of this wrapper: the base keeps its own
        super().__init__(config)
        self.generation_config = base.generation_config
        self.retro_config = retro_config
        self.base = base.requires_grad_(False).eval()
        self._blocks = list(blocks_of(base))  # no module list, which would name them a second time
        own = set(inspect.signature(base.forward).parameters)
        self._known = own | TransformersKwargs.__optional_keys__ | {"return_dict"}
        table = cast(nn.Embedding, base.get_input_embeddings())
        adapter = Adapter(retro_config, table.embedding_dim)
        self.adapter = adapter.to(base.device, base.dtype)
        self.train(False)

    def train(self, mode: bool = True) -> "RetrofitForCausalLM":
        """Training is of the new layers: the base keeps its evaluation mode, without dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_output_embeddings()

    def forward(
        self,
        input_ids: Int[Tensor, "batch n"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        neighbour_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's output, with neighbours where they are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, use_cache: as the base's.
            neighbour_ids: as in `RetroForCausalLM.forward`; None: the base alone.
            **kwargs: labels, logits_to_keep and whatever else the base knows.

        Raises:
            SettingError: shapes, dtypes or ids that do not fit.
        """
        if unknown := set(kwargs) - self._known:
            raise SettingError(f"forward knows no argument {sorted(unknown)[0]!r}: leave it out")
        if use_cache is None:
            use_cache = bool(self.base.config.use_cache) and not self.training
        if past_key_values is None and use_cache and neighbour_ids is not None:
            past_key_values = RetroCache(self.base.config)
        inputs = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **({} if position_ids is None else {"position_ids": position_ids}),
            **kwargs,
        }
        if neighbour_ids is None:
            return self.base(input_ids, **inputs)
        config = self.retro_config
        layout = layout_of(config, input_ids, attention_mask, past_key_values)
        check_call(config, layout, neighbour_ids, past_key_values)
        mask = None if attention_mask is None else attention_mask.bool()
        read = NeighbourReader(
            config,
            self._encoding(layout, neighbour_ids),
            layout,
            neighbour_ids,
            chunks_seen(mask, layout),
            past_key_values.chunk if isinstance(past_key_values, RetroCache) else None,
        )
        repeated = self.training and self.is_activation_checkpointing and past_key_values is None
        with self._attending(read), _checkpointed(self._blocks if repeated else []):
            return self.base(input_ids, **inputs)

    def _encoding(self, layout: ChunkLayout, ids: Tensor) -> Encode:
        """How neighbours are read: by the base here and now, before it reads what they are for."""
        config = self.retro_config
        if self.adapter.encoder is not None:
            return encoding(config, self.adapter.encoder, self._embed)
        encoded = None
        if layout.chunks:
            blocks = {number: self._blocks[number] for number in config.cca_layers}
            ids = ids[:, : layout.chunks]
            encoded = read_as_texts(self.base, blocks, self._embed, ids, no_padding(config, ids))
        return lambda *_: cast(Encoded, encoded)  # asked for where a chunk ends

    def _embed(self, ids: Tensor) -> Tensor:
        return self.adapter.embed(self.get_input_embeddings()(ids))

    @contextmanager
    def _attending(self, read: NeighbourReader) -> Iterator[None]:
        """Send what leaves the chosen layers of the base through the new ones."""
        handles = [
            self._blocks[int(number)].register_forward_hook(_after(layer, read))
            for number, layer in self.adapter.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the new weights and their settings to a folder, which `load_retrofit` reads.

        Args:
            save_directory: made where it is missing; an adapter in it is replaced.
            state_dict: weights of this whole model to write instead of its own.

        Raises:
            FolderError: the disk is full or the folder cannot be written.
        """
        folder = Path(save_directory)
        state = self.state_dict() if state_dict is None else state_dict
        weights = {
            name.removeprefix("adapter."): weight.detach().cpu().contiguous()
            for name, weight in state.items()
            if name.startswith("adapter.")
        }
        data = safetensors.torch.save(weights)
        config = {
            "format": 1,
            "retro": self.retro_config.to_diff_dict(),
            "base": {"name": model_name(self.base), "fingerprint": model_fingerprint(self.base)},
            "weights_sha256": hashlib.sha256(data).hexdigest(),
        }
        with disk_errors_explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / ADAPTER_WEIGHTS, data)
            write_atomically(folder / ADAPTER_CONFIG, json.dumps(config, indent=1).encode())


def retrofit(
    model: PreTrainedModel, layers: Sequence[int] | None = None, **settings: Any
) -> RetrofitForCausalLM:
    """Give a Hugging Face decoder layers that attend to neighbours.

    The model's own weights are frozen. The new layers add nothing at first: training starts from
    its predictions. It reads the neighbours itself (`base_encoder`), or an encoder of its own does.

    Args:
        model: any causal language model.
        layers: the new ones come after these, counted from 0; by default every third from the
            sixth on, as in the paper.
        **settings: of the encoder, of positions and of chunks, as in `RetroConfig`, whose `paper`
            preset holds but for two: `encoder` is "base", and one of its "own" has half the model's
            dims. Settings of the decoder, its embeddings, head and loss have no effect here and are
            refused; so are those of an encoder's layers where the model itself reads neighbours.

    Raises:
        ModelError: the model is not a decoder, or has been retrofitted.
        SettingError: a setting or a layer does not fit.
    """
    if isinstance(model, RetrofitForCausalLM):
        raise ModelError("this model is retrofitted already: pass the one it was made of, .base")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} is an encoder–decoder: load a causal model")
    if unused := sorted(set(settings) & _OF_THE_BASE):
        raise SettingError(
            f"{unused[0]} is of the model itself, which a retrofit leaves as it is: leave it out"
        )
    text = model.config.get_text_config()
    dim, heads, depth = text.hidden_size, text.num_attention_heads, len(blocks_of(model))
    if layers is None:
        layers = range(5, depth, 3)
    if not layers:
        raise SettingError(f"a model of {depth} layers has no sixth: name layers, such as [0]")
    encoder = settings.setdefault("encoder", "base")
    if encoder == "base" and (unused := sorted(set(settings) & _OF_ITS_ENCODER)):
        raise SettingError(
            f"{unused[0]} is of an encoder of its own, and the model itself reads the neighbours: "
            "leave it out, or give encoder='own' too"
        )
    half = max(dim // 2 // heads, 2) // 2 * 2 * heads
    config = RetroConfig.preset(
        "paper",
        **{
            "encoder_dim": half,
            "encoder_heads": heads,
            "encoder_attention_dim": half,
            "encoder_ffn_dim": 4 * half,
            "pad_token_id": -1 if text.pad_token_id is None else text.pad_token_id,
            "vocab_size": vocabulary_size(model),
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "decoder_dim": dim,
            "decoder_layers": depth,
            "decoder_heads": heads,
            "decoder_attention_dim": heads * (dim // heads),
            "cca_layers": list(layers),
            **settings,
        },
    )
    return RetrofitForCausalLM(model, config)


def load_retrofit(
    model: PreTrainedModel, folder: Path | str, *, force: bool = False
) -> RetrofitForCausalLM:
    """The new layers of a folder on the model that they were trained with.

    Raises:
        FolderError: the folder is missing, damaged or of a newer format.
        ModelError: the model has other weights (`force` accepts it).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        data = (folder / ADAPTER_WEIGHTS).read_bytes()
        whole = config["weights_sha256"] == hashlib.sha256(data).hexdigest()
        version, base, retro = config["format"], config["base"], dict(config["retro"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(
            f"{folder} holds no adapter that can be read ({error}): give a folder that "
            "save_pretrained of a retrofitted model wrote"
        ) from error
    if version != 1:
        raise FolderError(f"{folder} has the format {version}, newer than this program: update it")
    if not whole:
        raise FolderError(
            f"{folder} is damaged: {ADAPTER_WEIGHTS} is not the file {ADAPTER_CONFIG} tells of"
        )
    if not force and base["fingerprint"] != model_fingerprint(model):
        raise ModelError(
            f"{folder} was trained on {base['name'] or 'another model'}, whose weights this model "
            "does not have: load that one, or pass force=True and expect other predictions"
        )
    fitted = RetrofitForCausalLM(model, RetroConfig.from_dict(retro))
    try:
        fitted.adapter.load_state_dict(safetensors.torch.load(data))
    except RuntimeError as error:
        raise FolderError(
            f"{folder} does not fit this model ({str(error).splitlines()[-1].strip()}): give the "
            "model it was trained on, and its settings as they were written"
        ) from error
    return fitted


@contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Compute blocks a second time for their gradients; transformers does so in training alone."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:  # another had put its own there
                block.forward = forward


def _after(layer: nn.Module, read: NeighbourReader) -> Callable[..., Any]:
    """A hook that adds what a layer finds in the neighbours; blocks return states, or a tuple."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (layer(output[0], read(output[0])), *output[1:])
        return layer(output, read(output))

    return hook
