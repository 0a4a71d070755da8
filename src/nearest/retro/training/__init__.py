"""Training of RETRO models, from scratch and as RETROfit."""

from nearest.retro.training.run import TrainingResult, train
from nearest.retro.training.settings import OPTIMIZERS, TrainingSettings

__all__ = ["OPTIMIZERS", "TrainingResult", "TrainingSettings", "train"]
