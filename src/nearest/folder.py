"""Files on disk: arrays and JSON, whole or not at all, with checksums and a writer's lock.

Knows nothing of what the arrays mean. No pickle, ever: `.npy` is opened with `allow_pickle=False`.
"""

import errno
import hashlib
import io
import mmap
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from nearest.errors import FolderError, warn_caller
from nearest.machine import (
    ask_for_large_pages,
    file_system,
    forget_cached,
    machine_memory,
    reserve,
    try_lock,
)

_LARGE_PAGE = 1 << 21  # bytes
_SHARE_IN_LARGE_PAGES = 0.25  # of the machine's RAM


def refuse_address(path: Path) -> None:
    """Raise FolderError where a path is an address, which `Path` has left with one slash."""
    if found := re.fullmatch(r"([a-z][a-z0-9+.-]+):/+(.*)", str(path)):
        raise FolderError(
            f"{found[1]}://{found[2]} is an address, and a folder is needed here: name the "
            "memory's own, on the machine where it lies (`nearest upload` copies one to an address)"
        )


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable, or a folder's names, where the file system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        unknown = error.errno in (errno.EINVAL, errno.EOPNOTSUPP)  # of folders, as on SMB
        if not (unknown and path.is_dir()):
            raise
    finally:
        os.close(fd)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Replace `path` by what is written in the context, in one rename and durably.

    A reader, or a kill, sees the old file or the new; after an error the old one stands.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_file(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; see `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def write_once(path: Path, data: bytes) -> None:
    """Write a file, whole and durably, unless there is one: of several processes, the first does.

    Where the file system has no hard links, the last of several that begin at once does.
    """
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            return
        except OSError:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_file(path.parent)


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn a full or failing disk into a FolderError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder):
            raise  # of something else, such as a document that is being read
        reasons = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EFBIG: "a file would exceed the size limit (ulimit -f): raise it",
            errno.EACCES: "permission is denied: choose a folder you may write to",
            errno.EPERM: "permission is denied: choose a folder you may write to",
            errno.EIO: "the disk fails: choose another",
            errno.EROFS: "the file system is read-only: choose another folder",
        }
        reason = reasons.get(error.errno or 0)
        if reason is None:
            raise
        raise FolderError(f"cannot write to {folder}: {reason}, then run again") from error


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's one writer's lock.

    The lock is the kernel's, on the folder itself: it leaves no file behind and a crashed writer's
    lock is gone with its process. On NFS it is known to this host alone, which a warning says.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not try_lock(fd):
            raise FolderError(
                f"{folder} is being written by another process: wait for it to finish, or end it"
            )
        if file_system(folder).startswith("nfs"):
            warn_caller(
                f"{folder} is on NFS, where the lock keeps out writers on this host alone: let no "
                "other host write it meanwhile"
            )
        yield
    finally:
        os.close(fd)


class ArrayFile:
    """A `.npy` file written row by row, so that an array larger than memory never exists as one.

    Rows are appended, or, when `rows` is known beforehand, written anywhere. Space for known rows
    is reserved at once: a full disk is then found before any work, as an error and not as a crash
    of a memory map. Rows never written are zero.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any],
        row_shape: tuple[int, ...] = (),
        rows: int = 0,
        *,
        going_on: bool = False,
    ) -> None:
        """With `going_on`, the file is there already, of this shape, and its rows are kept."""
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._row_bytes = self._dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        self._rows = rows
        self._file = path.open("r+b" if going_on else "wb", buffering=0)
        try:
            self._start = self._write_header()
            if rows and not going_on:
                reserve(self._file.fileno(), self._start, rows * self._row_bytes)
        except BaseException:
            self._file.close()
            raise

    def _write_header(self) -> int:
        """Write the header for the present shape; numpy pads it so that its length is constant."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._rows, *self._row_shape),
            },
        )
        self._pwrite(header.getvalue(), 0)
        return header.tell()

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    def append(self, rows: np.ndarray) -> None:
        """Add rows [n, *row_shape] at the end."""
        first, self._rows = self._rows, self._rows + len(rows)
        try:
            self.write(first, rows)
        except ValueError:
            self._rows = first
            raise

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write rows [n, *row_shape] at row number `first`; they must lie inside the array."""
        if rows.shape[1:] != self._row_shape or not 0 <= first <= self._rows - len(rows):
            raise ValueError(f"rows {rows.shape} at {first} do not fit [{self._rows}, ...]")
        if len(rows):
            data = np.ascontiguousarray(rows, dtype=self._dtype)
            self._pwrite(data.data, self._start + first * self._row_bytes)

    def flush(self) -> None:
        """Make what was written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> int:
        """Write the final header, make the file durable, and return the number of rows."""
        with self._file:
            self._write_header()
            os.fsync(self._file.fileno())
            # What was written piece by piece is kept in small pages; read anew, in large ones.
            forget_cached(self._file.fileno())
        return self._rows

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _shortened(error: Exception, most: int = 200) -> str:
    """The first line of a message, cut where it goes on to quote what it could not read."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= most else f"{line[:most]}…"


def open_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map a `.npy` file read-only after checking that it is what the manifest says.

    Its pages are asked to be large ones, as long as the file is small beside the machine's memory:
    scattered rows are then found sooner, and each first touch reads two megabytes.

    Raises FolderError when the file is missing, truncated, or of another dtype or shape.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version)
            if read is None:
                raise ValueError(f"npy format {version} is not written by nearest")
            with warnings.catch_warnings(action="ignore"):
                found_shape, fortran, found_dtype = read(file)
            start = file.tell()
    except Exception as error:  # numpy's reader of damaged headers raises many kinds
        raise FolderError(
            f"{path} cannot be read as an array ({_shortened(error)}): restore it from a copy, or "
            "rebuild"
        ) from error
    if fortran or found_shape != shape or found_dtype != dtype:
        raise FolderError(
            f"{path} holds {found_dtype} {found_shape}, the manifest says {dtype} {shape}: "
            "restore it from a copy, or rebuild"
        )
    expected = start + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
    if path.stat().st_size != expected:
        raise FolderError(
            f"{path} has {path.stat().st_size:,} bytes, its header says {expected:,}: "
            "restore it from a copy, or rebuild"
        )
    if 0 in shape:
        return np.empty(shape, dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if _LARGE_PAGE <= expected <= _SHARE_IN_LARGE_PAGES * machine_memory():
        ask_for_large_pages(mapped)
    array: np.ndarray = np.frombuffer(mapped, dtype, offset=start).reshape(shape)
    return array
