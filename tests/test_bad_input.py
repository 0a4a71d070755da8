"""Whatever a user gets wrong: one clear message on stderr, exit code 2, nothing left behind."""

import copy
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)
from typer.testing import CliRunner

from conftest import edit_manifest, make_documents, make_model, make_tokenizer
from nearest import Memory
from nearest.cli import app
from nearest.folder import writer_lock
from nearest.store.manifest import FORMAT
from nearest.store.verify import verify

NEAREST = Path(sys.executable).with_name("nearest")
BOM = b"\xef\xbb\xbf"


def invoke(*arguments: Any) -> SimpleNamespace:
    """Run a command in this process: its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def message_of(stderr: str) -> str:
    """The one paragraph that a failed command ends with."""
    assert "Traceback" not in stderr
    _, _, message = stderr.partition("error: ")
    assert message.count("error: ") == 0
    assert message.endswith("\n")
    paragraph = message.removesuffix("\n")
    assert "\n" not in paragraph
    assert 20 < len(paragraph) < 700
    return paragraph


def refused(*arguments: Any) -> str:
    """The message of a command that must fail as a user's mistake."""
    result = invoke(*arguments, "--json")
    assert (result.code, result.out) == (2, "")
    return message_of(result.err)


def works(*arguments: Any) -> list[dict[str, Any]]:
    result = invoke(*arguments, "--json")
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> SimpleNamespace:
    """A corpus, a text to be scored, and a memory that knows where its model is."""
    folder = tmp_path_factory.mktemp("world")
    for name, documents in (
        ("corpus.jsonl", make_documents(12, 30)),
        ("text.jsonl", make_documents(2, 20, seed=1)),
    ):
        lines = [json.dumps({"id": d.id, "text": d.text}) for d in documents]
        (folder / name).write_text("\n".join(lines))
    corpus, memory = folder / "corpus.jsonl", folder / "law.memory"
    works("build", model_folder, corpus, "--out", memory, "--index", "IVF4,Flat")
    return SimpleNamespace(
        model=model_folder, corpus=corpus, text=folder / "text.jsonl", memory=memory
    )


