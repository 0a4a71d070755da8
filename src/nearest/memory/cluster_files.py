"""The arrays of a memory's clusters in its folder: written and opened."""

from pathlib import Path
from typing import Any

import numpy as np

from nearest.errors import FolderError
from nearest.folder import ArrayFile, open_array
from nearest.index.clusters import Clusters
from nearest.index.neighbours import position_dtype
from nearest.memory.generation import of_generation
from nearest.memory.manifest import ClustersRecord, FileRecord, Manifest


def open_clusters(folder: Path, manifest: Manifest) -> Clusters | None:
    """Map the arrays of a memory's clusters; None where it has none.

    Raises:
        FolderError: one of them is not what the manifest says.
    """
    record = manifest.clusters
    if record is None:
        return None
    arrays = _layout(record.tokens, record.clusters, record.members)
    try:
        paths = {name: folder / record.files[name].path for name in arrays}
    except KeyError as error:
        raise FolderError(
            f"the manifest of {folder} names no {error} file of its clusters: make them anew with "
            "`nearest cluster`"
        ) from error
    return Clusters(**{name: open_array(paths[name], *arrays[name]) for name in arrays})


def write_clusters(
    folder: Path, manifest: Manifest, clusters: Clusters, made_by: str
) -> ClustersRecord:
    """Write clusters of all entries for the generation after `manifest`, and describe them."""
    count = len(clusters.offsets) - 1
    names = {}
    for name, (dtype, shape) in _layout(len(clusters.of), count, len(clusters.members)).items():
        names[name] = of_generation(manifest.generation + 1, f"clusters.{name}.npy")
        with ArrayFile(folder / names[name], dtype, rows=shape[0]) as file:
            file.write(0, getattr(clusters, name))
    return ClustersRecord(
        made_by=made_by,
        tokens=len(clusters.of),
        clusters=count,
        members=len(clusters.members),
        segments=[segment.name for segment in manifest.segments],
        files={name: FileRecord.of(folder, file) for name, file in names.items()},
    )


def _layout(
    tokens: int, clusters: int, members: int
) -> dict[str, tuple[np.dtype[Any], tuple[int]]]:
    """Dtype and shape of each array."""
    return {
        "of": (np.dtype(np.int32), (tokens,)),
        "offsets": (np.dtype(np.int64), (clusters + 1,)),
        "members": (position_dtype(tokens), (members,)),
    }
