"""Prepare a text for scoring: its tokens, its windows, and the memory's key layer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from nearest.build.match import common_key_layer, refuse_attached
from nearest.corpus.documents import Document
from nearest.corpus.incoming import token_arrays
from nearest.corpus.text import Text
from nearest.corpus.tokens import Tokens
from nearest.encode.encoder import Encoder, ScoredBatch
from nearest.encode.identity import (
    AnyModel,
    bare_model,
    model_name,
    reads_sources,
    token_rules,
    vocabulary_size,
)
from nearest.encode.layers import find_key_layer
from nearest.encode.view import LmView
from nearest.errors import CorpusError, ModelError, SettingError
from nearest.index.neighbours import NO_ENTRY
from nearest.memory import Memory
from nearest.progress import Progress, no_progress
from nearest.retrieval.ensemble import Memories, memories_of
from nearest.retrieval.queries import Queries, Sources
from nearest.retrieval.settings import Settings

_RUN = 8  # batches' worth of text that is read apart from the rest, at least


@dataclass(frozen=True)
class ScoredBlock:
    """A run of n predictions, document after document and position after position.

    Attributes:
        sequences: number of each prediction's sequence; state goes on within one.
        documents: number of its document in the text, which is the same but for a stream.
        positions: of the token that is predicted, in its document; at least 1.
        queries: hidden states and contexts.
        targets: the tokens that came.
        lm_log_probs: the model's log-probability of each, in nats.
        seconds: of the model's forward passes, and of what is found for it to read.
    """

    sequences: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]
    queries: Queries
    targets: Int[np.ndarray, " n"]
    lm_log_probs: Float[Tensor, " n"]
    seconds: float

    def rows(self, rows: slice) -> "ScoredBlock":
        """A run of its predictions; `seconds` stays that of the whole block."""
        return ScoredBlock(
            self.sequences[rows],
            self.documents[rows],
            self.positions[rows],
            self.queries.rows(rows),
            self.targets[rows],
            self.lm_log_probs[rows],
            self.seconds,
        )


@dataclass(frozen=True)
class Scorer:
    """A text, and the model that reads it with the memory's key layer and windows."""

    text: Text
    encoder: Encoder
    own: Int[np.ndarray, " documents"] | None = None  # entry of each document's start; -1: none

    @classmethod
    def prepare(
        cls,
        model: AnyModel,
        memory: Memories | None,
        documents: "ScoredInput",
        *,
        tokenizer: Any = None,
        window: int | None = None,
        stride: int | None = None,
        score_eos: bool = False,
        force: bool = False,
        batch_size: int | None = None,
        leave_one_out: bool = False,
        stream: bool = False,
    ) -> "Scorer | ReadText":
        """Check that model, memory, tokenizer and text fit together.

        Windows not given are the memory's, so that queries are made as keys were. A tokenizer not
        given is loaded from where the model came from, when there is text to tokenise. With
        `leave_one_out`, a document that stands in the memory too is predicted without the entries
        that are itself. With `stream`, all documents are one sequence.

        Raises:
            NearestError: they do not fit.
        """
        if isinstance(documents, ReadText):
            if stream:
                raise SettingError("the text was read already: give stream to read_text instead")
            documents.check_own(memory, leave_one_out=leave_one_out)
            return documents
        model = bare_model(model)
        refuse_attached(model)
        arrays, texts = token_arrays(documents)
        if score_eos and arrays:
            raise SettingError("score_eos needs text: end the token arrays with EOS yourself")
        if reads_sources(model):
            _check_pairs(arrays, score_eos=score_eos)
        memories, own = memories_of(memory), None
        if arrays:
            text = Text.from_tokens(arrays, vocabulary_size(model))
        else:
            tokenizer = tokenizer or own_tokenizer(model)
            if score_eos and tokenizer.eos_token_id is None:
                raise ModelError("the tokenizer has no EOS token to score: set tokenizer.eos_token")
            text = Text.from_documents(
                texts,
                tokenizer,
                token_rules(
                    model,
                    tokenizer,
                    special_tokens=any(one.manifest.model.special_tokens for one in memories),
                ),
                tokenizer.eos_token_id if score_eos else None,
            )
        encoder = encoder_for(
            model,
            memories,
            tokenizer,
            window=window,
            stride=stride,
            batch_size=batch_size,
            force=force,
        )
        if leave_one_out and memories:
            if len(memories) > 1:
                raise SettingError(
                    "a text's own entries are left out of one memory only: give one, or leave "
                    "leave_one_out out"
                )
            own = memories[0].first_entries(text.own_tokens, text.encoder_tokens)
        if stream:
            text = text.as_stream()
        return cls(text, encoder, own)

    @cached_property
    def runs(self) -> list[range]:
        """Runs of sequences of which nothing is read together with others.

        Each has whole sequences, enough of them for batches with little padding. They depend on the
        text and the batches alone, so that whoever reads a run makes the same of it.
        """
        least = _RUN * self.encoder.batch_size * self.encoder.window
        runs, begun, tokens = [], 0, 0
        for number, sequence in enumerate(self.text.sequences, 1):
            tokens += len(sequence)
            if tokens >= least:
                runs.append(range(begun, number))
                begun, tokens = number, 0
        if begun < len(self.text.sequences):
            runs.append(range(begun, len(self.text.sequences)))
        return runs

    def only(self, run: range) -> "Scorer":
        """A scorer of some documents of a text that is no stream."""
        rows = slice(run.start, run.stop)
        beside = self.text.encoder_tokens
        text = replace(
            self.text,
            documents=self.text.documents[rows],
            ids=self.text.ids[rows],
            encoder_tokens=None if beside is None else beside[rows],
        )
        return Scorer(text, self.encoder, None if self.own is None else self.own[rows])

    def blocks(
        self, progress: Progress, stage: str, with_view: bool = False
    ) -> Iterator[ScoredBlock]:
        """Every prediction of the text exactly once, in its order.

        `with_view` adds to the queries what gates see of the model's predictions.
        """
        done, total = 0, self.text.predictions
        progress(stage, 0, total)
        sequences, beside = self.text.sequences, self.text.encoder_tokens
        for run in self.runs:
            rows = slice(run.start, run.stop)
            own = None if beside is None else beside[rows]
            for group in self.encoder.scores(sequences[rows], with_view, own):
                scored = []
                for batch in group:
                    scored.append(batch)
                    done += len(batch.lm_log_probs)
                    progress(stage, done, total)
                yield self.block(scored, sequences, first=run.start)

    def block(
        self,
        scored: list[ScoredBatch],
        read: Sequence[Tokens],
        seconds: float = 0.0,
        first: int = 0,
    ) -> ScoredBlock:
        """What was scored, in the order of the text.

        `seconds` are added to the passes' own, `first` to the numbers of sequences.
        """
        sequences = np.concatenate([one.batch.documents for one in scored]) + first
        ends = np.concatenate([one.batch.positions for one in scored])
        order = np.lexsort((ends, sequences))
        begun, last = int(sequences.min()), int(sequences.max())
        texts = read[begun : last + 1]
        starts = np.cumsum([0, *map(len, texts)])[:-1]
        sequences, ends = sequences[order], ends[order]
        documents, positions = self.text.places(sequences, ends + 1)
        rows = torch.from_numpy(order)
        own = None
        if self.own is not None:
            at = self.own[documents]
            own = np.where(at < 0, NO_ENTRY, at + positions - 1)
        sources = None
        if self.text.encoder_tokens is not None:  # then a document is a sequence
            sources = Sources(self.text.encoder_tokens[begun : last + 1], sequences - begun)
        return ScoredBlock(
            sequences,
            documents,
            positions,
            Queries(
                torch.cat([one.keys for one in scored])[rows].numpy(),
                texts[0] if len(texts) == 1 else np.concatenate(texts),
                starts[sequences - begun] + ends,
                _joined_views([one.view for one in scored], order),
                own,
                sources,
            ),
            np.concatenate([one.batch.targets for one in scored])[order],
            torch.cat([one.lm_log_probs for one in scored])[rows],
            seconds + sum(one.seconds for one in scored),
        )