@pytest.fixture
def memory(world: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(world.memory, tmp_path / "law.memory"))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where a memory is to be built that never will be."""
    yield tmp_path / "new.memory"
    assert not (tmp_path / "new.memory").exists()


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


# --- the corpus -----------------------------------------------------------------------------------

GOOD = b'{"id": "good", "text": "a good line"}\n'
BAD_CORPORA: dict[str, tuple[dict[str, bytes], str, list[str]]] = {
    "missing path": ({}, "missing.txt", ["missing.txt does not exist", "check the path"]),
    "empty file": ({"a.txt": b""}, "a.txt", ["a.txt holds no documents", "1 empty"]),
    "empty files in a folder": ({"f/a.txt": b"", "f/b.md": b""}, "f", ["2 empty", "f/a.txt"]),
    "empty folder": ({"f/x.odt": b"x"}, "f", ["f holds no file of a kind", "1 .odt", "--suffix"]),
    "unknown kind": ({"a.odt": b"x"}, "a.odt", ["a.odt is of no kind", "--format text"]),
    "not UTF-8": (
        {"a.txt": "12345 é".encode("latin-1")},
        "a.txt",
        ["a.txt is not UTF-8 at byte 6:", "--encoding-errors replace"],
    ),
    "not UTF-8 after a mark": ({"a.txt": BOM + b"12\xff"}, "a.txt", ["UTF-8 at byte 5:"]),
    "not UTF-8 in a line": (
        {"a.jsonl": GOOD + b'{"text": "\xff"}'},
        "a.jsonl",
        [f"a.jsonl is not UTF-8 at byte {len(GOOD) + 10}:"],
    ),
    "malformed line": (
        {"a.jsonl": GOOD * 1 + b"\n{text}\n"},
        "a.jsonl",
        ["a.jsonl:3 is not JSON", "mend it"],
    ),
    "line of another kind": ({"a.jsonl": b"[1]"}, "a.jsonl", ["a.jsonl:1 is not a JSON object"]),
    "no text": (
        {"a.jsonl": GOOD + b'{"txt": "b"}'},
        "a.jsonl",
        ["a.jsonl:2 has no field 'text'", "it has 'txt'", "--text-field"],
    ),
    "text is a number": (
        {"a.jsonl": b'{"text": 5}'},
        "a.jsonl",
        ["a.jsonl:1 has no text in its field 'text'"],
    ),
    "empty text": (
        {"a.jsonl": b'{"text": ""}'},
        "a.jsonl",
        ["a.jsonl holds no documents", "1 empty"],
    ),
    "lone surrogate": (
        {"a.jsonl": b'{"text": "a\\ud800"}'},
        "a.jsonl",
        ["a.jsonl:1 has a lone surrogate", "mend the escape"],
    ),
    "lone surrogate in the metadata": (
        {"a.jsonl": b'{"text": "a", "title": "\\ud800"}'},
        "a.jsonl",
        ["a.jsonl:1 "],
    ),
    "huge number": (
        {"a.jsonl": b'{"text": "a", "n": ' + b"1" * 5000 + b"}"},
        "a.jsonl",
        ["a.jsonl:1 "],
    ),
    "nested too deeply": (
        {"a.jsonl": b'{"text": "a", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"},
        "a.jsonl",
        ["a.jsonl:1 is not JSON"],
    ),
    "one id twice": (
        {"a.jsonl": GOOD * 2},
        "a.jsonl",
        ["'good' stands twice", "a.jsonl:1 and in ", "a.jsonl:2"],
    ),
    "a name like markup": ({}, "[bold]:cat:[red].txt", ["[bold]:cat:[red].txt does not exist"]),
    "name too long": ({}, "x" * 300 + ".txt", ["x.txt"]),
}


@pytest.mark.parametrize(
    ("verb", "case"),
    [*(("build", case) for case in BAD_CORPORA), ("eval", "not UTF-8"), ("eval", "one id twice")],
)
def test_a_bad_corpus(
    tmp_path: Path, world: SimpleNamespace, out: Path, verb: str, case: str
) -> None:
    files, given, words = BAD_CORPORA[case]
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    if verb == "build":
        message = refused("build", world.model, tmp_path / given, "--out", out)
    else:
        message = refused("eval", world.memory, "--text", tmp_path / given)
    for word in words:
        assert word in message
    assert str(tmp_path / given)[:40] in message


def test_text_that_is_not_utf8_can_be_replaced(tmp_path: Path, world: SimpleNamespace) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 law")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "na\xefve"}')
    corpus = [tmp_path / "a.txt", tmp_path / "b.jsonl", "--encoding-errors", "replace"]
    works("build", world.model, *corpus, "--out", tmp_path / "m")
    memory = Memory.open(tmp_path / "m")
    assert [memory.document(number).text for number in (0, 1)] == ["caf\ufffd law", "na\ufffdve"]
    texts = ["--text", tmp_path / "a.txt", "--encoding-errors", "replace"]
    (base,) = works("eval", tmp_path / "m", *texts, "--method", "base")
    assert base["tokens"] == len("caf\ufffd law".encode())


def test_a_document_of_one_token_works(tmp_path: Path, world: SimpleNamespace) -> None:
    (tmp_path / "a.txt").write_text("a")
    (record,) = works("build", world.model, tmp_path / "a.txt", "--out", tmp_path / "m")
    assert (record["documents"], record["tokens"], record["entries"]) == (1, 2, 1)
    assert verify(tmp_path / "m") == []
    memory = Memory.open(tmp_path / "m")
    found = memory.search(memory.keys.rows(np.array([0])), 10)
    assert found.ids.tolist() == [[0]]
    assert found.distances == pytest.approx(0, abs=1e-9)
    assert memory.values(found.ids).tolist() == [[2 + sorted_bytes().index("a")]]
    base, knn = works(
        "eval", tmp_path / "m", "--text", tmp_path / "a.txt", "--lam", 0.5, "--method", "base,knn"
    )
    assert (base["tokens"], knn["tokens"], knn["k"]) == (1, 1, 1)
    # The one neighbour votes for the right token: p = 0.5 + 0.5 p_LM.
    p = torch.tensor(-base["nll"]).exp()
    assert knn["nll"] == pytest.approx(-float((0.5 + 0.5 * p).log()), rel=1e-4)


def sorted_bytes() -> list[str]:
    return sorted(make_tokenizer().get_vocab(), key=make_tokenizer().get_vocab().__getitem__)[2:]


# --- the model ------------------------------------------------------------------------------------


def _broken(change: Callable[[Path], Any]) -> Callable[[Path, str], str]:
    """A copy of the model's folder with something wrong in it."""

    def make(folder: Path, model: str) -> str:
        change(Path(shutil.copytree(model, folder / "model")))
        return str(folder / "model")

    return make


