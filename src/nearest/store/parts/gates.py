"""Trained gates in a memory's folder: small files, read whole when the memory is opened."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from nearest.errors import FolderError
from nearest.folder import write_atomically
from nearest.store.manifest import GateRecord, Manifest
from nearest.store.new_files import NewFiles

SUFFIX = ".gate.safetensors"  # after the name of the method


class GateFile(NamedTuple):
    """A gate as stored: what the manifest says of it, and the bytes of its arrays."""

    record: GateRecord
    data: bytes

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, after the checksum has matched.

        Raises:
            FolderError: the file is damaged.
        """
        path = self.record.file.path
        cure = "train the gate again (`nearest tune`)"
        if hashlib.sha256(self.data).hexdigest() != self.record.file.sha256:
            raise FolderError(f"{path} is damaged (its checksum differs from the manifest): {cure}")
        try:
            return load(self.data)
        except SafetensorError as error:
            raise FolderError(f"{path} holds no arrays ({error}): {cure}") from error


class NewGate(NamedTuple):
    """A gate to be stored."""

    kind: str
    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def open_gates(folder: Path, manifest: Manifest) -> dict[str, GateFile]:
    """Read the gates of a memory, by method; nothing is checked before one is used."""
    return {
        method: GateFile(record, (folder / record.file.path).read_bytes())
        for method, record in manifest.gates.items()
    }


def write_gate(files: NewFiles, method: str, gate: NewGate) -> GateRecord:
    """Write the gate of a method, and describe it."""
    name = method + SUFFIX
    write_atomically(files.path(name), save(dict(gate.arrays)))
    return GateRecord(gate.kind, dict(gate.config), files.record(name))
