"""What users hold: a memory that is opened, searched and changed.

`store.snapshot` reads what it stores and `store.searched` searches it; this adds what was trained
for it, and the changes, each of which is a function of `build/`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from nearest.build.options import bare, options_of
from nearest.corpus.incoming import Documents
from nearest.index.choice import AUTO, RECALL
from nearest.index.gpu import SearchOn, checked_search_on
from nearest.markup import table
from nearest.progress import Progress, no_progress
from nearest.store.info import memory_info, told_first
from nearest.store.manifest import read_manifest
from nearest.store.objects import address_of, fetched, upload
from nearest.store.opening import open_snapshot
from nearest.store.parts.gates import GateFile, open_gates
from nearest.store.parts.index import IndexChoice
from nearest.store.searched import SearchedSnapshot
from nearest.store.snapshot import Snapshot
from nearest.store.verify import verify

if TYPE_CHECKING:
    from nearest.build.build import BuildOptions
    from nearest.build.search_text import Passage
    from nearest.build.sync import Synced


class Memory(SearchedSnapshot):
    """A snapshot of a memory folder, what was tuned for it, and the changes that follow it."""

    def __init__(
        self,
        snapshot: Snapshot,
        search_on: SearchOn = "cpu",
        known: SearchedSnapshot | None = None,
    ) -> None:
        super().__init__(snapshot, search_on, known)
        self._gates = open_gates(self.path, self.manifest)

    @classmethod
    def open(
        cls,
        path: str | Path,
        search_on: str = "cpu",
        *,
        shards: "str | Sequence[str | Sequence[str]] | None" = None,
        **options: Any,
    ) -> "Memory":
        """Open the present snapshot of a memory folder; files are checked as they are first used.

        Args:
            path: the folder, or its address in object storage ("s3://bucket/law.memory"), from
                which it is fetched into a cache once; with `shards`, what servers call the memory.
            search_on: "cpu", or "gpu": keys or indexes are copied there at the first search.
            shards: addresses of servers of which each holds some segments, in place of the folder
                (`nearest serve MEMORY --shard 1/2`); several for one shard hold the same. Or
                "ray://auto", whose actors do, of the folder (`serve.ray_shards.on_ray`).
            **options: of `remote.sharded.ShardedMemory`: api_key, patience, wait, partial; or of
                fsspec's file system for an address: key, secret, endpoint_url.

        Raises:
            FolderError: it is no memory, damaged, or of a newer format.
            SettingError: there is no GPU to search on, or the servers do not hold all shards.
            RemoteError: a shard does not answer.
        """
        if isinstance(shards, str):
            from nearest.serve.ray_shards import on_ray

            return on_ray(Path(path), shards, search_on=search_on, **options)
        if shards is not None:
            from nearest.remote.sharded import ShardedMemory, refuse_to_search_on

            refuse_to_search_on(search_on)
            return ShardedMemory(shards, Path(path).name.removesuffix(".memory"), **options)
        address, place = address_of(path), checked_search_on(search_on)
        if address is not None:
            return cls(open_snapshot(fetched(address, **options)), place)
        if options:
            raise TypeError(f"{', '.join(options)} is of shards or addresses, not of a folder")
        return cls(open_snapshot(Path(path)), place)

    @classmethod
    def build(
        cls,
        model: Any,
        tokenizer: Any,
        documents: Documents,
        path: str | Path,
        options: "BuildOptions | None" = None,
        *,
        tune: bool = True,
        **fields: Any,
    ) -> "Memory":
        """Make a memory of documents in a new folder, and open it.

        Args:
            model: a Hugging Face language model, causal or encoder–decoder, in evaluation mode.
                None makes a memory without keys of the tokenizer's tokens: for RETRO's chunks, and
                for the method suffix with any model that has this tokenizer.
            tokenizer: its tokenizer.
            documents: a corpus, strings, rows, a table or a path; they are read once, as a stream.
                An encoder–decoder needs documents with an `encoder_text`.
            path: the folder, which must not exist or be empty.
            options: how; the defaults of `BuildOptions` if not given.
            tune: find settings of knn, suffix and hybrid on a sample of the documents, each as if
                it were not in the memory. `nearest.tune` on held-out text finds better ones.
            **fields: of `BuildOptions`, instead of those in `options`.

        Raises:
            NearestError: something cannot be used. Nothing is left behind, unless the build took
                more than half a minute: the same build then goes on from there.
        """
        # Building needs torch and transformers; opening and looking up do not wait for them.
        from nearest.build.build import NO_KEYS, BuildOptions, build_memory
        from nearest.verbs.self_tune import self_tune

        if model is None and options is None:
            fields = {"keys": NO_KEYS, **fields}
        asked = options_of(BuildOptions, options, fields)
        build_memory(Path(path), documents, bare(model), tokenizer, asked)
        memory = cls.open(path)
        if tune and model is not None:
            self_tune(model, memory, tokenizer, asked.progress)
        return memory

    @classmethod
    def import_store(
        cls, store: str | Path, model: Any, tokenizer: Any, path: str | Path, **options: Any
    ) -> "Memory":
        """Make a memory of a datastore of knn-transformers or RetoMaton, and open it.

        `store` is its folder or its file of keys, made by `model` and `tokenizer`; the memory's
        folder must not exist or be empty. Options are those of `build.importing.ImportOptions`.
        """
        from nearest.build.importing import ImportOptions, import_store

        chosen = options_of(ImportOptions, None, options)
        import_store(Path(store), Path(path), bare(model), tokenizer, chosen)
        return cls.open(path)

    @classmethod
    def from_pretrained(
        cls, repo_or_path: str | Path, *, search_on: str = "cpu", **options: Any
    ) -> "Memory":
        """Open a memory folder, or "owner/name" on the Hugging Face hub, downloaded once.

        Options are those of `huggingface_hub.snapshot_download`: revision, token, repo_type …
        """
        from nearest.build.hub import downloaded

        return cls.open(downloaded(repo_or_path, **options), search_on)

    def push_to_hub(
        self,
        repo: str,
        *,
        license: str | None = None,  # noqa: A002  (the name that cards use)
        base_model: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        repo_type: str = "model",
    ) -> str:
        """Upload the memory, documents in full, to the Hugging Face hub; return its address.

        `license` is that of the documents, `base_model` the model's name on the hub where the
        memory was built with a folder; see `build.hub.push`.
        """
        from nearest.build.hub import push

        return push(self, repo, license, base_model, private, token, repo_type)

    def upload(self, address: str, progress: Progress = no_progress, **options: Any) -> str:
        """Write the memory to object storage, its manifest last; see `store.objects.upload`."""
        return upload(self.path, address, progress, **options)

    def search_text(
        self, model: Any, tokenizer: Any, text: str, k: int = 10, *, force: bool = False
    ) -> "list[Passage]":
        """The k places where the model's state is the most like that at the end of `text`.

        Nearest first. `force` skips the check that the model is the one that built the memory.
        """
        from nearest.build.search_text import search_text

        return search_text(self, bare(model), tokenizer, text, k, force=force)

    def refresh(self) -> "Memory":
        """The present snapshot: this memory itself, unless a writer has published another.

        This one stays what it was; they share what both hold, but not entry ids.
        """
        if read_manifest(self.path, self.shard).version == self.manifest.version:
            return self
        return Memory(open_snapshot(self.path, self, self.shard), self.search_on, self)

    def take_over_settings(self) -> None:
        """Take over the settings and gates in the folder; all else stays as it was opened."""
        stored = read_manifest(self.path)
        self._gates = open_gates(self.path, stored)
        self.manifest = msgspec.structs.replace(
            self.manifest, settings=stored.settings, gates=stored.gates, tuned_at=stored.tuned_at
        )

    def add(
        self,
        model: Any,
        tokenizer: Any,
        documents: Documents,
        *,
        replace: bool = False,
        if_exists: Literal["error", "skip", "replace"] = "error",
        **options: Any,
    ) -> "Memory":
        """Add documents in a new snapshot, and open it; this one stays what it was.

        Args:
            model, tokenizer: those that built the memory; model None where it has no keys.
            documents: as in `build`; what is done costs time for these, not for those there are.
            replace: each takes the place of the document with its id, which must be there.
            if_exists: whether a document whose id is there is an error, skipped, or replaces it.
            **options: batch_size, force, progress, as in `AddOptions`.

        Raises:
            NearestError: something cannot be used, or an id is there (or, to replace, is not).
        """
        from nearest.build.add import AddOptions, add_documents

        how = options_of(AddOptions, None, options)
        add_documents(
            self.path, documents, bare(model), tokenizer, how, replace=replace, if_exists=if_exists
        )
        return self.refresh()

    def sync(
        self,
        model: Any,
        tokenizer: Any,
        documents: Documents,
        *,
        dry_run: bool = False,
        **options: Any,
    ) -> "tuple[Memory, Synced]":
        """Make the memory hold exactly these documents, in one snapshot, and open it.

        Files are told by paths, rows by ids. What is equal stays, what differs is replaced, what is
        new is added, and what is gone is removed, unless it may be of a file that cannot be read.

        Args:
            model, tokenizer: as in `add`; not needed for a dry run.
            documents: as in `build`; all that the memory is to hold.
            dry_run: only count what would be done.
            **options: as in `add`; allow_empty: remove what came from folders that are empty now.

        Raises:
            NearestError: something cannot be used, or nothing would be left; nothing is changed.
        """
        from nearest.build.sync import SyncOptions, compare_documents, sync_documents

        how = options_of(SyncOptions, None, options)
        if dry_run:
            return self, compare_documents(self.path, documents, how)
        synced = sync_documents(self.path, documents, bare(model), tokenizer, how)
        return self.refresh(), synced

    def update(self, model: Any, tokenizer: Any, documents: Documents, **options: Any) -> "Memory":
        """Replace documents under their ids, in one snapshot; otherwise as `add`."""
        return self.add(model, tokenizer, documents, replace=True, **options)

    def remove(
        self, ids: Iterable[str] = (), *, where: Mapping[str, Any] | None = None
    ) -> "Memory":
        """Remove documents in a new snapshot, and open it.

        No access path leads to them any more; `compact` then erases them from the disk.

        Args:
            ids: of documents, all of which must be there.
            where: metadata that documents must have, all of it.
        """
        from nearest.build.remove import remove_documents

        remove_documents(self.path, ids, where or {})
        return self.refresh()

    def compact(self, progress: Progress = no_progress) -> "Memory":
        """Make one segment, or a few large ones, of all that was not removed, and open it."""
        from nearest.build.compact import compact_memory

        compact_memory(self.path, progress)
        return self.refresh()

    def cluster(
        self,
        clusters: int | None = None,
        *,
        sample: int | None = None,
        iterations: int = 10,
        greedy_merge: bool = False,
        neighbours: int = 9,
        progress: Progress = no_progress,
        workers: int | None = None,
        ray: str | None = None,
    ) -> "Memory":
        """Find which entries share a state, for RetoMaton to follow, and open the new snapshot.

        Args:
            clusters, sample, iterations: of k-means: how many clusters, and the entries that it
                finds centroids in (32 a cluster if not given).
            greedy_merge, neighbours: join near entries of one value instead (arXiv:2109.04212).
            workers, ray: who else finds the nearest centroids, as in `BuildOptions`.

        Raises:
            NearestError: no clusters can be made so, there are no keys, or it cannot be written.
        """
        from nearest.build.cluster import cluster_memory, how_to_cluster

        how = how_to_cluster(clusters, sample, iterations, neighbours if greedy_merge else None)
        cluster_memory(self.path, how, progress, workers, ray)
        return self.refresh()

    def compress(
        self,
        keys: str | None = None,
        *,
        pca: int | None = None,
        merge: bool = False,
        neighbours: int | None = None,
        index: str | None = None,
        recall: float | None = None,
        progress: Progress = no_progress,
    ) -> "Memory":
        """Make the keys smaller, and open the new snapshot; tune it again (arXiv:2109.04212).

        Args:
            keys: "fp16", "int8", or "pqM": a byte for each of M parts.
            pca: dimensions to keep.
            merge: join near entries of one value into one that counts for all of them.
            neighbours: of each entry, that may be merged into it; 9 if not given.
            index: a FAISS factory string, "exact" or "auto"; as before if not given.
            recall: recall@1024 to tune the index to; as before if not given.

        Raises:
            SettingError: the settings do not fit the memory, or it has no keys.
            FolderError: the folder cannot be written.
        """
        from nearest.build.compress import Compression, compress_memory

        how = Compression(keys, pca, merge, neighbours, index, recall)
        compress_memory(self.path, how, progress)
        return self.refresh()

    def reindex(
        self,
        index: str = AUTO,
        *,
        recall: float = RECALL,
        nprobe: int | None = None,
        progress: Progress = no_progress,
        workers: int | None = None,
        ray: str | None = None,
    ) -> "Memory":
        """Give every segment another index, and open the new snapshot.

        Args:
            index: a FAISS factory string, "exact" or "auto".
            recall: recall@1024 that the search is tuned to.
            nprobe: lists to search; tuned to the recall if not given.
            workers, ray: who else makes indexes, as in `BuildOptions`.

        Raises:
            SettingError: the index does not fit the keys, or the memory has none.
            FolderError: the folder cannot be written.
        """
        from nearest.build.index import rebuild_index

        rebuild_index(self.path, IndexChoice(index, recall, nprobe), progress, workers, ray)
        return self.refresh()

    def verify(self, progress: Progress = no_progress) -> list[str]:
        """Read the whole folder; what is wrong with it, one sentence each, or nothing."""
        return verify(self.path, progress)

    def _repr_html_(self) -> str:
        """What it holds, for notebooks; `info` says all."""
        return table(("memory", str(self.path)), told_first(self.info()))

    def info(self) -> dict[str, Any]:
        """What the memory holds, how it is searched and what was tuned, as `nearest info` says."""
        return memory_info(self)

    def gate(self, method: str) -> GateFile | None:
        """The gate that was trained for a method; None when none was."""
        return self._gates.get(method)
