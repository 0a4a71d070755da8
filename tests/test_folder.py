"""Arrays and JSON on disk: whole or not at all, checked when opened, one writer at a time."""

import errno
import gc
import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nearest.errors import FolderError
from nearest.folder import (
    ArrayFile,
    disk_errors_explained,
    open_array,
    sha256_of,
    write_atomically,
    write_once,
    writer_lock,
)

INT64 = np.dtype(np.int64)
DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array, allow_pickle=False)
    return path


def path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def open_paths() -> list[str]:
    """What this process's file descriptors point to."""
    paths = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            paths.append(str(link.readlink()))
    return paths


# --- ArrayFile ------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_appended_rows_are_what_numpy_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    row_shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=2)))
    rows = data.draw(st.integers(0, 9))
    array = data.draw(hnp.arrays(dtype, (rows, *row_shape)))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    path = tmp_path_factory.getbasetemp() / "appended.npy"
    with ArrayFile(path, dtype, row_shape) as file:
        for part in np.split(array, cuts):
            file.append(part)
    found = np.load(path, allow_pickle=False)
    assert (found.dtype, found.shape) == (dtype, array.shape)
    assert found.tobytes() == array.tobytes()  # NaN payloads and signed zeros too
    assert path.read_bytes() == _npy_bytes(array)
    opened = open_array(path, dtype, array.shape)
    assert opened.tobytes() == array.tobytes()


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0))
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30),
    writes=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 30)), max_size=6),
)
def test_rows_can_be_written_anywhere_and_the_others_are_zero(
    tmp_path_factory: pytest.TempPathFactory, rows: int, writes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "anywhere.npy"
    expected = np.zeros((rows, 3), dtype=np.float16)
    with ArrayFile(path, np.dtype(np.float16), (3,), rows=rows) as file:
        for value, (first, count) in enumerate(writes, 1):
            first = min(first, rows)
            count = min(count, rows - first)
            expected[first : first + count] = value
            file.write(first, np.full((count, 3), value, dtype=np.float16))
    np.testing.assert_array_equal(np.load(path), expected)


def test_space_for_known_rows_is_reserved_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with ArrayFile(path, np.dtype(np.float16), (64,), rows=1000):
        status = path.stat()
        assert status.st_size == 128 + 1000 * 64 * 2
        assert status.st_blocks * 512 >= 1000 * 64 * 2  # reserved, not sparse


def test_a_file_system_that_cannot_reserve_space_still_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with ArrayFile(tmp_path / "a.npy", INT64, rows=4) as file:
        file.write(2, np.array([7]))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 0, 7, 0]


def test_rows_are_converted_to_the_files_dtype_and_order(tmp_path: Path) -> None:
    with ArrayFile(tmp_path / "a.npy", np.dtype(np.uint16), (2,)) as file:
        file.append(np.array([[1, 2], [3, 65_535]], dtype=np.int64))
        file.append(np.asfortranarray([[5, 6], [7, 8]]))
        file.append(np.arange(20, dtype=">u4").reshape(5, 4)[::2, 1::2])
    expected = [[1, 2], [3, 65_535], [5, 6], [7, 8], [1, 3], [9, 11], [17, 19]]
    assert np.load(tmp_path / "a.npy").tolist() == expected


@pytest.mark.parametrize(
    ("first", "shape"),
    [(0, (2, 3)), (0, (2,)), (3, (2, 2)), (-1, (1, 2)), (5, (0, 2)), (0, (5, 2))],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, first: int, shape: tuple[int, ...]
) -> None:
    with ArrayFile(tmp_path / "a.npy", INT64, (2,), rows=4) as file:
        with pytest.raises(ValueError, match="do not fit"):
            file.write(first, np.ones(shape, dtype=INT64))
        file.write(3, np.array([[8, 9]]))
    assert np.load(tmp_path / "a.npy").tolist() == [[0, 0], [0, 0], [0, 0], [8, 9]]


def test_refused_rows_are_not_counted(tmp_path: Path) -> None:
    with ArrayFile(tmp_path / "a.npy", INT64, (2,)) as file:
        file.append(np.array([[1, 2]]))
        with pytest.raises(ValueError, match="do not fit"):
            file.append(np.array([[1, 2, 3]]))
        file.append(np.array([[3, 4]]))
    assert np.load(tmp_path / "a.npy").tolist() == [[1, 2], [3, 4]]


def test_a_write_may_need_many_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data[:5]), at))
    with ArrayFile(tmp_path / "a.npy", INT64, (2,)) as file:
        file.append(np.arange(40).reshape(20, 2))
    monkeypatch.undo()
    assert np.load(tmp_path / "a.npy").tolist() == np.arange(40).reshape(20, 2).tolist()


def test_closing_counts_the_rows_and_makes_them_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(path_of(fd)), fsync(fd)))
    file = ArrayFile(tmp_path / "a.npy", INT64)
    file.append(np.arange(3))
    file.append(np.arange(4))
    assert file.close() == 7
    assert synced == [tmp_path / "a.npy"]


