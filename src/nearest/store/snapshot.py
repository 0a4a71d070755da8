"""A state of a memory folder, opened for reading; a writer that replaces it does not disturb it.

An entry is a position of the corpus. Its key is the model's hidden state there, its value the next
token of the same document, so values and provenance need no arrays of their own. Entry ids are
int64 and count through all segments; positions of removed documents are counted, too.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.corpus.documents import Document
from nearest.corpus.tokens import Tokens
from nearest.errors import SettingError
from nearest.index.clusters import Clusters
from nearest.index.keys import JoinedKeys, Keys
from nearest.index.matches import Matches, TokenRun, longest_matches, match_lengths, values_of
from nearest.index.neighbours import NO_ENTRY
from nearest.index.ngrams import (
    Ngrams,
    NgramSamples,
    equal_documents,
    ngram_samples,
    ngrams,
    spans_stand,
)
from nearest.index.suffix import SuffixArray
from nearest.store.encoder_texts import EncoderTexts
from nearest.store.manifest import KeysRecord, Manifest
from nearest.store.pairs import equal_pairs
from nearest.store.segment import Segment, no_keys
from nearest.store.shard import Shard, document_bounds, entry_bounds
from nearest.store.tuned import Changed, SettingsFrom, changed_since_tuning, settings_from


class Place(NamedTuple):
    """Where an entry stands: its document's number in the memory, and the position in it."""

    document: int
    position: int