def encoder_for(
    model: PreTrainedModel,
    memories: Sequence[Memory],
    tokenizer: Any = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    force: bool = False,
) -> Encoder:
    """What makes queries for memories; windows not given are theirs.

    Raises:
        NearestError: the model does not fit one of them, or windows or batches are none.
    """
    if not memories:
        layer = find_key_layer(model, "last_hidden")
    else:
        layer = common_key_layer(memories, model, tokenizer, force=force)
        keyed = [one.manifest.keys for one in memories if one.manifest.keys is not None]
        if keyed and window is None and stride is None:
            window, stride = keyed[0].window, keyed[0].stride
    return Encoder.of(model, layer, window, stride, batch_size)


def _joined_views(views: Sequence[LmView | None], order: Int[np.ndarray, " n"]) -> LmView | None:
    some = [view for view in views if view is not None]
    if not some:
        return None
    return LmView(*(np.concatenate(parts)[order] for parts in zip(*some, strict=True)))


@dataclass(frozen=True)
class ReadText:
    """A text that a model has read, kept in memory so that it is read but once.

    `evaluate` and `tune` take it in the place of documents; windows are those it was read with. A
    text that was read with passages before it (`passages`) is for methods with these alone.
    """

    text: Text
    read: tuple[ScoredBlock, ...]
    own: Int[np.ndarray, " documents"] | None = None
    passages: Settings | None = None
    own_of: Path | None = None  # the memory whose entries `own` numbers

    def check_own(self, memory: Memories | None, *, leave_one_out: bool) -> None:
        """Refuse a memory of which other entries would be left out (SettingError)."""
        if leave_one_out and self.own is None:
            raise SettingError(
                "the text was read already, with its own entries: give leave_one_out to read_text "
                "instead"
            )
        if self.own is not None and any(one.path != self.own_of for one in memories_of(memory)):
            raise SettingError(
                f"the text was read without its own entries in {self.own_of}, which are no others' "
                "own: give this memory alone, or read the text anew"
            )

    def blocks(
        self, progress: Progress, stage: str, with_view: bool = False
    ) -> Iterator[ScoredBlock]:
        """The blocks that were read; they hold the gates' views in any case."""
        done = 0
        for block in self.read:
            yield block
            done += len(block.targets)
            progress(stage, done, self.text.predictions)


