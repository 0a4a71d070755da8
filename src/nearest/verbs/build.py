"""Build a memory from a model's name and a corpus."""

from pathlib import Path
from typing import Any

from nearest.build.build import BuildOptions, planned_memory
from nearest.build.plan import BuildPlan
from nearest.corpus.reading import Corpus
from nearest.encode.dtype import DtypeName
from nearest.encode.loading import load_model_and_tokenizer
from nearest.memory import Memory
from nearest.store.change import check_new


def build(
    model_name: str,
    corpus: Corpus,
    out: str | Path,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    **options: Any,
) -> Memory:
    """Read documents, encode them with a Hugging Face model, and write the memory `out`.

    Args:
        model_name: a folder or a hub name.
        corpus: what `read_documents` opened.
        out: the memory's folder; it must not exist, or be empty.
        dtype: what the model is to compute in.
        device: where ("auto": on CUDA's GPU, if there is one).
        **options: as in `build.build.BuildOptions`.

    Raises:
        NearestError: the model, corpus, settings or folder cannot be used; nothing is left behind.
    """
    check_new(Path(out))  # before a model is loaded for nothing
    model, tokenizer = load_model_and_tokenizer(model_name, dtype, device)
    return Memory.build(model, tokenizer, corpus, out, **options)


def plan(
    model_name: str,
    corpus: Corpus,
    out: str | Path,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    **options: Any,
) -> BuildPlan:
    """Say what `build` would make and take, from a sample of the work, and write nothing.

    The arguments, and what is raised, are those of `build`.
    """
    check_new(Path(out))  # before a model is loaded for nothing
    model, tokenizer = load_model_and_tokenizer(model_name, dtype, device)
    return planned_memory(Path(out), corpus, model, tokenizer, BuildOptions(**options))
