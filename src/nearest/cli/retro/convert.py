"""Weights of public models, as folders of ours."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearest.cli.app import quiet_libraries
from nearest.cli.options import AsJson
from nearest.cli.retro.options import report
from nearest.errors import FolderError, NearestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    if out_path is not None and out_path.exists():
        raise FolderError(f"{out_path} exists: give a folder that does not, or remove it")
    model = model_of(checkpoint, None if config is None else read_retro_json(config))
    if out_path is not None and not check:
        _save(model, out_path)
    weights = sum(weight.numel() for weight in model.parameters())
    report({"weights": weights, "missing": [], "surplus": []}, as_json)


def _save(model: "PreTrainedModel", folder: Path) -> None:
    """Write a model as a folder, whole or not at all."""
    from safetensors import SafetensorError

    from nearest.folder import disk_errors_explained

    partial = folder.with_name(f"{folder.name}.partial")
    try:
        with disk_errors_explained(folder.parent):
            model.save_pretrained(partial)
            partial.rename(folder)
    except SafetensorError as error:  # which is what it makes of a full disk
        raise FolderError(f"cannot write to {folder} ({error}): make room there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
