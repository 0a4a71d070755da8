"""Commands that change, describe and check a memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from nearest import reports
from nearest.cli.app import (
    err,
    open_with_model,
    out,
    quiet_libraries,
    say_what_was_read,
    what_reads_for,
)
from nearest.cli.options import (
    Adding,
    AsJson,
    CorpusPaths,
    Device,
    Dtype,
    FileOptions,
    MemoryPath,
    ModelName,
    Opening,
    Where,
    conditions,
)
from nearest.errors import NearestError

if TYPE_CHECKING:
    from nearest.corpus.reading import Corpus
    from nearest.memory import Memory


def info(memory: MemoryPath, as_json: AsJson = False) -> None:
    """Say what a memory holds, how it is searched and what was tuned."""
    from nearest.memory import Memory

    show_info(Memory.open(memory), as_json)


def add(
    memory: MemoryPath,
    corpus: CorpusPaths,
    *,
    if_exists: Annotated[
        Literal["error", "skip", "replace"],
        typer.Option(help="What becomes of a document whose id is in the memory."),
    ] = "error",
    adding: Adding,
    files: FileOptions,
    as_json: AsJson = False,
) -> None:
    """Add documents to a memory in a new snapshot; the others are not touched."""
    _add(memory, files.corpus(corpus), adding, as_json, if_exists=if_exists)


def update(
    memory: MemoryPath,
    corpus: CorpusPaths,
    *,
    adding: Adding,
    files: FileOptions,
    as_json: AsJson = False,
) -> None:
    """Replace documents under their ids, in one new snapshot."""
    _add(memory, files.corpus(corpus), adding, as_json, replace=True)


def sync(
    memory: MemoryPath,
    corpus: CorpusPaths,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")
    ] = False,
    allow_empty: Annotated[
        bool,
        typer.Option(
            "--allow-empty",
            help="Remove what was read from folders that are empty now, which may be drives or "
            "shares that are not mounted.",
        ),
    ] = False,
    adding: Adding,
    files: FileOptions,
    as_json: AsJson = False,
) -> None:
    """Make a memory hold what a corpus holds: replace what changed, remove what is gone, add the
    rest.

    Files are told by their paths below CORPUS, rows by their ids. All is one new snapshot.
    """
    quiet_libraries()
    from nearest.memory import Memory

    documents, opened = files.corpus(corpus), Memory.open(memory)
    model, tokenizer = (None, None) if dry_run else what_reads_for(opened, adding)
    with reports.live_progress(err) as progress:
        opened, synced = opened.sync(
            model,
            tokenizer,
            documents,
            dry_run=dry_run,
            allow_empty=allow_empty,
            batch_size=adding.batch_size,
            force=adding.force,
            progress=progress,
        )
    if as_json:
        counts = {**synced.to_dict(), "dry_run": dry_run, "corpus": documents.report.to_dict()}
        typer.echo(json.dumps(opened.info() | counts))
    else:
        out.print(f"{'would be: ' if dry_run else ''}{synced}", soft_wrap=True)
    say_what_was_read(documents)


def _add(
    memory: Path,
    corpus: "Corpus",
    adding: Adding,
    as_json: bool,
    *,
    replace: bool = False,
    if_exists: Literal["error", "skip", "replace"] = "error",
) -> None:
    quiet_libraries()
    from nearest.memory import Memory

    opened = Memory.open(memory)
    model, tokenizer = what_reads_for(opened, adding)
    with reports.live_progress(err) as progress:
        changed = opened.add(
            model,
            tokenizer,
            corpus,
            replace=replace,
            if_exists=if_exists,
            batch_size=adding.batch_size,
            force=adding.force,
            progress=progress,
        )
    show_info(changed, as_json, corpus)


def remove(
    memory: MemoryPath,
    doc: Annotated[
        list[str] | None, typer.Option("--doc", help="A document's id; give it again for more.")
    ] = None,
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Remove documents from what is searched; `compact` then erases their bytes."""
    from nearest.build.remove import remove_documents

    removed = remove_documents(memory, doc or [], conditions(where))
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
        typer.echo(json.dumps(needs.to_dict()))
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


def upload(
    memory: MemoryPath,
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="Such as s3://bucket/law.memory.")
    ],
) -> None:
    """Write a memory to object storage (s3://, gs://, hf://), its manifest last."""
    from nearest.store.objects import upload as upload_folder

    with reports.live_progress(err) as progress:
        told = upload_folder(memory, address, progress)
    out.print(f"open it with Memory.open({told!r})", soft_wrap=True)


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


def show_info(memory: "Memory", as_json: bool, corpus: "Corpus | None" = None) -> None:
    """Print what a memory holds, and what was read of the corpus that went into it."""
    if as_json:
        read = {} if corpus is None else {"corpus": corpus.report.to_dict()}
        typer.echo(json.dumps(memory.info() | read))
    else:
        out.print(reports.info_table(memory))
    if corpus is not None:
        say_what_was_read(corpus)
