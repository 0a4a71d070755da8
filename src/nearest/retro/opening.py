"""RETRO and RETROfit models by the name of their folder, and texts with their neighbours."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel

from nearest.encode.dtype import DtypeName, chosen_device, chosen_dtype
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import FolderError, ModelError
from nearest.retro.config import RetroConfig
from nearest.retro.data.database import ChunkDatabase
from nearest.retro.data.dataset import RetroDataset
from nearest.retro.data.opening import tokenizer_of
from nearest.retro.data.stages import Databases
from nearest.retro.data.table import NeighbourTable
from nearest.retro.model import RetroForCausalLM
from nearest.retro.retrofit import ADAPTER_CONFIG, load_retrofit
from nearest.retro.runs import MODEL, checkpoints


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
    except (OSError, ValueError, KeyError, TypeError) as error:
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
        loaded: Any = RetroForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FolderError(f"{folder} cannot be loaded ({reason}): copy it anew") from error
    opened, loading = loaded
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


@dataclass(frozen=True)
class NeighbouredText:
    """A corpus, what its neighbours were found in, and the table of them.

    Attributes:
        name: of the table's folder.
        own: the corpus' chunks. searched: the databases that ids count.
    """

    name: str
    own: ChunkDatabase
    searched: Databases
    table: NeighbourTable

    def dataset(self, **options: Any) -> RetroDataset:
        """Its documents with neighbours; options as `RetroDataset`'s."""
        return RetroDataset(self.own.chunks, self.searched.chunks, self.table, **options)


def open_text(
    databases: Sequence[Path | str],
    table: Path | str | None = None,
    queries: Path | str | None = None,
) -> NeighbouredText:
    """A text by the names of what was searched and of the table that came of it.

    Args:
        databases: what was searched, in the order in which ids count.
        table: the folder that `nearest retro neighbours` wrote; None: the first database's own.
        queries: whose chunks have these neighbours; by default the first database's where the table
            is of them, else those that `neighbours` left beside the table.

    Raises:
        FolderError: one of them is missing or damaged.
        SettingError: the table is of other chunks.
    """
    searched = Databases.open(databases)
    first = searched.databases[0]
    folder = first.path / "neighbours" if table is None else Path(table)
    opened = NeighbourTable.open(folder)
    beside = folder.with_name(folder.name + ".queries")
    if queries is not None:
        own = ChunkDatabase.open(queries)
    elif opened.record["queries"] == first.chunks.digest or not beside.exists():
        own = first
    else:
        own = ChunkDatabase.open(beside)
    opened.check(own.chunks, searched.chunks)
    return NeighbouredText(folder.name, own, searched, opened)


def check_vocabulary(tokenizer: Any, database: ChunkDatabase) -> None:
    """Refuse chunks that another tokenizer made, where the database says which one did.

    Raises:
        ModelError: the vocabularies differ, or the database's tokenizer is not there any more.
    """
    if tokenizer is None:
        return
    theirs = tokenizer_of(database)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{database.path} was cut with another tokenizer than the model's: its token ids mean "
            "other texts. Prepare a database with --tokenizer of this model"
        )
