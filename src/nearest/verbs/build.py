"""Build a memory from a model's name and a corpus."""

from pathlib import Path
from typing import Any

from nearest.build.build import BuildOptions, planned_memory
from nearest.build.plan import BuildPlan
from nearest.corpus.reading import Corpus
from nearest.encode.dtype import DtypeName
from nearest.encode.loading import load_model_and_tokenizer, load_tokenizer
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.store.change import check_new


def build(
    model_name: str | None,
    corpus: Corpus,
    out: str | Path,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    tokenizer_name: str | None = None,
    **options: Any,
) -> Memory:
    """Read documents, encode them with a Hugging Face model, and write the memory `out`.

    Args:
        model_name: a folder or a hub name; None with a tokenizer_name.
        corpus: what `read_documents` opened.
        out: the memory's folder; it must not exist, or be empty.
        dtype: what the model is to compute in.
        device: where ("auto": on CUDA's GPU, if there is one).
        tokenizer_name: of a memory without keys and without a language model.
        **options: as in `build.build.BuildOptions`.

    Raises:
        NearestError: the model, corpus, settings or folder cannot be used; nothing is left behind.
    """
    check_new(Path(out))  # before a model is loaded for nothing
    model, tokenizer = _loaded(model_name, tokenizer_name, dtype, device)
    return Memory.build(model, tokenizer, corpus, out, **options)


def plan(
    model_name: str | None,
    corpus: Corpus,
    out: str | Path,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    tokenizer_name: str | None = None,
    **options: Any,
) -> BuildPlan:
    """Say what `build` would make and take, from a sample of the work, and write nothing.

    The arguments, and what is raised, are those of `build`.
    """
    check_new(Path(out))  # before a model is loaded for nothing
    model, tokenizer = _loaded(model_name, tokenizer_name, dtype, device)
    return planned_memory(Path(out), corpus, model, tokenizer, BuildOptions(**options))


def _loaded(
    model_name: str | None, tokenizer_name: str | None, dtype: DtypeName, device: str
) -> tuple[Any, Any]:
    if model_name is not None and tokenizer_name is None:
        return load_model_and_tokenizer(model_name, dtype, device)
    if tokenizer_name is not None and model_name is None:
        return None, load_tokenizer(tokenizer_name)
    raise SettingError(
        "a memory is built with a model, or with a tokenizer alone: name one of both"
    )
