"""Weights out of a file, without running anything that the file says.

A PyTorch checkpoint is a pickle, and a pickle is a program. Here its names never import anything:
tensors and plain containers are rebuilt by the code below, any other class becomes an inert stub
(training frameworks store their own settings so), and names that could run code are refused.

`torch.load(weights_only=True)` with stubs in `safe_globals` would not do: it refuses to fill
subclasses of dict, among them the `defaultdict` and `AttributeDict` of every Lightning checkpoint.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from nearest.errors import ModelError

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_CONTAINERS = {"set": set, "frozenset": frozenset, "list": list, "dict": dict, "tuple": tuple}
_HARMLESS = {
    "bool",
    "int",
    "float",
    "complex",
    "str",
    "bytes",
    "bytearray",
    "slice",
    "range",
    "object",
}
# What a hostile pickle calls. Nothing is ever called: this list only decides what is refused aloud
# and what becomes a stub.
_RUNS_CODE = {
    *("builtins", "__builtin__", "io", "_io", "codecs", "os", "posix", "nt", "sys", "subprocess"),
    *("shutil", "socket", "pty", "importlib", "runpy", "code", "ctypes", "pickle", "_pickle"),
    *("marshal", "operator", "_operator", "webbrowser", "multiprocessing", "asyncio", "urllib"),
    *("http", "ftplib", "timeit", "pdb", "imp", "pkgutil", "zipimport", "pip", "ensurepip"),
}


class _Inert:
    """Stands for an object of a class that is not imported; takes anything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return _Inert()

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None:
        """Take a list's item."""

    def extend(self, _: Any) -> None:
        """Take a list's items."""

    def add(self, _: Any) -> None:
        """Take a set's item."""


class _Storage(NamedTuple):
    data: bytearray
    dtype: torch.dtype


def _rebuild_tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    if not storage.data:
        return torch.empty(size, dtype=storage.dtype)
    flat = torch.frombuffer(storage.data, dtype=storage.dtype)
    return torch.as_strided(flat, size, stride, offset).clone()


def _rebuild_parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _encode(text: str, *_: Any) -> bytes:
    """How protocol 2 spells bytes."""
    return text.encode("latin1")


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Of a zip archive's `data.pkl`."""

    def __init__(self, archive: zipfile.ZipFile, record: str) -> None:
        super().__init__(archive.open(record))
        self._archive = archive
        self._folder = record.removesuffix("data.pkl")
        self._storages: dict[str, bytearray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module in ("builtins", "__builtin__") and name in _CONTAINERS:
            return _CONTAINERS[name]
        if module.split(".")[0] in _RUNS_CODE and name not in _HARMLESS:
            raise ModelError(
                f"this checkpoint asks to run {module}.{name} when it is opened: it was refused, "
                "nothing was run; get the weights from somewhere you trust, as safetensors"
            )
        return _Inert

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a storage of unknown kind {dtype!r}")
        if key not in self._storages:
            self._storages[key] = bytearray(self._archive.read(f"{self._folder}data/{key}"))
        data = self._storages[key]
        if len(data) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes, not {count} items")
        return _Storage(data, dtype)


def read_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """The weights of a `.safetensors` file, a saved state dict or a Lightning `.ckpt`, by name.

    Raises:
        ModelError: it is missing or damaged, holds no weights, or asks to run code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        if not zipfile.is_zipfile(path):  # PyTorch's format before 1.6
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with zipfile.ZipFile(path) as archive:
                records = [name for name in archive.namelist() if name.endswith("data.pkl")]
                if len(records) != 1:
                    raise pickle.UnpicklingError("no single data.pkl in the archive")
                content = _Unpickler(archive, records[0]).load()
    except ModelError:
        raise
    except Exception as error:  # damaged bytes make every kind of error
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{path} is no checkpoint that can be read ({reason}): give a .safetensors file, a "
            "state dict saved by torch.save, or a Lightning .ckpt"
        ) from error
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path} holds no weights: it should be a state dict or a Lightning .ckpt")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{path} is no state dict: {name!r} is no tensor; save model.state_dict()"
            )
    return dict(content)
