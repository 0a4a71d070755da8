"""nearest: a memory for language models.

The public names are loaded on first use, so that `import nearest` and `nearest --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nearest.build.build import BuildOptions
    from nearest.corpus.documents import Document
    from nearest.corpus.reading import read_documents
    from nearest.episodic import EpisodicMemory, EpisodicSettings
    from nearest.errors import NearestError
    from nearest.memory import Memory
    from nearest.models.attach import attach, detach
    from nearest.models.memorizing.attention import MemorizingAttention
    from nearest.models.memorizing.layers import memorize
    from nearest.models.memorizing.memory import AttentionMemory
    from nearest.models.scoring import read_text
    from nearest.retrieval.settings import Settings
    from nearest.verbs.evaluate import evaluate
    from nearest.verbs.sweep import sweep
    from nearest.verbs.tune import tune
    from nearest.verbs.weights import tune_weights

_HOMES = {
    "AttentionMemory": "nearest.models.memorizing.memory",
    "BuildOptions": "nearest.build.build",
    "Document": "nearest.corpus.documents",
    "EpisodicMemory": "nearest.episodic",
    "EpisodicSettings": "nearest.episodic",
    "MemorizingAttention": "nearest.models.memorizing.attention",
    "Memory": "nearest.memory",
    "NearestError": "nearest.errors",
    "Settings": "nearest.retrieval.settings",
    "attach": "nearest.models.attach",
    "detach": "nearest.models.attach",
    "evaluate": "nearest.verbs.evaluate",
    "memorize": "nearest.models.memorizing.layers",
    "read_documents": "nearest.corpus.reading",
    "read_text": "nearest.models.scoring",
    "sweep": "nearest.verbs.sweep",
    "tune": "nearest.verbs.tune",
    "tune_weights": "nearest.verbs.weights",
}

__all__ = [
    "AttentionMemory",
    "BuildOptions",
    "Document",
    "EpisodicMemory",
    "EpisodicSettings",
    "MemorizingAttention",
    "Memory",
    "NearestError",
    "Settings",
    "attach",
    "detach",
    "evaluate",
    "memorize",
    "read_documents",
    "read_text",
    "sweep",
    "tune",
    "tune_weights",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nearest' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
