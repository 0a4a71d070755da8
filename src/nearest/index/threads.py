"""Work on rows, shared among threads of our own.

Numba's parallel loops end the process when they meet a fork, and FAISS's threads are not ours. A
kernel that releases the interpreter's lock needs neither.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_ROWS_A_THREAD = 32  # fewer are done before a thread has been woken
_pool = ThreadPoolExecutor(os.cpu_count(), "nearest-rows")  # starts threads as they are needed


def _new_pool() -> None:
    """The threads of a parent do not survive a fork."""
    global _pool
    _pool = ThreadPoolExecutor(os.cpu_count(), "nearest-rows")


os.register_at_fork(after_in_child=_new_pool)


def in_threads(work: Callable[[slice], None], rows: int) -> None:
    """Call `work` on slices that cover `rows` rows, as many at once as torch uses threads.

    `work` must not call `in_threads` itself: its threads would wait for each other.
    """
    threads = rows // _ROWS_A_THREAD
    if threads > 1:
        import torch  # late: the command starts without it

        threads = min(threads, torch.get_num_threads())
    if threads > 1:
        bounds = np.linspace(0, rows, threads + 1).astype(int)
        own, *others = itertools.starmap(slice, itertools.pairwise(bounds))
        waiting = [_pool.submit(work, some) for some in others]
        try:
            work(own)
        finally:
            for one in waiting:
                one.result()
    else:
        work(slice(None))
