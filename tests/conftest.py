"""Small random models and a byte tokenizer, so that every test is quick and needs no network."""

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# Tiny arrays gain nothing from threads, and on a busy machine threads that wait cost seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nearest import Memory
from nearest.corpus.documents import Document
from nearest.retrieval.gates import network

# A busy machine must not decide a test.
settings.register_profile("patient", deadline=None)
settings.register_profile("few", deadline=None, max_examples=20)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="Run tests in a random order.")
    parser.addoption(
        "--few-cases",
        type=int,
        metavar="N",
        help="Run at most N cases of each test, evenly spread, and 20 examples of Hypothesis's.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--few-cases") is not None:
        settings.load_profile("few")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Few memories of tests are tuned: the note of it is no error. And the options above.

    The filter stands here because one in pyproject.toml that names a class of the package imports
    the package before CHECK_ALL can instrument it.
    """
    ignored = pytest.mark.filterwarnings("ignore::nearest.errors.SettingsWarning")
    for item in items:
        item.add_marker(ignored, append=False)
    if (most := config.getoption("--few-cases")) is not None:
        left_out = cases_left_out(items, most)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    if (seed := config.getoption("--shuffle")) is not None:
        shuffle(items, seed)


def cases_left_out(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    """All cases of each test but `most` evenly spread ones, the first and the last among them."""
    of_test: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        of_test.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    left_out = []
    for cases in of_test.values():
        kept = set(np.linspace(0, len(cases) - 1, min(most, len(cases))).round().astype(int))
        left_out += [case for number, case in enumerate(cases) if number not in kept]
    return left_out


def shuffle(items: list[pytest.Item], seed: int) -> None:
    """Files in a random order, and so the tests of each; those of a file share its fixtures."""
    order = random.Random(seed)
    of_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        of_file.setdefault(item.path, []).append(item)
    files = list(of_file.values())
    order.shuffle(files)
    for tests in files:
        order.shuffle(tests)
    items[:] = [item for tests in files for item in tests]


BYTES_AND_SPECIALS = 258
POSITIONS = 64

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

WORDS = ["court", "shall", "the", "of", "law", "section", "person", "district", "mayor", "council"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, BOS 0 and EOS 1 in front."""
    alphabet = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def make_model(kind: str = "gpt2", vocab_size: int = BYTES_AND_SPECIALS) -> PreTrainedModel:
    """A random model whose predictions are far from uniform (weights enlarged)."""
    common = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1}
    config = {
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS, **common),
        "llama": lambda: LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            pad_token_id=1,
            **common,
        ),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            weight.data.mul_(4)
    return model


def make_documents(count: int, words: int, seed: int = 0) -> list[Document]:
    """Documents of random words, some much longer than others."""
    rng = np.random.default_rng(seed)
    return [
        Document(
            f"doc-{i}",
            " ".join(rng.choice(WORDS, size=int(rng.integers(2, words)))),
            {"title": f"Title {i}"},
        )
        for i in range(count)
    ]


def documents_apart(count: int, words: int, seed: int = 0) -> list[Document]:
    """As `make_documents`, each with a first letter of its own: alike beginnings have one key."""
    documents = make_documents(count, words, seed)
    return [replace(d, text=f"{chr(ord('A') + i)}{d.text}") for i, d in enumerate(documents)]


def random_documents() -> list[Document]:
    """Texts in which hardly any context stands twice, so that no two keys are equally near."""
    rng = np.random.default_rng(0)
    return [
        Document(f"doc-{i}", bytes(rng.integers(33, 127, size=size).tolist()).decode())
        for i, size in enumerate(rng.integers(40, 200, size=10))
    ]


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and sign it again: SHA-256 of itself with zeros for the checksum."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    unsigned = "0" * 64
    text = json.dumps({**manifest, "checksum": unsigned})
    path.write_text(text.replace(unsigned, hashlib.sha256(text.encode()).hexdigest()))


def in_two_segments(parts: list[Memory], path: Path) -> Memory:
    """One memory of two that were built alike."""
    shutil.copytree(parts[0].path, path)
    shutil.copytree(parts[1].path / "segments/000001", path / "segments/000002")
    second = json.loads((parts[1].path / "manifest.json").read_bytes())["segments"][0]
    second = json.loads(json.dumps(second).replace("000001", "000002"))
    edit_manifest(path, lambda manifest: manifest["segments"].append(second))
    return Memory.open(path)


@contextmanager
def gates_trained_at_once(steps: int = 60) -> Iterator[None]:
    """Briefly: to learn takes seconds, and few tests are about it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(network, "STEPS", steps)
        yield


@contextmanager
def pass_widths(model: PreTrainedModel) -> Iterator[list[int]]:
    """The widths of the passes that a model makes."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, arguments, __: seen.append(arguments[0].shape[-1])
    )
    try:
        yield seen
    finally:
        hook.remove()


@pytest.fixture(autouse=True, scope="session")
def memories_are_not_self_tuned() -> Iterator[None]:
    """Tiny memories of most tests are to be as they were built, and settings the paper's."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nearest.verbs.self_tune.self_tune", lambda *_: False)
        yield


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: files' bytes, links' targets, None for folders."""

    def content(item: Path) -> bytes | str | None:
        if item.is_symlink():
            return str(item.readlink())
        return item.read_bytes() if item.is_file() else None

    return {item.relative_to(folder).as_posix(): content(item) for item in folder.rglob("*")}


def call_fails(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, error: BaseException
) -> None:
    """Let the count-th call of a function, and every later one, raise."""
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= count:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_model() -> PreTrainedModel:
    return make_model("gpt2")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> str:
    """The tiny model and tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def build_memory(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Memory]:
    """Build a memory of documents with a model, in a fresh folder."""

    def build(
        model: PreTrainedModel, documents: list[Document] | None = None, **options: Any
    ) -> Memory:
        path = Path(tmp_path_factory.mktemp("memories")) / "test.memory"
        documents = make_documents(12, 30) if documents is None else documents
        if options.get("keys") is None:
            options["keys"] = "fp16"  # as precise as an oracle needs
        return Memory.build(model, tiny_tokenizer, documents, path, **options)

    return build


@pytest.fixture(scope="session")
def tiny_memory(build_memory: Callable[..., Memory], tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model)
