"""Prompts, sampling and chats, by the command and beside `model.generate`."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_documents, make_model, make_tokenizer
from nearest import Memory, attach
from nearest.cli import app
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import SettingError
from nearest.verbs.chat import Chat
from nearest.verbs.generate import generate
from nearest.verbs.prompt import prompt_tokens

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
DEMO = Path(__file__).parents[1] / "src/nearest/demo/general-gpt2-7m"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model that chats, and a memory of it."""
    folder = tmp_path_factory.mktemp("generating")
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    memory = Memory.build(model, tokenizer, make_documents(12, 30), folder / "m")
    return SimpleNamespace(model=model, tokenizer=tokenizer, memory=memory, folder=folder)


def run(*arguments: Any, typed: bytes | str = "") -> SimpleNamespace:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def answered(world: SimpleNamespace, *arguments: Any, typed: bytes | str = "") -> dict[str, Any]:
    options = ["generate", world.memory.path, "--model", world.folder / "model", "--json"]
    result = run(*options, "--max-new-tokens", 6, *arguments, typed=typed)
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def refused(world: SimpleNamespace, *arguments: Any, typed: bytes | str = "") -> str:
    result = run("generate", world.memory.path, *arguments, typed=typed)
    assert result.code == 2
    return " ".join(str(result.err).split())


def test_sampling_is_that_of_transformers(world: SimpleNamespace) -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    flags = [option.replace("_", "-") for option in options]
    found = answered(world, "--prompt", "the", *flags, "--seed", 7, "--knn-temperature", 30)
    ids = torch.tensor([prompt_tokens(world.model, world.tokenizer, "the").inputs])
    with attach(world.model, world.memory, temperature=30.0):
        torch.manual_seed(7)
        output = world.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=True,
            pad_token_id=0,
            **given,
        )
    expected = world.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["text"] == expected
    greedy = answered(world, "--prompt", "the", "--knn-temperature", 30)
    assert greedy["text"] != found["text"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", 0),
        ("top-p", 1.5),
        ("top-k", 0),
        ("repetition-penalty", 0),
        ("repetition-penalty", float("nan")),
    ],
)
def test_sampling_out_of_range_is_refused(world: SimpleNamespace, flag: str, value: float) -> None:
    assert f"--{flag}" in refused(world, "--prompt", "a", f"--{flag}", value)


@pytest.mark.slow
def test_a_prompt_comes_from_a_pipe_or_a_file(world: SimpleNamespace, tmp_path: Path) -> None:
    expected = answered(world, "--prompt", "é the court")
    (file := tmp_path / "p.txt").write_text("é the court\n", encoding="utf-8")
    assert answered(world, "--prompt-file", file) == expected
    assert answered(world, "--prompt", "-", typed="é the court\n".encode()) == expected
    for broken in (["--prompt", "-"], ["--prompt-file", tmp_path / "bad.txt"]):
        (tmp_path / "bad.txt").write_bytes(b"ab\xff")
        message = refused(world, *broken, typed=b"ab\xff")
        assert "not UTF-8 (at byte 2)" in message
        options = [*broken, "--encoding-errors", "replace"]
        assert answered(world, *options, typed=b"ab\xff")["prompt"] == "ab\ufffd"
    assert "either" in refused(world)
    assert "either" in refused(world, "--prompt", "a", "--prompt-file", file)
    assert "cannot be read" in refused(world, "--prompt-file", tmp_path / "none")


def test_special_tokens_of_a_prompt_are_text_unless_asked_for(world: SimpleNamespace) -> None:
    def ids(text: str, **options: bool) -> list[int]:
        return prompt_tokens(world.model, world.tokenizer, text, **options).inputs[1:]

    assert ids("a<eos>", special_tokens=True) == [*ids("a"), 1]
    assert 1 not in ids("a<eos>")
    assert world.tokenizer.decode(ids("a<eos>")) == "a<eos>"
    with pytest.raises(SettingError, match="not UTF-8"):
        ids("a\udcff")


@pytest.mark.slow
def test_spaces_at_the_end_are_left_to_the_first_token(tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(str(DEMO))
    healed = prompt_tokens(model, tokenizer, "The Mayor ", heal=True)
    assert healed.inputs == prompt_tokens(model, tokenizer, "The Mayor").inputs
    assert healed.first is not None
    assert {tokenizer.decode([token])[0] for token in healed.first} == {" "}
    memory = Memory.build(model, tokenizer, ["The Mayor shall act."], tmp_path / "m")
    pieces: list[str] = []
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "method": "knn"}
    found = generate(
        model, tokenizer, memory, "The Mayor ", heal=True, stream=pieces.append, **options
    )
    without = generate(model, tokenizer, memory, "The Mayor", **options)
    assert " " + found.text == without.text
    assert "".join(pieces) == found.text == "".join(token.text for token in found.tokens)
    kept = prompt_tokens(model, tokenizer, "The Mayor ")
    assert tokenizer.decode(kept.inputs[1:]) == "The Mayor "
    assert kept.first is None


