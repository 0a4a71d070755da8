"""FAISS, imported on first use, with the cure named where it is absent."""

from functools import cache
from typing import Any

from nearest.errors import require


@cache
def load_faiss() -> Any:
    """The faiss module; NearestError names the extra to install when it is missing."""
    require("faiss", "cpu")
    import faiss

    return faiss
