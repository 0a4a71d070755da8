"""Whole arrays in a memory's folder."""

from pathlib import Path

import numpy as np

from nearest.folder import ArrayFile
from nearest.store.manifest import FileRecord


def write_array(root: Path, place: str, array: np.ndarray) -> FileRecord:
    """Write an array at a place below the memory's folder, and describe the file."""
    with ArrayFile(root / place, array.dtype, array.shape[1:], rows=len(array)) as file:
        file.write(0, array)
    return FileRecord.of(root, place)