def _only_config(config: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        config.save_pretrained(folder)

    return change


BAD_MODELS: dict[str, Callable[[Path, str], str]] = {
    "no such folder": lambda folder, _: str(folder / "nowhere"),
    "no such name": lambda *_: "no-such-organisation/no-such-model",
    "not a name": lambda *_: "not a model's name!",
    "no name": lambda *_: "",
    "an empty folder": lambda folder, _: str(folder),
    "no weights": _broken(lambda folder: (folder / "model.safetensors").unlink()),
    "weights cut off": _broken(lambda folder: os.truncate(folder / "model.safetensors", 5000)),
    "no weights but bytes": _broken(
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    ),
    "layers without weights": _broken(
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(n_layer=3))
    ),
    "weights of other sizes": _broken(
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(n_embd=64))
    ),
    "configuration cut off": _broken(lambda folder: os.truncate(folder / "config.json", 50)),
    "unknown kind": _broken(
        lambda folder: edit_json(
            folder / "config.json", lambda config: config.update(model_type="no such model")
        )
    ),
    "no tokenizer": _broken(lambda folder: [path.unlink() for path in folder.glob("tokenizer*")]),
    "tokenizer cut off": _broken(lambda folder: os.truncate(folder / "tokenizer.json", 500)),
    "no language model": _broken(_only_config(T5Config(d_model=8, num_layers=1, vocab_size=258))),
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be_loaded(
    tmp_path: Path, world: SimpleNamespace, out: Path, case: str
) -> None:
    (tmp_path / "models").mkdir()
    name = BAD_MODELS[case](tmp_path / "models", world.model)
    for arguments in (
        ("build", name, world.corpus, "--out", out),
        ("eval", world.memory, "--text", world.text, "--model", name),
    ):
        if name == "" and arguments[0] == "eval":
            continue  # an empty --model is none
        message = refused(*arguments)
        assert repr(name) in message
        assert "give a folder" in message


def test_a_memory_that_does_not_know_its_model_asks_for_it(
    tmp_path: Path, world: SimpleNamespace, tiny_model: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    Memory.build(tiny_model, tiny_tokenizer, ["some text"], tmp_path / "m")
    assert "--model" in refused("eval", tmp_path / "m", "--text", world.text)
    works("eval", tmp_path / "m", "--text", world.text, "--model", world.model)


def test_a_tokenizer_with_more_tokens_than_the_model(
    tmp_path: Path, world: SimpleNamespace, tiny_model: PreTrainedModel, out: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["court"])
    model = save(tmp_path / "model", tiny_model, tokenizer)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "the court"}\n')
    message = refused("build", model, tmp_path / "a.jsonl", "--out", out)
    assert f"token 258 in {tmp_path / 'a.jsonl'}:2 is outside the model's vocabulary of 258" in (
        message
    )
    assert "use the model's own tokenizer, or resize its embeddings" in message


