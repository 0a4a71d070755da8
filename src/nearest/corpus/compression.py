"""Files as streams of bytes, decompressed on the way where they are compressed.

What is decompressed is handed on in small pieces, so that a file that grows a thousandfold costs no
more memory than any other.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import zstandard

from nearest.errors import CorpusError

_PIECE = 1 << 16
# A zstd block is at least 3 bytes and gives at most 128 KiB: from this much come 22 MiB or less.
_ZSTD_INPUT = 512
_ZSTD_WINDOW = 1 << 27  # what `zstd -d` itself takes without being asked


def opened(path: Path) -> BufferedReader:
    """Open a file for reading; `.gz` and `.zst` are decompressed.

    Raises (while it is read, too):
        CorpusError: the compressed stream is damaged or cut short.
        OSError: the file cannot be opened.
    """
    pieces = _DECOMPRESSORS.get(path.suffix.lower())
    file = path.open("rb")
    return file if pieces is None else BufferedReader(_Decompressed(path, file, pieces))


class _Decompressed(io.RawIOBase):
    """What comes of a compressed file, piece by piece."""

    def __init__(
        self, path: Path, file: BufferedReader, pieces: Callable[[BufferedReader], Iterator[bytes]]
    ) -> None:
        self._path, self._file = path, file
        self._pieces = pieces(file)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As any raw file; 0 bytes at its end."""
        try:
            while not self._rest:
                self._rest = memoryview(next(self._pieces))
        except StopIteration:
            return 0
        except EOFError as error:
            raise CorpusError(f"{self._path} is cut short: fetch or compress it again") from error
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise CorpusError(
                f"{self._path} is damaged, or compressed otherwise than its name says ({error}): "
                "fetch or compress it again"
            ) from error
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _gunzipped(file: BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as members:
        while piece := members.read(_PIECE):
            yield piece


def _unzstandard(file: BufferedReader) -> Iterator[bytes]:
    """All frames, one after another."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = None
    while compressed := file.read(_ZSTD_INPUT):
        while compressed:
            frame = frame or decompressor.decompressobj()
            if piece := frame.decompress(compressed):
                yield piece
            compressed = b""
            if frame.eof:
                compressed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError


_DECOMPRESSORS: dict[str, Callable[[BufferedReader], Iterator[bytes]]] = {
    ".gz": _gunzipped,
    ".zst": _unzstandard,
}
COMPRESSED = tuple(_DECOMPRESSORS)
