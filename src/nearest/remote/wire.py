"""Arrays on their way over HTTP: `.npy` members of a stored zip, as `numpy.load` reads them.

What comes from the network may have been made by a stranger: nothing is unpickled or unpacked, and
an array takes no more memory than the bytes that were sent.
"""

import io
import math
import zipfile
from collections.abc import Mapping

import numpy as np

from nearest.errors import CorpusError

VERSION_HEADER = "X-Nearest-Version"
SNAPSHOT_HEADER = "X-Nearest-Snapshot"
"""The checksum of the memory's manifest: two servers with the same one hold the same memory."""


def npy(array: np.ndarray) -> bytes:
    """An array as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def packed(arrays: Mapping[str, np.ndarray], *, suffix: bool = True) -> bytes:
    """Arrays as a stored zip; numpy reads one whose members' names have the suffix."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy" if suffix else name, npy(array))
    return buffer.getvalue()


def read_npy(content: bytes) -> np.ndarray:
    """The array of a `.npy` file, which is not copied (CorpusError where it is none)."""
    buffer = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(buffer)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(buffer)
    except (ValueError, EOFError, SyntaxError, TypeError, KeyError, UnicodeError) as error:
        raise CorpusError("this is no .npy file") from error
    if dtype.kind not in "biufU" or fortran or not all(0 <= n < 2**31 for n in shape):
        raise CorpusError("a .npy file of another kind than plain numbers in C order")
    if math.prod(shape) * dtype.itemsize != len(content) - buffer.tell():
        raise CorpusError("a .npy file whose length is not what its header says")
    return np.frombuffer(content, dtype, offset=buffer.tell()).reshape(shape)


def unpacked(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a stored zip, by their names without suffix (CorpusError where it is none)."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED for one in members):
                raise CorpusError("the zip is compressed: store its members as they are")
            if sum(one.file_size for one in members) > len(content):  # they overlap
                raise CorpusError("the zip says that it holds more than was sent")
            return {
                one.filename.removesuffix(".npy"): read_npy(archive.read(one)) for one in members
            }
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise CorpusError(f"this is no zip of .npy files ({error})") from error
