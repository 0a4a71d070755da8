"""The arrays of a segment's clusters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nearest.folder import open_array
from nearest.index.clusters import Clusters
from nearest.index.neighbours import position_dtype
from nearest.store.array_files import write_array
from nearest.store.manifest import FileRecord

ARRAYS = ("of", "offsets", "members")


def open_clusters(paths: Mapping[str, Path], tokens: int, clusters: int, members: int) -> Clusters:
    """Map the arrays of a segment's clusters.

    Raises:
        KeyError: `paths` lacks one of them.
        FolderError: one is not what it must be.
    """
    layout: dict[str, tuple[np.dtype[Any], tuple[int]]] = {
        "of": (np.dtype(np.int32), (tokens,)),
        "offsets": (np.dtype(np.int64), (clusters + 1,)),
        "members": (position_dtype(tokens), (members,)),
    }
    return Clusters(
        **{name: open_array(paths[f"cluster_{name}"], *layout[name]) for name in ARRAYS}
    )


def write_clusters(root: Path, folder: str, prefix: str, found: Clusters) -> dict[str, FileRecord]:
    """Write the clusters of a segment below `root` and describe the files."""
    files = {}
    for name in ARRAYS:
        place = f"{folder}/{prefix}clusters.{name}.npy"
        files[f"cluster_{name}"] = write_array(root, place, getattr(found, name))
    return files
