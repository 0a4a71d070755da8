"""A memory that `nearest serve` holds: looked up over HTTP as one in a folder is.

Every request names the snapshot that the client began with, and every answer the one it was made
of: entry ids of two snapshots never meet. When the memory changes, what is under way is refused
with that reason; `refresh` goes on with the new one.
"""

import base64
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.corpus.documents import Document
from nearest.corpus.tokens import Tokens
from nearest.errors import FolderError, RemoteError, SettingError
from nearest.index.clusters import Clusters
from nearest.index.keys import Keys
from nearest.index.matches import Matches
from nearest.index.neighbours import NO_ENTRY, Neighbours
from nearest.index.ngrams import Ngrams
from nearest.index.search import By, Group
from nearest.index.suffix import MAX_MATCH
from nearest.memory import Memory
from nearest.remote.servers import Patience, Servers
from nearest.remote.wire import SNAPSHOT_HEADER, packed, unpacked
from nearest.store.manifest import Manifest
from nearest.store.parts.gates import GateFile
from nearest.store.shard import Shard

_AT_ONCE = 1 << 18  # numbers of one array in a request
_BETWEEN = -1  # no token: where one context ends and another begins
_KNOWN = 4  # answers whose entries' values are remembered


class RemoteMemory(Memory):
    """A memory over HTTP, for `attach`, `evaluate` and all that looks one up.

    Dense search, key distances, suffix matches, pointers and gates are asked of the server, which
    needs no model for it. What changes a memory, or needs its arrays, is refused.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        name: str | None = None,
        *,
        api_key: str | None = None,
        patience: Patience | None = None,
        servers: Servers | None = None,
        one_shard: bool = False,
    ) -> None:
        """Ask a server what the memory is.

        Args:
            urls: of one or more servers of the same memory, such as "http://127.0.0.1:8000".
            name: of the memory, where a server has several.
            api_key: of the servers.
            patience: how long to wait, and how often to try again.
            servers: that are in use already, in place of urls.
            one_shard: accept servers of one shard, who answer of its segments alone.

        Raises:
            RemoteError: no server answers.
            NearestError: there is no such memory, or the key is wrong.
        """
        # What `Memory` reads from a folder is asked for here, and nothing of its own is made.
        self._servers = servers or Servers(urls, api_key, patience)
        self._name = name
        named = {} if name is None else {"memory": name}
        about = self._servers.get("/search/memory", named).json()
        try:
            self.manifest = msgspec.convert(about["manifest"], Manifest)
            self.name = str(about["name"])
            self._counts: dict[str, int] = {
                field: int(about[field]) for field in ("documents", "entries", "positions")
            }
            self._merged = bool(about["has_weights"])
            shard = about["shard"]
            self.shard = None if shard is None else Shard.parse(shard)
            self.groups = {
                name: msgspec.convert(group, Group) for name, group in about["groups"].items()
            }
            self._gates = {
                method: GateFile(self.manifest.gates[method], base64.b64decode(data))
                for method, data in about["gates"].items()
            }
        except (KeyError, TypeError, ValueError, SettingError, msgspec.ValidationError) as error:
            raise RemoteError(
                f"{self._servers.address} speaks another version of the protocol ({error}): use "
                "the same version of nearest on both sides"
            ) from error
        if self.shard is not None and not one_shard:
            raise SettingError(
                f"{self.address} serves shard {self.shard} of {self.name} alone: name the servers "
                f"of all {self.shard.of} (Memory.open(name, shards=[…]))"
            )
        self._of_shard = one_shard
        self.path = Path(self._servers.address) / self.name
        self.search_on = "cpu"
        self._known: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def refresh(self) -> "RemoteMemory":
        """The present snapshot: this memory itself, unless the server's has changed.

        Raises:
            RemoteError: no server answers.
        """
        now = RemoteMemory("", self._name, servers=self._servers, one_shard=self._of_shard)
        return self if now.manifest.checksum == self.manifest.checksum else now

    def __repr__(self) -> str:
        return f"<RemoteMemory {self.name!r} of {self._servers!r}: {self.entries:,} entries>"

    # --- numbers ----------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Of its first server."""
        return self._servers.address

    @property
    def entries(self) -> int:
        return self._counts["entries"]

    @property
    def documents(self) -> int:
        return self._counts["documents"]

    @property
    def positions(self) -> int:
        return self._counts["positions"]

    @property
    def has_weights(self) -> bool:
        return self._merged

    # --- entries ----------------------------------------------------------------------------------

    def _search(
        self, queries: Float[np.ndarray, "q dim"], k: int, by: By, rerank: int, ordered: bool
    ) -> Neighbours:
        options = {"k": k, "distances": by, "rerank": rerank, "ordered": ordered}
        parts = [
            self.ask("search", {"queries": np.asarray(queries[rows], np.float32)}, options)
            for rows in parts_of(len(queries), max(k, queries.shape[1]))
        ]
        for part in parts:
            self._remember(part["ids"], part["values"])
        return Neighbours(*joined(parts, "ids", "distances"))

    def key_distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        return self._measured(queries, ids, "keys")

    def index_distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        return self._measured(queries, ids, "index")

    def values(self, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        flat = ids.reshape(-1)
        told = np.full(flat.shape, NO_ENTRY, np.int64)
        missing = flat >= 0
        for known, values in self._known:
            if not missing.any():
                break
            at = np.minimum(np.searchsorted(known, flat), len(known) - 1)
            found = missing & (known[at] == flat)
            told[found] = values[at[found]]
            missing &= ~found
        if missing.any():
            asked, where = np.unique(flat[missing], return_inverse=True)
            told[missing] = self._of_entries("values", asked)[where]
        return told.reshape(ids.shape)

    def successors(self, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        return self._of_entries("successors", ids.reshape(-1)).reshape(ids.shape)

    def log_weights(self, ids: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        if not self._merged:
            return np.zeros(ids.shape, np.float32)
        return self._of_entries("log_weights", ids.reshape(-1)).reshape(ids.shape)

    @property
    def keys(self) -> Keys:
        self._refuse()

    @cached_property
    def clusters(self) -> Clusters | None:
        if self.manifest.clusters is None:
            return None
        found = self.ask("clusters", {}, {})
        return Clusters(found["labels"], found["offsets"], found["members"])

    # --- text -------------------------------------------------------------------------------------

    def longest_matches(self, context: Tokens, ends: Int[np.ndarray, " q"], most: int) -> Matches:
        parts = [
            self.ask("longest_matches", text_of(context, ends[rows]), {"k": most})
            for rows in parts_of(len(ends), most)
        ]
        for part in parts:
            self._remember(part["ids"], part["values"])
        return Matches(*joined(parts, "ids", "lengths", "longest"))

    def match_lengths(
        self, ids: Int[np.ndarray, "q k"], context: Tokens, ends: Int[np.ndarray, " q"]
    ) -> Int[np.ndarray, "q k"]:
        parts = [
            self.ask("match_lengths", {"ids": ids[rows], **text_of(context, ends[rows])}, {})
            for rows in parts_of(len(ends), ids.shape[1])
        ]
        return joined(parts, "lengths")[0]

    def ngrams(self, context: Tokens, ends: Int[np.ndarray, " q"], longest: int) -> Ngrams:
        parts = [
            self.ask("ngrams", text_of(context, ends[rows]), {"length": longest})
            for rows in parts_of(len(ends), longest)
        ]
        return Ngrams(*joined(parts, "counts", "fertility"))

    def spans_stand(
        self, context: Tokens, ends: Int[np.ndarray, " q"], length: int
    ) -> Bool[np.ndarray, " q"]:
        parts = [
            self.ask("spans_stand", text_of(context, ends[rows]), {"length": length})
            for rows in parts_of(len(ends), 1)
        ]
        return joined(parts, "stand")[0]

    def equal_documents(self, documents: Sequence[Tokens]) -> Int[np.ndarray, " documents"]:
        lengths = np.array([len(tokens) for tokens in documents], np.int64)
        found = [np.empty(0, np.int64)]
        for some in np.split(np.arange(len(lengths)), np.flatnonzero(_full(lengths))):
            if len(some):
                context = np.concatenate([documents[n] for n in some]).astype(np.int64)
                arrays = {"context": context, "ends": np.cumsum(lengths[some])}
                found.append(self.ask("equal_documents", arrays, {})["ids"])
        return np.concatenate(found)

    # --- documents --------------------------------------------------------------------------------

    def places(
        self, entries: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        parts = [
            self.ask("places", {"ids": entries[rows]}, {}) for rows in parts_of(len(entries), 1)
        ]
        documents, positions = joined(parts, "documents", "positions")
        return documents, positions

    def document(self, number: int) -> Document:
        self._check_number(number)
        told = self._servers.get("/search/memory/document", self._named({"number": number})).json()
        return Document(told["id"], told["text"], told["metadata"], self._servers.address)

    def number_of(self, document_id: str) -> int | None:
        """The number of the document with this id; None where there is none."""
        path, wanted = "/search/memory/number", self._named({"id": document_id})
        number: int | None = self._servers.get(path, wanted).json()["number"]
        return number

    def document_tokens(self, number: int) -> Tokens:
        self._check_number(number)
        return self.ask("document_tokens", {"ids": np.array([number])}, {})["tokens"]

    def _check_number(self, number: int) -> None:
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} is outside a memory of {self.documents:,}")

    # --- asking -----------------------------------------------------------------------------------

    def ask(
        self, call: str, arrays: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """The answer to a look-up of `remote.calls`."""
        answer = self._servers.post(f"/search/memory/{call}", self._named(options), packed(arrays))
        if answer.headers.get(SNAPSHOT_HEADER) != self.manifest.checksum:
            raise FolderError(
                f"{answer.url.host} answered from another snapshot of {self.name}: open it anew "
                "(`refresh`)"
            )
        return unpacked(answer.content)

    def _named(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"memory": self.name, "snapshot": self.manifest.checksum, **options}

    def _measured(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"], by: str
    ) -> Float[np.ndarray, "q k"]:
        if not ids.size:
            return np.empty(ids.shape, np.float32)
        measured = []
        for rows in parts_of(len(ids), max(ids.shape[1], queries.shape[1])):
            arrays = {"queries": np.asarray(queries[rows], np.float32), "ids": ids[rows]}
            answer = self.ask("distances", arrays, {"distances": by})
            self._remember(ids[rows], answer["values"])
            measured.append(answer["distances"])
        return np.concatenate(measured)

    def _of_entries(self, call: str, ids: Int[np.ndarray, " n"]) -> np.ndarray:
        parts = [self.ask(call, {"ids": ids[rows]}, {})[call] for rows in parts_of(len(ids), 1)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _remember(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Keep the values of the entries of the last answers: they are asked for next."""
        unique, first = np.unique(ids.reshape(-1), return_index=True)
        if len(unique):
            self._known = (unique, values.reshape(-1)[first]), *self._known[: _KNOWN - 1]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise SettingError(
            f"{self.name} is looked up over HTTP, and this needs its folder: run it where the "
            "memory is (a server that was started with --writable changes it)"
        )

    def __getattr__(self, name: str) -> NoReturn:
        """What is read from a folder's segments is not here."""
        if name not in ("segments", "bounds", "searcher"):
            raise AttributeError(name)
        self._refuse()

    take_over_settings = cast(Any, _refuse)
    add = update = sync = remove = compact = cast(Any, _refuse)
    cluster = compress = reindex = verify = info = push_to_hub = upload = cast(Any, _refuse)


def parts_of(rows: int, width: int) -> list[slice]:
    """Rows, and so many numbers each, in parts that a request has room for.

    One, of none, where there are none.
    """
    size = max(1, _AT_ONCE // max(1, width))
    return [slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size)]


def _full(lengths: Int[np.ndarray, " documents"]) -> Bool[np.ndarray, " documents"]:
    """Documents that begin a new request, since those before them fill one."""
    requests = np.cumsum(lengths) // _AT_ONCE
    return np.diff(requests, prepend=requests[:1]) > 0


def joined(parts: Sequence[Mapping[str, np.ndarray]], *names: str) -> list[np.ndarray]:
    """The arrays of these names, each of all parts."""
    return [np.concatenate([part[name] for part in parts]) for name in names]


def text_of(context: Tokens, ends: Int[np.ndarray, " q"]) -> dict[str, np.ndarray]:
    """What matches can reach back to of a context, and where the queries end in it.

    Queries that are far apart in a long context each bring their own part, with what no context
    holds between them.
    """
    reach = MAX_MATCH + 1
    first = max(0, int(ends.min()) + 1 - reach) if len(ends) else 0
    last = int(ends.max(initial=-1)) + 1
    if last - first <= len(ends) * (reach + 1):
        return {"context": np.asarray(context[first:last], np.int64), "ends": ends - first}
    parts = [context[max(0, end + 1 - reach) : end + 1] for end in ends.tolist()]
    joined = np.concatenate([np.append(part, _BETWEEN) for part in parts]).astype(np.int64)
    stops = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)
    return {"context": joined, "ends": stops - 2}
