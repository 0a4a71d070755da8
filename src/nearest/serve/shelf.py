"""Opened memories by name, always in their newest version, and their documents.

A request keeps the memories that it began with; writers that publish a new version disturb nothing
that is under way.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from nearest.corpus.documents import Document
from nearest.errors import FolderError, RemoteError, SettingError
from nearest.memory import Memory
from nearest.remote.memory import RemoteMemory
from nearest.serve.errors import ApiError
from nearest.store.stored_ids import StoredIds

_KEPT_HEADINGS = 4096
_ASKED_EVERY = 2.0  # seconds


class Heading(NamedTuple):
    """What answers say of a document that they name."""

    id: str
    title: str
    licence: str | None
    url: str | None

    @classmethod
    def of(cls, document: Document) -> "Heading":
        """As its metadata have it; the title is its name, else its id, where there is none."""
        told = document.metadata
        return cls(
            document.id,
            _first(told, ("title", "name")) or document.id,
            _first(told, ("licence", "license")),
            _first(told, ("url", "source_url", "link")),
        )


def _first(metadata: Mapping[str, Any], names: Sequence[str]) -> str | None:
    values = (metadata.get(name) for name in names)
    return next((str(value) for value in values if value), None)


def version_of(memory: Memory) -> int:
    """The version that a memory was opened in."""
    return memory.manifest.version


def name_of(path: Path) -> str:
    """What requests call the memory in a folder."""
    return path.resolve().name.removesuffix(".memory")


def by_name(memories: Sequence[Memory]) -> dict[str, Memory]:
    """Memories by what requests call them (SettingError for two of one name)."""
    named = {name_of(memory.path): memory for memory in memories}
    if len(named) < len(memories):
        raise SettingError(
            "two of the memories have the same name, by which requests tell them apart: rename a "
            "folder"
        )
    return named


class Shelf:
    """Memories by name; several threads may use it."""

    def __init__(self, memories: Sequence[Memory]) -> None:
        self._memories = by_name(memories)
        self._stamps = {name: stamp_of(memory) for name, memory in self._memories.items()}
        self._in_use = WeakSet(self._memories.values())
        self._headings: WeakKeyDictionary[Memory, dict[int, Heading]] = WeakKeyDictionary()
        self._ids: WeakKeyDictionary[Memory, StoredIds] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._refreshing = {name: threading.Lock() for name in self._memories}

    @property
    def names(self) -> list[str]:
        """The names of all memories."""
        return list(self._memories)

    def memory(self, name: str, param: str | None = None) -> Memory:
        """A memory in its newest version.

        Raises:
            ApiError: there is none of this name.
            FolderError: its folder is away.
        """
        with self._lock:
            memory = self._memories.get(name)
            if memory is None:
                raise ApiError(
                    404 if param is None else 400,
                    f"there is no memory {name!r} here: choose among {', '.join(self._memories)}",
                    param=param,
                )
            known = self._stamps[name]
        stamp = stamp_of(memory)
        if stamp == known:
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
        stamp = stamp_of(memory)
        if memory.refresh() is memory:  # else another writer has published since
            with self._lock:
                self._use(name, memory, stamp)

    def versions_in_use(self, name: str) -> int:
        """Versions of a memory that requests under way look up still, and the present one."""
        with self._lock:
            used = list(self._in_use)
        return sum(name_of(memory.path) == name for memory in used)

    def _use(self, name: str, memory: Memory, stamp: tuple[int, ...]) -> None:
        """The memory of a name from now on; what was made of the version before is forgotten."""
        if memory is not self._memories[name]:
            self._memories[name] = memory
            self._in_use.add(memory)
            self._changed(name)
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

    def _changed(self, name: str) -> None:
        """A memory has another version: forget what was made of the one before."""

    def heading(self, memory: Memory, number: int) -> Heading:
        """Of a document of a memory; kept for a while, since answers name the same ones again."""
        with self._lock:
            kept = self._headings.setdefault(memory, {})
            if len(kept) > _KEPT_HEADINGS:
                kept.clear()
        if (heading := kept.get(number)) is None:
            kept[number] = heading = Heading.of(memory.document(number))
        return heading

    def number(self, memory: Memory, document_id: str) -> int | None:
        """The number of the document with this id; None where there is none."""
        if isinstance(memory, RemoteMemory):
            return memory.number_of(document_id)
        (found,) = self.stored_ids(memory).find([document_id])
        return None if found is None else memory.number_at(found.segment, found.number)

    def stored_ids(self, memory: Memory) -> StoredIds:
        """The ids of a memory's documents, sorted once for all requests."""
        with self._lock:
            ids = self._ids.get(memory)
        if ids is None:
            ids = StoredIds(memory)
            with self._lock:
                self._ids[memory] = ids
        return ids


def stamp_of(memory: Memory) -> tuple[int, ...]:
    """Changes whenever a writer publishes; costs one system call.

    A server elsewhere is asked every other second.

    Raises:
        FolderError: the memory's folder is away.
    """
    if isinstance(memory, RemoteMemory):
        return (int(time.monotonic() / _ASKED_EVERY),)
    try:
        status = (memory.path / "manifest.json").stat()
    except OSError as error:
        raise FolderError(
            f"{memory.path} cannot be read ({error.strerror}): see that the disk it is on is "
            "there, or bring it back from a backup"
        ) from error
    return status.st_ino, status.st_mtime_ns, status.st_size
