"""Output that loses no result: any terminal's encoding, closed pipes, full disks."""

import errno
import os
import sys
from io import TextIOWrapper

_CLOSED = (errno.EPIPE, errno.EINVAL)  # Windows says EINVAL of a closed pipe
_UNWRITABLE = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EDQUOT, errno.EFBIG)


def write_in_any_encoding() -> None:
    """Write characters that a terminal's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_of_output(error: OSError) -> bool:
    """Whether an error is of standard output; the rest of what is written there is then lost."""
    if error.errno not in (*_CLOSED, *_UNWRITABLE) or error.filename is not None:
        return False
    try:  # so that the interpreter does not fail again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stream without a file, as in tests
        return False
    return True


def is_closed(error: OSError) -> bool:
    """Whether the reader of a pipe, such as `head`, has seen enough."""
    return error.errno in _CLOSED
