"""Weights of the public RETRO implementations, into this one and back."""

from nearest.retro.convert.checkpoint import read_checkpoint
from nearest.retro.convert.norlund import from_norlund, to_norlund
from nearest.retro.convert.retro_pytorch import from_retro_pytorch, to_retro_pytorch

__all__ = [
    "from_norlund",
    "from_retro_pytorch",
    "read_checkpoint",
    "to_norlund",
    "to_retro_pytorch",
]