def test_an_interrupted_file_is_not_taken_for_an_array(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def write() -> None:
        with ArrayFile(path, INT64) as file:
            file.append(np.arange(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    for rows in (0, 5):
        with pytest.raises(FolderError):
            open_array(path, INT64, (rows,))
    path.write_bytes(path.read_bytes()[:40])  # killed while the header was written
    with pytest.raises(FolderError):
        open_array(path, INT64, (5,))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_failing_disk_leaves_no_descriptor_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with ArrayFile(tmp_path / "a.npy", INT64, rows=3) as file:
            file.write(0, np.array([1]))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert str(tmp_path / "a.npy") not in open_paths()
    del caught
    gc.collect()


# --- open_array -----------------------------------------------------------------------------------


def test_an_opened_array_is_a_read_only_map(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    opened = open_array(path, INT64, (2, 3))
    assert not opened.flags.owndata
    assert opened.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="read-only"):
        opened[0, 0] = 1
    path.unlink()  # a writer may replace the file: this reader keeps its own
    assert opened.sum() == 15


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_arrays_open(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(tmp_path / "a.npy", np.empty(shape, dtype=np.float16))
    assert open_array(path, np.dtype(np.float16), shape).shape == shape
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FolderError, match="its header says"):
        open_array(path, np.dtype(np.float16), shape)


GOOD = np.arange(6).reshape(3, 2)
OBJECT = io.BytesIO()
np.save(OBJECT, np.array([[{"a": 1}, None]] * 3, dtype=object), allow_pickle=True)
PICKLE = np.arange(6).dumps()
VERSION_2 = io.BytesIO()
np.lib.format.write_array(VERSION_2, GOOD, version=(2, 0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_npy_bytes(GOOD.astype(np.int32)), "holds int32 (3, 2), the manifest says int64 (3, 2)"),
        (_npy_bytes(GOOD.astype(np.uint64)), "holds uint64"),
        (_npy_bytes(GOOD.astype(">i8")), "holds >i8"),
        (_npy_bytes(GOOD.astype(np.float64)), "holds float64"),
        (_npy_bytes(GOOD.view("V8")), "holds |V8"),
        (_npy_bytes(GOOD.view("M8[s]")), "holds datetime64[s]"),
        (_npy_bytes(GOOD.T), "holds int64 (2, 3)"),
        (_npy_bytes(GOOD[:2]), "holds int64 (2, 2)"),
        (_npy_bytes(GOOD.reshape(6)), "holds int64 (6,)"),
        (_npy_bytes(GOOD.reshape(3, 2, 1)), "holds int64 (3, 2, 1)"),
        (_npy_bytes(GOOD).replace(b"False", b"True "), "holds int64 (3, 2), the manifest says"),
        (_npy_bytes(GOOD)[:-1], "has 175 bytes, its header says 176"),
        (_npy_bytes(GOOD)[:128], "has 128 bytes"),
        (_npy_bytes(GOOD) + b"\0", "has 177 bytes"),
        (_npy_bytes(GOOD) * 2, "has 352 bytes"),
        (OBJECT.getvalue(), "holds object"),
        (VERSION_2.getvalue(), "cannot be read as an array"),
        (PICKLE, "cannot be read as an array"),
        (b"", "cannot be read as an array"),
        (b"\x93NUMPY", "cannot be read as an array"),
        (b"\x93NUMPY\x01\x00", "cannot be read as an array"),
        (b"\x93NUMPY\x01\x00\xff\xff{}", "cannot be read as an array"),
        (b"PK\x03\x04" + bytes(200), "cannot be read as an array"),
        (bytes(176), "cannot be read as an array"),
    ],
)
def test_a_file_that_is_not_as_described_is_refused(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    with pytest.raises(FolderError, match="restore it from a copy, or rebuild") as caught:
        open_array(path, INT64, (3, 2))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("missing.npy", "folder", "missing/a.npy"):
        with pytest.raises(FolderError, match="cannot be read as an array"):
            open_array(tmp_path / name, INT64, (3, 2))


def test_every_length_but_the_right_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    data = _npy_bytes(GOOD)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FolderError):
            open_array(path, INT64, (3, 2))


def test_a_damaged_header_gives_the_same_array_or_a_folder_error(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "a.npy"
    data = _npy_bytes(GOOD)
    damaged = [(position, int(rng.integers(256))) for position in range(128) for _ in range(8)]
    damaged += [(8, 1), (21, ord(",")), (22, ord("a")), (26, ord("B")), (60, ord("("))]
    opened = 0
    for position, value in damaged:
        path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
        try:
            found = open_array(path, INT64, (3, 2))
        except FolderError:
            continue
        assert found.tolist() == GOOD.tolist()
        opened += 1
    assert opened < len(damaged) / 2


@pytest.mark.parametrize(
    "header",
    [
        b"(" * 100,
        b"'''",
        b"{[1]: 2}",
        b"{}",
        b"1" * 6000,
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (3L, 2L)}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 2)}",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (-3, 2)}",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999999999, 2)}",
        b"__import__('os').abort()",
        b"\xff" * 60,
    ],
)
def test_no_header_can_do_harm(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(FolderError):
        open_array(path, INT64, (3, 2))


# --- write_atomically -----------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, b"", b"old" * 1000])
@pytest.mark.parametrize("new", [b"", b"new" * 100_000])
def test_a_file_is_replaced(tmp_path: Path, old: bytes | None, new: bytes) -> None:
    path = tmp_path / "manifest.json"
    if old is not None:
        path.write_bytes(old)
    write_atomically(path, new)
    assert path.read_bytes() == new
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("owner", "call"),
    [(os, "fsync"), (Path, "replace"), (Path, "open")],
    ids=lambda item: str(item),
)
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_leaves_the_old_file_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    owner: Any,
    call: str,
    old: bytes | None,
) -> None:
    path = tmp_path / "manifest.json"
    if old is not None:
        path.write_bytes(old)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == (
        [] if old is None else [("manifest.json", old)]
    )


