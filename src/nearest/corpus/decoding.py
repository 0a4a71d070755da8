"""Bytes of files as text: which encoding they have, and what is no text at all."""

import codecs
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Literal

from nearest.corpus.documents import UnfitFileError
from nearest.corpus.report import CorpusReport
from nearest.errors import CorpusError, SettingError, require

EncodingErrors = Literal["strict", "replace"]
AUTO = "auto"
_PIECE = 1 << 18
_SAMPLE = 1 << 16  # bytes that an encoding is guessed by

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_MAGIC = {
    b"%PDF-": "a PDF file",
    b"PK\x03\x04": "a zip archive (or an Office file)",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "a program",
}
_LFS = b"version https://git-lfs.github.com/spec/"
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # no text has many of these
_MANY_CONTROLS = 0.02
_FEW = 16  # bytes, too few for any guess
# Of a few Latin letters, guesses take these for the encoding of Western Europe.
_TAKEN_FOR_WESTERN = (
    *("cp1006", "cp1257", "cp775", "cp852", "hp_roman8", "iso8859_10", "iso8859_13", "iso8859_16"),
    *("mac_iceland", "mac_latin2"),
)
_WESTERN = set("àâäáãåæçéèêëíìîïñóòôöõœúùûüÿß«»“”‘’„–—…€£§°·•¡¿ºª©®™\xa0")


@dataclass(frozen=True)
class Decoding:
    """How bytes become text.

    Attributes:
        encoding: a codec's name, or "auto": detected in files that are not UTF-8. A byte-order
            mark of UTF-8, UTF-16 or UTF-32 always decides.
        errors: "replace" puts U+FFFD for bytes that are not of that encoding.

    Raises:
        SettingError: there is no such encoding.
    """

    encoding: str = "utf-8"
    errors: EncodingErrors = "strict"

    def __post_init__(self) -> None:
        if self.encoding == AUTO:
            require("charset_normalizer", "files")
            return
        try:
            "".encode(self.encoding)
        except LookupError as error:
            raise SettingError(
                f"there is no text encoding {self.encoding!r}: name one that Python knows, such as "
                "cp1252, or auto"
            ) from error


def refuse_pointer(head: bytes, origin: str) -> None:
    """Refuse what Git LFS leaves where a large file was not fetched (UnfitFileError)."""
    if head.startswith(_LFS):
        raise UnfitFileError(
            f"{origin} is a Git LFS pointer and not the file: fetch it (git lfs pull)",
            "Git LFS pointers, not fetched",
        )


def text_pieces(
    file: BufferedReader,
    origin: str,
    decoding: Decoding,
    report: CorpusReport,
    declared: Callable[[bytes], str | None] = lambda _: None,
) -> Iterator[str]:
    """The text of an opened file, piece by piece.

    `declared` may find an encoding that the file itself names in its beginning.

    Raises:
        UnfitFileError: it is plainly no text.
        CorpusError: bytes are not of the encoding, or it is plainly another one.
    """
    data = file.read(_PIECE)
    mark, codec = _codec_of(data, origin, decoding, report, declared)
    decoder = codecs.getincrementaldecoder(codec)()
    offset, data = len(mark), data[len(mark) :]
    replacing = False
    while True:
        following = file.read(_PIECE)
        state = decoder.getstate()
        try:
            piece = decoder.decode(data, not following)
        except UnicodeDecodeError as error:
            if decoding.errors == "strict" or replacing:
                raise CorpusError(
                    f"{origin} is not {_shown(codec)} at byte "
                    f"{offset - len(state[0]) + error.start:,}: convert it, name its encoding "
                    "(--encoding cp1252; --encoding auto detects it), or pass --encoding-errors "
                    "replace"
                ) from error
            replacing, decoder = True, codecs.getincrementaldecoder(codec)("replace")
            decoder.setstate(state)
            report.replaced += 1
            piece = decoder.decode(data, not following)
        offset += len(data)
        if piece:
            yield piece
        if not following:
            return
        data = following


