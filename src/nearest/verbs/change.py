"""Add documents from files to a memory, or replace some, with the model that built it."""

from pathlib import Path
from typing import Any, Literal

from nearest.build.sync import Synced
from nearest.corpus.reading import Corpus
from nearest.encode.dtype import DtypeName
from nearest.encode.loading import load_model_and_tokenizer, load_tokenizer
from nearest.errors import ModelError
from nearest.memory import Memory


def add(
    path: str | Path,
    corpus: Corpus,
    *,
    model_name: str | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    replace: bool = False,
    if_exists: Literal["error", "skip", "replace"] = "error",
    **options: Any,
) -> Memory:
    """Read documents and add them to a memory as a new generation.

    Args:
        path: the memory's folder.
        corpus: what `read_documents` opened.
        model_name: the model that built it, where it is not where it was then.
        dtype: what the model is to compute in.
        device: where ("auto": on CUDA's GPU, if there is one).
        replace: each document takes the place of the one with its id.
        **options: as in `Memory.add`.

    Raises:
        NearestError: the model, corpus or folder cannot be used; the memory stays as it was.
    """
    memory = Memory.open(path)
    model, tokenizer = _loaded(memory, model_name, dtype, device)
    return memory.add(model, tokenizer, corpus, replace=replace, if_exists=if_exists, **options)


def sync(
    path: str | Path,
    corpus: Corpus,
    *,
    model_name: str | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    dry_run: bool = False,
    **options: Any,
) -> tuple[Memory, Synced]:
    """Make a memory hold what a corpus holds, as one new snapshot, and say what that took.

    The arguments are those of `add`; a dry run loads no model and changes nothing.

    Raises:
        NearestError: the model, corpus or folder cannot be used; the memory stays as it was.
    """
    memory = Memory.open(path)
    if dry_run:
        return memory.sync(None, None, corpus, dry_run=True)
    model, tokenizer = _loaded(memory, model_name, dtype, device)
    return memory.sync(model, tokenizer, corpus, **options)


def name_of_model(memory: Memory) -> str:
    """Where the model that built a memory is.

    Raises:
        ModelError: none did, or one that was nowhere but in memory.
    """
    record = memory.manifest.model
    if record.tokenizer_only:
        raise ModelError(
            f"{memory.path} was built with the tokenizer {record.name!r} alone: name a language "
            "model that has this tokenizer (--model)"
        )
    return _named(memory)


def _named(memory: Memory) -> str:
    if not memory.manifest.model.name:
        raise ModelError(
            f"{memory.path} does not say where its model is, for it was built from one in memory: "
            "name it (--model)"
        )
    return memory.manifest.model.name


def _loaded(
    memory: Memory, model_name: str | None, dtype: DtypeName, device: str
) -> tuple[Any, Any]:
    """What reads documents for a memory: a model, or None where none did, and a tokenizer."""
    if memory.manifest.model.tokenizer_only and model_name is None:
        return None, load_tokenizer(_named(memory))
    return load_model_and_tokenizer(model_name or name_of_model(memory), dtype, device)
