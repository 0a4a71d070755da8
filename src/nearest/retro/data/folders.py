"""Reading and writing the small folders of arrays that RETRO's data is made of."""

import errno
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearest.errors import FolderError
from nearest.folder import whole_file


def save_array(path: Path, array: np.ndarray) -> None:
    """Write `.npy` in one rename: a kill leaves the old file or the new."""
    with whole_file(path) as file:
        np.save(file, array, allow_pickle=False)


def save_blocks(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[np.ndarray]
) -> None:
    """As `save_array`, of an array that comes in blocks of rows."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)


def read_array(path: Path) -> np.ndarray:
    """Map a `.npy` file read-only (FolderError where it is missing, empty or cut short)."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FolderError(f"{path} is missing: make it anew, or restore it from a copy") from error
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise FolderError(
                f"{path} cannot be opened: too many files are open; raise the limit (ulimit -n)"
            ) from error
        raise FolderError(
            f"{path} is damaged ({str(error).strip().splitlines()[0]}): make it anew, or restore "
            "it from a copy"
        ) from error
    return array


def joined_arrays(paths: Sequence[Path], like: np.ndarray) -> np.ndarray:
    """The rows of `.npy` files, one after the other; two files are open at most.

    Args:
        paths: of arrays.
        like: an array of their dtype and of as many columns.
    """
    rows = [len(read_array(path)) for path in paths]
    whole = np.empty((sum(rows), *like.shape[1:]), like.dtype)
    for path, first, count in zip(paths, np.cumsum([0, *rows]).tolist(), rows, strict=False):
        whole[first : first + count] = read_array(path)
    return whole


def read_record(path: Path, newest: int, what: str) -> dict[str, Any]:
    """The JSON object that describes a folder (FolderError where it is none, or too new)."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format"]
    except FileNotFoundError as error:
        raise FolderError(f"{path.parent} is not {what}: it has no {path.name}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} is damaged ({error}): make it anew") from error
    if not isinstance(version, int) or version > newest:
        raise FolderError(
            f"{path.parent} has format {version}, this version reads up to {newest}: update nearest"
        )
    return dict(record)
