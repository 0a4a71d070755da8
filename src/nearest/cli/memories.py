"""Commands that make, describe and check a memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from nearest import reports
from nearest.cli.app import err, open_with_model, out, quiet_libraries
from nearest.cli.options import (
    Adding,
    AsJson,
    BatchSize,
    CorpusPaths,
    Device,
    Dtype,
    Encoding,
    Keying,
    MemoryPath,
    ModelName,
    Nprobe,
    Opening,
)
from nearest.errors import NearestError

if TYPE_CHECKING:
    from nearest.memory import Memory


def build(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.")],
    corpus: CorpusPaths,
    out_path: Annotated[Path, typer.Option("--out", metavar="MEMORY", help="The new folder.")],
    keys: Annotated[
        Literal["fp16", "int8", "none"],
        typer.Option(help="How keys are stored; none: no forward pass, for suffix matching only."),
    ] = "int8",
    *,
    keying: Keying,
    nprobe: Nprobe = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    encoding_errors: Encoding = "strict",
    tune: Annotated[
        bool,
        typer.Option(help="End with λ, temperature and k tuned on a sample of the documents."),
    ] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would make and take; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a memory of documents: text, JSONL, Parquet, Arrow, folders of them, datasets."""
    quiet_libraries()
    from nearest.verbs import build as verb

    options: dict[str, Any] = {
        "encoding_errors": encoding_errors,
        "dtype": dtype,
        "device": device,
        "keys": keys,
        **vars(keying),
        "nprobe": nprobe,
        "batch_size": batch_size,
    }
    if plan:
        needs = verb.plan(model, corpus, out_path, **options)
        if as_json:
            typer.echo(json.dumps(needs.as_json()))
        else:
            out.print(reports.plan_table(needs))
        return
    with reports.live_progress(err) as progress:
        memory = verb.build(model, corpus, out_path, progress=progress, tune=tune, **options)
    show_info(memory, as_json)


def info(memory: MemoryPath, as_json: AsJson = False) -> None:
    """Say what a memory holds, how it is searched and what was tuned."""
    from nearest.memory import Memory

    show_info(Memory.open(memory), as_json)


def add(
    memory: MemoryPath,
    corpus: CorpusPaths,
    *,
    adding: Adding,
    as_json: AsJson = False,
) -> None:
    """Add documents to a memory, as a new generation; the others are not touched."""
    _add(memory, corpus, adding, as_json, replace=False)


def update(
    memory: MemoryPath,
    corpus: CorpusPaths,
    *,
    adding: Adding,
    as_json: AsJson = False,
) -> None:
    """Replace documents under their ids, in one new generation."""
    _add(memory, corpus, adding, as_json, replace=True)


def _add(memory: Path, corpus: list[str], adding: Adding, as_json: bool, *, replace: bool) -> None:
    quiet_libraries()
    from nearest.verbs.change import add as add_to_memory

    with reports.live_progress(err) as progress:
        changed = add_to_memory(
            memory,
            corpus,
            model_name=adding.model,
            dtype=adding.dtype,
            device=adding.device,
            replace=replace,
            encoding_errors=adding.encoding_errors,
            batch_size=adding.batch_size,
            force=adding.force,
            progress=progress,
        )
    show_info(changed, as_json)


def remove(
    memory: MemoryPath,
    doc: Annotated[
        list[str] | None, typer.Option("--doc", help="A document's id; give it again for more.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", help="KEY=VALUE of metadata; all that are given must be so."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take documents back: nothing leads to them any more. `compact` then erases their bytes."""
    from nearest.build.lifecycle import remove_documents

    wanted = {}
    for condition in where or []:
        key, equals, value = condition.partition("=")
        if not equals:
            raise NearestError(f"--where {condition!r} has no value: write KEY=VALUE")
        wanted[key] = value
    removed = remove_documents(memory, doc or [], wanted)
    if as_json:
        for document in removed:
            typer.echo(json.dumps({"removed": document.id, "metadata": dict(document.metadata)}))
        return
    for document in removed:
        out.print(f"removed {escape(document.id)}", soft_wrap=True)
    out.print(f"their bytes go with `nearest compact {escape(str(memory))}`", soft_wrap=True)


def compact(
    memory: MemoryPath,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would take; do nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make one segment, or a few large ones, of all, and erase what was removed from the disk."""
    from nearest.build.compact import compact_memory, plan_compaction
    from nearest.memory import Memory

    needs = plan_compaction(memory)
    if plan and as_json:
        typer.echo(json.dumps(needs.as_json()))
    else:
        (out if plan else err).print(
            f"{needs.segments} segments become {needs.segments_after}, "
            f"{needs.removed} removed documents are erased: "
            f"{needs.bytes_needed:,} bytes of the {needs.bytes_free:,} free, about "
            f"{needs.seconds:g} s",
            soft_wrap=True,
        )
    if plan:
        return
    with reports.live_progress(err) as progress:
        compact_memory(memory, progress)
    show_info(Memory.open(memory), as_json)


def verify(
    memory: MemoryPath,
    keys: Annotated[
        bool, typer.Option("--keys", help="Read a sample again with the model, and compare.")
    ] = False,
    model: ModelName = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Read everything and find what is damaged."""
    from nearest.store.verify import verify as problems_of

    with reports.live_progress(err) as progress:
        problems = problems_of(memory, progress)
    if keys and not problems:
        from nearest.build.reproduce import reproduction_problems

        quiet_libraries()
        opened, *with_model = open_with_model(memory, Opening(model, dtype, device))
        problems = reproduction_problems(opened, *with_model)
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
        typer.echo(json.dumps(memory.info()))
    else:
        out.print(reports.info_table(memory))
