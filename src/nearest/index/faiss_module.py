"""FAISS, imported on first use, with the cure named where it is absent."""

import os
from functools import cache
from typing import Any

from nearest.errors import require


@cache
def load_faiss() -> Any:
    """The faiss module; NearestError names the extra to install when it is missing."""
    require("faiss", "cpu")
    import faiss

    # OpenMP's threads do not survive a fork, and a child that waits for them waits for ever.
    os.register_at_fork(after_in_child=lambda: faiss.omp_set_num_threads(1))
    return faiss
