"""The command that reads the datastores of earlier tools."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from nearest import reports
from nearest.cli.app import err, quiet_libraries
from nearest.cli.memories import show_info
from nearest.cli.options import AsJson, Keying


def import_store(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="A datastore's folder, or its *_keys.npy.")
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that made it.")],
    out_path: Annotated[Path, typer.Option("--out", metavar="MEMORY", help="The new folder.")],
    entries: Annotated[
        int | None, typer.Option(help="How many it holds, where its files do not tell.")
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="End a document at every EOS; else it is one.")
    ] = False,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Read its FAISS index: only where you know who made it."),
    ] = False,
    members: Annotated[
        bool, typer.Option("--members/--no-members", help="Read its clusters (members*.pkl).")
    ] = True,
    keys: Annotated[Literal["fp16", "int8"], typer.Option(help="How keys are stored.")] = "fp16",
    *,
    keying: Keying,
    as_json: AsJson = False,
) -> None:
    """Make a memory of a datastore that knn-transformers or RetoMaton wrote."""
    quiet_libraries()
    from nearest.build import importing
    from nearest.encode.loading import load_model_and_tokenizer
    from nearest.memory import Memory
    from nearest.store.change import check_new

    check_new(out_path)  # before a model is loaded for nothing
    with reports.live_progress(err) as progress:
        options = importing.ImportOptions(
            entries=entries,
            split=split,
            trust=trust,
            members=members,
            keys=keys,
            progress=progress,
            **vars(keying),
        )
        importing.import_store(store, out_path, *load_model_and_tokenizer(model), options)
    show_info(Memory.open(out_path), as_json)
