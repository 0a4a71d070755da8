"""A training run, from its folder to the model that is left in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from nearest.encode.fingerprint import model_fingerprint
from nearest.errors import SettingError, require
from nearest.retro.evaluation.scoring import check_fit, collate_of, mean_loss, retro_config
from nearest.retro.passages import Course, Passages
from nearest.retro.retrofit import RetrofitForCausalLM
from nearest.retro.runs import MODEL, Curve, begin, read_curve, step_of
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
            with other settings.
        ModelError: the loss or a gradient is no number any more; says in which documents.
        FolderError: the folder is something else, or the disk fails.
    """
    require("accelerate", "train")
    settings = settings or TrainingSettings()
    run = Path(out)
    for some in (passages, validation):
        if some is not None:
            check_fit(model, some)
    if settings.validate_every is not None and validation is None:
        raise SettingError("validate_every is given, but no validation text: give one, or neither")
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
    checkpoint = begin(run, record) if first else None
    trainer.accelerator.wait_for_everyone()
    if not first:
        checkpoint = begin(run, record)
    resumed = 0 if checkpoint is None else step_of(checkpoint)
    if resumed >= settings.max_steps and (run / MODEL).exists():
        load_weights(model, run / MODEL)
        return _finished(run, model, settings, resumed)

    def validate() -> float:
        assert validation is not None  # for this it is asked
        args = trainer.args
        share = (args.process_index, args.world_size)
        sums: Any = trainer.accelerator.reduce
        return mean_loss(
            model,
            validation,
            settings.batch_size,
            share,
            lambda tensor: sums(tensor.to(args.device), "sum") if share[1] > 1 else tensor,
        )

    scalars = open_tensorboard(run, resumed) if tensorboard and first else None
    curve = Curve(run, resumed) if first else None
    if validation is not None and checkpoint is None:
        before = validate()
        if curve is not None:
            curve.add({"step": 0, "val_loss": before})
    reports = Reports(trainer, None if validation is None else validate, report, scalars, curve)
    trainer.add_callback(reports)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_whole(MODEL)
    model.eval()
    assert reports.last is not None or resumed == settings.max_steps
    return _finished(run, model, settings, resumed)


def _record(
    model: PreTrainedModel, passages: Passages, settings: TrainingSettings
) -> Mapping[str, Any]:
    """What decides a run's numbers."""
    data = passages.dataset
    step = settings.batch_size * settings.accumulate * processes()
    base = model_fingerprint(model.base) if isinstance(model, RetrofitForCausalLM) else None
    return {
        "settings": {**settings.deciding(), "passages_a_step": step},
        "data": {
            "corpus": data.chunks.digest,
            "database": data.database.digest,
            "neighbours": data.neighbours,
            "continuation": data.continuation,
            "documents": len(data),
            "window": passages.window,
            "stride": passages.stride,
            "passages": len(passages),
        },
        "model": {
            "kind": type(model).__name__,
            "config": retro_config(model).to_diff_dict(),
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
