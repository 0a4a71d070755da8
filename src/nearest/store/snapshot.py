"""A state of a memory folder, opened for reading; a writer that replaces it does not disturb it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearest.errors import FolderError
from nearest.index.keys import JoinedKeys, Keys
from nearest.store.manifest import KeysRecord, Manifest, read_manifest
from nearest.store.segment import Segment, no_keys


@dataclass(frozen=True)
class Snapshot:
    """The segments of a memory, as one manifest describes them.

    Entry ids are int64 and count through all segments; positions of removed documents count, too.
    """

    path: Path
    manifest: Manifest
    segments: list[Segment]

    @classmethod
    def open(cls, path: Path) -> "Snapshot":
        """Open the present snapshot of a memory folder; files are checked as they are first used.

        Raises:
            FolderError: it is no memory, damaged, or of a newer format.
        """
        while True:
            manifest = read_manifest(path)
            try:
                return cls(path, manifest, [Segment(path, manifest, r) for r in manifest.segments])
            except (FolderError, FileNotFoundError):
                if read_manifest(path).generation == manifest.generation:
                    raise  # else a writer has published meanwhile, and deleted the files of before

    @cached_property
    def bounds(self) -> Int[np.ndarray, " segments_plus_1"]:
        """The first entry id of each segment, and the id after the last."""
        return np.cumsum([0, *(segment.record.tokens for segment in self.segments)])

    @cached_property
    def keys(self) -> Keys:
        """The stored keys of all segments (SettingError when the memory has none)."""
        parts = [segment.keys for segment in self.segments]
        return parts[0] if len(parts) == 1 else JoinedKeys(parts, self.bounds.tolist())

    @property
    def keys_record(self) -> KeysRecord:
        """What the keys are (SettingError when the memory has none)."""
        if self.manifest.keys is None:
            raise no_keys(self.path)
        return self.manifest.keys

    def keyed_entries(self) -> Int[np.ndarray, " m"]:
        """The ids of all entries that have a key, ascending.

        All have one, except those merged into an entry whose document was removed since.
        """
        parts = zip(self.segments, self.bounds.tolist(), strict=False)
        return np.concatenate([segment.keyed + first for segment, first in parts])
