"""The servers of a memory's shards: what each holds, and asking them all, or those that matter."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from nearest.errors import RemoteError, SettingError, warn_caller
from nearest.index.neighbours import NO_ENTRY
from nearest.index.search import Group
from nearest.remote.memory import RemoteMemory, joined, parts_of
from nearest.remote.servers import Servers
from nearest.store.shard import document_bounds, entry_bounds

T = TypeVar("T")
_PAUSE = 0.2  # seconds between questions to a shard that is lost


class Held(NamedTuple):
    """A shard that servers hold: the ids of its entries, and its documents' numbers."""

    memory: RemoteMemory
    name: str
    entries: range
    documents: range

    def own(self, ids: Int[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        """Which ids are of its entries."""
        own: Bool[np.ndarray, "*shape"] = (ids >= self.entries.start) & (ids < self.entries.stop)
        return own


class Shards:
    """All shards of one snapshot, in the order of their segments; any thread may ask.

    Attributes:
        held: each once.
        lost: the names of those that did not answer when they were asked last, where answers may be
            partial.
    """

    def __init__(
        self,
        servers: Sequence[Servers],
        name: str | None = None,
        wait: float = 30.0,
        *,
        partial: bool = False,
    ) -> None:
        """Ask every shard what it holds.

        Args:
            servers: of each shard.
            name: of the memory, where the servers have several.
            wait: seconds that a lost shard is waited for, and snapshots to become one.
            partial: go on without shards that are lost.

        Raises:
            RemoteError: a shard does not answer.
            SettingError: the servers do not hold all shards of one memory at one snapshot.
        """
        self._wait, self._partial = wait, partial
        self.lost: tuple[str, ...] = ()
        self._pool = ThreadPoolExecutor(len(servers), thread_name_prefix="shard")
        self.held = _arranged(self._opened(servers, name))

    def _opened(self, servers: Sequence[Servers], name: str | None) -> list[RemoteMemory]:
        """A client of each shard, all at one snapshot."""
        until = time.monotonic() + self._wait

        def ask(one: Servers) -> RemoteMemory:
            def work() -> RemoteMemory:
                return RemoteMemory("", name, servers=one, one_shard=True)

            return _waited(f"the shard at {one.address}", work, one.wake, until)

        while True:
            opened = list(self._pool.map(ask, servers))
            snapshots = {one.manifest.checksum for one in opened}
            if len(snapshots) == 1:
                return opened
            if time.monotonic() > until:
                raise SettingError(
                    f"the servers hold {len(snapshots)} different snapshots of {opened[0].name}: "
                    "let them serve the same folder, or copies of one"
                )
            time.sleep(_PAUSE)

    @property
    def groups(self) -> dict[str, Group]:
        """What is searched, by name, over all shards."""
        groups: dict[str, list[Group]] = {}
        for shard in self.held:
            for name, group in shard.memory.groups.items():
                groups.setdefault(name, []).append(group)
        return {
            name: Group(
                sum(one.entries for one in some),
                max(one.margin for one in some),
                some[0].exact,
                min([sum(one.most for one in some), *(o.most for o in some if o.most < o.entries)]),
            )
            for name, some in groups.items()
        }

    def each(
        self, work: Callable[[Held], T], of: Callable[[Held], bool] = lambda _: True
    ) -> list[tuple[Held, T]]:
        """What shards answer, all asked at once; without those that are lost, if that will do.

        Raises:
            RemoteError: a shard does not answer, and answers may not be partial.
        """
        until = time.monotonic() + (0.0 if self._partial else self._wait)

        def ask(shard: Held) -> T | RemoteError:
            try:
                return _waited(shard.name, lambda: work(shard), shard.memory._servers.wake, until)
            except RemoteError as error:
                if not self._partial:
                    raise
                return error

        asked = [shard for shard in self.held if shard.entries and of(shard)]
        answers = list(zip(asked, self._pool.map(ask, asked), strict=True))
        lost = tuple(shard.name for shard, answer in answers if isinstance(answer, RemoteError))
        if set(lost) - set(self.lost):
            warn_caller(f"answers are partial, for this does not answer: {', '.join(lost)}")
        others = {shard.name for shard in self.held} - {shard.name for shard in asked}
        self.lost = (*(name for name in self.lost if name in others), *lost)
        return [(s, answer) for s, answer in answers if not isinstance(answer, RemoteError)]

    def one(self, of: Callable[[Held], bool], work: Callable[[RemoteMemory], T]) -> T:
        """What the shard answers that is asked for, which is waited for in any case."""
        shard = next(shard for shard in self.held if of(shard))
        until = time.monotonic() + self._wait
        return _waited(shard.name, lambda: work(shard.memory), shard.memory._servers.wake, until)

    def owners(self, call: str, ids: Int[np.ndarray, " n"], into: Mapping[str, np.ndarray]) -> None:
        """Ask of each entry the shard that has it; the answers go into arrays of the ids' shape."""

        def ask(shard: Held) -> dict[str, np.ndarray]:
            own = ids[shard.own(ids)]
            answers = [
                shard.memory.ask(call, {"ids": own[rows]}, {}) for rows in parts_of(len(own), 1)
            ]
            return dict(zip(into, joined(answers, *into), strict=True))

        for shard, answer in self.each(ask, lambda shard: bool(shard.own(ids).any())):
            for name, array in into.items():
                array[shard.own(ids)] = answer[name]

    def rows(
        self,
        call: str,
        ids: Int[np.ndarray, "q k"],
        given: Callable[[Int[np.ndarray, " rows"]], Mapping[str, np.ndarray]],
        options: Mapping[str, str],
        into: Mapping[str, np.ndarray],
        width: int,
    ) -> None:
        """As `owners`, of entries and the queries in their rows, of which `given` tells some."""

        def ask(shard: Held) -> dict[str, np.ndarray]:
            own = np.where(shard.own(ids), ids, NO_ENTRY)
            rows = np.flatnonzero((own >= 0).any(axis=1))
            answers = [
                shard.memory.ask(call, {**given(rows[some]), "ids": own[rows[some]]}, options)
                for some in parts_of(len(rows), width)
            ]
            return dict(zip(into, joined(answers, *into), strict=True))

        for shard, answer in self.each(ask, lambda shard: bool(shard.own(ids).any())):
            own = shard.own(ids)
            rows = own.any(axis=1)
            for name, array in into.items():
                array[own] = answer[name][own[rows]]


def _waited(name: str, work: Callable[[], T], wake: Callable[[], None], until: float) -> T:
    """What `work` gives, tried again until then where no server answers.

    `wake` is called before each pause, so that servers that have failed do not rest for longer.
    """
    while True:
        try:
            return work()
        except RemoteError as error:
            if time.monotonic() >= until:
                raise RemoteError(
                    f"{name} does not answer ({error}); or look up what the other shards hold "
                    "(partial=True)"
                ) from error
            wake()
            time.sleep(_PAUSE)


def _arranged(opened: Sequence[RemoteMemory]) -> list[Held]:
    """The shards in the order of their segments, each once (SettingError if they are not all)."""
    manifest, found = opened[0].manifest, dict[int, Held]()
    entries, documents = entry_bounds(manifest.segments), document_bounds(manifest.segments)
    for one in opened:
        if one.shard is None:
            raise SettingError(
                f"{one.address} serves the whole of {one.name}, not a shard: start it with "
                f"`nearest serve MEMORY --shard 1/{len(opened)}`, or look it up alone"
            )
        own = manifest.segments_of(one.shard)
        found[one.shard.number] = Held(
            one,
            f"shard {one.shard} ({one.address})",
            range(int(entries[own.start]), int(entries[own.stop])),
            range(int(documents[own.start]), int(documents[own.stop])),
        )
    of = {one.shard.of for one in opened if one.shard is not None}
    missing = sorted(set(range(1, max(of) + 1)) - set(found))
    if len(of) > 1 or missing or len(found) < len(opened):
        told = ", ".join(shard.name for shard in found.values())
        raise SettingError(
            f"these are not all shards of {opened[0].name}, each once: {told}; number "
            f"{', '.join(map(str, missing)) or 'one'} of {max(of)} is missing or there twice"
        )
    return [found[number] for number in sorted(found)]
