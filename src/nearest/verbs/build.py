"""Build a memory from a model's name and paths of documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearest.build.build import BuildOptions, planned_memory
from nearest.build.plan import BuildPlan
from nearest.corpus.reading import Corpus, read_documents
from nearest.corpus.text_files import EncodingErrors
from nearest.encode.dtype import DtypeName
from nearest.encode.loading import load_model_and_tokenizer
from nearest.memory import Memory
from nearest.store.change import check_new


def build(
    model_name: str,
    corpus: Sequence[str | Path],
    out: str | Path,
    *,
    encoding_errors: EncodingErrors = "strict",
    dtype: DtypeName = "auto",
    device: str = "auto",
    **options: Any,
) -> Memory:
    """Read documents, encode them with a Hugging Face model, and write the memory `out`.

    Args:
        model_name: a folder or a hub name.
        corpus: as in `read_documents`.
        out: the memory's folder; it must not exist, or be empty.
        encoding_errors: what to do with text that is not UTF-8.
        dtype: what the model is to compute in.
        device: where ("auto": on CUDA's GPU, if there is one).
        **options: as in `build.build.BuildOptions`.

    Raises:
        NearestError: the model, corpus, settings or folder cannot be used; nothing is left behind.
    """
    documents = _documents(corpus, out, encoding_errors)
    model, tokenizer = load_model_and_tokenizer(model_name, dtype, device)
    return Memory.build(model, tokenizer, documents, out, **options)


def plan(
    model_name: str,
    corpus: Sequence[str | Path],
    out: str | Path,
    *,
    encoding_errors: EncodingErrors = "strict",
    dtype: DtypeName = "auto",
    device: str = "auto",
    **options: Any,
) -> BuildPlan:
    """Say what `build` would make and take, from a sample of the work, and write nothing.

    The arguments, and what is raised, are those of `build`.
    """
    documents = _documents(corpus, out, encoding_errors)
    model, tokenizer = load_model_and_tokenizer(model_name, dtype, device)
    return planned_memory(Path(out), documents, model, tokenizer, BuildOptions(**options))


def _documents(
    corpus: Sequence[str | Path], out: str | Path, encoding_errors: EncodingErrors
) -> Corpus:
    """What is to be read, before a model is loaded for nothing."""
    check_new(Path(out))
    return read_documents(corpus, encoding_errors=encoding_errors)