def test_a_tokenizer_without_a_start_token(
    tmp_path: Path, world: SimpleNamespace, tiny_model: PreTrainedModel, out: Path
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    message = refused(
        "build", save(tmp_path / "model", tiny_model, plain), world.corpus, "--out", out
    )
    assert "neither a BOS nor an EOS token" in message
    assert "set tokenizer.bos_token" in message


def test_a_model_without_the_key_layer(tmp_path: Path, world: SimpleNamespace, out: Path) -> None:
    config = MambaConfig(
        vocab_size=258, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=2
    )
    torch.manual_seed(0)
    model = save(tmp_path / "mamba", MambaForCausalLM(config))
    message = refused("build", model, world.corpus, "--out", out)
    assert "MambaForCausalLM has no feed-forward layer" in message
    assert "--key-layer last_hidden" in message
    (record,) = works(
        "build", model, world.corpus, "--out", tmp_path / "m", "--key-layer", "last_hidden"
    )
    assert record["keys"].startswith("last_hidden (lm_head), 16 dims")
    assert verify(tmp_path / "m") == []


@pytest.mark.parametrize(
    ("keys", "weight", "value", "shown"),
    [
        (keys, *broken)
        for keys, largest in (("fp16", 65_504.0), ("int8", 1e15))
        for broken in (
            ("transformer.wte.weight", float("nan"), "nan"),
            ("transformer.h.1.ln_2.bias", float("nan"), "nan"),
            ("transformer.h.1.ln_2.bias", float("inf"), "inf"),
            ("transformer.h.1.ln_2.bias", -1.1 * largest, "-"),
            ("transformer.h.1.ln_2.weight", 20 * largest, ""),
        )
    ],
)
def test_keys_that_their_format_cannot_hold(
    tmp_path: Path,
    world: SimpleNamespace,
    tiny_model: PreTrainedModel,
    out: Path,
    keys: str,
    weight: str,
    value: float,
    shown: str,
) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.get_parameter(weight).fill_(value)
    broken = save(tmp_path / "model", model)
    message = refused("build", broken, world.corpus, "--out", out, "--keys", keys)
    assert f"the key last_ffn_input is {shown}" in message
    assert " of document number " in message
    assert f"which {keys} keys cannot hold: check the model's weights" in message


def test_the_position_of_a_bad_key_is_named(
    tmp_path: Path, world: SimpleNamespace, tiny_model: PreTrainedModel, out: Path
) -> None:
    memory = Memory.open(world.memory)
    largest = np.abs(memory.keys.rows(np.arange(memory.tokens)).astype(np.float64)).max(axis=1)
    second, first = np.argsort(largest)[-2:].tolist()
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():  # so that one key alone exceeds the limit
        for name in ("weight", "bias"):
            scale = 65_504 / (largest[first] * largest[second]) ** 0.5
            model.get_parameter(f"transformer.h.1.ln_2.{name}").mul_(scale)
    place = memory.place(first)
    large = save(tmp_path / "model", model)
    message = refused("build", large, world.corpus, "--out", out, "--keys", "fp16")
    assert f" at token {place.position} of document number {place.document + 1}, " in message


# --- a model that does not fit the memory ---------------------------------------------------------


def other_weights(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("transformer.h.0.mlp.c_fc.weight")[3, 4] += 0.5
    return other


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary with two bytes exchanged."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


VERBS: dict[str, list[str]] = {
    "eval": ["--text", "TEXT"],
    "tune": ["--text", "TEXT"],
    "generate": ["--prompt", "a", "--max-new-tokens", "1"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("difference", ["weights", "tokenizer"])
def test_a_memory_of_another_model_or_tokenizer(
    tmp_path: Path,
    world: SimpleNamespace,
    memory: Path,
    tiny_model: PreTrainedModel,
    verb: str,
    difference: str,
) -> None:
    if difference == "weights":
        other = save(tmp_path / "other", other_weights(tiny_model))
    else:
        other = save(tmp_path / "other", tiny_model, other_tokenizer())
    arguments = [str(world.text) if word == "TEXT" else word for word in VERBS[verb]]
    message = refused(verb, memory, *arguments, "--model", other)
    assert f"Load '{Path(world.model).resolve()}', build a memory with this one, or" in message
    assert "--force" in message
    expected = "is not the one that built" if difference == "weights" else "tokenizer differs"
    assert expected in message
    works(verb, memory, *arguments, "--model", other, "--force")


def test_a_memory_of_another_dimension_cannot_be_forced(
    tmp_path: Path, world: SimpleNamespace
) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=258)
    other = save(tmp_path / "other", type(make_model())(config))
    for force in ([], ["--force"]):
        message = refused("eval", world.memory, "--text", world.text, "--model", other, *force)
        assert "have 32 dims but this model gives 16" in message
        assert f"load '{world.model}', or build a memory with this one" in message


def test_a_memory_of_another_key_layer(tmp_path: Path, world: SimpleNamespace) -> None:
    memory = tmp_path / "m"
    works("build", world.model, world.corpus, "--out", memory, "--key-layer", "last_hidden")
    edit_manifest(memory, lambda m: m["keys"].update(layer="last_ffn_input"))
    message = refused("eval", memory, "--text", world.text)
    assert "its key layer last_ffn_input is 'transformer.h.1.mlp.c_fc' and was 'lm_head'" in message
    assert "its states for a fixed text are" in message
    edit_manifest(memory, lambda m: m["keys"].update(layer="first_hidden"))
    assert "first_hidden" in refused("eval", memory, "--text", world.text)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["eval", "generate"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lam", "-0.1"], "lam must lie inside [0, 1], got -0.1"),
        (["--lam", "1.01"], "lam must lie inside [0, 1], got 1.01"),
        (["--lam", "nan"], "lam must lie inside [0, 1], got nan"),
        (["--k", "0"], "k must be at least 1, got 0"),
        (["--k", "-3"], "k must be at least 1, got -3"),
        (["--knn-temperature", "0"], "temperature must be above 0 and finite, got 0"),
        (["--knn-temperature", "-1"], "temperature must be above 0 and finite, got -1"),
        (["--knn-temperature", "inf"], "temperature must be above 0 and finite, got inf"),
        (["--knn-temperature", "nan"], "temperature must be above 0 and finite, got nan"),
    ],
)
def test_settings_out_of_range(
    world: SimpleNamespace, verb: str, arguments: list[str], message: str
) -> None:
    required = ["--text", world.text] if verb == "eval" else ["--prompt", "a"]
    assert message in refused(verb, world.memory, *required, *arguments)


@pytest.mark.parametrize("verb", ["build", "eval", "tune"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "65"], "a window of 65 is longer than the model's 64 positions"),
        (["--window", "16", "--stride", "16"], "stride 16 must be at least 1 and below the window"),
        (["--window", "16", "--stride", "17"], "try a stride of half the window"),
        (["--stride", "64"], "stride 64 must be at least 1 and below the window, 64"),
        (["--stride", "0"], "stride 0 must be at least 1"),
        (["--window", "0"], "below the window, 0"),
        (["--batch-size", "0"], "batch size must be at least 1"),
        (["--batch-size", "-2"], "batch size must be at least 1"),
    ],
)
def test_windows_and_batches_that_cannot_work(
    world: SimpleNamespace, out: Path, verb: str, arguments: list[str], message: str
) -> None:
    if verb == "build":
        assert message in refused("build", world.model, world.corpus, "--out", out, *arguments)
    else:
        assert message in refused(verb, world.memory, "--text", world.text, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "retro"], "method 'retro' is unknown: choose among base, knn"),
        (["--method", "base,,knn"], "method '' is unknown"),
        (["--method", "knn,knn"], "each only once"),
    ],
)
def test_methods_that_do_not_exist(
    world: SimpleNamespace, arguments: list[str], message: str
) -> None:
    assert message in refused("eval", world.memory, "--text", world.text, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recall", "0"], "recall target must lie in (0, 1], got 0"),
        (["--recall", "1.1"], "recall target must lie in (0, 1]"),
        (["--recall", "nan"], "recall target must lie in (0, 1]"),
        (["--nprobe", "0"], "nprobe must be at least 1, got 0"),
        (["INDEX", "no such index"], "FAISS cannot build the index 'no such index'"),
        (["INDEX", "IVF5000,Flat"], "the index 'IVF5000,Flat' has more lists than"),
    ],
)
@pytest.mark.parametrize("verb", ["build", "index"])
def test_indexes_that_cannot_work(
    world: SimpleNamespace,
    memory: Path,
    out: Path,
    verb: str,
    arguments: list[str],
    message: str,
) -> None:
    before = (memory / "manifest.json").read_bytes()
    given = ["--index" if word == "INDEX" else word for word in arguments]
    if verb == "build":
        text = refused("build", world.model, world.corpus, "--out", out, *given)
    else:
        text = refused("index", memory, *given)
    assert message in text
    assert (memory / "manifest.json").read_bytes() == before
    assert verify(memory) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"lam": "high"},
        {"lam": None},
        {"lam": [0.5]},
        {"k": 2.5},
        {"k": "all"},
        {"temperature": {}},
        {"distances": 3},
        {"lam": 7},
    ],
)
def test_stored_settings_that_mean_nothing(
    world: SimpleNamespace, memory: Path, settings: dict[str, Any]
) -> None:
    edit_manifest(memory, lambda m: m.update(settings={"knn": settings}))
    message = refused("eval", memory, "--text", world.text)
    assert next(iter(settings)) in message


