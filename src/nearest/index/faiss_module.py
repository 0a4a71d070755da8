"""FAISS, imported on first use."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

from nearest.errors import require


@cache
def has_faiss() -> bool:
    """Whether it is installed."""
    return find_spec("faiss") is not None


@cache
def load_faiss() -> Any:
    """The faiss module (NearestError names the extra to install if it is missing)."""
    require("faiss", "cpu")
    import faiss

    # OpenMP's threads do not survive a fork; a child that waits for them hangs.
    os.register_at_fork(after_in_child=lambda: faiss.omp_set_num_threads(1))
    return faiss
