"""nearest: a memory for language models.

The public names are loaded on first use, so that `import nearest` and `nearest --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nearest.corpus.documents import Document, read_documents
    from nearest.errors import NearestError
    from nearest.memory.memory import Memory
    from nearest.models.attach import attach
    from nearest.verbs.evaluate import evaluate
    from nearest.verbs.sweep import sweep
    from nearest.verbs.tune import tune

_HOMES = {
    "Document": "nearest.corpus.documents",
    "Memory": "nearest.memory.memory",
    "NearestError": "nearest.errors",
    "attach": "nearest.models.attach",
    "evaluate": "nearest.verbs.evaluate",
    "read_documents": "nearest.corpus.documents",
    "sweep": "nearest.verbs.sweep",
    "tune": "nearest.verbs.tune",
}

__all__ = [
    "Document",
    "Memory",
    "NearestError",
    "attach",
    "evaluate",
    "read_documents",
    "sweep",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nearest' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