def test_the_data_are_durable_before_the_rename_and_the_rename_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    events: list[tuple[str, bool]] = []
    fsync, replace = os.fsync, Path.replace

    def record_sync(fd: int) -> None:
        events.append((path_of(fd).name, path.exists()))
        fsync(fd)

    def record_replace(self: Path, target: Path) -> Path:
        events.append(("rename", path.exists()))
        assert self.read_bytes() == b"new"
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_atomically(path, b"new")
    assert events == [
        ("manifest.json.partial", False),
        ("rename", False),
        (tmp_path.name, True),
    ]


# --- the writer's lock ----------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from nearest.folder import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold_lock(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", ["exit", "SIGKILL", "SIGTERM"])
def test_the_lock_excludes_another_process_until_that_ends(tmp_path: Path, end: str) -> None:
    holder = hold_lock(tmp_path)
    with holder:
        with pytest.raises(FolderError, match="is being written by another process") as caught:
            writer_lock(tmp_path).__enter__()
        assert str(tmp_path) in str(caught.value)
        if end == "exit":
            assert holder.stdin is not None
            holder.stdin.close()
        else:
            holder.send_signal(signal.Signals[end])
        holder.wait(30)
        with writer_lock(tmp_path):
            assert list(tmp_path.iterdir()) == []  # and it leaves no file behind


def test_the_lock_is_released_after_an_error_and_is_not_shared(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writer_lock(tmp_path):
        raise KeyboardInterrupt
    with writer_lock(tmp_path):
        with pytest.raises(FolderError, match="another process"):
            writer_lock(tmp_path).__enter__()
        (tmp_path / "other").mkdir()
        with writer_lock(tmp_path / "other"):
            pass
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child, writer_lock(tmp_path):  # a program started meanwhile does not keep it
        pass
    assert str(tmp_path) not in open_paths()


# --- errors and checksums -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full: free some space, then run again"),
        (errno.EDQUOT, "the disk quota is used up: free some space, then run again"),
        (errno.EFBIG, "a file would exceed the size limit (ulimit -f): raise it, then run again"),
        (errno.EACCES, "permission is denied: choose a folder you may write to"),
        (errno.EPERM, "permission is denied: choose a folder you may write to"),
        (errno.EROFS, "the file system is read-only: choose another folder"),
        (errno.EIO, ": "),
    ],
)
def test_a_failing_disk_is_explained(tmp_path: Path, number: int, message: str) -> None:
    original = OSError(number, os.strerror(number), str(tmp_path / "file.npy"))
    with pytest.raises(FolderError) as caught, disk_errors_explained(tmp_path):
        raise original
    assert str(caught.value).startswith(f"cannot write to {tmp_path}: ")
    assert message in str(caught.value)
    assert caught.value.__cause__ is original


@pytest.mark.parametrize(
    "error",
    [
        FolderError("mine"),
        ValueError("mine"),
        KeyboardInterrupt("mine"),
        ConnectionResetError("mine"),
        FileNotFoundError(errno.ENOENT, "mine", "elsewhere.txt"),
        PermissionError(errno.EACCES, "mine, of a document", "elsewhere.txt"),
    ],
)
def test_other_errors_pass_through(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error), match="mine") as caught, disk_errors_explained(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("size", [0, 1, 262_144, 1_000_003])
def test_checksums_are_sha256_of_the_whole_file(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_file_that_several_write_at_once_is_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sync, nested = tmp_path / "begun.json", os.fsync, list[bool]()

    def between(fd: int) -> None:
        if not nested:
            nested.append(True)
            write_once(path, b"second")
        sync(fd)

    monkeypatch.setattr(os, "fsync", between)
    write_once(path, b"first")
    assert path.read_bytes() == b"second"  # which was there before
    write_once(path, b"third")
    assert path.read_bytes() == b"second"

    def no_links(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    write_once(tmp_path / "other.json", b"one")
    assert (tmp_path / "other.json").read_bytes() == b"one"
    assert {file.name for file in tmp_path.iterdir()} == {"begun.json", "other.json"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_names_are_made_durable_where_a_file_system_can(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some, such as those of SMB, know no fsync of a folder."""
    synced = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        synced(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EINVAL:
        write_atomically(tmp_path / "a", b"data")
        assert (tmp_path / "a").read_bytes() == b"data"
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_atomically(tmp_path / "a", b"data")
