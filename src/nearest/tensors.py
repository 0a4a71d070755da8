"""One safetensors file that describes itself: tensors, JSON settings and a checksum of the whole.

Knows nothing of what the tensors mean. No pickle, ever; a file appears whole or not at all.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from nearest.errors import FolderError
from nearest.folder import disk_errors_explained, write_atomically

_FORMAT = "1"
_UNSIGNED = b"0" * 64
_HEADER_MOST = 100_000_000  # bytes; what safetensors itself allows


class _Description(msgspec.Struct, frozen=True):
    """The metadata of such a file; safetensors allows strings alone."""

    format: str
    kind: str
    settings: str
    sha256: str


class _Header(msgspec.Struct, frozen=True):
    metadata: _Description = msgspec.field(name="__metadata__")


def save_tensors(
    path: Path, kind: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write tensors and JSON settings as one file, replacing an older one in a single rename.

    Raises:
        FolderError: the disk is full, fails, or may not be written to.
    """
    description = {
        "format": _FORMAT,
        "kind": kind,
        "settings": json.dumps(settings),
        "sha256": _UNSIGNED.decode(),
    }
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, description)
    checksum = hashlib.sha256(data).hexdigest().encode()
    place = data.index(_UNSIGNED)
    if not path.parent.is_dir():
        raise FolderError(f"{path.parent} is no folder: make it, or choose another path")
    if path.is_dir():
        raise FolderError(f"{path} is a folder: give the file a name of its own")
    with disk_errors_explained(path.parent):
        write_atomically(path, data[:place] + checksum + data[place + len(checksum) :])


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and settings that `save_tensors` wrote for the same `kind`.

    Raises:
        FolderError: there is no such file, it holds something else, or a byte of it is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FolderError(f"{path} cannot be read ({error.strerror}): check the path") from error
    try:
        described = _description(data)
        if (described.format, described.kind) != (_FORMAT, kind):
            raise FolderError(
                f"{path} holds {described.kind!r} of format {described.format!r}, where {kind!r} "
                f"of format {_FORMAT!r} is needed: give the right file, or upgrade nearest"
            )
        _check(data, described.sha256)
        return safetensors.torch.load(data), dict(json.loads(described.settings))
    except (ValueError, TypeError, RecursionError, msgspec.MsgspecError, SafetensorError) as error:
        raise FolderError(
            f"{path} is damaged or was not written by nearest ({error}): restore it from a copy"
        ) from error


def _description(data: bytes) -> _Description:
    """Read the metadata from a safetensors header: a length of 8 bytes, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= min(len(data) - 8, _HEADER_MOST):
        raise ValueError("it has no whole header")
    return msgspec.json.decode(data[8 : 8 + length], type=_Header).metadata


def _check(data: bytes, checksum: str) -> None:
    """Compare with the SHA-256 of the same bytes with zeros in the checksum's place."""
    place = data.find(checksum.encode())
    digest = hashlib.sha256(data[:place] + _UNSIGNED)
    digest.update(memoryview(data)[place + len(_UNSIGNED) :])
    if digest.hexdigest() != checksum:
        raise ValueError("it differs from its own checksum")
