"""Layer 6: RETRO, a language model that attends to the neighbours of each chunk it reads."""

from nearest.retro.cache import RetroCache
from nearest.retro.config import RetroConfig
from nearest.retro.model import RetroForCausalLM

__all__ = ["RetroCache", "RetroConfig", "RetroForCausalLM"]
