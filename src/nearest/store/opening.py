"""Open a snapshot of a memory folder, or a shard of it, beside one that is open already."""

from pathlib import Path

from nearest.errors import FolderError
from nearest.store.manifest import Manifest, read_manifest
from nearest.store.segment import Segment, same_stored
from nearest.store.shard import Shard
from nearest.store.snapshot import Snapshot


def open_snapshot(
    path: Path, known: Snapshot | None = None, shard: Shard | None = None
) -> Snapshot:
    """Open the present snapshot of a memory folder; files are checked as they are first used.

    Args:
        path: the folder.
        known: an earlier snapshot of it, whose segments are shared as far as they are the same.
        shard: open the segments of this one alone; the files of others need not be there.

    Raises:
        FolderError: it is no memory, damaged, or of a newer format.
    """
    while True:
        manifest = read_manifest(path, shard)
        shared = {} if known is None else _shared(known, manifest)
        try:
            segments = [
                shared[record.name].with_record(record)
                if record.name in shared
                else Segment(path, manifest, record)
                for record in (manifest.segments[n] for n in manifest.segments_of(shard))
            ]
            return Snapshot(path, manifest, segments, shard)
        except (FolderError, FileNotFoundError):
            if read_manifest(path, shard).version == manifest.version:
                raise  # else a writer has published meanwhile, and deleted the files of before


def _shared(known: Snapshot, manifest: Manifest) -> dict[str, Segment]:
    """By name, the segments that both snapshots have, but for what is removed."""
    own = known.manifest
    if any(
        getattr(own, what) != getattr(manifest, what)
        for what in ("model", "keys", "clusters", "chunks")
    ):
        return {}
    records = {record.name: record for record in manifest.segments}
    return {
        segment.record.name: segment
        for segment in known.segments
        if segment.record.name in records
        and same_stored(segment.record, records[segment.record.name])
    }
