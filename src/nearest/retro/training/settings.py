"""How a model is trained: one set of settings, which a resumed run must share."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nearest.errors import SettingError
from nearest.retro.passages import Variation


@dataclass(frozen=True)
class Optimizing:
    """AdamW's settings.

    Attributes:
        rate: learning rate. decay: weight decay. decay_vectors: also of biases and norms.
        clip: greatest norm of the gradient; 0: any.
    """

    rate: float
    decay: float
    decay_vectors: bool
    clip: float


OPTIMIZERS = {
    "norlund": Optimizing(rate=1e-4, decay=0.1, decay_vectors=True, clip=1.0),
    "retro-pytorch": Optimizing(rate=3e-4, decay=0.1, decay_vectors=False, clip=0.0),
}
"""As the public implementations train, under the names of the models' presets."""

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides what a run computes, and how often it is looked at.

    Attributes:
        max_steps: optimiser steps.
        batch_size: passages that a process reads at once.
        accumulate: batches of a step.
        optimizer: a name in OPTIMIZERS; the next three replace single settings of it.
        learning_rate, weight_decay, clip: None: the optimiser's.
        schedule: "constant", or falling to 0 as "linear" or "cosine".
        warmup: steps in which the rate rises from 0.
        bf16: compute in bfloat16 where that is safe; weights stay float32.
        checkpointing: keep fewer activations, and compute them a second time.
        seed: of the order, of dropout and of what is done to neighbours.
        neighbour_dropout, shuffle_neighbours: as in `Variation`.
        validate_every: steps between two validations; None: never.
        save_every: steps between two checkpoints; None: only the model at the end is saved.
        keep: checkpoints kept, the latest.
        workers: processes that load data; changes nothing of what is read.
    """

    max_steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "norlund"
    learning_rate: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    schedule: Schedule = "constant"
    warmup: int = 0
    bf16: bool = False
    checkpointing: bool = False
    seed: int = 0
    neighbour_dropout: float = 0.0
    shuffle_neighbours: bool = False
    validate_every: int | None = None
    save_every: int | None = 500
    keep: int = 2
    workers: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise SettingError(
                f"optimizer {self.optimizer!r} is unknown: choose {' or '.join(OPTIMIZERS)}"
            )
        if self.schedule not in SCHEDULES:
            raise SettingError(
                f"schedule {self.schedule!r} is unknown: choose {', '.join(SCHEDULES)}"
            )
        least = {"max_steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "seed": 0}
        least |= {"keep": 1, "workers": 0, "validate_every": 1, "save_every": 1}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise SettingError(f"{name} must be at least {value}, got {given}")
        for name in ("learning_rate", "weight_decay", "clip"):
            given = getattr(self, name)
            if given is not None and not 0 <= given < float("inf"):
                raise SettingError(f"{name} must be 0 or more and finite, got {given}")
        if self.validate_every is not None and self.validate_every > self.max_steps:
            raise SettingError(
                f"validate_every {self.validate_every} is beyond the run's {self.max_steps} steps, "
                "which would never be validated: make it smaller"
            )
        if self.warmup > self.max_steps:
            raise SettingError(f"warmup {self.warmup} exceeds the run's {self.max_steps} steps")
        _ = self.variation  # checks its own numbers

    @property
    def optimizing(self) -> Optimizing:
        """The optimiser's settings with what was given."""
        preset = OPTIMIZERS[self.optimizer]
        return Optimizing(
            preset.rate if self.learning_rate is None else self.learning_rate,
            preset.decay if self.weight_decay is None else self.weight_decay,
            preset.decay_vectors,
            preset.clip if self.clip is None else self.clip,
        )

    @property
    def variation(self) -> Variation:
        """What is done to neighbours."""
        return Variation(self.neighbour_dropout, self.shuffle_neighbours)

    def deciding(self) -> dict[str, Any]:
        """Those settings that decide what is computed, with which a run must be resumed."""
        free = {"validate_every", "save_every", "keep", "workers", "batch_size", "accumulate"}
        if self.schedule == "constant":
            free.add("max_steps")  # such a run can go on for longer
        return {name: value for name, value in asdict(self).items() if name not in free}
