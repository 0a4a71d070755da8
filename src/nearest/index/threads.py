"""Work on rows, shared among threads of our own.

Numba's parallel loops end the process when they meet a fork, and FAISS's threads are not ours; a
kernel that releases the interpreter's lock needs neither.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nearest.index.faiss_module import load_faiss

_ROWS_A_THREAD = 32  # fewer are done before a thread has been started


def in_threads(work: Callable[[slice], None], rows: int) -> None:
    """Call `work` on slices that cover `rows` rows, as many at once as FAISS would use threads."""
    threads = rows // _ROWS_A_THREAD
    if threads > 1:
        threads = min(threads, load_faiss().omp_get_max_threads())
    if threads > 1:
        bounds = np.linspace(0, rows, threads + 1).astype(int)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, itertools.starmap(slice, itertools.pairwise(bounds))))
    else:
        work(slice(None))
