"""Layer 7: RETRO, a language model that attends to the neighbours of each chunk it reads."""

from nearest.retro.cache import RetroCache
from nearest.retro.config import RetroConfig
from nearest.retro.data.dataset import RetroDataset
from nearest.retro.data.live import MemoryNeighbours
from nearest.retro.data.table import NeighbourTable
from nearest.retro.model import RetroForCausalLM
from nearest.retro.neighbours import AskedNeighbours, FixedNeighbours, NeighbourCache
from nearest.retro.retrofit import RetrofitForCausalLM, load_retrofit, retrofit

__all__ = [
    "AskedNeighbours",
    "FixedNeighbours",
    "MemoryNeighbours",
    "NeighbourCache",
    "NeighbourTable",
    "RetroCache",
    "RetroConfig",
    "RetroDataset",
    "RetroForCausalLM",
    "RetrofitForCausalLM",
    "load_retrofit",
    "retrofit",
]
