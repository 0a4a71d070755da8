"""Make a memory of a datastore that `knn-transformers` or RetoMaton wrote."""

from pathlib import Path
from typing import Any

from nearest.build.importing import ImportOptions
from nearest.build.importing import import_store as write_import
from nearest.encode.loading import load_model_and_tokenizer
from nearest.memory import Memory
from nearest.store.change import check_new


def import_store(store: str | Path, model_name: str, out: str | Path, **options: Any) -> Memory:
    """Read a datastore and write the memory `out`.

    Args:
        store: its folder, its keys, or what the names of its files begin with.
        model_name: the model that made it.
        out: the memory's folder; it must not exist, or be empty.
        **options: as in `memory.importing.ImportOptions`.

    Raises:
        NearestError: datastore, model, settings or folder cannot be used; nothing is left behind.
    """
    check_new(Path(out))
    checked = ImportOptions(**options)
    model, tokenizer = load_model_and_tokenizer(model_name)
    write_import(Path(store), Path(out), model, tokenizer, checked)
    return Memory.open(out)
