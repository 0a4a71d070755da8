"""What a run tells while it goes on: its curve, TensorBoard's tags, and each step's report."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nearest.errors import require
from nearest.retro.runs import Curve
from nearest.retro.training.trainer import RetroTrainer, Validate


@dataclass(frozen=True)
class StepReport:
    """A step that has ended.

    Attributes:
        step: counted from 1. steps: of the run.
        loss: of the step, nats a token.
        validation: mean nll of the validation text; None where none was made after this step.
        rate: the learning rate. tokens: scored in the step.
        tokens_a_second: over this process's run so far, validation left out.
        seconds_left: at that speed.
    """

    step: int
    steps: int
    loss: float
    validation: float | None
    rate: float
    tokens: int
    tokens_a_second: float
    seconds_left: float


Report = Callable[[StepReport], None]


@runtime_checkable
class Scalars(Protocol):
    """TensorBoard's writer, as far as it is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...

    def close(self) -> None: ...


def open_tensorboard(run: Path, step: int) -> Scalars:
    """A writer of TensorBoard's files; what stands there after a step is hidden.

    Raises:
        NearestError: TensorBoard is not installed.
    """
    require("tensorboard", "train")
    from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined, unused-ignore]

    made: Scalars = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
    return made


def tags_of(line: StepReport) -> dict[str, float]:
    """The scalars of a step: `train_loss` and `val_loss` under those names, and ours."""
    tags = {
        "train_loss": line.loss,
        "train_perplexity": math.exp(min(line.loss, 700)),
        "learning_rate": line.rate,
        "tokens_per_second": line.tokens_a_second,
    }
    if line.validation is not None:
        tags["val_loss"] = line.validation
        tags["val_perplexity"] = math.exp(min(line.validation, 700))
    return tags


class Reports(TrainerCallback):
    """Follows a run: validates where it is due, and tells of each step."""

    def __init__(
        self,
        trainer: RetroTrainer,
        validate: Validate | None,
        report: Report,
        scalars: Scalars | None,
        curve: Curve | None,
    ) -> None:
        """Of a run.

        Args:
            trainer: whose steps are told of.
            validate: called in every process, every `validate_every` steps and after the last.
            report: called after each step.
            scalars: TensorBoard's writer, or None.
            curve: on disk; None in all processes but the first, where `report` is not called.
        """
        self._trainer = trainer
        self._validate = validate
        self._report = report
        self._scalars = scalars
        self._curve = curve
        self._seconds = 0.0
        self._tokens = 0
        self._since = 0.0
        self._first = 0
        self._rate = 0.0
        self.last: StepReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.save_steps = int(args.save_steps)  # a checkpoint has those of the run that wrote it
        self._first = state.global_step
        self._since = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._rate = cast(Any, self._trainer.optimizer).param_groups[0]["lr"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        loss = self._trainer.end_step()
        self._seconds += time.perf_counter() - self._since  # data and checkpoints included
        self._tokens += self._trainer.step_tokens
        step, settings = state.global_step, self._trainer.settings
        every = settings.validate_every
        due = self._validate is not None and (
            step == settings.max_steps or (every is not None and step % every == 0)
        )
        validation = None
        if due and self._validate is not None:
            validation = self._validate()
        self._since = time.perf_counter()
        done = step - self._first
        self.last = StepReport(
            step=step,
            steps=settings.max_steps,
            loss=loss,
            validation=validation,
            rate=self._rate,
            tokens=self._trainer.step_tokens,
            tokens_a_second=self._tokens / self._seconds,
            seconds_left=(settings.max_steps - step) * self._seconds / done,
        )
        if self._curve is None:
            return
        self._curve.add(line_of(self.last))
        if self._scalars is not None:
            for tag, value in tags_of(self.last).items():
                self._scalars.add_scalar(tag, value, step)
        self._report(self.last)


def line_of(report: StepReport) -> Mapping[str, Any]:
    """A line of the curve: what a resumed run gives again, and the speed."""
    line: dict[str, Any] = {
        "step": report.step,
        "train_loss": report.loss,
        "learning_rate": report.rate,
        "tokens": report.tokens,
        "tokens_per_second": report.tokens_a_second,
    }
    return line if report.validation is None else {**line, "val_loss": report.validation}