def test_a_continuation_is_shown_as_it_comes(world: SimpleNamespace) -> None:
    expected = answered(world, "--prompt", "the court")
    options = ["--model", world.folder / "model", "--max-new-tokens", 6]
    shown = run("generate", world.memory.path, "--prompt", "the court", *options)
    assert shown.out == "the court" + expected["text"] + "\n"


@pytest.mark.parametrize("method", ["base", "knn"])
def test_a_stop_string_ends_a_text(world: SimpleNamespace, method: str) -> None:
    given = (world.model, world.tokenizer, world.memory, "the court")
    letters = world.tokenizer("abcdefghij", add_special_tokens=False)["input_ids"]
    options: dict[str, Any] = {
        "method": method,
        "max_new_tokens": 12,
        "do_sample": False,
        "suppress_tokens": sorted({*range(258)} - {*letters}),
    }
    text = generate(*given, **options).text
    assert len(text) == 12
    assert (
        generate(*given, stop_strings=[text[5]], **options).text
        == text.partition(text[5])[0] + text[5]
    )


def test_a_chat_prompt_is_written_by_the_template(world: SimpleNamespace) -> None:
    found = answered(world, "--prompt", "hello", "--chat", "--method", "base")
    ids = world.tokenizer("u:hello<eos>a:", add_special_tokens=False)["input_ids"]
    output = world.model.generate(
        torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert found["text"] == world.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert found["continues"] is False
    plain = make_tokenizer()
    with pytest.raises(SettingError, match="no chat template"):
        Chat(world.model, plain, world.memory)


def test_a_chat_keeps_what_was_said_and_leaves_the_oldest_out(world: SimpleNamespace) -> None:
    talk = Chat(world.model, world.tokenizer, world.memory, max_new_tokens=4, do_sample=False)
    first = talk.say("ab")
    assert len(first.tokens) > 0
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "cd"},
    ]
    expected = generate(
        world.model, world.tokenizer, world.memory, messages, max_new_tokens=4, do_sample=False
    )
    assert talk.say("cd").text == expected.text
    talk.remembers = False
    assert talk.say("ef").tokens == []
    talk.remembers = True
    long = talk.say("x" * 50)  # 64 positions: all that was said before is left out
    talk.begin_anew()
    assert talk.say("x" * 50).text == long.text
    with pytest.raises(SettingError, match="positions"):
        talk.say("x" * 60)


def test_a_prompt_that_begins_with_two_start_tokens_is_noted(world: SimpleNamespace) -> None:
    ids = torch.tensor([[0, 0, 5, 6]])
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 1}
    with attach(world.model, world.memory):
        with pytest.warns(UserWarning, match="two start tokens"):
            world.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        world.model.generate(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]), **options)
    typed = ["--prompt", "<bos>the", "--special-tokens", "--model", world.folder / "model"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        noted = run("generate", world.memory.path, *typed, "--max-new-tokens", 2)
    assert "two start tokens" in noted.err
    plain = run("generate", world.memory.path, *typed[:2], *typed[3:], "--max-new-tokens", 2)
    assert "note:" not in plain.err


def test_the_chat_command_takes_lines_and_commands(world: SimpleNamespace) -> None:
    lines = ["/sources", "ab", "/sources", "/off", "ab", "/method suffix", "/method none", "/nope"]
    options = ["--model", world.folder / "model", "--max-new-tokens", 3]
    typed = "\n".join([*lines, "/new", "/help", "", "/quit", "never"])
    result = run("chat", world.memory.path, *options, typed=typed)
    assert result.code == 0
    talk = Chat(world.model, world.tokenizer, world.memory, max_new_tokens=3, do_sample=False)
    assert talk.say("ab").text in result.out
    assert "from the memory:" in result.out
    assert "the memory is off" in result.out
    assert "method suffix" in result.out
    assert "a new conversation" in result.out
    assert result.err.count("error:") == 3  # nothing to name sources of, a method, a command
    assert run("chat", world.memory.path, *options, typed="ab").code == 0


def test_python_runs_the_command_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "nearest", "--help"], capture_output=True, text=True, check=True
    )
    assert "generate" in shown.stdout
    assert "--install-completion" in shown.stdout
