"""transformers' `Trainer`, with one loss for every model, whole checkpoints and early ends."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from nearest.errors import FolderError, ModelError, SettingError
from nearest.retro.data.dataset import NOT_SCORED, Collate
from nearest.retro.evaluation.scoring import retro_config
from nearest.retro.loss import next_token_loss
from nearest.retro.passages import Course, PassageCollate, next_labels
from nearest.retro.runs import PARTIAL, checkpoints, publish, step_of
from nearest.retro.training.settings import Optimizing, TrainingSettings
from nearest.retro.training.weights import load_weights

Validate = Callable[[], float]
"""Mean nll of the validation text, in nats; the same in every process."""


def processes() -> int:
    """How many share the run, as `torchrun` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def optimizer_of(model: nn.Module, settings: Optimizing) -> AdamW:
    """AdamW over the weights that learn; vectors are biases, norms and other weights of one dim."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    vectors = [weight for weight in weights if weight.ndim < 2]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": settings.decay},
        {
            "params": vectors,
            "weight_decay": settings.decay if settings.decay_vectors else 0.0,
        },
    ]
    return AdamW([group for group in groups if group["params"]], lr=settings.rate)


def arguments_of(settings: TrainingSettings, run: Path, device: torch.device) -> TrainingArguments:
    """What transformers is told; reports are made elsewhere.

    Raises:
        SettingError: the device is not the one that transformers takes, the first it sees.
    """
    if device.type == "cuda" and device.index and processes() == 1:
        raise SettingError(
            f"a run trains on the first GPU that it sees, not on {device}: choose another by "
            f"CUDA_VISIBLE_DEVICES={device.index}, or use all of them with torchrun"
        )
    made = TrainingArguments(
        output_dir=str(run),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.optimizing.rate,
        max_grad_norm=settings.optimizing.clip,
        lr_scheduler_type="constant_with_warmup"  # its "constant" drops the warm-up
        if settings.schedule == "constant"
        else settings.schedule,
        warmup_steps=settings.warmup,
        bf16=settings.bf16,
        activation_checkpointing=settings.checkpointing,
        seed=settings.seed,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or settings.max_steps,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        # documents shorter than a chunk leave the layers of neighbours unused
        ddp_find_unused_parameters=True,
        ddp_backend="gloo" if device.type == "cpu" and processes() > 1 else None,
    )
    # more would be DataParallel, which has other batches and whose copies share RETROfit's hooks
    made._n_gpu = min(made.n_gpu, 1)
    return made


class RetroTrainer(Trainer):
    """Trains on a course of passages.

    The loss of a step is the sum over all its scored tokens, in whatever batches and processes,
    divided by their number, whatever the model's own settings say of shifting and padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        course: Course,
        collate: Collate,
        settings: TrainingSettings,
        run: Path,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(
            model=model,
            args=arguments_of(settings, run, model.device),
            train_dataset=cast(Any, course),
            data_collator=PassageCollate(collate),
        )
        self.run = run
        self.course = course
        self.settings = settings
        self.tokenizer = tokenizer
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # transformers then leaves the loss as it is
        self.step_tokens = 0  # scored in the step that runs, by all processes
        self._step_loss = 0.0
        self._step_documents: list[int] = []
        self._writing = False

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """The course is in order already."""
        return SequentialSampler(cast(Any, self.course))

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None:
            trained = cast(nn.Module, self.model)
            self.optimizer = optimizer_of(trained, self.settings.optimizing)
        return self.optimizer

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | None:
        """Scored tokens of a step, of all processes."""
        counts = [(next_labels(batch["labels"]) != NOT_SCORED).sum() for batch in batch_samples]
        total = cast(Any, self.accelerator).gather(torch.stack(counts).sum().to(device)).sum()
        self.step_tokens = int(total)
        return cast(Tensor, total)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """A batch's part of the step's loss, times the processes, whose gradients are averaged.

        Raises:
            ModelError: it is no number.
        """
        apart = {"labels", "documents"}
        if not retro_config(cast(PreTrainedModel, self.model)).cca_layers:
            apart.add("neighbour_ids")  # the same decoder without retrieval
        given = {n: v for n, v in inputs.items() if n not in apart}
        self._step_documents += inputs["documents"].tolist()
        logits = model(**given).logits
        loss = next_token_loss(logits, next_labels(inputs["labels"]), num_items_in_batch)
        value = loss.item()
        self._step_loss += value
        if not math.isfinite(value):
            self._stop("the loss", value)
        return loss * self.args.world_size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Refuse, before the step, a gradient that would spoil every weight."""
        norm = cast(Any, super())._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(float(norm)):
            self._stop("the gradient", float(norm))
        return norm

    def end_step(self) -> float:
        """The loss of the step that ends, of all processes."""
        total = self._step_loss
        if self.args.world_size > 1:
            mine = torch.tensor(total, dtype=torch.float64, device=self.args.device)
            total = float(cast(Any, self.accelerator).reduce(mine, "sum"))
        self._step_loss = 0.0
        self._step_documents = []
        return total

    def _stop(self, what: str, value: float) -> None:
        names = [self.course.passages.name(number) for number in self._step_documents]
        step = self.state.global_step
        # weights that this step could not use are no good ones
        good = [checkpoint for checkpoint in checkpoints(self.run) if step_of(checkpoint) < step]
        last = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint is kept"
        raise ModelError(
            f"{what} became {value} in step {step + 1}, which read the documents "
            f"{', '.join(names)}; {last}: begin anew in another folder with a lower learning rate, "
            "or without those documents (--subset)"
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run / PARTIAL if self._writing else self.run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written aside by all processes, and published by the first when all have."""
        self._writing = True
        try:
            with self._failures_explained():
                cast(Any, super())._save_checkpoint(model, trial)
        finally:
            self._writing = False
        self._publish(f"checkpoint-{self.state.global_step}", self.settings.keep)

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        """What torch and safetensors say where a disk is full."""
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            of_disk = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
            if isinstance(error, RuntimeError) and not of_disk:
                raise
            raise FolderError(
                f"cannot write to {self.run} ({str(error).splitlines()[0]}): see that the disk has "
                "room and works, then run again"
            ) from error

    def save_whole(self, name: str) -> None:
        """Save the model and its tokenizer as a folder of the run."""
        with self._failures_explained():
            self._save(str(self.run / PARTIAL / name))
        self._publish(name)

    def _publish(self, name: str, keep: int | None = None) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(self.run, name, keep)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save or output_dir is None:
            return
        cast(PreTrainedModel, self.model).save_pretrained(output_dir)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(cast(PreTrainedModel, self.model), Path(resume_from_checkpoint))
