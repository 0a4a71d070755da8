"""What the machine and its operating system offer, with a portable way around what is missing."""

import errno
import functools
import mmap
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path

_ALONE = "let no other process write the memory meanwhile"
_UNKNOWN_MEMORY = 4 << 30  # bytes that are counted on where the system does not say
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


def machine_memory() -> int:
    """Bytes of RAM that this process may use: the machine's, or less in a container or a job."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # a system that does not tell
        physical = _UNKNOWN_MEMORY
    return min([physical, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Bytes of RAM that the control groups of this process allow, its own and those around it."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, name = _CGROUPS, "memory.max"  # version 2
        elif "memory" in controllers.split(","):
            top, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = top / path.lstrip("/")
        # In a container the path may be that outside of it, and the top is then what is seen.
        for folder in {top, *(own, *own.parents)}:
            if folder.is_relative_to(top):
                with suppress(OSError, ValueError):  # not there, or "max"
                    limits.append(int((folder / name).read_text()))
    return limits


@functools.cache
def code_can_be_cached() -> bool:
    """Whether numba finds a place for compiled code, in the installation or the user's cache.

    Where both are read-only, every process compiles its own.
    """
    import numba

    try:
        numba.njit(cache=True)(_nothing)
    except RuntimeError:  # "no locator available"
        return False
    return True


def _nothing() -> None:
    pass


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, such as "ext4" or "nfs4"; "" if unknown."""
    found, longest, place = "", -1, folder.resolve()
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:  # no Linux
        return ""
    for line in lines:
        left, _, right = line.partition(b" - ")
        # Spaces and their like are written as three octal digits; other bytes stand as they are.
        name = _OCTAL.sub(lambda byte: bytes([int(byte[1], 8)]), left.split(b" ")[4])
        mount = Path(os.fsdecode(name))
        if place.is_relative_to(mount) and len(mount.parts) >= longest:
            found, longest = right.split()[0].decode(), len(mount.parts)
    return found


def reserve(fd: int, start: int, size: int) -> None:
    """Give a file room up to start + size bytes, on the disk where that is possible.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, start, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what some file systems say
                raise
    os.ftruncate(fd, start + size)


def forget_cached(fd: int) -> None:
    """Let the kernel drop the pages of a file that is durable: read anew, they can be large."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def ask_for_large_pages(mapped: mmap.mmap) -> None:
    """Ask for large pages, where the kernel has them."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)


def try_lock(fd: int) -> bool:
    """Lock an open file or folder for this process alone; whether nobody else holds it.

    The kernel releases the lock with the descriptor, or with the process. Where the system or the
    file system knows no such locks, a warning says so.
    """
    try:
        import fcntl
    except ImportError:
        warnings.warn(f"this system has no locks: {_ALONE}", stacklevel=2)
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"this file system has no locks: {_ALONE}", stacklevel=2)
    return True
