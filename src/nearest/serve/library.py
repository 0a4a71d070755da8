"""The served memories, always in their newest version, and the methods requests ask of them.

A request keeps the memories that it began with; writers that publish a new version disturb nothing
that is under way. Requests that ask for the same share one `Ensemble`, and with it their searches.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from nearest.corpus.documents import Document
from nearest.errors import NearestError, RemoteError, SettingError
from nearest.memory import Memory
from nearest.remote.memory import RemoteMemory
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import BASE, MEMORY_METHODS, check_method, resolve_settings
from nearest.serve.errors import ApiError
from nearest.serve.schema import NearestOptions
from nearest.store.snapshot import Snapshot
from nearest.store.stored_ids import StoredIds

_KEPT_ENSEMBLES = 64
_KEPT_DOCUMENTS = 4096
_ASKED_EVERY = 2.0  # seconds


@dataclass(frozen=True)
class Retrieval:
    """What a request looks up: each memory by name and number, in one version.

    Attributes:
        method: of all memories.
        names: of the memories, by their numbers in the ensemble.
        memories: opened, by number.
        ensemble: of no memory where the method is "base".
    """

    method: str
    names: tuple[str, ...]
    memories: tuple[Memory, ...]
    ensemble: Ensemble

    def described(self) -> dict[str, Any]:
        """As answers tell it."""
        lookups = self.ensemble.lookups
        settings = lookups[0].settings.of(self.method) if lookups else {}
        return {
            "version": 1,
            "method": self.method,
            "settings": {k: "inf" if v == float("inf") else v for k, v in settings.items()},
            "memories": [
                {"name": name, "version": version_of(memory), "weight": weight}
                for name, memory, weight in zip(
                    self.names, self.memories, self.ensemble.weights, strict=True
                )
            ],
        }


def version_of(memory: Memory) -> int:
    """The version that a memory was opened in."""
    return memory.manifest.version


def name_of(path: Path) -> str:
    """What requests call the memory in a folder."""
    return path.resolve().name.removesuffix(".memory")


class Library:
    """Memories by name; several threads may use it."""

    def __init__(
        self, memories: Sequence[Memory], method: str | None, settings: Mapping[str, Any]
    ) -> None:
        self._memories = {name_of(memory.path): memory for memory in memories}
        if len(self._memories) < len(memories):
            raise SettingError(
                "two of the memories have the same name, by which requests tell them apart: "
                "rename a folder"
            )
        self._stamps = {name: _stamp(memory) for name, memory in self._memories.items()}
        self._in_use = WeakSet(self._memories.values())
        self.methods = [BASE, *(m for m in MEMORY_METHODS if self._can(m))]
        if method is None:
            preferred = ("hybrid", "knn", "suffix")
            method = next(m for m in preferred if m in self.methods)
        check_method(method)
        self.method = method
        self._settings = dict(settings)
        self._ensembles: OrderedDict[Any, Retrieval] = OrderedDict()
        self._documents: WeakKeyDictionary[Memory, dict[int, Document]] = WeakKeyDictionary()
        self._ids: WeakKeyDictionary[Memory, StoredIds] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._refreshing = {name: threading.Lock() for name in self._memories}
        self.retrieval(
            method, None
        )  # refuses settings that make no sense before anything is served

    @property
    def names(self) -> list[str]:
        """The names of all memories."""
        return list(self._memories)

    def memory(self, name: str, param: str | None = None) -> Memory:
        """A memory in its newest version.

        Raises:
            ApiError: there is none of this name.
        """
        with self._lock:
            memory = self._memories.get(name)
            if memory is None:
                raise ApiError(
                    404 if param is None else 400,
                    f"there is no memory {name!r} here: choose among {', '.join(self._memories)}",
                    param=param,
                )
            stamp = _stamp(memory)
            if stamp == self._stamps[name]:
                return memory
        # One at a time, and nobody waits for a server elsewhere but the one who asks it.
        elsewhere = isinstance(memory, RemoteMemory)
        if not self._refreshing[name].acquire(blocking=not elsewhere):
            return memory
        try:
            return self._refreshed(name, stamp)
        finally:
            self._refreshing[name].release()

    def _refreshed(self, name: str, stamp: tuple[int, ...]) -> Memory:
        with self._lock:
            memory = self._memories[name]
            if stamp == self._stamps[name]:  # another has done it meanwhile
                return memory
        try:
            fresh = memory.refresh()
        except RemoteError:  # look-ups say so; what is here needs none
            return memory
        with self._lock:
            if self._memories[name] is not memory:  # a change was made here meanwhile
                return self._memories[name]
            self._use(name, fresh, stamp)
            return fresh

    def take_over(self, name: str, memory: Memory) -> None:
        """Use a version that was made here from now on, with its index read before anyone waits."""
        if memory.manifest.keys is not None:
            _ = memory.searcher
        stamp = _stamp(memory)
        if memory.refresh() is memory:  # else another writer has published since
            with self._lock:
                self._use(name, memory, stamp)

    def versions_in_use(self, name: str) -> int:
        """Versions of a memory that requests under way look up still, and the present one."""
        return sum(name_of(memory.path) == name for memory in list(self._in_use))

    def _use(self, name: str, memory: Memory, stamp: tuple[int, ...]) -> None:
        """The memory of a name from now on; what was made of the version before is forgotten."""
        if memory is not self._memories[name]:
            self._memories[name] = memory
            self._in_use.add(memory)
            for key in [k for k, one in self._ensembles.items() if name in one.names]:
                del self._ensembles[key]
        self._stamps[name] = stamp

    def chosen(self, name: str | None) -> tuple[str, Memory]:
        """A memory by name; without one, the only memory there is.

        Raises:
            ApiError: there is none of this name, or a name is needed.
        """
        if name is None and len(self._memories) > 1:
            raise ApiError(
                400, f"name the memory: one of {', '.join(self._memories)}", param="memory"
            )
        name = next(iter(self._memories)) if name is None else name
        return name, self.memory(name)

    def retrieval(self, method: str | None, options: NearestOptions | None) -> Retrieval:
        """What a request looks up.

        Raises:
            ApiError: a memory, method, document or setting is unknown or out of range.
        """
        options = options or NearestOptions.model_validate({})
        method = options.method or method or self.method
        if method not in self.methods:
            raise ApiError(
                400,
                f"method {method!r} is not served: choose among {', '.join(self.methods)}",
                param="nearest.method",
            )
        if method == BASE:
            return self._base(options)
        names, weights = self._weighted(options)
        memories = tuple(self.memory(name, "nearest.memories") for name in names)
        settings = options.settings or (self._settings if method == self.method else {})
        given = {k: float(v) if v == "inf" else v for k, v in settings.items()}
        without = tuple(sorted({(one.memory, one.id) for one in options.without}))
        key = (
            method,
            tuple(sorted(given.items())),
            tuple(zip(names, map(version_of, memories), weights, strict=True)),
            without,
        )
        with self._lock:
            if (known := self._ensembles.get(key)) is not None:
                self._ensembles.move_to_end(key)
                return known
        made = self._made(method, given, names, memories, weights, without)
        with self._lock:
            self._ensembles[key] = made
            if len(self._ensembles) > _KEPT_ENSEMBLES:
                self._ensembles.popitem(last=False)
            return made

    def document(self, memory: Memory, number: int) -> Document:
        """A document of a memory, kept for a while since answers name the same ones again."""
        with self._lock:
            kept = self._documents.setdefault(memory, {})
            if len(kept) > _KEPT_DOCUMENTS:
                kept.clear()
        if (document := kept.get(number)) is None:
            kept[number] = document = memory.document(number)
        return document

    def number(self, memory: Memory, document_id: str) -> int | None:
        """The number of the document with this id; None where there is none."""
        if isinstance(memory, RemoteMemory):
            return memory.number_of(document_id)
        (found,) = self._stored_ids(memory).find([document_id])
        return None if found is None else memory.number_at(found.segment, found.number)

    def _stored_ids(self, memory: Memory) -> StoredIds:
        with self._lock:
            if (ids := self._ids.get(memory)) is None:
                ids = self._ids[memory] = StoredIds(memory)
            return ids

    def _without(self, memory: Memory, name: str, ids: Sequence[str]) -> Memory:
        """A memory as it would be without some documents; nothing is written."""
        if not ids:
            return memory
        if isinstance(memory, RemoteMemory):
            raise ApiError(
                400,
                f"memory {name!r} is held by another server, so that no document can be left out",
                param="nearest.without",
            )
        hidden: list[list[int]] = [[] for _ in memory.segments]
        for one, stored in zip(ids, self._stored_ids(memory).find(ids), strict=True):
            if stored is None:
                raise ApiError(
                    400, f"memory {name!r} has no document {one!r}", param="nearest.without"
                )
            hidden[stored.segment].append(stored.number)
        if len(ids) >= memory.documents:
            raise ApiError(
                400, f"nothing of memory {name!r} would be left", param="nearest.without"
            )
        segments = [
            segment.without(numbers) if numbers else segment
            for segment, numbers in zip(memory.segments, hidden, strict=True)
        ]
        without = Snapshot(memory.path, memory.manifest, segments)
        return Memory(without, memory.search_on, memory)

    def _can(self, method: str) -> bool:
        try:
            for memory in self._memories.values():
                Lookup.of(memory, method, resolve_settings(method, memory))
        except NearestError:
            return False
        return True

    def _base(self, options: NearestOptions) -> Retrieval:
        for field in ("settings", "memories", "without"):
            if getattr(options, field):
                raise ApiError(
                    400,
                    "the method base looks nothing up: leave this out",
                    param=f"nearest.{field}",
                )
        return Retrieval(BASE, (), (), Ensemble((), ()))

    def _weighted(self, options: NearestOptions) -> tuple[tuple[str, ...], tuple[float, ...]]:
        chosen = options.memories
        if chosen is None:
            names = self.names
            return tuple(names), (1 / len(names),) * len(names)
        weights = [one.weight for one in chosen]
        if all(weight is None for weight in weights):
            return tuple(one.name for one in chosen), (1 / len(chosen),) * len(chosen)
        if any(weight is None for weight in weights):
            raise ApiError(
                400, "give every memory a weight, or none of them", param="nearest.memories"
            )
        return tuple(one.name for one in chosen), tuple(w for w in weights if w is not None)

    def _made(
        self,
        method: str,
        settings: Mapping[str, Any],
        names: tuple[str, ...],
        memories: tuple[Memory, ...],
        weights: tuple[float, ...],
        without: tuple[tuple[str, str], ...],
    ) -> Retrieval:
        if len(set(names)) < len(names):
            raise ApiError(400, "a memory is named twice", param="nearest.memories")
        if unknown := {name for name, _ in without} - set(names):
            raise ApiError(
                400, f"no memory {min(unknown)!r} is looked up here", param="nearest.without"
            )
        memories = tuple(
            self._without(memory, name, [i for n, i in without if n == name])
            for name, memory in zip(names, memories, strict=True)
        )
        try:
            ensemble = Ensemble.of(list(memories), method, weights, **settings)
        except (SettingError, TypeError, ValueError) as error:
            param = "nearest.memories" if "weight" in str(error) else "nearest.settings"
            raise ApiError(400, str(error), param=param) from error
        return Retrieval(method, names, memories, ensemble)


def _stamp(memory: Memory) -> tuple[int, ...]:
    """Changes whenever a writer publishes; costs one system call.

    A server elsewhere is asked every other second.
    """
    if isinstance(memory, RemoteMemory):
        return (int(time.monotonic() / _ASKED_EVERY),)
    status = (memory.path / "manifest.json").stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
