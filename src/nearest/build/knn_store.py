"""A datastore of `knn-transformers` or RetoMaton: raw arrays of keys and values, side by side.

`…_keys.npy` and `…_vals.npy` have no header, whatever their names say: shape and dtype follow from
the sizes of both, the dimension of the model, and from what the values may be.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer

from nearest.errors import CorpusError, SettingError, warn_caller

KEYS, VALUES = "_keys.npy", "_vals.npy"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class StoreFiles:
    """Where the parts of a datastore are; None where it has none of a kind."""

    keys: Path
    values: Path
    index: Path | None
    members: Path | None


@dataclass(frozen=True)
class Store:
    """Entry i has the key keys[i], and its value is the token that came then: values[i]."""

    keys: Float[np.ndarray, "entries dim"]
    values: Integer[np.ndarray, " entries"]


def find_store(given: Path) -> StoreFiles:
    """The files of a datastore: of the only one in a folder, or of the keys or prefix given.

    Raises:
        CorpusError: there is none, more than one, or its values are missing.
    """
    if given.is_dir():
        keys = sorted(given.glob(f"*{KEYS}"))
        if len(keys) != 1:
            found = ", ".join(path.name for path in keys) or "none"
            raise CorpusError(
                f"{given} must hold one datastore (*{KEYS}; found: {found}): name its keys"
            )
        path = keys[0]
    else:
        path = given if given.name.endswith(KEYS) else given.with_name(given.name + KEYS)
    values = path.with_name(path.name.removesuffix(KEYS) + VALUES)
    for part in (path, values):
        if not part.is_file():
            raise CorpusError(f"{part} does not exist: name a datastore's folder, or its keys")
    index = _only(path, "*.indexed") or _only(path, "*.index")  # RetoMaton's own is knn.index
    return StoreFiles(path, values, index, _only(path, "*members*.pkl"))


def _only(keys: Path, pattern: str) -> Path | None:
    """The one file of a kind that belongs to these keys.

    Where a folder holds several, names tell: dstore_gpt2_N_d, index_gpt2_N_d, members_gpt2_N_d….
    """
    found = sorted(keys.parent.glob(pattern))
    whole = keys.name.removesuffix(KEYS).partition("_")[2]
    own = [path for path in found if whole and whole in path.name]
    found = own or (found if len(list(keys.parent.glob(f"*{KEYS}"))) == 1 else [])
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CorpusError(f"{keys.parent} holds several of {pattern} ({names}): leave one there")
    return found[0] if found else None


def open_store(files: StoreFiles, dim: int, vocab_size: int, entries: int | None = None) -> Store:
    """Map a datastore of a model with so many dimensions and token ids.

    Args:
        files: where it is.
        dim: of the keys.
        vocab_size: what values lie below.
        entries: how many there are, where the files do not tell; fewer than they have room for
            leave the rest out.

    Raises:
        CorpusError: the sizes do not fit each other, or values are no tokens of the model.
        SettingError: the files have no room for so many entries, or do not tell how many.
    """
    key_bytes, value_bytes = files.keys.stat().st_size, files.values.stat().st_size
    fitting = []
    for key in (np.dtype("<f2"), np.dtype("<f4")):
        for value in (np.dtype("<i4"), np.dtype("<i8")):
            rows = key_bytes // (dim * key.itemsize)
            sizes = (rows * dim * key.itemsize, rows * value.itemsize)
            if rows and sizes == (key_bytes, value_bytes):
                fitting.append((rows, key, value))
    if not fitting:
        raise CorpusError(
            f"{files.keys} ({key_bytes:,} bytes) and {files.values.name} ({value_bytes:,}) fit no "
            f"number of keys of {dim} dims in 16 or 32 bits with values in 32 or 64: name the "
            "model that made them, or fetch them again"
        )
    possible = []
    for rows, key, value in fitting:
        values = np.memmap(files.values, value, "r", shape=(rows,))
        if _are_tokens(values, vocab_size):
            possible.append((rows, key, values))
    if len(possible) > 1 and entries is not None:
        possible = [one for one in possible if one[0] == entries] or possible
    if not possible:
        raise CorpusError(
            f"{files.values} holds values that are no tokens of the model, which has "
            f"{vocab_size:,}: name the model that made them"
        )
    if len(possible) > 1:
        counts = " or ".join(f"{rows:,}" for rows, *_ in possible)
        raise SettingError(f"{files.keys} may hold {counts} entries: say how many (--entries)")
    rows, key, values = possible[0]
    keys = np.memmap(files.keys, key, "r", shape=(rows, dim))
    if entries is not None and not 0 < entries <= rows:
        raise SettingError(f"{files.keys} has room for {rows:,} entries, not for {entries:,}")
    used = _used(keys, values) if entries is None else entries
    if not used:
        raise CorpusError(f"{files.keys} holds nothing but zeros: make the datastore anew")
    if entries is None and used < rows:
        warn_caller(
            f"the last {rows - used:,} of {rows:,} entries were never written (they are zeros): "
            "they are left out"
        )
    return Store(keys[:used], values[:used])


def _are_tokens(values: Integer[np.ndarray, " n"], vocab_size: int) -> bool:
    """Whether all lie in the vocabulary; 64 bits read as 32 would make every other one a zero."""
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        if int(block.min()) < 0 or int(block.max()) >= vocab_size:
            return False
    return not (
        values.dtype.itemsize == 4
        and len(values) > 1
        and bool(values[::2].any())
        and not values[1::2].any()
    )


def _used(keys: Float[np.ndarray, "n dim"], values: Integer[np.ndarray, " n"]) -> int:
    """Entries up to the last one that was written: room that was left over holds zeros."""
    for stop in range(len(values), 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        nonzero = np.flatnonzero(values[start:stop])
        last = start + int(nonzero[-1]) + 1 if len(nonzero) else start
        while last < stop and keys[last].any():  # token 0, with a key
            last += 1
        if last > start:
            return last
    return 0
