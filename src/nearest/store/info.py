"""Facts and figures about a memory folder."""

from pathlib import Path
from typing import Any

from nearest.index.choice import explained
from nearest.store.chunks import ChunkVectors
from nearest.store.manifest import KeysRecord, ModelRecord
from nearest.store.records import ChunksRecord
from nearest.store.snapshot import Snapshot


def memory_info(memory: Snapshot) -> dict[str, Any]:
    """Contents, index and settings of a memory, as `nearest info` shows them."""
    manifest, keys, clusters = memory.manifest, memory.manifest.keys, memory.manifest.clusters
    sizes = dict[str, int]()
    for segment in manifest.segments:
        for name, file in segment.files.items():
            kind = "clusters" if name.startswith("cluster_") else name
            sizes[kind] = sizes.get(kind, 0) + file.size
        for file in () if segment.index is None else segment.index.file_records():
            sizes["index"] = sizes.get("index", 0) + file.size
    for file in () if keys is None else keys.file_records():
        kind = Path(file.path).stem.partition(".")[2]
        sizes[kind] = file.size
    return {
        "memory": str(memory.path),
        "format": manifest.format,
        "snapshot": manifest.version,
        "documents": memory.documents,
        "tokens": memory.tokens,
        "entries": memory.entries,
        "bytes": sum(sizes.values()),
        "bytes_per_entry": round(sum(sizes.values()) / memory.entries, 1),
        "files": sizes,
        **_made_with(manifest.model),
        "keys": "none"
        if keys is None
        else f"{keys.layer} ({keys.module}), {_dims(keys)}, {keys.format}, {keys.metric}",
        "keys_made_in": "none" if keys is None else keys.dtype or "unknown",
        "segments": len(manifest.segments),
        "removed_documents": sum(segment.removed for segment in manifest.segments),
        "kept_entries": sum(segment.searched_count for segment in memory.segments),
        "windows": "none" if keys is None else f"{keys.window} with a stride of {keys.stride}",
        **{
            f"index_of_segment_{segment.name}": {
                "spec": segment.index.spec,
                "nprobe": segment.index.nprobe,
                "margin": segment.index.margin,
                "recall@1024": segment.index.recall,
                "recall_target": segment.index.recall_target,
                "why": explained(
                    keys.index,
                    segment.index.spec,
                    segment.index.entries,
                    keys.stored_dim,
                    segment.index.recall_target,
                ),
            }
            for segment in manifest.segments
            if segment.index is not None and keys is not None
        },
        "clusters": "none"
        if clusters is None
        else {
            "made_by": clusters.made_by,
            "clusters": clusters.clusters,
            "members": sum(segment.members or 0 for segment in manifest.segments),
        },
        "chunks": "none" if manifest.chunks is None else _chunks(memory, manifest.chunks),
        **{f"settings_of_{method}": values for method, values in manifest.settings.items()},
        "settings_found": {method: memory.settings_from(method) for method in manifest.settings}
        or "none: the paper's defaults are in use",
        **{
            f"tuned_before_{what}_changed": [
                method
                for method in manifest.tuned_at
                if what in memory.changed_since_tuning(method)
            ]
            for what in ("documents", "keys")
        },
    }


def _chunks(memory: Snapshot, chunks: ChunksRecord) -> dict[str, Any]:
    found = ChunkVectors(memory.segments, chunks)
    indexes = [s.chunk_index for s in memory.manifest.segments if s.chunk_index is not None]
    return {
        "size": chunks.size,
        "chunks": len(found),
        "without_vector": len(found.missing),
        "embedder": "none" if chunks.embedder is None else chunks.embedder.name,
        "indexes": [index.spec for index in indexes],
        "recall@4": min((index.recall for index in indexes), default=None),
    }


def _made_with(model: ModelRecord) -> dict[str, str]:
    if model.tokenizer_only:
        return {"model": "none", "tokenizer": model.name}
    kind = "encoder–decoder" if model.reads_sources else "causal"
    return {"model": model.name, "model_kind": kind}


def _dims(keys: KeysRecord) -> str:
    if keys.projection is None:
        return f"{keys.dim} dims"
    return f"{keys.projection.dim} of {keys.dim} dims"


def told_first(info: dict[str, Any]) -> list[tuple[str, str]]:
    """The few facts of `memory_info` that a notebook shows, with their names."""
    names = ("documents", "tokens", "bytes", "bytes_per_entry", "keys", "model", "snapshot")
    return [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in info.items()
        if name in names
    ]
