"""Check, train, fill and join FAISS indexes of any factory string."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.index.approximate import inverted_lists
from nearest.index.choice import AUTO, EXACT, resolve_spec
from nearest.index.faiss_module import load_faiss
from nearest.index.keys import Keys
from nearest.index.neighbours import Metric
from nearest.progress import Progress, no_progress

_ADD_ROWS = 65_536
_ADD_BYTES = 1 << 24  # of float32 rows; FAISS allocates as much again
_TRAINING_BYTES = 1 << 29
_FEWEST_A_LIST = 39  # rows, FAISS's own minimum


def check_spec(spec: str, dim: int, nprobe: int | None, entries: int | None = None) -> None:
    """Refuse an index that cannot be built, before any key is encoded.

    Raises:
        SettingError: FAISS does not know the string, it does not fit the dimension, it needs more
            entries, or nprobe is set for an index without lists.
        NearestError: FAISS is not installed, and the index is not exact.
    """
    if entries is not None:
        spec = resolve_spec(spec, entries, dim)
    ivf = None
    if spec not in (AUTO, EXACT):
        index = _make_index(spec, dim, "l2")
        ivf = inverted_lists(index)
    if ivf is not None and entries is not None and ivf.nlist > entries:
        raise SettingError(
            f"the index {spec!r} has more lists than the memory has entries ({entries:,}): choose "
            "fewer lists, or auto"
        )
    if nprobe is not None and ivf is None and spec != AUTO:
        raise SettingError(
            f"the index {spec!r} has no lists to probe: leave nprobe out, or choose an IVF index"
        )


def training_rows(spec: str, dim: int) -> int:
    """Rows that suffice to train an index: FAISS's minimum for each list and each 8-bit code."""
    return _FEWEST_A_LIST * max(256, number_of_lists(spec, dim))


def code_bytes(spec: str, dim: int) -> int:
    """Bytes of an index for each entry, without the id."""
    index = _make_index(spec, dim, "l2")
    ivf = inverted_lists(index)
    return int(index.sa_code_size() if ivf is None else ivf.code_size)


def number_of_lists(spec: str, dim: int) -> int:
    """Number of inverted lists; 0 for an index without them."""
    ivf = inverted_lists(_make_index(spec, dim, "l2"))
    return 0 if ivf is None else int(ivf.nlist)


def _make_index(spec: str, dim: int, metric: Metric) -> Any:
    faiss = load_faiss()
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        return faiss.index_factory(dim, spec, kind)
    except RuntimeError as error:
        raise _refused(spec, dim, error) from error


def _refused(spec: str, dim: int, error: RuntimeError) -> SettingError:
    reason = str(error).strip().split("\n")[-1].split(": ")[-1]
    return SettingError(
        f"FAISS cannot build the index {spec!r} over keys of {dim} dims ({reason}): choose another "
        "index_factory string, or auto"
    )


def train_index(keys: Keys, ids: Int[np.ndarray, " m"], spec: str, rng: np.random.Generator) -> Any:
    """An empty FAISS index, trained on a sample of the keys of `ids`.

    Raises:
        SettingError: FAISS does not know the factory string, or it does not fit the keys.
    """
    faiss = load_faiss()
    index = _make_index(spec, keys.dim, keys.metric)
    try:
        if not _keeps_ids(index):
            index = faiss.IndexIDMap(index)
        if not index.is_trained:
            lists = number_of_lists(spec, keys.dim)
            index.train(_read(keys, _training_sample(ids, keys.dim, lists, rng)))
    except RuntimeError as error:
        raise _refused(spec, keys.dim, error) from error
    return index


def fill_index(
    index: Any,
    keys: Keys,
    ids: Int[np.ndarray, " m"],
    spec: str,
    progress: Progress = no_progress,
) -> None:
    """Add the keys of `ids` to a trained FAISS index, with those ids.

    Raises:
        SettingError: this kind of index cannot take them.
    """
    done = 0
    try:
        for block in _blocks(keys, ids):
            index.add_with_ids(keys.rows(block), block)
            done += len(block)
            progress(f"index {spec}", done, len(ids))
    except RuntimeError as error:
        raise _refused(spec, keys.dim, error) from error


