"""Claims: one owner at a time, taken over from those that have ended or are silent for long."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nearest.errors import FolderError
from nearest.store import claims
from nearest.store.claims import (
    Watch,
    beside,
    held_by,
    owner_here,
    position,
    suspect,
    suspected,
)

ELSEWHERE = "another-host-1-w0"  # whether its process lives cannot be told here


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "000001.keys"


def test_one_owner_at_a_time(path: Path) -> None:
    first, second = Watch(owner_here("a")), Watch(owner_here("b"))
    claim = first.take(path)
    assert claim is not None
    assert claim.held
    assert held_by(path) == owner_here("a")
    assert second.take(path) is None
    claim.at((5, 1, 2))
    first.give_up()
    assert held_by(path) is None
    assert not claim.held
    assert position(path) == (5, 1, 2)  # outlives the claim
    again = second.take(path)
    assert again is not None
    assert again.held
    second.give_up()


def test_who_has_ended_is_followed_at_once(path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    owner = owner_here("gone").replace(f"-{os.getpid()}-", f"-{ended.stdout.decode().strip()}-")
    first = Watch(owner).take(path)
    assert first is not None
    (first.scratch / "keys.npy").write_bytes(b"half")
    second = Watch(owner_here("b")).take(path)
    assert second is not None
    assert not first.held
    assert (second.scratch / "keys.npy").read_bytes() == b"half"  # it goes on from there
    assert not first.scratch.exists()


def test_who_was_quicker_keeps_what_was_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two see that an owner is gone; the second claims it before the first has moved its files."""
    first = Watch(ELSEWHERE).take(path)
    assert first is not None
    (first.scratch / "keys.npy").write_bytes(b"half")
    slower, quicker = Watch(owner_here("b")), Watch(owner_here("c"))
    for watch in (slower, quicker):
        monkeypatch.setattr(watch, "_abandoned", lambda claim: True)  # both have seen it
    made, won = claims.Claim, []

    def claimed(*args: Any) -> claims.Claim:
        claim = made(*args)
        if not won:
            won.append(claim)  # so that the call below is of the original
            quicker.take(path)
            won[0] = quicker._held
        return claim

    monkeypatch.setattr(claims, "Claim", claimed)
    lost = slower.take(path)
    assert lost is not None
    assert not lost.held
    assert won[0].held
    assert (won[0].scratch / "keys.npy").read_bytes() == b"half"
    with lost.unless_lost():
        raise FolderError("what it wrote is gone")
    with pytest.raises(FolderError, match="cannot be read"), won[0].unless_lost():
        raise FolderError("it cannot be read")


def test_a_node_that_is_gone_is_followed_when_its_claim_is_old(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Watch(ELSEWHERE).take(path)
    assert first is not None
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    after = Watch(owner_here("b"), stale=120)
    for _ in range(5):  # it lives, longer than it may be silent
        assert after.take(path) is None
        now[0] += 100
        time.sleep(0.02)  # times of files are coarse
        first.beat()
    assert after.take(path) is None
    now[0] += 119
    assert after.take(path) is None
    assert first.held
    now[0] += 1
    second = after.take(path)
    assert second is not None
    assert second.held
    assert not first.held
    first.beat()
    first.give_up()  # it was only cut off, and lets go of what is another's
    assert second.held
    assert held_by(path) == owner_here("b")


def test_a_claim_is_touched_while_its_owner_works(path: Path) -> None:
    watch = Watch(owner_here("a"), heartbeat=0.01)
    with watch.beating():
        assert watch.take(path) is not None
        before = beside(path, "claim").stat().st_mtime_ns
        until = time.monotonic() + 30
        while beside(path, "claim").stat().st_mtime_ns == before:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert held_by(path) is None  # given up at the end


def test_where_an_owner_ended_is_noted(path: Path) -> None:
    watch = Watch(owner_here("a"))
    claim = watch.take(path)
    assert claim is not None
    assert suspect(path) is None
    suspected(path, owner_here("a"))
    assert suspect(path) is None  # it said nothing
    again = watch.take(path)
    assert again is not None
    again.at((7, 3, 4))
    suspected(path, owner_here("b"))
    assert suspect(path) is None
    assert again.held  # that was another's
    suspected(path, owner_here("a"))
    assert suspect(path) == (7, 3, 4)
    assert held_by(path) is None
    beside(path, "suspect").write_bytes(b"cut")
    assert suspect(path) is None


def test_who_was_only_stopped_writes_into_files_of_its_own(path: Path) -> None:
    first = Watch(ELSEWHERE).take(path)
    assert first is not None
    for name in ("keys.npy", "batches.json"):
        (first.scratch / name).write_bytes(b"old")
    with (first.scratch / "keys.npy").open("r+b") as file:
        after = Watch(owner_here("b"), stale=0)
        assert after.take(path) is None  # it sees how old the claim is
        second = after.take(path)
        assert second is not None
        file.write(b"new")
    assert {one.name: one.read_bytes() for one in second.scratch.iterdir()} == {
        "keys.npy": b"old",
        "batches.json": b"old",
    }
    assert not first.scratch.exists()


@pytest.mark.parametrize("operation", ["mkdir", "pwrite"])
def test_a_full_disk_leaves_no_claim(
    operation: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path if operation == "mkdir" else os, operation, full)
        with pytest.raises(OSError, match="No space"):
            Watch(owner_here("a")).take(path)
    assert Watch(owner_here("b")).take(path) is not None


def test_a_process_of_another_container_is_not_taken_for_one_that_has_ended(path: Path) -> None:
    """The host's name may be the same, and the number of a process says nothing then."""
    host, _, rest = owner_here("a").partition("-")
    assert host == owner_here("b").partition("-")[0]
    assert Watch(f"{host}1-{2**22 + 1}-{rest}").take(path) is not None
    assert Watch(owner_here("b")).take(path) is None
