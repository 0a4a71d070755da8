"""Commands that make, describe and check a memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from nearest import reports
from nearest.cli.app import err, out, quiet_libraries
from nearest.cli.options import (
    AsJson,
    BatchSize,
    CorpusPaths,
    Encoding,
    MemoryPath,
    Nprobe,
    Recall,
    Spec,
    Stride,
    Window,
)
from nearest.errors import NearestError

if TYPE_CHECKING:
    from nearest.memory.memory import Memory


def build(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.")],
    corpus: CorpusPaths,
    out_path: Annotated[Path, typer.Option("--out", metavar="MEMORY", help="The new folder.")],
    keys: Annotated[
        Literal["fp16", "int8", "none"],
        typer.Option(help="How keys are stored; none: no forward pass, for suffix matching only."),
    ] = "fp16",
    key_layer: Annotated[
        Literal["last_ffn_input", "last_hidden"], typer.Option(help="Which states are keys.")
    ] = "last_ffn_input",
    window: Window = None,
    stride: Stride = None,
    index: Spec = "auto",
    metric: Annotated[
        Literal["l2", "ip"], typer.Option(help="Squared L2, or inner product.")
    ] = "l2",
    recall: Recall = 0.95,
    nprobe: Nprobe = None,
    batch_size: BatchSize = None,
    encoding_errors: Encoding = "strict",
    as_json: AsJson = False,
) -> None:
    """Make a memory of documents (.txt, .md, .jsonl, folders of them)."""
    quiet_libraries()
    from nearest.verbs.build import build as build_memory

    with reports.live_progress(err) as progress:
        memory = build_memory(
            model,
            corpus,
            out_path,
            encoding_errors=encoding_errors,
            keys=keys,
            key_layer=key_layer,
            window=window,
            stride=stride,
            index=index,
            metric=metric,
            recall=recall,
            nprobe=nprobe,
            batch_size=batch_size,
            progress=progress,
        )
    show_info(memory, as_json)


def info(memory: MemoryPath, as_json: AsJson = False) -> None:
    """Say what a memory holds, how it is searched and what was tuned."""
    from nearest.memory.memory import Memory

    show_info(Memory.open(memory), as_json)


def verify(memory: MemoryPath, as_json: AsJson = False) -> None:
    """Read everything and find what is damaged."""
    from nearest.memory.verify import verify as problems_of

    with reports.live_progress(err) as progress:
        problems = problems_of(memory, progress)
    if as_json:
        typer.echo(json.dumps({"memory": str(memory), "sound": not problems, "problems": problems}))
    elif not problems:
        out.print(f"{escape(str(memory))} is sound")
    if problems:
        raise NearestError(
            f"{memory} is damaged: {'; '.join(problems)}. Restore it from a copy, or rebuild it"
        )


def show_info(memory: "Memory", as_json: bool) -> None:
    """Print what a memory holds."""
    if as_json:
        typer.echo(json.dumps(reports.memory_info(memory)))
    else:
        out.print(reports.info_table(memory))
