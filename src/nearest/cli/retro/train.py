"""`nearest retro train` and `fit`: models that learn to read neighbours."""

import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nearest.cli.app import err, quiet_libraries
from nearest.cli.options import AsJson, Device, with_commas
from nearest.cli.retro.options import DatabasePath, More, Queries, TablePath, report
from nearest.cli.retro.reading import (
    Subset,
    check_tokenizers,
    dataset_of_text,
    opened_text,
)
from nearest.errors import NearestError, SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nearest.retro.opening import NeighbouredText
    from nearest.retro.passages import Passages
    from nearest.retro.training import TrainingSettings
    from nearest.retro.training.reports import StepReport

RunPath = Annotated[
    Path, typer.Option("--out", help="The run's folder; one that was stopped goes on.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A setting of RetroConfig, as decoder_layers=6; repeat."
    ),
]
Begin = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Begin with the weights and settings of this model, run or checkpoint, in place of "
        "new ones.",
    ),
]


@dataclass(frozen=True)
class Corpus:
    """What is learnt from."""

    table: TablePath = None
    more: More = None
    queries: Queries = None
    validation: Annotated[
        Path | None, typer.Option(help="Table of a validation text's neighbours.")
    ] = None
    neighbours: Annotated[int, typer.Option(help="Neighbours read of each chunk.")] = 2
    continuations: Annotated[
        int, typer.Option(help="Chunks read after each neighbour, never past its document's end.")
    ] = 1
    max_len: Annotated[
        int | None,
        typer.Option(help="Tokens read at once.  \\[default: 1024, or the model's positions]"),
    ] = None
    first_only: Annotated[
        bool,
        typer.Option("--first-only", help="Read the first --max-len tokens of a document alone."),
    ] = False
    subset: Subset = None

    def texts(self, database: Path) -> "tuple[NeighbouredText, NeighbouredText | None]":
        """The text to learn from, and the one to validate with."""
        text = opened_text(database, self.more, self.table, self.queries)
        if self.validation is None:
            return text, None
        return text, opened_text(database, self.more, self.validation)

    def passages(
        self,
        texts: "tuple[NeighbouredText, NeighbouredText | None]",
        positions: int | None,
        least: int = 2,
    ) -> "tuple[Passages, Passages | None]":
        """What is read of both by a model of so many positions, in passages of so many tokens."""
        from nearest.retro.passages import Passages

        chunk = texts[0].own.chunks.size
        window = max(min(1024, positions or 1024) // chunk, 1) * chunk
        if self.max_len is not None:
            window = self.max_len

        def read(text: "NeighbouredText", subset: Path | None) -> Passages:
            data = dataset_of_text(
                text,
                subset,
                neighbours=self.neighbours,
                continuation=self.continuations,
                max_len=window if self.first_only else None,
            )
            return Passages(data, window, least=least)

        validation = None if texts[1] is None else read(texts[1], None)
        return read(texts[0], self.subset), validation


@dataclass(frozen=True)
class Training:
    """How."""

    max_steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000
    batch_size: Annotated[int, typer.Option(help="Passages a process reads at once.")] = 8
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1
    optimizer: Annotated[
        Literal["norlund", "retro-pytorch"],
        typer.Option(
            help="AdamW as the public code has it: 1e-4, decay 0.1 on all, clip 1; or 3e-4, no "
            "decay of vectors, no clip."
        ),
    ] = "norlund"
    lr: Annotated[
        float | None, typer.Option(help="Learning rate, in place of the optimiser's.")
    ] = None
    weight_decay: Annotated[float | None, typer.Option(help="In place of the optimiser's.")] = None
    clip: Annotated[float | None, typer.Option(help="Greatest norm of a gradient; 0: any.")] = None
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], typer.Option(help="How the rate falls to 0.")
    ] = "constant"
    warmup: Annotated[int, typer.Option(help="Steps in which the rate rises.")] = 0
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Keep fewer activations, compute them twice.")
    ] = False
    neighbour_dropout: Annotated[
        float, typer.Option(help="Probability that a neighbour is left out.")
    ] = 0.0
    shuffle_neighbours: Annotated[
        bool, typer.Option("--shuffle-neighbours", help="Read a chunk's neighbours in any order.")
    ] = False
    validate_every: Annotated[
        int | None,
        typer.Option(help="Steps between validations; else only before the first and after all."),
    ] = None
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500
    keep: Annotated[int, typer.Option(help="Checkpoints kept.")] = 2
    seed: Annotated[int, typer.Option(help="Of new weights, order and dropout.")] = 0
    workers: Annotated[int, typer.Option(help="Processes that load data.")] = 0

    def settings(self) -> "TrainingSettings":
        """As `train` takes them."""
        from nearest.retro.training import TrainingSettings

        named = dict(vars(self))
        named["learning_rate"] = named.pop("lr")
        return TrainingSettings(**named)


@dataclass(frozen=True)
class Watching:
    """What is told of a run while it goes on."""

    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")
    ] = False
    log_every: Annotated[int, typer.Option(min=1, help="Steps between two lines.")] = 10


