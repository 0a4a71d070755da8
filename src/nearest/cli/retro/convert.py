"""Weights of public models, as folders of ours."""

from pathlib import Path
from typing import Annotated

import typer

from nearest.cli.app import quiet_libraries
from nearest.cli.options import AsJson
from nearest.cli.retro.options import report
from nearest.errors import NearestError


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Weights of either public implementation.")],
    *,
    out_path: Annotated[Path | None, typer.Option("--out", help="The model's new folder.")] = None,
    config: Annotated[Path | None, typer.Option(help="The checkpoint's retro.json.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether all weights are there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a public checkpoint into a folder for `RetroForCausalLM.from_pretrained`."""
    quiet_libraries()
    from nearest.retro.convert import model_of, read_retro_json

    if out_path is None and not check:
        raise NearestError("a converted model needs a folder: give --out FOLDER, or --check")
    model = model_of(checkpoint, None if config is None else read_retro_json(config))
    if out_path is not None and not check:
        model.save_pretrained(out_path)
    weights = sum(weight.numel() for weight in model.parameters())
    report({"weights": weights, "missing": [], "surplus": []}, as_json)