class Snapshot:
    """The segments of a memory, or of one shard of it, as one manifest describes them.

    A shard has the ids and numbers of the whole memory, and finds what is in its segments.
    """

    def __init__(
        self, path: Path, manifest: Manifest, segments: list[Segment], shard: Shard | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.segments = segments
        self.shard = shard
        self._own = manifest.segments_of(shard)
        records = list(manifest.segments)
        records[self._own.start : self._own.stop] = [segment.record for segment in segments]
        self.bounds = entry_bounds(records)
        self._first_document = document_bounds(records)

    def settings(self, method: str) -> dict[str, Any]:
        """The settings that `tune` stored for a method; empty if it was not tuned."""
        return dict(self.manifest.settings.get(method, {}))

    def settings_from(self, method: str) -> SettingsFrom:
        """Where the settings of a method come from: "tuned", "self-tuned" or "defaults"."""
        return settings_from(self.manifest, method)

    def changed_since_tuning(self, method: str) -> dict[Changed, str]:
        """What has changed since a method was tuned, "keys" or "documents", and how.

        Where keys or indexes were rewritten (`compress`, `reindex`), distances mean something else,
        and a gate trained on them is refused. Empty if nothing has changed, or nothing was tuned.
        """
        return changed_since_tuning(self.manifest, method)

    def __repr__(self) -> str:
        keys = self.manifest.keys
        form = "no keys" if keys is None else f"{keys.format} keys"
        return (
            f"<{type(self).__name__} {str(self.path)!r}: {self.documents:,} documents, "
            f"{self.entries:,} entries, {form}>"
        )

    def __len__(self) -> int:
        """Number of entries."""
        return self.entries

    # --- numbers ----------------------------------------------------------------------------------

    @property
    def entries(self) -> int:
        """Number of entries: tokens that have a successor in their document."""
        return sum(segment.entry_count for segment in self.segments)

    @property
    def tokens(self) -> int:
        """Number of tokens, each document's context token included."""
        return self.entries + self.documents

    @property
    def positions(self) -> int:
        """Entry ids are below this; positions of removed documents are counted too."""
        return int(self.bounds[-1])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self._first_document[-1])

    # --- entries ----------------------------------------------------------------------------------

    def _located(self) -> Iterator[tuple[Segment, int]]:
        """Each segment, with its first entry id."""
        return zip(self.segments, self.bounds[self._own].tolist(), strict=True)

    def valued_entries(self) -> Int[np.ndarray, " m"]:
        """The ids of all entries that have a value, ascending."""
        return np.concatenate([segment.entries + first for segment, first in self._located()])

    def keyed_entries(self) -> Int[np.ndarray, " m"]:
        """The ids of all entries that have a key, ascending.

        All have one, except those merged into an entry whose document was removed since.
        """
        return np.concatenate([segment.keyed + first for segment, first in self._located()])

    def values(self, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The token that follows each entry (int64); -1 for id -1."""
        return values_of(self._runs, ids)

    def successors(self, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The entry after each one; -1 for id -1 and where the next position has no value."""
        after = np.where(ids < 0, NO_ENTRY, ids + 1)
        for segment, first in self._located():
            own = (after >= first) & (after < first + segment.record.tokens)
            local = after[own] - first
            ends = segment.offsets[np.searchsorted(segment.offsets, local, side="right")] - 1
            after[own] = np.where(local == ends, NO_ENTRY, after[own])
        return after

    @property
    def has_weights(self) -> bool:
        """Whether some entries stand for others that were merged into them."""
        return any(segment.merged is not None for segment in self.segments)

    def log_weights(self, ids: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Log of the number of entries that each stands for (float32), to be added to −d/T.

        0 unless entries have been merged (`nearest compress --merge`); also for entries that were
        merged into another, which a search does not find, and for id -1.
        """
        weights = np.zeros(ids.shape, np.float32)
        for segment, first in self._located():
            if segment.merged is None:
                continue
            inside = (ids >= first) & (ids < first + segment.record.tokens)
            counts = np.maximum(segment.merged.weights[ids[inside] - first], 1)
            weights[inside] = np.log(counts, dtype=np.float32)  # of bytes it would be a float16
        return weights

    def heads(self, ids: Int[np.ndarray, "q k"]) -> Int[np.ndarray, "q k"]:
        """The entries whose keys some have or share; -1 where there is none."""
        heads = ids.copy()
        for segment, first in self._located():
            inside = (ids >= first) & (ids < first + segment.record.tokens)
            local = segment.heads(ids[inside] - first)
            heads[inside] = np.where(local < 0, NO_ENTRY, local + first)
        return heads

    @cached_property
    def keys(self) -> Keys:
        """The stored keys of all segments (SettingError when the memory has none)."""
        parts = [segment.keys for segment in self.segments]
        if len(parts) == 1 and not self._own.start:
            return parts[0]
        return JoinedKeys(parts, self.bounds[self._own.start : self._own.stop + 1].tolist())

    @property
    def keys_record(self) -> KeysRecord:
        """The manifest's record of the keys (SettingError if the memory has none)."""
        if self.manifest.keys is None:
            raise no_keys(self.path)
        return self.manifest.keys

    @cached_property
    def clusters(self) -> Clusters | None:
        """Which entries share a state; None where `nearest cluster` has not been run.

        Those of several segments, or without removed documents, are put together in memory once.
        """
        record = self.manifest.clusters
        if record is None:
            return None
        if len(self.segments) == 1:
            return self.segments[0].clusters
        return Clusters.from_labels(self.labels(), record.clusters)

    def labels(self) -> Int[np.ndarray, " positions"]:
        """The cluster of each position of the segments that are here (int32), -1 for none."""
        none = np.empty(0, np.int32)
        return np.concatenate([none, *(segment.labels for segment in self.segments)])

    # --- documents --------------------------------------------------------------------------------

    def place(self, entry: int) -> Place:
        """The document and position of an entry."""
        documents, positions = self.places(np.array([entry]))
        return Place(int(documents[0]), int(positions[0]))

    def places(
        self, entries: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The document and the position in it of each entry."""
        documents, positions = np.empty_like(entries), np.empty_like(entries)
        numbers = np.searchsorted(self.bounds, entries, side="right") - 1
        for number in np.unique(numbers).tolist():
            own, segment = numbers == number, self._segment(number)
            local = entries[own] - self.bounds[number]
            stored = np.searchsorted(segment.offsets, local, side="right") - 1
            live = np.searchsorted(segment.numbers, stored)
            documents[own] = self._first_document[number] + live
            positions[own] = local - segment.offsets[stored]
        return documents, positions

    def document(self, number: int) -> Document:
        """A document's id, text and metadata."""
        segment, stored = self._stored_document(number)
        return segment.documents[stored]

    def number_at(self, segment: int, stored: int) -> int:
        """The number of the document that is stored so in a segment."""
        live = int(np.searchsorted(self.segments[segment].numbers, stored))
        return int(self._first_document[self._own.start + segment]) + live

    def document_tokens(self, number: int) -> Tokens:
        """A document's token ids, its context token first."""
        segment, stored = self._stored_document(number)
        return segment.tokens_of(stored)

    def encoder_tokens(self, number: int) -> Tokens:
        """What the encoder reads with a document (SettingError for a model without an encoder)."""
        segment, stored = self._stored_document(number)
        found = segment.source_of(stored)
        if found is None:
            raise SettingError(f"{self.path} is of a model without an encoder")
        return found

    @cached_property
    def encoder_texts(self) -> EncoderTexts:
        """What the encoder reads with all documents, to find like ones by."""
        return EncoderTexts(self)

    def entries_of(self, number: int) -> range:
        """The ids of a document's entries: of its positions but the last, which has no value."""
        place, stored = self._where(number)
        first, stop = self._segment(place).offsets[stored : stored + 2] + self.bounds[place]
        return range(int(first), int(stop) - 1)

    def _stored_document(self, number: int) -> tuple[Segment, int]:
        place, stored = self._where(number)
        return self._segment(place), stored

    def _where(self, number: int) -> tuple[int, int]:
        """Which segment a document is in, and its stored number there."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} is outside a memory of {self.documents:,}")
        place = int(np.searchsorted(self._first_document, number, side="right")) - 1
        return place, int(self._segment(place).numbers[number - int(self._first_document[place])])

    def _segment(self, number: int) -> Segment:
        """A segment by its number in the whole memory."""
        if number not in self._own:
            raise IndexError(f"segment {number} of {self.path} is not in shard {self.shard}")
        return self.segments[number - self._own.start]

    # --- text -------------------------------------------------------------------------------------

    @cached_property
    def _runs(self) -> list[TokenRun]:
        """The token arrays that values are read from; suffix arrays are not touched."""
        return [TokenRun(segment.tokens, first) for segment, first in self._located()]

    @cached_property
    def _suffix_arrays(self) -> list[SuffixArray]:
        return [segment.suffix_array(first) for segment, first in self._located()]

    def longest_matches(self, context: Tokens, ends: Int[np.ndarray, " q"], most: int) -> Matches:
        """Up to `most` entries whose left context shares the longest suffix with each query's.

        There are fewer columns if the memory holds fewer entries.

        Args:
            context: int64 token ids; a match never reaches back beyond a start token.
            ends: query i is context[: ends[i] + 1].
            most: number of entries wanted.
        """
        start_token, most = self.manifest.model.start_token, min(most, max(1, self.entries))
        return longest_matches(self._suffix_arrays, start_token, context, ends, most)

    def ngram_samples(
        self, context: Tokens, ends: Int[np.ndarray, " q"], longest: int
    ) -> NgramSamples:
        """What `ngrams` counts, and the entries among which it counts successors."""
        start_token = self.manifest.model.start_token
        return ngram_samples(self._suffix_arrays, start_token, context, ends, longest)

    def ngrams(self, context: Tokens, ends: Int[np.ndarray, " q"], longest: int) -> Ngrams:
        """How often entries' contexts end with the last 1 … `longest` tokens of each query's.

        `context` and `ends` as in `longest_matches`.
        """
        start_token = self.manifest.model.start_token
        return ngrams(self._suffix_arrays, start_token, context, ends, longest)

    def match_lengths(
        self, ids: Int[np.ndarray, "q k"], context: Tokens, ends: Int[np.ndarray, " q"]
    ) -> Int[np.ndarray, "q k"]:
        """Tokens of left context (int16) that query i shares with entry ids[i, j]; 0 for id -1."""
        start_token = self.manifest.model.start_token
        return match_lengths(self._runs, start_token, ids, context, ends)

    def first_entries(
        self, documents: Sequence[Tokens], sources: Sequence[Tokens] | None = None
    ) -> Int[np.ndarray, " documents"]:
        """The first entry of the document that has exactly these tokens; -1 where there is none.

        Where sources are given, it has exactly the same source, too.

        Raises:
            SettingError: entries have been merged, so that they cannot be told apart.
        """
        if self.has_weights:
            raise SettingError(
                f"entries of {self.path} were merged into others, so that a text's own cannot be "
                "left out: use the memory from before `nearest compress --merge`"
            )
        if sources is None:
            return self.equal_documents(documents)
        return equal_pairs(self._located(), list(zip(documents, sources, strict=True)))

    def equal_documents(self, documents: Sequence[Tokens]) -> Int[np.ndarray, " documents"]:
        """Like `first_entries`, for any memory."""
        arrays = [np.asarray(tokens, dtype=np.int64) for tokens in documents]
        found = np.full(len(arrays), NO_ENTRY, dtype=np.int64)
        for segment, suffixes in zip(self.segments, self._suffix_arrays, strict=True):
            at = equal_documents(suffixes, segment.offsets, arrays)
            found = np.where((found < 0) & (at >= 0), at + suffixes.first, found)
        return found

    def spans_stand(
        self, context: Tokens, ends: Int[np.ndarray, " q"], length: int
    ) -> Bool[np.ndarray, " q"]:
        """Whether the `length` tokens that end at each of `ends` stand in a document.

        They stand so in `context`, int64 token ids, and none of them is the start token.
        """
        found = np.zeros(len(ends), dtype=bool)
        for suffixes in self._suffix_arrays:
            found |= spans_stand(suffixes, context, ends, length)
        return found
