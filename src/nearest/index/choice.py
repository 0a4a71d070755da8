"""The index that "auto" chooses, by entries, dimension, RAM and the recall that is wanted."""

import math

from nearest.machine import machine_memory

EXACT = "exact"
AUTO = "auto"
EXACT_BELOW = 50_000  # entries; fewer are scanned as quickly as an index is searched
RECALL = 0.95  # of the 1,024 nearest after re-ranking, to which an index is tuned
_SHARE = 0.5  # of the machine's RAM, for the codes of one index
_ID_BYTES = 8
_ROTATED_ABOVE, _COARSER_ABOVE = 256, 1_024  # dims
_ROUGH = 0.97  # recall that 4-bit codes reach with a margin that is still quick to re-rank
_BYTES = "SQ8"


def resolve_spec(
    spec: str, entries: int, dim: int, memory_bytes: int | None = None, *, recall: float = RECALL
) -> str:
    """Turn "auto" into exact search for small memories, else into inverted lists.

    The default codes are product codes: 4 bits for every two dims (four above 1,024 dims), which
    FAISS compares in registers ("fast scan"), far quicker than 8-bit codes and smaller. Their order
    is rough, so more candidates are fetched and re-ranked by the stored keys. Keys of more than 256
    dims are rotated at random first. Models of this size have dims and tokens far larger than the
    rest; fast scan rounds all of a query's table by one scale, and such a dim would leave nothing
    of the others.
    If such codes need more than half of the machine's RAM, up to sixteen dims share a code. 8-bit
    codes are chosen if the dims cannot be divided so, and if rough codes do not reach the recall
    and there is room. Only exact search has a recall of 1.

    Args:
        spec: any spec but "auto" is returned unchanged.
        entries, dim: number and dimension of keys.
        memory_bytes: RAM; the machine's if not given.
        recall: that the index is to be tuned to.
    """
    if spec != AUTO:
        return spec
    if entries < EXACT_BELOW or recall == 1:
        return EXACT
    room = _SHARE * (machine_memory() if memory_bytes is None else memory_bytes)
    parts = [dim // n for n in _dims_a_code(dim)]
    fitting = [n for n in parts if entries * (n / 2 + _ID_BYTES) <= room]
    fine = recall > _ROUGH and entries * (dim + _ID_BYTES) <= room
    codes = _BYTES if fine or not parts else f"PQ{(fitting or parts[-1:])[0]}x4fs"
    rotation = f"RR{dim}," if codes != _BYTES and dim > _ROTATED_ABOVE else ""
    return f"{rotation}IVF{fitting_lists(entries)},{codes}"


def fitting_lists(entries: int) -> int:
    """The number of inverted lists for so many entries: the power of two nearest sqrt(entries)."""
    return 1 << round(math.log2(entries) / 2)


def bytes_an_entry(dim: int) -> int:
    """Bytes an entry of the finest index that "auto" chooses, its id included."""
    dims = _dims_a_code(dim)
    return _ID_BYTES + (dim // dims[0] // 2 if dims else dim)


def explained(asked: str, spec: str, entries: int, dim: int, recall: float = RECALL) -> str:
    """One-sentence explanation of why this index was chosen (shown by `nearest info`)."""
    if asked != AUTO:
        if spec == EXACT != asked:
            return f"{asked} was asked for; so few entries, beside others, are scanned"
        return "asked for"
    if spec == EXACT and recall == 1:
        return "a recall of 1 is what exact search has alone"
    if spec == EXACT:
        return f"fewer than {EXACT_BELOW:,} entries are scanned as quickly as an index is searched"
    if not spec.endswith("fs") and _dims_a_code(dim):
        return f"a byte a dim: codes of 4 bits do not find {recall:.1%} of the nearest"
    if not spec.endswith("fs"):
        return f"{dim} dims cannot be cut into parts of up to 16, so each is a byte"
    dims = dim // int(spec.partition("PQ")[2].removesuffix("x4fs"))
    lists = spec.partition("IVF")[2].partition(",")[0]
    finest = _dims_a_code(dim)[0]
    small = "" if dims == finest else f" (not {finest}, for the sake of this machine's memory)"
    why = "of keys that are rotated, lest a few dims outweigh the rest; "
    rotated = why if spec.startswith("RR") else ""
    return (
        f"{lists} lists for {entries:,} entries; {rotated}4 bits for {dims} dims{small}: quick to "
        "compare and rough, so that the stored keys re-rank what is found"
    )


def _dims_a_code(dim: int) -> list[int]:
    """Numbers of dims that may share a code, ascending."""
    return [n for n in range(2 if dim <= _COARSER_ABOVE else 4, 17) if dim % n == 0]
