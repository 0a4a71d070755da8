# The public names, and where each is defined: the one list of them, which __init__.py reads.

__version__: str

from nearest.build.build import BuildOptions as BuildOptions
from nearest.corpus.documents import Document as Document
from nearest.corpus.reading import read_documents as read_documents
from nearest.episodic import EpisodicMemory as EpisodicMemory
from nearest.episodic import EpisodicSettings as EpisodicSettings
from nearest.errors import NearestError as NearestError
from nearest.memory import Memory as Memory
from nearest.models.attach import attach as attach
from nearest.models.attach import detach as detach
from nearest.models.memorizing.attention import MemorizingAttention as MemorizingAttention
from nearest.models.memorizing.layers import memorize as memorize
from nearest.models.memorizing.memory import AttentionMemory as AttentionMemory
from nearest.models.scoring import read_text as read_text
from nearest.remote.memory import RemoteMemory as RemoteMemory
from nearest.remote.neighbours import RemoteNeighbours as RemoteNeighbours
from nearest.retrieval.settings import Settings as Settings
from nearest.verbs.callback import MemoryCallback as MemoryCallback
from nearest.verbs.evaluate import evaluate as evaluate
from nearest.verbs.evaluate_generated import GeneratedResult as GeneratedResult
from nearest.verbs.evaluate_generated import evaluate_generated as evaluate_generated
from nearest.verbs.sweep import sweep as sweep
from nearest.verbs.tune import tune as tune
from nearest.verbs.tune_generated import TunedByText as TunedByText
from nearest.verbs.tune_generated import tune_generated as tune_generated
from nearest.verbs.weights import tune_weights as tune_weights
