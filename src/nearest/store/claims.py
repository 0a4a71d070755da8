"""Which process works on what, where several write one folder: claims with heartbeats.

A claim is a file that only one process can create. Its owner touches it while it lives; another
takes over a claim whose owner has ended, or that was not touched for long. A claim that was taken
from a process that was merely stopped leaves two that do the same work. That is harmless: each
writes files of its own, whose bytes are equal, and moves them to their place in one rename.

What is claimed is a path that need not exist; claims, and what their owners leave, stand beside it.
"""

import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nearest.errors import NearestError

HEARTBEAT = 10.0  # seconds
STALE = 120.0  # seconds without one; network file systems show times that are a minute old
_POLL = 0.05  # seconds, growing to
_LONGEST_POLL = 1.0
Position = tuple[int, int, int]  # entries done; the first and the last document that come next


def beside(path: Path, what: str) -> Path:
    """The file of a kind beside what is claimed."""
    return path.with_name(f"{path.name}.{what}")


def until_done(done: Callable[[], bool], some: Callable[[], bool]) -> None:
    """Do some of the work until all is done, with pauses while others are at it.

    Args:
        done: whether nothing is left.
        some: does what nobody else does; returns whether there was anything.
    """
    pause = _POLL
    while not done():
        if some():
            pause = _POLL
        else:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL)


def owner_here(token: str = "") -> str:
    """A name for a worker of this process, by which others can tell whether it has ended."""
    return f"{_here()}-{os.getpid()}-{token or os.urandom(4).hex()}"


def _here() -> str:
    """The host, and among which of its processes ids are told apart: containers have their own."""
    try:
        return f"{socket.gethostname()}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


class Claim:
    """A claim that this process holds, or has held.

    Attributes:
        path: what is claimed.
        scratch: the folder in which the owner writes.
    """

    def __init__(self, path: Path, owner: str, fd: int) -> None:
        self.path, self._fd = path, fd
        self.scratch = beside(path, f"files.{owner}")
        self._at: int | None = None

    @property
    def held(self) -> bool:
        """Whether nobody has taken it over."""
        try:
            return os.path.samestat(os.fstat(self._fd), beside(self.path, "claim").stat())
        except OSError:  # given up, or the build is over
            return False

    def at(self, position: Position) -> None:
        """Leave word of what is done and what comes next; it outlives the process."""
        if self._at is None:
            self._at = os.open(beside(self.path, "at"), os.O_CREAT | os.O_RDWR, 0o666)
        os.pwrite(self._at, struct.pack("<qqq", *position), 0)

    def beat(self) -> None:
        """Touch the file that was created, whatever stands in its place now."""
        with suppress(OSError):
            os.utime(self._fd)

    @contextmanager
    def unless_lost(self) -> Iterator[None]:
        """Pass over an error where another has taken the claim over, and what was written."""
        try:
            yield
        except (OSError, NearestError):
            if self.held:
                raise

    def give_up(self) -> None:
        """Let others claim it, unless one has."""
        if self.held:
            beside(self.path, "claim").unlink(missing_ok=True)
        os.close(self._fd)
        if self._at is not None:
            os.close(self._at)


def position(path: Path) -> Position | None:
    """What `Claim.at` left."""
    return _read(beside(path, "at"))


def suspect(path: Path) -> Position | None:
    """Where an owner has ended unasked, as `suspected` noted it."""
    return _read(beside(path, "suspect"))


def suspected(path: Path, owner: str) -> None:
    """Take away the claim of an owner that has ended unasked, and note where that was."""
    if held_by(path) != owner:
        return  # another has taken it over
    with suppress(OSError):
        beside(path, "suspect").write_bytes(beside(path, "at").read_bytes())
    beside(path, "claim").unlink(missing_ok=True)


def _read(path: Path) -> Position | None:
    try:
        entries, first, last = struct.unpack("<qqq", path.read_bytes())
    except (OSError, struct.error):
        return None
    return entries, first, last


def held_by(path: Path) -> str | None:
    """The owner of the claim on a path; None where there is none."""
    try:
        return beside(path, "claim").read_text()
    except OSError:
        return None


class Watch:
    """Takes claims for an owner, and takes over those that others have abandoned."""

    def __init__(self, owner: str, stale: float = STALE, heartbeat: float = HEARTBEAT) -> None:
        self._owner, self._stale, self._heartbeat = owner, stale, heartbeat
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        self._held: Claim | None = None

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Touch the claim that is held, as long as the context is open; then give it up."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._heartbeat):
                if (held := self._held) is not None:
                    held.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.give_up()

    def give_up(self) -> None:
        """Let others have the claim that is held."""
        held, self._held = self._held, None
        if held is not None:
            held.give_up()

    def take(self, path: Path, *, go_on: bool = True) -> Claim | None:
        """Claim a path, with what an earlier owner has left; None where another works on it.

        Without `go_on` that is not looked for, which takes longer the more files are beside it.
        """
        place, silent = beside(path, "claim"), ""
        try:
            fd = os.open(place, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            if not self._abandoned(place):
                return None
            owner = held_by(path) or ""
            silent = "" if _has_ended(owner) else owner
            fd = self._overtaken(place)
        claim = self._held = Claim(path, self._owner, fd)
        try:
            os.pwrite(fd, self._owner.encode(), 0)
            lefts = list(path.parent.glob(f"{path.name}.files.*")) if go_on else []
            if claim.held:  # else one of them may be of who has taken it over meanwhile
                for left in lefts:
                    _take_over(left, claim.scratch, copy=left.name.endswith(f".files.{silent}"))
            claim.scratch.mkdir(exist_ok=True)
        except BaseException:  # such as of a full disk
            self.give_up()
            raise
        return claim

    def _overtaken(self, place: Path) -> int:
        """Put a claim of our own in the place of one that was abandoned."""
        own = place.with_name(f"{place.name}.{self._owner}")
        fd = os.open(own, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            os.pwrite(fd, self._owner.encode(), 0)
            own.replace(place)
        except BaseException:
            os.close(fd)
            own.unlink(missing_ok=True)
            raise
        return fd

    def _abandoned(self, claim: Path) -> bool:
        try:
            owner, status = claim.read_text(), claim.stat()
        except OSError:  # given up meanwhile: it is free the next time
            return False
        if _has_ended(owner):
            return True
        now, state = time.monotonic(), (status.st_ino, status.st_mtime_ns)
        known, since = self._seen.get(claim, (None, now))
        if known != state:
            self._seen[claim] = state, now
            return False
        return now - since >= self._stale


def _take_over(left: Path, scratch: Path, *, copy: bool) -> None:
    """Go on with the files of another owner: with a copy, where it may yet write into them."""
    if not copy:
        with suppress(OSError):  # another was quicker
            left.rename(scratch)
        return
    try:
        scratch.mkdir(exist_ok=True)
        for file in sorted(left.iterdir()):  # what tells how far arrays are (batches.json) first
            shutil.copyfile(file, scratch / file.name)
    except OSError:  # what is half copied is of no use
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(left, ignore_errors=True)


def _has_ended(owner: str) -> bool:
    """Whether a process of this host is gone; False if that cannot be told."""
    host, _, pid = owner.rpartition("-")[0].rpartition("-")
    if host != _here() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False