def build_index(keys: Keys, ids: Int[np.ndarray, " m"], spec: str, rng: np.random.Generator) -> Any:
    """`train_index` and `fill_index` in one."""
    index = train_index(keys, ids, spec, rng)
    fill_index(index, keys, ids, spec)
    return index


def can_be_joined(index: Any) -> bool:
    """Whether `joined` can merge indexes filled from this trained one: only inverted lists."""
    return inverted_lists(index) is not None


def joined(parts: Sequence[tuple[Any, int]]) -> Any:
    """Merge FAISS indexes that were filled from the same trained one; the inputs are consumed.

    Args:
        parts: indexes, and the offset to add to the ids of each. An index that cannot be merged
            (`can_be_joined`) must be the only one.
    """
    (whole, first), *others = parts
    if first:
        _shift_ids(whole, first)
    for other, beginning in others:
        _append_blocks(inverted_lists(whole), inverted_lists(other), beginning)
        whole.merge_from(other, beginning)
    return whole


def _shift_ids(index: Any, by: int) -> None:
    """Add an offset to all ids, in inverted lists or in an id map."""
    faiss, ivf = load_faiss(), inverted_lists(index)
    if ivf is None:
        ids = faiss.downcast_index(index).id_map
        faiss.rev_swig_ptr(ids.data(), ids.size())[:] += by
        return
    for number in range(ivf.nlist):
        ids, size = ivf.invlists.get_ids(number), ivf.invlists.list_size(number)
        faiss.rev_swig_ptr(ids, size)[:] += by


def _append_blocks(whole: Any, other: Any, beginning: int) -> None:
    """Move over the lists that FAISS would corrupt: codes in blocks, after exactly whole ones.

    Its merge tells such lists by `size % bytes a block`, and then copies as many blocks as both
    hold together, from the other one and behind the end (1.15). The rest is left to it.
    """
    faiss = load_faiss()
    lists, others = (faiss.downcast_InvertedLists(ivf.invlists) for ivf in (whole, other))
    if not isinstance(lists, faiss.BlockInvertedLists):
        return
    for number in range(lists.nlist):
        size, more = lists.list_size(number), others.list_size(number)
        if not (size and more and size % lists.block_size == 0):
            continue
        held, added = (-(-n // lists.n_per_block) * lists.block_size for n in (size, more))
        lists.resize(number, size + more)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), held + added)
        codes[held:] = faiss.rev_swig_ptr(others.get_codes(number), added)
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size + more)
        ids[size:] = faiss.rev_swig_ptr(others.get_ids(number), more) + beginning
        others.resize(number, 0)


def _keeps_ids(index: Any) -> bool:
    """Whether an index stores the ids it is given; the others need an id map around them."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexPreTransform):
        return _keeps_ids(faiss.downcast_index(index.index))
    return isinstance(index, faiss.IndexIVF | faiss.IndexIDMap)


def sample_size(dim: int, lists: int) -> int:
    """Rows for k-means: 64 a centroid is enough for lists, 64 × 256 for product quantisers.

    Where those take more than half a gigabyte, fewer, but no fewer than FAISS asks for.
    """
    wanted = 64 * max(256, lists)
    return min(wanted, max(_FEWEST_A_LIST * lists, _TRAINING_BYTES // (4 * dim)))


def _training_sample(
    ids: Int[np.ndarray, " m"], dim: int, lists: int, rng: np.random.Generator
) -> Int[np.ndarray, " s"]:
    size = min(sample_size(dim, lists), len(ids))
    return np.sort(rng.choice(ids, size=size, replace=False))


def rows_at_once(dim: int) -> int:
    """Keys that are decoded together while an index is trained and filled."""
    return max(1, min(_ADD_ROWS, _ADD_BYTES // (4 * dim)))


def _blocks(keys: Keys, ids: Int[np.ndarray, " m"]) -> Iterator[Int[np.ndarray, "_"]]:
    """Ids a block at a time, so that few rows are held as float32."""
    rows = rows_at_once(keys.dim)
    return (ids[start : start + rows] for start in range(0, len(ids), rows))


def _read(keys: Keys, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
    """Many rows at once; what they are decoded from is held a block at a time."""
    rows, done = np.empty((len(ids), keys.dim), np.float32), 0
    for block in _blocks(keys, ids):
        rows[done : done + len(block)] = keys.rows(block)
        done += len(block)
    return rows