# Documents as `Memory.build` takes them, sequences of token ids, or what a model has read of such.
ScoredInput = (
    Iterable[Document | str | Mapping[str, Any] | Tokens | Sequence[int] | Tensor] | Path | ReadText
)


def read_text(
    model: AnyModel,
    memory: Memories | None,
    documents: ScoredInput,
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> ReadText:
    """Let a model read a text, for several calls of `evaluate` and `tune`.

    Args:
        model, memory, documents: as in `evaluate`; the memory decides about key layer and windows.
        progress: told (stage, done, total).
        **options: tokenizer, window, stride, score_eos, batch_size, force, leave_one_out, stream,
            as in `evaluate`.

    Raises:
        NearestError: they do not fit.
    """
    scorer = Scorer.prepare(model, memory, documents, **options)
    blocks = tuple(scorer.blocks(progress, "read", with_view=True))
    own_of = None if scorer.own is None else memories_of(memory)[0].path
    return ReadText(scorer.text, blocks, scorer.own, own_of=own_of)


def _check_pairs(arrays: Sequence[Tokens], *, score_eos: bool) -> None:
    """Refuse what an encoder–decoder cannot score (SettingError, CorpusError)."""
    if arrays:
        raise CorpusError(
            "an encoder–decoder reads an encoder text for each text, and arrays of token ids have "
            "none: give documents with 'encoder_text' and 'text'"
        )
    if score_eos:
        raise SettingError(
            "the texts of an encoder–decoder end with EOS, as in training, and their ends are "
            "always scored: leave score_eos out"
        )


def own_tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer where a model came from (ModelError where there is none)."""
    try:
        return AutoTokenizer.from_pretrained(model_name(model))
    except (OSError, ValueError) as error:
        raise ModelError(
            "text needs a tokenizer, and none is where the model came from: pass tokenizer=…"
        ) from error
