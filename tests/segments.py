"""What tests of builds in segments share: documents, options, the build that is to be equalled."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import random_documents
from nearest import Memory
from nearest.build import workers
from nearest.build.build import BuildOptions, build_memory
from nearest.build.workers import Spec, Start
from nearest.encode import loading
from nearest.encode.loading import load_model_and_tokenizer

DOCUMENTS = random_documents()
OPTIONS: dict[str, Any] = {"index": "IVF4,SQ8", "batch_size": 1, "segment_tokens": 150}
Model = tuple[PreTrainedModel, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def model(model_folder: str) -> Model:
    return load_model_and_tokenizer(model_folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """What one process makes."""
    path = tmp_path_factory.mktemp("whole") / "m"
    assert len(Memory.build(*model, DOCUMENTS, path, tune=False, **OPTIONS).segments) >= 5
    return path


def parts_of(folder: Path, model: Model, count: int) -> list[Path]:
    """The same build in parts."""
    paths = [folder / f"part-{number}" for number in range(1, count + 1)]
    for number, path in enumerate(paths, 1):
        build_memory(path, DOCUMENTS, *model, BuildOptions(**OPTIONS), (number, count))
    return paths


def load_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For workers that are threads: transformers loads one model at a time."""
    lock = threading.Lock()

    def load(*args: Any) -> Any:
        with lock:
            return load_model_and_tokenizer(*args)

    monkeypatch.setattr(loading, "load_model_and_tokenizer", load)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads, which start at once."""
    load_one_at_a_time(monkeypatch)

    @contextmanager
    def in_threads(folder: Path, spec: Spec, workers: int) -> Iterator[Start]:
        with ThreadPoolExecutor(workers) as pool:
            yield lambda token: pool.submit(spec.work, folder, token)

    monkeypatch.setattr(workers, "local_workers", in_threads)
