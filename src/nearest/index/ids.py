"""Entry ids: the dtype that stores them, and one random order of all entries.

The order is that of a hash of the id. It breaks ties between entries: of distances (`neighbours`)
and of match lengths (`sample`). The result depends neither on how a corpus is divided nor on the
number of queries, and favours no document.
"""

from typing import Any, no_type_check

import numba
import numpy as np

from nearest.machine import code_can_be_cached


def position_dtype(tokens: int) -> np.dtype[Any]:
    """int32 if that can number all positions, else int64."""
    return np.dtype(np.int32 if tokens <= np.iinfo(np.int32).max else np.int64)


# fmt: off
@no_type_check  # numba compiles the bare function
@numba.vectorize([numba.uint64(numba.int64)], cache=code_can_be_cached())
def random_order(entry: Any) -> Any:
    """Rank of an entry in the random order, unique; id -1 comes last.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    if entry < 0:
        return np.uint64(0xFFFFFFFFFFFFFFFF)
    bits = np.uint64(entry)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
# fmt: on
