"""Add documents from files to a memory, or replace some, with the model that built it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearest.corpus.reading import read_documents
from nearest.corpus.text_files import EncodingErrors
from nearest.encode.dtype import DtypeName
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import ModelError
from nearest.memory import Memory


def add(
    path: str | Path,
    corpus: Sequence[str | Path],
    *,
    model_name: str | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    replace: bool = False,
    encoding_errors: EncodingErrors = "strict",
    **options: Any,
) -> Memory:
    """Read documents and add them to a memory as a new generation.

    Args:
        path: the memory's folder.
        corpus: as in `read_documents`.
        model_name: the model that built it, where it is not where it was then.
        dtype: what the model is to compute in.
        device: where ("auto": on CUDA's GPU, if there is one).
        replace: each document takes the place of the one with its id.
        encoding_errors: what to do with text that is not UTF-8.
        **options: as in `Memory.add`.

    Raises:
        NearestError: the model, corpus or folder cannot be used; the memory stays as it was.
    """
    memory = Memory.open(path)
    documents = read_documents(corpus, encoding_errors=encoding_errors)
    name = model_name or name_of_model(memory)
    model, tokenizer = load_model_and_tokenizer(name, dtype, device)
    return memory.add(model, tokenizer, documents, replace=replace, **options)


def name_of_model(memory: Memory) -> str:
    """Where the model that built a memory is.

    Raises:
        ModelError: it was built from a model that was nowhere but in memory.
    """
    if not memory.manifest.model.name:
        raise ModelError(
            f"{memory.path} does not say where its model is, for it was built from one in memory: "
            "name it (--model)"
        )
    return memory.manifest.model.name
