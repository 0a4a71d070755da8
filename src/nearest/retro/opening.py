"""A RETRO or RETROfit model by the name of its folder."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from nearest.encode.dtype import DtypeName, chosen_device, chosen_dtype
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import FolderError, ModelError
from nearest.retro.config import RetroConfig
from nearest.retro.model import RetroForCausalLM
from nearest.retro.retrofit import ADAPTER_CONFIG, load_retrofit
from nearest.retro.training.checkpoints import MODEL, checkpoints


def open_retro(
    path: Path | str,
    *,
    base: str | None = None,
    dtype: DtypeName = "float32",
    device: str = "auto",
    force: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a RETRO or RETROfit model and its tokenizer, ready to read.

    Args:
        path: a folder that `train` or `save_pretrained` wrote, or a run's folder: its model, or
            while it runs its latest checkpoint.
        base: of a RETROfit: where the model is that it was made of, if no longer where it was.
        dtype, device: as in `load_model_and_tokenizer`.
        force: accept a base whose weights have changed.

    Returns:
        The model, and its tokenizer or, for weights saved without one, None.

    Raises:
        FolderError: there is no such model, or it is damaged.
        ModelError: the base cannot be loaded, or is another one.
    """
    folder = _model_folder(Path(path))
    if (folder / ADAPTER_CONFIG).exists():
        name = base or _base_of(folder)
        model, tokenizer = load_model_and_tokenizer(name, dtype, device)
        return load_retrofit(model, folder, force=force), tokenizer
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise FolderError(
            f"{path} holds no RETRO model ({error}): give a folder that `nearest retro train`, "
            "`fit` or `convert` made"
        ) from error
    if kind != RetroConfig.model_type:
        raise ModelError(
            f"{path} is a plain {kind} model, which reads no neighbours: fit them to it with "
            f"`nearest retro fit {path} …`"
        )
    try:
        opened, loading = RetroForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FolderError(f"{folder} cannot be loaded ({reason}): copy it anew") from error
    if wrong := sorted({*loading["missing_keys"], *loading["unexpected_keys"]}):
        raise FolderError(
            f"{folder} holds other weights than its config.json tells of ({wrong[0]}, {len(wrong)} "
            "in all): take config and weights from one model"
        )
    place = chosen_device(device)
    opened.to(place, chosen_dtype(dtype, opened.dtype, place.type))
    return opened.eval(), _tokenizer(folder)


def _model_folder(path: Path) -> Path:
    """Where a run's model is; other folders are their own."""
    if (path / MODEL).is_dir():
        return path / MODEL
    whole = checkpoints(path) if path.is_dir() else []
    return whole[-1] if whole else path


def _base_of(folder: Path) -> str:
    try:
        name = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(
            f"{folder} holds no RETROfit adapter that can be read ({error}): give a folder that "
            "`nearest retro fit` made"
        ) from error
    if not name:
        raise ModelError(f"{folder} does not say what it was made of: name it with --base MODEL")
    return str(name)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer saved with a model; None where there is none."""
    if not (folder / "tokenizer_config.json").exists():
        return None
    return AutoTokenizer.from_pretrained(folder)