def test_a_prompt_that_is_too_long(world: SimpleNamespace) -> None:
    message = refused("generate", world.memory, "--prompt", "a" * 60, "--max-new-tokens", 10)
    assert "the prompt's 61 tokens and 10 new ones exceed the model's 64 positions" in message
    assert "--max-new-tokens" in message


# --- the memory's folder --------------------------------------------------------------------------

READERS: dict[str, list[str]] = {
    "info": [],
    "verify": [],
    "index": ["--index", "exact"],
    "eval": ["--text", "TEXT"],
    "tune": ["--text", "TEXT"],
    "generate": ["--prompt", "a"],
}


@pytest.mark.parametrize("verb", READERS)
def test_a_memory_that_cannot_be_read(world: SimpleNamespace, memory: Path, verb: str) -> None:
    arguments = [str(world.text) if word == "TEXT" else word for word in READERS[verb]]
    manifest = (memory / "manifest.json").read_bytes()
    edit_manifest(memory, lambda m: m.update(format=1))
    message = refused(verb, memory, *arguments)
    assert "has format 1, which this version does not read any more" in message
    assert "build the memory anew" in message
    edit_manifest(memory, lambda m: m.update(format=FORMAT + 1))
    message = refused(verb, memory, *arguments)
    assert f"has format {FORMAT + 1}, this version reads up to {FORMAT}: use a newer one" in message
    (memory / "manifest.json").write_bytes(manifest[:-10])
    assert "manifest.json is not a valid manifest" in refused(verb, memory, *arguments)
    (memory / "manifest.json").write_bytes(manifest)
    keys = memory / "segments/000001/keys.npy"
    os.truncate(keys, 500)
    message = refused(verb, memory, *arguments)
    assert f"{keys} has 500 bytes, the manifest says" in message
    keys.unlink()
    assert f"{keys} is missing" in refused(verb, memory, *arguments)
    (memory / "manifest.json").unlink()
    assert f"{memory} is not a memory" in refused(verb, memory, *arguments)
    assert f"{world.text} is not a memory" in refused(verb, world.text, *arguments)
    message = refused(verb, memory.parent / "nowhere", *arguments)
    assert "nowhere does not exist: check the path, or build it" in message


