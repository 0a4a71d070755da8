"""Weights of the public RETRO implementations, into this one and back."""

from nearest.retro.convert.checkpoint import read_checkpoint
from nearest.retro.convert.files import model_of, read_retro_json
from nearest.retro.convert.norlund import from_norlund, to_norlund
from nearest.retro.convert.retro_pytorch import from_retro_pytorch, to_retro_pytorch

__all__ = [
    "from_norlund",
    "from_retro_pytorch",
    "model_of",
    "read_checkpoint",
    "read_retro_json",
    "to_norlund",
    "to_retro_pytorch",
]
