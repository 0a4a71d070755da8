"""Arrays over HTTP: what is read is what was written, and what a stranger made is refused."""

import io
import zipfile

import numpy as np
import pytest

from nearest.errors import CorpusError
from nearest.remote.wire import npy, packed, read_npy, unpacked


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i8", "<u2", "bool", "<U5"])
def test_what_is_read_is_what_was_written(dtype: str) -> None:
    array = np.arange(6).astype(dtype).reshape(2, 3)
    np.testing.assert_array_equal(read_npy(npy(array)), array)
    both = unpacked(packed({"a": array, "b": array[:, ::2]}))
    np.testing.assert_array_equal(both["a"], array)
    np.testing.assert_array_equal(both["b"], array[:, ::2])
    with np.load(io.BytesIO(packed({"a": array}))) as archive:
        np.testing.assert_array_equal(archive["a"], array)


def zipped(method: int = zipfile.ZIP_STORED, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.npy", content or npy(np.zeros(3)))
    return buffer.getvalue()


def overlapping() -> bytes:
    """A zip whose second entry has the first one's bytes once more."""
    raw = zipped(content=npy(np.zeros(1000)))
    start = raw.index(b"PK\x01\x02")
    entry, end = raw[start : raw.index(b"PK\x05\x06")], raw[raw.index(b"PK\x05\x06") :]
    counts = (2).to_bytes(2, "little") * 2 + (2 * len(entry)).to_bytes(4, "little")
    return raw[:start] + entry * 2 + end[:8] + counts + end[16:]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x05\x06",
        zipped(zipfile.ZIP_DEFLATED),
        zipped(content=b"no array"),
        zipped(content=npy(np.zeros(3))[:-1]),
        zipped(content=npy(np.zeros(3)).replace(b"(3,)", b"(9,)")),
        zipped()[:-10],
    ],
)
def test_what_is_no_zip_of_arrays_is_refused(content: bytes) -> None:
    with pytest.raises(CorpusError):
        unpacked(content)


def test_a_zip_that_claims_more_than_was_sent_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"more than was sent|Overlapped"):
        unpacked(overlapping())


def test_objects_are_never_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorpusError):
        read_npy(buffer.getvalue())