def _codec_of(
    head: bytes,
    origin: str,
    decoding: Decoding,
    report: CorpusReport,
    declared: Callable[[bytes], str | None],
) -> tuple[bytes, str]:
    """The byte-order mark that a file begins with, or b"", and its codec."""
    for mark, codec in _MARKS.items():
        if head.startswith(mark):
            return mark, codec
    refuse_pointer(head, origin)
    if decoding.encoding not in (AUTO, "utf-8"):
        return b"", decoding.encoding
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise UnfitFileError(
                f"{origin} is {kind} and no text: convert it, give it the suffix of its kind, or "
                "leave it out (--exclude)",
                "binary",
            )
    if wide := _wide_codec(head[:_SAMPLE]):
        if decoding.encoding != AUTO:
            raise CorpusError(
                f"{origin} is {_shown(wide)} without a byte-order mark: pass --encoding {wide} or "
                "--encoding auto, or convert it to UTF-8"
            )
        report.detected(wide)
        return b"", wide
    sample = head[:_SAMPLE]
    many = max(1, _MANY_CONTROLS * len(sample))
    if b"\0" in sample or len(_CONTROLS.findall(sample)) > many:
        raise UnfitFileError(
            f"{origin} holds bytes that no text has: it is binary, or in an encoding to be named "
            "(--encoding); convert it, or leave it out (--exclude)",
            "binary",
        )
    if named := declared(head):
        return b"", named
    if decoding.encoding == AUTO and (bad := _first_wrong(head)) is not None:
        codec = _guessed(head, bad, origin)
        report.detected(codec)
        return b"", codec
    return b"", "utf-8"


def _wide_codec(sample: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, told by where mostly Latin text has its zero bytes."""
    zeros = [sample[at::4].count(0) * 4 / max(len(sample), 1) for at in range(4)]
    if len(sample) < 4 or sum(zeros) < 1:
        return None
    often = [share > 0.6 for share in zeros]
    for codec, places in {
        "utf-32-le": [False, True, True, True],
        "utf-32-be": [True, True, True, False],
        "utf-16-le": [False, True, False, True],
        "utf-16-be": [True, False, True, False],
    }.items():
        if often == places:
            return codec if _reads(sample[: len(sample) // 4 * 4], codec) else None
    return None


def _reads(data: bytes, codec: str) -> bool:
    """Whether bytes are of a codec, but for a character that they end within."""
    try:
        codecs.getincrementaldecoder(codec)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _first_wrong(head: bytes) -> int | None:
    """The first byte that is not UTF-8; None where there is none."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, len(head) < _PIECE)
    except UnicodeDecodeError as error:
        return error.start
    return None


def _guessed(head: bytes, bad: int, origin: str) -> str:
    from charset_normalizer import from_bytes

    start = 0 if bad < _SAMPLE else head.rfind(b"\n", 0, bad - _SAMPLE // 2) + 1
    sample = head[start : start + _SAMPLE]
    found = from_bytes(sample)
    best = found.best()
    if best is None:
        raise UnfitFileError(
            f"{origin} is in no encoding that can be told: name it (--encoding), convert it, or "
            "leave it out (--exclude)",
            "in an unknown encoding",
        )
    western = any(
        other.encoding == "cp1252"
        and other.chaos <= best.chaos
        and other.coherence >= best.coherence
        for other in found
    )
    doubtful = best.encoding in _TAKEN_FOR_WESTERN or len(sample) < _FEW
    if western or (doubtful and _is_western(sample)):
        return "cp1252"
    return best.encoding.replace("_", "-")


def _is_western(sample: bytes) -> bool:
    """Whether bytes are letters and signs of Western European languages, read as cp1252."""
    if not _reads(sample, "cp1252"):
        return False
    signs = {sign for sign in sample.decode("cp1252").lower() if not sign.isascii()}
    return signs <= _WESTERN


def _shown(codec: str) -> str:
    return codec.upper() if codec.startswith("utf") else codec
