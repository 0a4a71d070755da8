"""A memory whose segments several servers hold, looked up as one.

Every server holds some whole segments (`nearest serve MEMORY --shard 1/4`) and answers of these
alone, with ids and document numbers that count through the whole memory. What is found is what one
process would find: candidates are told with their codes and put together by the rules of
`index.search`, samples by the random order of ids.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from functools import partial as partial_of
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.corpus.documents import Document
from nearest.corpus.tokens import Tokens
from nearest.errors import SettingError
from nearest.index.clusters import NO_CLUSTER, Clusters
from nearest.index.matches import Matches
from nearest.index.neighbours import NO_ENTRY, Neighbours
from nearest.index.ngrams import SAMPLED, Ngrams
from nearest.index.search import By, Fetched, found_nearest
from nearest.remote.memory import RemoteMemory, joined, parts_of, text_of
from nearest.remote.merging import longest_of, nearest_of, ngrams_of
from nearest.remote.servers import Patience, Servers
from nearest.remote.shards import Held, Shards
from nearest.store.shard import entry_bounds

T = TypeVar("T")


def refuse_to_search_on(place: str) -> None:
    """Refuse another place than the CPU for a memory that servers search, where they are told to.

    Raises:
        SettingError: it is another.
    """
    if place != "cpu":
        raise SettingError(
            f"searching on {place!r} is asked for, and servers hold this memory: start them with "
            f"`nearest serve … --search-on {place}`, and leave it out here"
        )


class ShardedMemory(RemoteMemory):
    """A memory over HTTP of which several servers hold parts; `RemoteMemory` in all else.

    A shard that does not answer is waited for, and then named in an error. With `partial`, what the
    others find is returned instead, with a warning: `lost` names those that were missing last.
    """

    def __init__(
        self,
        urls: Sequence[str | Sequence[str] | Servers],
        name: str | None = None,
        *,
        api_key: str | None = None,
        patience: Patience | None = None,
        wait: float = 30.0,
        partial: bool = False,
    ) -> None:
        """Ask every shard what it holds.

        Args:
            urls: of a server for each shard, in any order, or of several that hold the same one;
                or what reaches them.
            name: of the memory, where the servers have several.
            api_key: of all servers.
            patience: how long a server is waited for, and how often asked again.
            wait: seconds that a lost shard is waited for beyond that.
            partial: answer without shards that are lost.

        Raises:
            RemoteError: a shard does not answer.
            SettingError: the servers do not hold all shards of one snapshot of a memory.
        """
        if isinstance(urls, str) or not urls:
            raise SettingError("give a list of addresses, one of each shard")
        servers = [
            one if isinstance(one, Servers) else Servers(one, api_key, patience) for one in urls
        ]
        self._open = partial_of(Shards, servers, name, wait, partial=partial)
        self._take_over(self._open())
        self.path = self._shards.held[0].memory.path

    def _take_over(self, shards: Shards) -> None:
        """What the shards tell of the whole memory."""
        clients = [one.memory for one in shards.held]
        first = clients[0]
        self._shards, self._groups = shards, shards.groups
        self.manifest, self.name = first.manifest, first.name
        self.search_on, self.shard, self._gates, self._known = "cpu", None, first._gates, ()
        self._counts = {**first._counts, "entries": sum(one.entries for one in clients)}
        self._merged = any(one.has_weights for one in clients)

    @property
    def lost(self) -> tuple[str, ...]:
        """The shards that did not answer last, where answers may be partial."""
        return self._shards.lost

    @property
    def address(self) -> str:
        """Of the first shard's server."""
        return self._shards.held[0].memory.address

    def __repr__(self) -> str:
        count = len(self._shards.held)
        return f"<ShardedMemory {self.name!r} of {count} shards: {self.entries:,} entries>"

    def refresh(self) -> "ShardedMemory":
        """The present snapshot: this memory itself, unless the shards' has changed."""
        shards = self._open()
        if shards.held[0].memory.manifest.checksum == self.manifest.checksum:
            return self
        fresh = copy.copy(self)
        vars(fresh).pop("clusters", None)
        fresh._take_over(shards)
        return fresh

    def ask(
        self, call: str, arrays: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """Refuse: every look-up has its own way to put the shards' answers together."""
        raise SettingError(
            f"{call} is asked of one server, and {self.name} is in {len(self._shards.held)} "
            "shards: use the memory's methods (search, longest_matches, ...), which ask them all"
        )

    def _all(
        self, call: str, arrays: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> list[dict[str, np.ndarray]]:
        asked = self._shards.each(lambda one: one.memory.ask(call, arrays, options))
        return [answer for _, answer in asked]

    # --- entries ----------------------------------------------------------------------------------

    def _search(
        self, queries: Float[np.ndarray, "q dim"], k: int, by: By, rerank: int, ordered: bool
    ) -> Neighbours:
        self.keys_record  # noqa: B018  refuses a memory without keys

        def fetch(some: Float[np.ndarray, "q dim"], wanted: Sequence[int]) -> Sequence[Fetched]:
            return self._fetched(some, dict(zip(self._groups, wanted, strict=True)), by)

        groups = list(self._groups.values())
        return found_nearest(groups, fetch, queries, k, by, rerank, ordered=ordered)

    def _fetched(
        self, queries: Float[np.ndarray, "q dim"], wanted: Mapping[str, int], by: By
    ) -> list[Fetched]:
        """So many entries of each group, over all shards that have some of it."""

        def ask(shard: Held) -> list[np.ndarray]:
            many = np.array([wanted[name] for name in shard.memory.groups], np.int64)
            answers = [
                shard.memory.ask(
                    "fetch",
                    {"queries": np.asarray(queries[rows], np.float32), "wanted": many},
                    {"distances": by},
                )
                for rows in parts_of(len(queries), max(int(many.sum()), queries.shape[1]))
            ]
            widths = answers[0]["widths"].tolist()
            arrays = joined(answers, "ids", "codes", "distances", "values")
            return [np.array(widths), *arrays]

        found: dict[str, list[Fetched]] = {name: [] for name in self._groups}
        answers = self._shards.each(ask, lambda shard: bool(shard.memory.groups))
        for shard, (widths, ids, codes, distances, _) in answers:
            stops = np.cumsum(widths)
            for name, stop, width in zip(shard.memory.groups, stops, widths, strict=True):
                own = slice(stop - width, stop)
                found[name].append(Fetched(ids[:, own], codes[:, own], distances[:, own]))
        if answers:
            every, values = (np.concatenate([a[n] for _, a in answers], axis=1) for n in (1, 4))
            self._remember(every, values)
        return [
            nearest_of(found[name], len(queries), many, exact=self._groups[name].exact)
            for name, many in wanted.items()
        ]

    def _measured(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"], by: str
    ) -> Float[np.ndarray, "q k"]:
        told: dict[str, np.ndarray] = {
            "distances": np.full(ids.shape, np.inf, np.float32),
            "values": np.full(ids.shape, NO_ENTRY, np.int64),
        }

        def given(rows: Int[np.ndarray, " rows"]) -> dict[str, np.ndarray]:
            return {"queries": np.asarray(queries[rows], np.float32)}

        width = max(*ids.shape[1:], queries.shape[1])
        self._shards.rows("distances", ids, given, {"distances": by}, told, width)
        known = told["values"] >= 0  # not of a shard that is lost
        self._remember(ids[known], told["values"][known])
        return told["distances"]

    def _of_entries(self, call: str, ids: Int[np.ndarray, " n"]) -> np.ndarray:
        fill = np.zeros(len(ids), np.float32)
        told = {call: fill if call == "log_weights" else np.full(ids.shape, NO_ENTRY, np.int64)}
        self._shards.owners(call, ids, told)
        return told[call]

    @cached_property
    def clusters(self) -> Clusters | None:
        if self.manifest.clusters is None:
            return None
        labels = np.full(self.positions, NO_CLUSTER, np.int32)
        for shard, answer in self._shards.each(lambda s: s.memory.ask("labels", {}, {})):
            labels[shard.entries.start : shard.entries.stop] = answer["labels"]
        return Clusters.from_labels(labels, self.manifest.clusters.clusters)

    # --- text -------------------------------------------------------------------------------------

    def longest_matches(self, context: Tokens, ends: Int[np.ndarray, " q"], most: int) -> Matches:
        most, parts = min(most, max(1, self.entries)), []
        bounds = entry_bounds(self.manifest.segments)
        for rows in parts_of(len(ends), most):
            asked = self._all("longest_matches", text_of(context, ends[rows]), {"k": most})
            for answer in asked:
                self._remember(answer["ids"], answer["values"])
            told = [Matches(one["ids"], one["lengths"], one["longest"]) for one in asked]
            parts.append(longest_of(told, len(ends[rows]), most, bounds))
        return Matches(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def match_lengths(
        self, ids: Int[np.ndarray, "q k"], context: Tokens, ends: Int[np.ndarray, " q"]
    ) -> Int[np.ndarray, "q k"]:
        lengths = np.zeros(ids.shape, np.int16)

        def given(rows: Int[np.ndarray, " rows"]) -> dict[str, np.ndarray]:
            return text_of(context, ends[rows])

        self._shards.rows("match_lengths", ids, given, {}, {"lengths": lengths}, ids.shape[1])
        return lengths

    def ngrams(self, context: Tokens, ends: Int[np.ndarray, " q"], longest: int) -> Ngrams:
        parts = [
            ngrams_of(
                self._all("ngram_samples", text_of(context, ends[rows]), {"length": longest}),
                (len(ends[rows]), longest),
            )
            for rows in parts_of(len(ends), longest * SAMPLED)
        ]
        return Ngrams(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def spans_stand(
        self, context: Tokens, ends: Int[np.ndarray, " q"], length: int
    ) -> Bool[np.ndarray, " q"]:
        stand = np.zeros(len(ends), dtype=bool)
        for rows in parts_of(len(ends), 1):
            for answer in self._all(
                "spans_stand", text_of(context, ends[rows]), {"length": length}
            ):
                stand[rows] |= answer["stand"]
        return stand

    def equal_documents(self, documents: Sequence[Tokens]) -> Int[np.ndarray, " documents"]:
        found = np.full(len(documents), NO_ENTRY, np.int64)
        for _, ids in self._shards.each(
            lambda one: one.memory.equal_documents(documents)
        ):  # the first that has it, in the order of segments
            found = np.where(found < 0, ids, found)
        return found

    # --- documents --------------------------------------------------------------------------------

    def places(
        self, entries: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        told = {name: np.full_like(entries, -1) for name in ("documents", "positions")}
        self._shards.owners("places", entries, told)
        return told["documents"], told["positions"]

    def document(self, number: int) -> Document:
        return self._holder(number, lambda one: one.document(number))

    def document_tokens(self, number: int) -> Tokens:
        return self._holder(number, lambda one: one.document_tokens(number))

    def number_of(self, document_id: str) -> int | None:
        asked = self._shards.each(lambda one: one.memory.number_of(document_id))
        return next((number for _, number in asked if number is not None), None)

    def _holder(self, number: int, work: Callable[[RemoteMemory], T]) -> T:
        """What the shard says that holds a document."""
        self._check_number(number)
        return self._shards.one(lambda shard: number in shard.documents, work)
