"""Layer 7: RETRO, a language model that attends to the neighbours of each chunk it reads."""

from nearest.retro.cache import RetroCache
from nearest.retro.config import RetroConfig
from nearest.retro.model import RetroForCausalLM
from nearest.retro.neighbours import AskedNeighbours, FixedNeighbours, NeighbourCache
from nearest.retro.retrofit import RetrofitForCausalLM, load_retrofit, retrofit

__all__ = [
    "AskedNeighbours",
    "FixedNeighbours",
    "NeighbourCache",
    "RetroCache",
    "RetroConfig",
    "RetroForCausalLM",
    "RetrofitForCausalLM",
    "load_retrofit",
    "retrofit",
]
