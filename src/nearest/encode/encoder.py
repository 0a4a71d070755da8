"""A model made ready to read documents: where its keys are, and how long texts are cut for it."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from nearest.corpus.batches import WindowBatch, batch_windows, check_batch_size, grouped_batches
from nearest.corpus.tokens import Tokens
from nearest.corpus.windows import choose_windows
from nearest.encode.forward import encode_and_score, encode_keys
from nearest.encode.identity import max_positions, vocabulary_size
from nearest.encode.layers import KeyLayer, LanguageModel
from nearest.encode.view import LmView

_LOGITS_BYTES = 1 << 29
_GROUP_BYTES = 1 << 27  # of the keys of a group, that are looked up together
# On a CPU larger batches are no quicker, and often slower (benchmarks/batch_size.py).
_BATCH_TOKENS_CPU = 2_048
_BATCH_TOKENS_GPU = 8_192


@dataclass(frozen=True)
class ScoredBatch:
    """A batch of windows with what the model makes of its n predictions."""

    batch: WindowBatch
    keys: Float[Tensor, "n dim"]
    lm_log_probs: Float[Tensor, " n"]
    view: LmView | None
    seconds: float


@dataclass(frozen=True)
class Encoder:
    """Reads documents window by window; every token but the first of each is predicted once.

    Where the model is an encoder–decoder, `encoder_tokens` are what its encoder reads for each
    document.
    """

    model: LanguageModel
    layer: KeyLayer
    window: int
    stride: int
    batch_size: int

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        layer: KeyLayer,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int | None = None,
    ) -> "Encoder":
        """Fill in what is not given: windows by the model's positions, a batch by its device.

        Raises:
            SettingError: windows lose tokens or exceed the model's positions, or a batch is empty.
        """
        check_batch_size(batch_size)
        window, stride = choose_windows(window, stride, max_positions(model))
        if batch_size is None:  # such that the logits of a batch stay within half a gigabyte
            quick = _BATCH_TOKENS_CPU if model.device.type == "cpu" else _BATCH_TOKENS_GPU
            tokens = min(quick, _LOGITS_BYTES // (4 * vocabulary_size(model)))
            batch_size = max(1, tokens // window)
        return cls(model, layer, window, stride, batch_size)

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model accepts and predicts."""
        return vocabulary_size(self.model)

    def keys(
        self, documents: Iterable[Tokens], encoder_tokens: Iterable[Tokens] | None = None
    ) -> Iterator[tuple[WindowBatch, Float[Tensor, "n dim"]]]:
        """The key of every position that predicts, without what the model does above it."""
        for batch in self.batches(documents, encoder_tokens):
            yield batch, self.encode(batch)

    def batches(
        self, documents: Iterable[Tokens], encoder_tokens: Iterable[Tokens] | None = None
    ) -> Iterator[WindowBatch]:
        """What the model reads at once: always the same for the same documents."""
        return batch_windows(documents, self.window, self.stride, self.batch_size, encoder_tokens)

    def encode(self, batch: WindowBatch) -> Float[Tensor, "n dim"]:
        """The keys of one batch."""
        return encode_keys(
            self.model, self.layer, batch.inputs, batch.predicts, batch.encoder_inputs
        )

    def scores(
        self,
        documents: Iterable[Tokens],
        with_view: bool = False,
        encoder_tokens: Iterable[Tokens] | None = None,
    ) -> Iterator[Iterator[ScoredBatch]]:
        """The key of every prediction and the model's log-probability of it, timed.

        Batches come in groups: the predictions of a group follow those of the one before.
        """
        together = max(1, _GROUP_BYTES // (4 * self.layer.dim * self.window * self.batch_size))
        for group in grouped_batches(
            documents, self.window, self.stride, self.batch_size, encoder_tokens, together
        ):
            yield (self.score(batch, with_view) for batch in group)

    def score(self, batch: WindowBatch, with_view: bool = False) -> ScoredBatch:
        """The keys and log-probabilities of one batch, timed."""
        started = time.perf_counter()
        keys, log_probs, view = encode_and_score(
            self.model,
            self.layer,
            batch.inputs,
            batch.predicts,
            batch.targets,
            with_view,
            batch.encoder_inputs,
        )
        return ScoredBatch(batch, keys, log_probs, view, time.perf_counter() - started)
