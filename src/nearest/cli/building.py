"""Commands that make a memory: at once, or in parts that are joined."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nearest import reports
from nearest.cli.app import err, out, quiet_libraries, say_what_was_read
from nearest.cli.memories import show_info
from nearest.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    FileOptions,
    Keying,
    Nprobe,
    Sharing,
)
from nearest.errors import NearestError


def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL CORPUS...",
            help="A model (folder, or name on the hub), which --tokenizer stands for; then files, "
            "folders, pipes (- for stdin), or hf://owner/name\\[/config][:split].",
        ),
    ],
    out_path: Annotated[Path, typer.Option("--out", metavar="MEMORY", help="The new folder.")],
    keys: Annotated[
        Literal["fp16", "int8", "none"] | None,
        typer.Option(
            help="How keys are stored; none: no forward pass, for suffix matching only.  "
            "\\[default: int8]"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Build with this tokenizer (folder or hub name), without model and keys."
        ),
    ] = None,
    *,
    keying: Keying,
    nprobe: Nprobe = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    files: FileOptions,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens",
            help="Read <|endoftext|> and its like in documents as tokens, not as text.",
        ),
    ] = False,
    segment_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a segment, the unit of shared work.  "
            "\\[default: about 16 million; fewer for wide keys]",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Make every N-th segment from the I-th on; `nearest join` then makes the memory.",
        ),
    ] = None,
    sharing: Sharing,
    tune: Annotated[
        bool,
        typer.Option(
            help="End with settings of knn, suffix and hybrid found on a sample of the documents."
        ),
    ] = True,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Say what it would make and take, with --workers on so many machines such as this "
            "one; write nothing.",
        ),
    ] = False,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of --plan: what a machine costs an hour.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a memory of documents: text, JSONL, Parquet, Arrow, folders of them, datasets."""
    quiet_libraries()
    from nearest.build.build import BuildOptions, build_memory, planned_memory
    from nearest.build.plan import share_plan
    from nearest.encode.loading import load_model_and_tokenizer, load_tokenizer
    from nearest.memory import Memory
    from nearest.store.change import check_new
    from nearest.store.shard import share_named

    corpus = sources if tokenizer else sources[1:]
    if not corpus:
        raise NearestError(
            f"{sources[0]!r} is all that is named, which is the model: name a corpus, too"
        )
    options: dict[str, Any] = {
        "keys": keys or ("none" if tokenizer else "int8"),
        **vars(keying),
        "nprobe": nprobe,
        "batch_size": batch_size,
        "special_tokens": special_tokens,
        "segment_tokens": segment_tokens,
        **vars(sharing),
        **({} if tokenizer else {"device": device}),
    }
    if price is not None and not plan:
        raise NearestError("--price is of a plan: add --plan, or leave it out")
    which = (1, 1) if part is None else share_named(part)
    documents = files.corpus(corpus)
    check_new(out_path)  # before a model is loaded for nothing
    model, reader = (
        (None, load_tokenizer(tokenizer))
        if tokenizer
        else load_model_and_tokenizer(sources[0], dtype, device)
    )
    if plan:
        needs = planned_memory(out_path, documents, model, reader, BuildOptions(**options))
        shared = share_plan(needs, sharing.workers or 1, price)
        if as_json:
            told = {"shared": asdict(shared), "corpus": documents.report.to_dict()}
            typer.echo(json.dumps(needs.to_dict() | told))
        else:
            out.print(reports.plan_table(needs, shared))
        say_what_was_read(documents)
        return
    if part is not None:
        with reports.live_progress(err) as progress:
            asked = BuildOptions(**options, progress=progress)
            build_memory(out_path, documents, model, reader, asked, which)
        _say_part(out_path, which, as_json)
        say_what_was_read(documents)
        return
    with reports.live_progress(err) as progress:
        memory = Memory.build(
            model, reader, documents, out_path, progress=progress, tune=tune, **options
        )
    show_info(memory, as_json, documents)


def _say_part(path: Path, part: tuple[int, int], as_json: bool) -> None:
    """Print what a part of a build has made."""
    from nearest.store.journal import read_stage

    corpora = read_stage(path).corpora
    own = [corpus for corpus in corpora if corpus.record is not None]
    found = {
        "part": part[0],
        "parts": part[1],
        "segments": len(own),
        "entries": sum(corpus.entries for corpus in own),
        "segments_of_all": len(corpora),
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    out.print(
        f"part {part[0]}/{part[1]}: {len(own)} of {len(corpora)} segments, {found['entries']:,} "
        f"entries; `nearest join` of all {part[1]} parts makes the memory",
        soft_wrap=True,
    )


def join(
    parts: Annotated[
        list[Path],
        typer.Argument(metavar="PART...", help="All parts of a build, or memories built alike."),
    ],
    out_path: Annotated[Path, typer.Option("--out", metavar="MEMORY", help="The new folder.")],
    *,
    sharing: Sharing,
    as_json: AsJson = False,
) -> None:
    """Make one memory of the parts of a build, or of memories of one model, tokenizer and keys.

    Files are linked where that is possible. Nothing is tuned: `nearest tune` does that.
    """
    from nearest.build.build import BuildOptions
    from nearest.build.join import join as join_folders
    from nearest.memory import Memory

    with reports.live_progress(err) as progress:
        join_folders(parts, out_path, BuildOptions(**vars(sharing), progress=progress))
    show_info(Memory.open(out_path), as_json)
