"""A training run, from its folder to the model that is left in it."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nearest.encode.dtype import warn_of_slow_dtype
from nearest.encode.fingerprint import model_fingerprint
from nearest.errors import FolderError, ModelError, SettingError, require
from nearest.folder import disk_errors_explained, writer_lock
from nearest.retro.evaluation.scoring import check_fit, collate_of, mean_loss, retro_config
from nearest.retro.passages import Course, Passages
from nearest.retro.retrofit import RetrofitForCausalLM
from nearest.retro.runs import MODEL, Curve, begin, clear, make_folder, read_curve, step_of
from nearest.retro.training.reports import Report, Reports, open_tensorboard
from nearest.retro.training.settings import TrainingSettings
from nearest.retro.training.trainer import RetroTrainer, processes
from nearest.retro.training.weights import load_weights


@dataclass(frozen=True)
class TrainingResult:
    """A run that is done.

    Attributes:
        model: its folder, for `open_retro`.
        steps: of the whole run. resumed: the step that this process went on from; 0: none.
        train_loss: of the last step. val_loss: after it; None without a validation text.
    """

    model: Path
    steps: int
    resumed: int
    train_loss: float
    val_loss: float | None


def train(
    model: PreTrainedModel,
    passages: Passages,
    out: Path | str,
    settings: TrainingSettings | None = None,
    *,
    validation: Passages | None = None,
    tokenizer: Any = None,
    tensorboard: bool = False,
    report: Report = lambda _: None,
) -> TrainingResult:
    """Train a RETRO or RETROfit model, or go on with a run that was stopped.

    The k-th step reads what it would have read in any other run with the same settings, so that a
    resumed run has the losses of the unbroken one. Under `torchrun` the processes share each step.

    Args:
        model: from `RetroForCausalLM(config)` or `retrofit`; its weights are where a new run
            begins, and are replaced where a run goes on. It is left trained.
        passages: to learn from.
        out: the run's folder, new or of a run with the same settings.
        settings: how; see `TrainingSettings`.
        validation: whose loss is looked at.
        tokenizer: saved with the model.
        tensorboard: also write TensorBoard's files, in out/tensorboard.
        report: called after each step, by the first process.

    Raises:
        SettingError: chunks of another size, tokens outside the vocabulary, or a run that was begun
            with other settings, or has made more steps already.
        ModelError: the loss or a gradient is no number any more; says in which documents.
        FolderError: the folder is something else, another process writes it, or the disk fails.
    """
    require("accelerate", "train")
    settings = settings or TrainingSettings()
    run = Path(out)
    for some in (passages, validation):
        if some is not None:
            check_fit(model, some)
    if settings.validate_every is not None and validation is None:
        raise SettingError("validate_every is given, but no validation text: give one, or neither")
    warn_of_slow_dtype(model, bf16=settings.bf16)
    make_folder(run)
    items = settings.max_steps * settings.batch_size * settings.accumulate
    trainer = RetroTrainer(
        model,
        Course(passages, settings.seed, items * processes(), settings.variation),
        collate_of(model, passages.dataset.chunks.size),
        settings,
        run,
        tokenizer,
    )
    first = trainer.args.process_index == 0
    record = _record(model, passages, settings)
    with ExitStack() as held:
        held.enter_context(disk_errors_explained(run))
        if first:
            held.enter_context(writer_lock(run))
        checkpoint = begin(run, record) if first else None
        trainer.accelerator.wait_for_everyone()
        if not first:
            checkpoint = begin(run, record)
        resumed = 0 if checkpoint is None else step_of(checkpoint)
        _check_resumed(trainer, resumed)
        if resumed >= settings.max_steps and (run / MODEL).exists():
            load_weights(model, run / MODEL)
            return _finished(run, model, settings, resumed)
        if first:
            clear(run, resumed if resumed < settings.max_steps else 0)

        def validate() -> float:
            assert validation is not None  # for this it is asked
            return _validation_loss(trainer, model, validation)

        scalars = open_tensorboard(run, resumed) if tensorboard and first else None
        if scalars is not None:
            held.callback(scalars.close)
        curve = Curve(run, -1 if checkpoint is None else resumed) if first else None
        if validation is not None and checkpoint is None:
            before = validate()
            if curve is not None:
                curve.add({"step": 0, "val_loss": before})
        reports = Reports(trainer, None if validation is None else validate, report, scalars, curve)
        trainer.add_callback(reports)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_whole(MODEL)
    model.eval()
    return _finished(run, model, settings, resumed)


def _check_resumed(trainer: RetroTrainer, resumed: int) -> None:
    """Refuse a run that is longer than wanted, or that not all processes see."""
    run, most = trainer.run, trainer.settings.max_steps
    mine = torch.tensor([resumed], device=trainer.args.device)
    steps = cast(Tensor, cast(Any, trainer.accelerator).gather(mine))
    if len(steps.unique()) > 1:
        raise FolderError(
            f"the processes find {run} after {steps.tolist()} steps: put --out where all hosts see "
            "the same files"
        )
    if resumed > most:
        raise SettingError(
            f"{run} has made {resumed} steps already, more than max_steps {most}: give {resumed} "
            "or more, or --out a new folder"
        )


def _validation_loss(trainer: RetroTrainer, model: PreTrainedModel, validation: Passages) -> float:
    args = trainer.args
    share = (args.process_index, args.world_size)
    sums: Any = trainer.accelerator.reduce
    loss = mean_loss(
        model,
        validation,
        trainer.settings.batch_size,
        share,
        lambda tensor: sums(tensor.to(args.device), "sum") if share[1] > 1 else tensor,
    )
    if not math.isfinite(loss):
        raise ModelError(
            f"the validation loss became {loss} after step {trainer.state.global_step}: begin anew "
            "in another folder with a lower learning rate"
        )
    return loss


def _record(
    model: PreTrainedModel, passages: Passages, settings: TrainingSettings
) -> Mapping[str, Any]:
    """What decides a run's numbers."""
    data = passages.dataset
    step = settings.batch_size * settings.accumulate * processes()
    base = model_fingerprint(model.base) if isinstance(model, RetrofitForCausalLM) else None
    config = retro_config(model).to_diff_dict()
    config.pop("transformers_version", None)  # a newer one may go on
    return {
        "settings": {**settings.deciding(), "passages_a_step": step},
        "data": {
            "corpus": data.chunks.digest,
            "database": data.database.digest,
            "neighbours": data.neighbours,
            "continuation": data.continuation,
            "table": data.table_digest,
            "documents": len(data),
            "window": passages.window,
            "stride": passages.stride,
            "passages": len(passages),
            "read": passages.digest,
        },
        "model": {
            "kind": type(model).__name__,
            "config": config,
            "base": base,
        },
    }


def _finished(
    run: Path, model: PreTrainedModel, settings: TrainingSettings, resumed: int
) -> TrainingResult:
    lines = read_curve(run)
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    at_end = [line["val_loss"] for line in lines[-1:] if "val_loss" in line]
    return TrainingResult(
        run / MODEL,
        settings.max_steps,
        resumed,
        losses[-1] if losses else float("nan"),
        at_end[0] if at_end else None,
    )
