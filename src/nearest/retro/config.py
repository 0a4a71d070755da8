"""What a RETRO model is made of: every point in which the published implementations differ."""

from dataclasses import field
from typing import Any, no_type_check

import msgspec
from transformers import PreTrainedConfig

from nearest.errors import SettingError
from nearest.retro.presets import PRESETS

CHOICES: dict[str, tuple[str, ...]] = {
    "encoder": ("own", "base"),
    "norm": ("rms", "rms_clamped", "layer"),
    "feed_forward": ("geglu", "mlp"),
    "activation": ("gelu_tanh", "gelu"),
    "positions": ("buckets", "rotary"),
    "bucket_spacing": ("linear", "log"),
    "cca_buckets": ("concat", "shared"),
    "cca_rotary": ("aligned", "public"),
    "chunk_count": ("ceil", "floor"),
}


@no_type_check  # its base class makes __init__ take more than the fields
class RetroConfig(PreTrainedConfig):
    """Settings of a RETRO model; the defaults are the published model of `norlund`.

    Args:
        chunk_size: m, tokens of a chunk; the neighbours of a chunk act from its last token on.
        document_start_id: token that each document of the training text began with, and prompts
            begin with; None where they begin with their text.
        decoder_dim, decoder_layers, decoder_heads, decoder_attention_dim, decoder_ffn_dim: sizes;
            the attention dim is that of all heads together.
        cca_layers: decoder layers with chunked cross-attention, counted from 0. The encoder reads
            the hidden states of the first of them, after its self-attention.
        encoder: of neighbours. "own" layers read them in both directions and in the light of their
            chunk; "base" is the frozen model that a RETROfit was made of, which has no others.
        encoder_dim, encoder_layers, encoder_heads, encoder_attention_dim, encoder_ffn_dim: sizes.
        encoder_cross_layers: encoder layers that attend to the chunk being answered, from 0.
        memorizing_layers: decoder layers whose self-attention also reads a `memory` of the segments
            before, where it is given, through a learned gate a head (arXiv:2203.08913), from 0.
        memorizing_k: pairs that each query attends to in each head; None for all.
        memorizing_capacity: pairs that each row remembers, the latest.
        memorizing_initial_gate: of every head, in (0, 1).
        norm: "rms" x/(rms + 1e-8), "rms_clamped" x/max(rms, 1e-8), or "layer".
        gated_norm: also multiply by σ(x·w); of RMS norms.
        deepnet: norms after the residual sums, which are weighted, and initial weights by depth
            (arXiv:2203.00555); take norm="layer" with it.
        scale_scores: multiply attention scores by head_dim^-½.
        feed_forward: "geglu" (arXiv:2002.05202) or "mlp". activation: GELU by tanh or exact.
        bias: biases in feed-forward and attention outputs.
        positions: "buckets", a learned bias of the scores for each layer and relative position, or
            "rotary" (arXiv:2104.09864) on the first `rotary_dim` dims of a head.
        bucket_spacing: "linear" clamps distances; "log" spaces the far half logarithmically up to
            `bucket_max_distance` (arXiv:1910.10683).
        decoder_buckets, cca_bucket_count, encoder_buckets, encoder_cross_buckets: buckets in
            self-attention, chunked cross-attention, the encoder's self- and cross-attention.
        cca_buckets: "concat" counts positions through a chunk's neighbours one after another;
            "shared" gives each neighbour the same ones, d = i − i' + m − 1 (the paper).
        cca_rotary: "aligned" places row i of a chunk's queries at i + m − 1; "public" at 2m − 2 for
            row 0 and 0 for the others, as the weights of retro-pytorch were trained.
        absolute_positions: add learned embeddings of up to `max_position_embeddings` positions.
        share_embeddings: the encoder's table is the decoder's, of encoder_dim columns, with a
            projection to the decoder where the dims differ.
        embedding_std: initial standard deviation of the decoder's table.
        head_bias, tie_word_embeddings: of the output head.
        project_encoder_output: norm and projection to decoder_dim after the encoder.
        zero_init_retrieval: the output projections of chunked cross-attention, and of the encoder's
            layers, begin at zero: until they learn, neighbours change nothing (but for the norms
            that DeepNet has after each sum).
        null_neighbour: a learned key and value that chunked cross-attention always sees; without
            it, a chunk whose neighbours are all padding adds exactly nothing.
        mask_encoder_context: hide padding of the chunk from the encoder's cross-attention.
        mask_input_pads: where no attention_mask is given, hide pad_token_id in the input.
        masked_score: added to the score of padding; None for half the least number of the dtype.
        chunk_count: neighbours are given for ceil or floor of length / m chunks; those of an
            unfinished chunk are never read.
        pad_token_id: padding in neighbours, besides −1, which alone is padding where it is −1: of a
            model that was made without such a token and is fitted.
        shift_labels: labels are shifted here, as in transformers; False: the data set did it.
        ignore_pad_labels: labels equal to pad_token_id do not count, besides −100.
        attention_dropout, residual_dropout, feed_forward_dropout: of attention weights, of what
            is added to the residual stream, and inside the feed-forward.

    Raises:
        SettingError: a setting is unknown or does not fit another.
    """

    model_type = "nearest-retro"
    keys_to_ignore_at_inference = ("past_key_values", "memory")
    attribute_map = {  # noqa: RUF012 - as in transformers
        "hidden_size": "decoder_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_heads",
    }

    vocab_size: int = 32_128
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    chunk_size: int = 64
    document_start_id: int | None = None
    use_cache: bool = True

    decoder_dim: int = 1536
    decoder_layers: int = 12
    decoder_heads: int = 12
    decoder_attention_dim: int = 1536
    decoder_ffn_dim: int = 6144
    cca_layers: list[int] = field(default_factory=lambda: [5, 8, 11])

    encoder: str = "own"
    encoder_dim: int = 896
    encoder_layers: int = 2
    encoder_heads: int = 14
    encoder_attention_dim: int = 896
    encoder_ffn_dim: int = 3584
    encoder_cross_layers: list[int] = field(default_factory=lambda: [1])

    memorizing_layers: list[int] = field(default_factory=list)
    memorizing_k: int | None = 32
    memorizing_capacity: int = 8192
    memorizing_initial_gate: float = 0.5

    norm: str = "rms"
    gated_norm: bool = False
    deepnet: bool = False
    scale_scores: bool = False
    feed_forward: str = "geglu"
    activation: str = "gelu_tanh"
    bias: bool = False

    positions: str = "buckets"
    bucket_spacing: str = "linear"
    bucket_max_distance: int = 128
    decoder_buckets: int = 1024
    cca_bucket_count: int = 192
    encoder_buckets: int = 256
    encoder_cross_buckets: int = 192
    cca_buckets: str = "concat"
    rotary_dim: int = 32
    cca_rotary: str = "aligned"
    absolute_positions: bool = False
    max_position_embeddings: int = 2048

    share_embeddings: bool = False
    embedding_std: float = 0.02
    head_bias: bool = False
    tie_word_embeddings: bool = False

    project_encoder_output: bool = False
    zero_init_retrieval: bool = False
    null_neighbour: bool = False
    mask_encoder_context: bool = True
    mask_input_pads: bool = True
    masked_score: float | None = -10_000.0
    chunk_count: str = "ceil"

    shift_labels: bool = True
    ignore_pad_labels: bool = False
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    feed_forward_dropout: float = 0.1

    @classmethod
    def preset(cls, name: str, **settings: Any) -> "RetroConfig":
        """Settings of `norlund`, `retro-pytorch` or `paper`, with changes.

        Raises:
            SettingError: no such preset, or a setting is unknown.
        """
        if name not in PRESETS:
            raise SettingError(f"preset {name!r} is unknown: choose among {', '.join(PRESETS)}")
        if unknown := sorted(set(settings) - set(cls.__dataclass_fields__)):
            raise SettingError(f"{unknown[0]!r} is no setting of a RETRO model: see RetroConfig")
        return cls(**{**PRESETS[name], **settings})

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_types()
        self.cca_layers = sorted(self.cca_layers)
        self.encoder_cross_layers = sorted(self.encoder_cross_layers)
        self.memorizing_layers = sorted(self.memorizing_layers)
        self._check()
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def encoder_head_dim(self) -> int:
        """Dims of one of the encoder's heads."""
        return self.encoder_attention_dim // self.encoder_heads

    @property
    def decoder_head_dim(self) -> int:
        """Dims of one of the decoder's heads."""
        return self.decoder_attention_dim // self.decoder_heads

    @property
    def input_dim(self) -> int:
        """Columns of the decoder's embedding table."""
        return self.encoder_dim if self.share_embeddings else self.decoder_dim

    @property
    def encoder_output_dim(self) -> int:
        """Dims of what chunked cross-attention attends to."""
        as_wide = self.project_encoder_output or self.encoder == "base"
        return self.decoder_dim if as_wide else self.encoder_dim

    def chunks(self, length: int) -> int:
        """How many chunks' neighbours an input of so many tokens comes with."""
        whole, rest = divmod(length, self.chunk_size)
        return whole + (rest > 0 and self.chunk_count == "ceil")

    def _check_types(self) -> None:
        for name, wanted in RetroConfig.__annotations__.items():
            value = getattr(self, name)
            try:
                msgspec.convert(value, wanted)
            except msgspec.ValidationError as error:
                example = ", as [1]" if wanted == list[int] else ""
                raise SettingError(
                    f"{name} is {value!r}: {str(error).lower().replace('array', 'list')}{example}"
                ) from error

    def _check(self) -> None:
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise SettingError(
                    f"{name} {getattr(self, name)!r} is unknown: choose {' or '.join(values)}"
                )
        if self.gated_norm and self.norm == "layer":
            raise SettingError("gated_norm gates RMS norms: take norm 'rms' or 'rms_clamped'")
        if self.chunk_size < 2:
            raise SettingError(f"chunk_size must be at least 2, got {self.chunk_size}")
        if not -1 <= self.pad_token_id < self.vocab_size:
            raise SettingError(
                f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}: "
                "neighbours are padded with it"
            )
        for side in ("encoder", "decoder"):
            dim, heads = getattr(self, f"{side}_attention_dim"), getattr(self, f"{side}_heads")
            if heads < 1 or dim % heads:
                raise SettingError(
                    f"{side}_attention_dim {dim} is not divisible by {side}_heads {heads}"
                )
            if self.positions == "rotary" and (
                self.rotary_dim % 2 or not 0 < self.rotary_dim <= dim // heads
            ):
                raise SettingError(
                    f"rotary_dim {self.rotary_dim} must be even and at most a head's {dim // heads}"
                )
        for name, layers, depth in (
            ("cca_layers", self.cca_layers, self.decoder_layers),
            ("encoder_cross_layers", self.encoder_cross_layers, self.encoder_layers),
            ("memorizing_layers", self.memorizing_layers, self.decoder_layers),
        ):
            if len(set(layers)) < len(layers) or any(not 0 <= i < depth for i in layers):
                raise SettingError(
                    f"{name} {layers} must be different layers, counted from 0, of {depth}"
                )
        if self.positions == "buckets":
            self._check_buckets()
        if self.tie_word_embeddings and self.input_dim != self.decoder_dim:
            raise SettingError(
                f"the head cannot be tied to a table of {self.input_dim} columns when the decoder "
                f"has {self.decoder_dim} dims: make them equal, or untie it"
            )

    def _check_buckets(self) -> None:
        """A logarithmic far half needs a near one before it, in each direction that is read."""
        for name, parts in (
            ("decoder_buckets", 2),
            ("cca_bucket_count", 4),
            ("encoder_buckets", 4),
            ("encoder_cross_buckets", 4),
        ):
            count, log = getattr(self, name), self.bucket_spacing == "log"
            least = parts if log else 1
            if count < least:
                raise SettingError(
                    f"{name} must be at least {least}, got {count}: each direction needs a bucket "
                    "for near keys, and with log spacing one for far ones"
                )
            if log and self.bucket_max_distance <= count // parts:
                raise SettingError(
                    f"bucket_max_distance {self.bucket_max_distance} must exceed {count // parts}: "
                    f"with {name} {count}, so many distances have a bucket each"
                )