@pytest.mark.parametrize(
    ("address", "verb", "arguments"),
    [
        ("http://127.0.0.1:9/law", "info", ["ADDRESS"]),
        ("http://127.0.0.1:9/law", "compact", ["ADDRESS"]),
        ("s3://bucket/law.memory", "remove", ["ADDRESS", "--doc", "a"]),
        ("s3://bucket/law.memory", "build", ["MODEL", "CORPUS", "--out", "ADDRESS"]),
    ],
)
def test_an_address_where_a_folder_is_needed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: SimpleNamespace,
    address: str,
    verb: str,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"ADDRESS": address, "MODEL": world.model, "CORPUS": world.corpus}
    message = refused(verb, *(known.get(word, word) for word in arguments))
    assert f"{address} is an address, and a folder is needed here" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["eval", "tune", "generate"])
def test_a_flipped_byte_in_the_index(world: SimpleNamespace, memory: Path, verb: str) -> None:
    arguments = [str(world.text) if word == "TEXT" else word for word in READERS[verb]]
    index = memory / "segments/000001/index.faiss"
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.write_bytes(data)
    message = refused(verb, memory, *arguments)
    assert f"{index} is damaged (its checksum differs from the manifest)" in message
    assert "rebuild it with `nearest index`" in message
    works("index", memory)
    works(verb, memory, *arguments)


