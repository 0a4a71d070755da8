"""What the operating system offers: limits of RAM, file systems, and calls that may be missing."""

import errno
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from conftest import make_tokenizer
from nearest import Memory, machine
from nearest.folder import ArrayFile, open_array, writer_lock
from nearest.machine import file_system, machine_memory

SOURCE = str(Path(machine.__file__).parents[1])
_AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
INT64 = np.dtype(np.int64)
PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "5000"}, 5000),
        ("0::/job/step", {"job/step/memory.max": "3000", "job/memory.max": "5000"}, 3000),
        ("0::/outside/of/the/container", {"memory.max": "4000"}, 4000),
        ("4:cpu,memory:/job", {"memory/job/memory.limit_in_bytes": "7000"}, 7000),
        ("4:cpu:/job", {"memory/job/memory.limit_in_bytes": "7000"}, PHYSICAL),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "9223372036854771712"}, PHYSICAL),
        ("0::/", {}, PHYSICAL),
    ],
)
def test_ram_is_what_control_groups_allow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    files: dict[str, str],
    expected: int,
) -> None:
    for place, text in files.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
    assert machine_memory() == expected


def mounts(path: Path, folder: Path, kind: str) -> Path:
    path.write_text(
        "22 1 0:20 / / rw - ext4 /dev/root rw\n"
        f"30 22 0:40 / {folder} rw,relatime shared:5 - {kind} server:/export rw\n"
    )
    return path


def test_the_file_system_of_a_folder_is_that_of_its_nearest_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "share"
    folder.mkdir()
    monkeypatch.setattr(machine, "_MOUNTS", mounts(tmp_path / "mounts", folder, "nfs4"))
    assert file_system(folder / "law.memory") == "nfs4"
    assert file_system(tmp_path) == "ext4"
    monkeypatch.setattr(machine, "_MOUNTS", tmp_path / "missing")
    assert file_system(folder) == ""


def test_a_writer_on_nfs_is_told_what_the_lock_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writer_lock(tmp_path):
        pass
    mounted = mounts(tmp_path.parent / f"{tmp_path.name}.mounts", tmp_path, "nfs")
    monkeypatch.setattr(machine, "_MOUNTS", mounted)
    with pytest.warns(UserWarning, match="NFS"), writer_lock(tmp_path):
        pass


def test_arrays_are_written_and_read_without_calls_that_only_linux_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    with ArrayFile(tmp_path / "a.npy", INT64, rows=4) as file:
        file.write(2, np.array([7]))
    assert open_array(tmp_path / "a.npy", INT64, (4,)).tolist() == [0, 0, 7, 0]


def test_ram_is_counted_on_where_a_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cgroup_limits", list)
    monkeypatch.delattr(os, "sysconf")
    assert machine_memory() == 4 << 30
    monkeypatch.setattr(machine, "_cgroup_limits", lambda: [5_000])
    assert machine_memory() == 5_000


def test_a_writer_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "fcntl", None)
        with pytest.warns(UserWarning, match="this system has no locks"), writer_lock(tmp_path):
            pass

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="this file system has no locks"), writer_lock(tmp_path):
        pass


def test_a_full_disk_is_no_missing_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        ArrayFile(tmp_path / "a.npy", INT64, rows=4)

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with ArrayFile(tmp_path / "b.npy", INT64, rows=4) as file:
        file.write(2, np.array([7]))
    assert open_array(tmp_path / "b.npy", INT64, (4,)).tolist() == [0, 0, 7, 0]


def test_code_is_compiled_anew_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.code_can_be_cached() is True

    def no_place(**_: object) -> object:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("numba.njit", no_place)
    machine.code_can_be_cached.cache_clear()
    try:
        assert machine.code_can_be_cached() is False
    finally:
        machine.code_can_be_cached.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs another user")
def test_another_user_without_a_home_runs_commands(tiny_model: PreTrainedModel) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        memory = Path(folder) / "m"
        Memory.build(tiny_model, make_tokenizer(), ["a text"], memory, keys="none")
        memory.chmod(0o755)
        command = "from nearest.index import ids, matches; from nearest.cli import main; main()"
        done = subprocess.run(
            [*_AS_NOBODY, sys.executable, "-c", command, "info", str(memory)],
            env={"HOME": "/nonexistent", "PATH": os.environ["PATH"], "PYTHONPATH": SOURCE},
            cwd="/",
            capture_output=True,
            text=True,
        )
    assert (done.returncode, "documents" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("name", [b"B\xfccher", "Bücher".encode(), b"two words"])
def test_mount_points_of_any_name_are_told(
    name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(name)
    written = mounts(tmp_path / "mounts", Path("MOUNT"), "nfs4")
    escaped = os.fsencode(folder).replace(b" ", rb"\040")
    written.write_bytes(written.read_bytes().replace(b"MOUNT", escaped))
    monkeypatch.setattr(machine, "_MOUNTS", written)
    assert file_system(folder / "law.memory") == "nfs4"
    assert file_system(tmp_path) == "ext4"
