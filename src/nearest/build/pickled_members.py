"""Clusters' members out of a pickled SciPy matrix, without trusting the pickle.

A pickle is a program that calls what it names. Here it can name a sparse matrix, an array, a dtype
and the functions that make arrays and bytes, and what it gets for each is an inert stand-in of ours
that takes the state down; SciPy is not imported, and NumPy's readers of state are not called.

`torch.load(weights_only=True)` would not do: it reads torch's own files, protocol 2 of pickle, and
not the bare pickles of later protocols that the scripts of others write.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from nearest.errors import CorpusError

_DTYPE = re.compile(r"[iu][1248]|b1|f[248]")


class Members(NamedTuple):
    """Entry numbers of each cluster, one cluster after another; cluster i starts at offsets[i]."""

    offsets: Int[np.ndarray, " clusters_plus_1"]
    entries: Int[np.ndarray, " members"]


class _Dtype:
    def __init__(self, name: object, *_: object) -> None:
        if not (isinstance(name, str) and _DTYPE.fullmatch(name)):
            raise pickle.UnpicklingError(f"the dtype {name!r}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = {">": ">"}.get(state[1], "<")

    def real(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.name)


class _Array:
    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, data = state
        self.state = (shape, dtype, data)

    def numbers(self) -> Int[np.ndarray, " n"]:
        """The array, one-dimensional and of whole numbers."""
        (size,), dtype, data = self.state
        real = dtype.real()
        if real.kind not in "iu" or len(data) != size * real.itemsize:
            raise ValueError("an array that is not of whole numbers, or not of its size")
        return np.frombuffer(data, real).astype(np.int64)


class _Matrix:
    """Takes whatever state a compressed sparse matrix has."""

    state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state[0] if isinstance(state, tuple) else state


def _empty(*_: object) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, *_: object) -> _Array:
    made = _Array()
    made.state = (shape, dtype, data)
    return made


def _bytes(text: str, *_: object) -> bytes:
    return text.encode("latin-1")  # how protocol 2 writes them


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{(f"scipy.sparse.{module}", "csr_matrix"): _Matrix for module in ("csr", "_csr")},
    ("scipy.sparse._csr", "csr_array"): _Matrix,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}") from None


def read_members(path: Path, entries: int) -> Members:
    """Read which of so many entries are in which cluster.

    Raises:
        CorpusError: it is no pickled CSR matrix, or names anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            matrix = _Restricted(file).load()
        offsets = matrix.state["indptr"].numbers()
        members = matrix.state["indices"].numbers()
        if (
            len(offsets) < 2
            or (offsets[0], offsets[-1]) != (0, len(members))
            or (np.diff(offsets) < 0).any()
            or (len(members) and not 0 <= members.min() <= members.max() < entries)
            or len(np.unique(members)) != len(members)
        ):
            raise ValueError(f"its rows are no clusters of {entries:,} entries")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}): check it") from error
    except pickle.UnpicklingError as error:
        raise CorpusError(
            f"{path} asks for {error}, and only SciPy and NumPy arrays of numbers are admitted: "
            "do not use it, or leave the clusters out (--no-members)"
        ) from error
    except Exception as error:  # a pickle can fail in any way: it is a program
        reason = f"{type(error).__name__}: {error}"
        raise CorpusError(
            f"{path} is not a pickled CSR matrix of clusters ({reason}): leave the clusters out "
            "(--no-members)"
        ) from error
    return Members(offsets, members)


def labels_of(members: Members, entries: int) -> Int[np.ndarray, " entries"]:
    """The cluster of each entry (int32), -1 where it is in none."""
    labels = np.full(entries, -1, np.int32)
    clusters = np.arange(len(members.offsets) - 1, dtype=np.int32)
    labels[members.entries] = np.repeat(clusters, np.diff(members.offsets))
    return labels