@pytest.mark.parametrize("position", [9, 22, 60, 100])
def test_a_flipped_byte_in_a_header(memory: Path, position: int) -> None:
    keys = memory / "segments/000001/keys.npy"
    data = bytearray(keys.read_bytes())
    for bit in range(8):
        damaged = data.copy()
        damaged[position] ^= 1 << bit
        keys.write_bytes(damaged)
        result = invoke("info", memory, "--json")
        if result.code:  # what changes nothing that is read is left to `verify`
            assert (result.code, result.out) == (2, "")
            assert str(keys) in message_of(result.err)


def test_where_nothing_may_be_built(tmp_path: Path, world: SimpleNamespace, memory: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, words in {
        "law.memory": "is already a memory: give another path, or delete it first",
        "mine": "is not empty (it holds 'notes.txt'): give the memory its own folder",
        "file": "is a file: give the memory another path",
        "file/below": "",
        "link": "",
        "x" * 300: "",
    }.items():
        message = refused("build", world.model, world.corpus, "--out", tmp_path / name)
        assert str(tmp_path / name) in message
        assert words in message
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("verb", ["build", "index", "tune"])
def test_two_writers(tmp_path: Path, world: SimpleNamespace, memory: Path, verb: str) -> None:
    arguments = {
        "build": [world.model, world.corpus, "--out", tmp_path / "empty"],
        "index": [memory, "--index", "exact"],
        "tune": [memory, "--text", world.text],
    }[verb]
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "empty" if verb == "build" else memory
    before = sorted(folder.rglob("*"))
    with writer_lock(folder):
        message = refused(verb, *arguments)
    assert f"{folder} is being written by another process: wait for it to finish" in message
    assert sorted(folder.rglob("*")) == before
    works(verb, *arguments)


# --- the disk, and the keyboard -------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _leave_free(disk: Path, pages: int) -> None:
    """Fill a disk so that only so many pages of 4096 bytes are free."""
    status = os.statvfs(disk)
    ballast = (status.f_bavail * status.f_frsize) // 4096 - pages
    (disk / "ballast").write_bytes(bytes(4096 * ballast))
    status = os.statvfs(disk)
    assert status.f_bavail * status.f_frsize == 4096 * pages


@pytest.mark.parametrize("fits", ["nothing", "corpus", "suffix array", "keys", "index", "manifest"])
def test_a_full_disk(small_disk: Path, world: SimpleNamespace, fits: str) -> None:
    """The disk is full at every stage in turn, and only when all fits is there a memory."""
    segment = world.memory / "segments/000001"
    pages = {path.name: -(-path.stat().st_size // 4096) for path in segment.iterdir()}
    stages = {
        "nothing": 0,
        "corpus": pages["tokens.npy"]
        + pages["offsets.npy"]
        + pages["documents.jsonl.zst"]
        + pages["frames.npy"]
        + pages["ids.npy"],
        "suffix array": pages["suffix.npy"],
        "keys": pages["keys.npy"] + pages["scales.npy"],
        "index": pages["trained.faiss"] + pages["index.faiss"],
        # and of the files that say how far the build is: four stay until the end, one is rewritten
        "manifest": -(-(world.memory / "manifest.json").stat().st_size // 4096) + 6,
    }
    names = list(stages)
    _leave_free(small_disk, sum(stages[name] for name in names[: names.index(fits) + 1]))
    path = small_disk / "new.memory"
    arguments = ["build", world.model, world.corpus, "--out", path, "--index", "IVF4,Flat"]
    if fits == "manifest":
        works(*arguments)
        assert verify(path) == []
        return
    message = refused(*arguments)
    assert message == (f"cannot write to {path}: the disk is full: free some space, then run again")
    assert [item.name for item in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    works(*arguments)
    assert verify(path) == []


def test_a_full_disk_while_an_index_is_replaced(small_disk: Path, world: SimpleNamespace) -> None:
    path = Path(shutil.copytree(world.memory, small_disk / "law.memory"))
    before = {item: item.read_bytes() for item in path.rglob("*") if item.is_file()}
    _leave_free(small_disk, 2)
    message = refused("index", path, "--index", "IVF2,Flat")
    assert "the disk is full: free some space, then run again" in message
    assert {item: item.read_bytes() for item in path.rglob("*") if item.is_file()} == before
    assert verify(path) == []


def test_a_read_only_disk(small_disk: Path, world: SimpleNamespace) -> None:
    path = Path(shutil.copytree(world.memory, small_disk / "law.memory"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    cure = "the file system is read-only: choose another folder"
    new = small_disk / "new.memory"
    assert f"{new}: {cure}" in refused("build", world.model, world.corpus, "--out", new)
    assert f"{path}: {cure}" in refused("index", path, "--index", "exact")
    assert f"{path}: {cure}" in refused("index", path, "--index", "Flat")
    assert f"{path}: {cure}" in refused("tune", path, "--text", world.text)
    (sound,) = works("verify", path)
    assert sound["sound"]
    assert works("eval", path, "--text", world.text) != []


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes; no longer than is needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [200, 2_000, 20_000])
def test_a_limit_on_the_size_of_files(world: SimpleNamespace, out: Path, limit: int) -> None:
    with file_size_limit(limit):
        message = refused("build", world.model, world.corpus, "--out", out)
    assert message == (
        f"cannot write to {out}: a file would exceed the size limit (ulimit -f): raise it, "
        "then run again"
    )


@pytest.mark.slow
def test_an_interruption_from_the_keyboard(tmp_path: Path, world: SimpleNamespace) -> None:
    out = tmp_path / "new.memory"  # stays, to be gone on with, where a task took a second
    (tmp_path / "long.txt").write_text("the court shall " * 20_000)
    command = [
        NEAREST,
        "build",
        world.model,
        tmp_path / "long.txt",
        "--out",
        out,
        "--json",
        "--window",
        "64",
        "--stride",
        "1",
        "--batch-size",
        "1",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # Tests that run in the background have been started with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            deadline = time.monotonic() + 60
            while not list(out.glob("build/*/keys.npy")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()  # it would go on for hours
    assert (process.returncode, stdout) == (2, "")
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last == "stopped: nothing half-written is in use; run it again"
