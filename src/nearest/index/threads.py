"""Work on rows, shared among threads of our own.

Numba's parallel loops end the process when they meet a fork, and FAISS does not lend its threads. A
kernel that releases the interpreter's lock needs neither.
"""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

_ROWS_A_THREAD = 32  # fewer are done before a thread has been woken
_thread = threading.local()  # `in_pool`: whether this thread is one of the pool's


def _new_pool() -> ThreadPoolExecutor:
    """Threads start as they are needed."""
    return ThreadPoolExecutor(
        os.cpu_count(), "nearest-rows", lambda: setattr(_thread, "in_pool", True)
    )


_pool = _new_pool()


def _renew_pool() -> None:
    """The threads of a parent do not survive a fork."""
    global _pool
    _pool = _new_pool()
    _thread.in_pool = False


os.register_at_fork(after_in_child=_renew_pool)


def in_threads(work: Callable[[slice], None], rows: int) -> None:
    """Call `work` on slices that cover `rows` rows, as many at once as torch uses threads.

    Called from within `work`, it runs in that thread alone: threads of one pool that wait for each
    other could wait for ever.
    """
    threads = rows // _ROWS_A_THREAD
    if threads > 1 and not getattr(_thread, "in_pool", False):
        import torch  # late: the command starts without it

        threads = min(threads, torch.get_num_threads())
    else:
        threads = 1
    if threads == 1:
        work(slice(None))
        return
    bounds = np.linspace(0, rows, threads + 1).astype(int)
    own, *others = itertools.starmap(slice, itertools.pairwise(bounds))
    futures = [_pool.submit(work, some) for some in others]
    try:
        work(own)
    finally:  # nobody writes to the arrays any more when this call has ended, or failed
        wait(futures)
    for future in futures:
        future.result()