def train(
    database: DatabasePath,
    run: RunPath,
    *,
    preset: Annotated[
        Literal["norlund", "retro-pytorch", "paper"] | None,
        typer.Option(help="Kind of model.  \\[default: norlund]", show_default=False),
    ] = None,
    changes: Set = None,
    begin: Begin = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name; the database's own by default.")
    ] = None,
    corpus: Corpus,
    training: Training,
    watching: Watching,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a RETRO model on a database's chunks and their neighbours, from scratch or further."""
    quiet_libraries()
    import torch

    from nearest.encode.dtype import chosen_device
    from nearest.retro import RetroConfig, RetroForCausalLM
    from nearest.retro.data.opening import tokenizer_of

    settings = training.settings()
    texts = corpus.texts(database)
    own = tokenizer_of(texts[0].own, tokenizer)
    _check_tokenizers(own, texts)
    torch.manual_seed(settings.seed)
    model: Any
    if begin is not None:
        _check_alone({"--preset": preset, "--set": changes})
        model, _ = _begun(begin, RetroForCausalLM, device)
    else:
        of_data = {**_of_data(texts[0]), **vocabulary_of(own)}
        given = {**of_data, **settings_given(changes)}
        model = RetroForCausalLM(RetroConfig.preset(preset or "norlund", **given))
        model.to(chosen_device(device))
    config = model.config
    positions = config.max_position_embeddings if config.absolute_positions else None
    passages = corpus.passages(texts, positions)
    _run(model, own, passages, run, settings, watching, as_json)


def fit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Any causal language model: folder or hub name.")
    ],
    database: DatabasePath,
    run: RunPath,
    *,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers after which neighbours are read, from 0; every third from 5 on."),
    ] = None,
    changes: Set = None,
    begin: Begin = None,
    corpus: Corpus,
    training: Training,
    watching: Watching,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """RETROfit: give a language model new layers that read neighbours, and train those alone."""
    quiet_libraries()
    import torch

    from nearest.encode.loading import load_model_and_tokenizer
    from nearest.retro import RetrofitForCausalLM, retrofit

    settings = training.settings()
    texts = corpus.texts(database)
    torch.manual_seed(settings.seed)
    if begin is not None:
        _check_alone({"--layers": layers, "--set": changes})
        fitted, tokenizer = _begun(begin, RetrofitForCausalLM, device, base=model)
    else:
        base, tokenizer = load_model_and_tokenizer(model, "float32", device)
        given = {**_of_data(texts[0]), **settings_given(changes)}
        fitted = retrofit(base, _layers(layers), **given)
    _check_tokenizers(tokenizer, texts)
    positions = getattr(fitted.base.config, "max_position_embeddings", None)
    # on a passage of no more than a chunk no neighbour could act
    passages = corpus.passages(texts, positions, least=fitted.retro_config.chunk_size + 1)
    _run(fitted, tokenizer, passages, run, settings, watching, as_json)


def _of_data(text: "NeighbouredText") -> dict[str, Any]:
    """Settings of a new model that the chunks it learns from decide."""
    return {"chunk_size": text.own.chunks.size, "document_start_id": text.own.cut.start}


def _check_alone(others: dict[str, Any]) -> None:
    """Refuse settings beside `--from`, whose model has its own."""
    for name, value in others.items():
        if value:
            raise NearestError(f"{name} is of a new model, and --from begins with one: give one")


def _begun(
    folder: Path, kind: "type[PreTrainedModel]", device: str, **opening: Any
) -> tuple[Any, Any]:
    """Model and tokenizer of `--from`; open_retro's errors, and one for another kind of model."""
    from nearest.retro.opening import open_retro

    model, tokenizer = open_retro(folder, device=device, **opening)
    if not isinstance(model, kind):
        other = "train" if kind.__name__ == "RetrofitForCausalLM" else "fit"
        raise NearestError(
            f"{folder} is a {type(model).__name__}: `nearest retro {other}` goes on from it"
        )
    return model, tokenizer


def _check_tokenizers(
    tokenizer: Any, texts: "tuple[NeighbouredText, NeighbouredText | None]"
) -> None:
    for some in texts:
        if some is not None:
            check_tokenizers(tokenizer, some)


def _run(
    model: "PreTrainedModel",
    tokenizer: Any,
    passages: "tuple[Passages, Passages | None]",
    run: Path,
    settings: "TrainingSettings",
    watching: Watching,
    as_json: bool,
) -> None:
    from nearest.retro.training import train as train_model

    def tell(step: "StepReport") -> None:
        notable = step.step == step.steps or step.validation is not None
        if step.step % watching.log_every and not notable:
            return
        if as_json:
            typer.echo(json.dumps(asdict(step)))
        else:
            err.print(step_line(step))

    result = train_model(
        model,
        passages[0],
        run,
        settings,
        validation=passages[1],
        tokenizer=tokenizer,
        tensorboard=watching.tensorboard,
        report=tell,
    )
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first tells
        return
    if result.resumed:
        err.print(f"[dim]went on from step {result.resumed}[/]")
    report({**asdict(result), "model": str(result.model)}, as_json)


def step_line(report: "StepReport") -> str:
    """A step for people."""
    validation = "" if report.validation is None else f"  validation {report.validation:.4f}"
    left = timedelta(seconds=round(report.seconds_left))
    return (
        f"step {report.step:,}/{report.steps:,}  loss {report.loss:.4f}{validation}  "
        f"{report.tokens_a_second:,.0f} tokens/s  {left} left"
    )


def settings_given(changes: list[str] | None) -> dict[str, Any]:
    """Settings of RetroConfig from NAME=VALUE (SettingError where one is written otherwise)."""
    found = {}
    for change in changes or ():
        name, equals, value = change.partition("=")
        if not equals:
            raise SettingError(f"--set {change!r} is no NAME=VALUE, as decoder_layers=6")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value.strip()
    return found


def vocabulary_of(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer decides of a new model; one without a padding token gets an id for it."""
    size, pad = len(tokenizer), tokenizer.pad_token_id
    return {
        "vocab_size": size if pad is not None else size + 1,
        "pad_token_id": size if pad is None else pad,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id
        if tokenizer.eos_token_id is not None
        else tokenizer.sep_token_id,
    }


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in with_commas(text)]
    except ValueError as error:
        raise NearestError(
            f"--layers {text!r} is no list of numbers: write them as in 2,5"
        ) from error
