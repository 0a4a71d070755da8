"""Models, tokenizers and messages as people hand them over: each works, or is named with a cure."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from conftest import make_documents, make_model, make_tokenizer
from nearest import Memory, attach, detach, evaluate
from nearest.errors import ModelError, NearestError, SettingError
from nearest.verbs.chat import Chat
from nearest.verbs.generate import generate
from nearest.verbs.prompt import prompt_tokens

TEXTS = ["the court shall", "a person of the district"]
TINY = GPT2Config(
    vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
)
TEMPLATE = "<bos>{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"


@pytest.fixture(scope="module")
def memory(build_memory: Callable[..., Memory], tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, make_documents(6, 20, seed=6))


def chatting(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def vit() -> ViTModel:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    return ViTModel(config).eval()


NO_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a name": (lambda: "gpt2", "is needed, and this is a str: load one"),
    "a layer": (lambda: nn.Linear(3, 3), "this is a Linear"),
    "a tokenizer": (make_tokenizer, "is needed, and this is a "),
    "no head": (lambda: GPT2Model(TINY).eval(), "load it with a language-model head"),
    "another head": (
        lambda: GPT2ForSequenceClassification(TINY).eval(),
        "load it with a language-model head",
    ),
    "a model of images": (vit, "reads pixel_values"),
    "without weights": (lambda: make_model().to("meta"), "are not loaded"),
}


@pytest.mark.parametrize(("make", "message"), NO_MODELS.values(), ids=NO_MODELS)
def test_what_is_no_language_model_is_named(
    make: Callable[[], Any], message: str, tmp_path: Path, memory: Memory
) -> None:
    with pytest.raises(ModelError, match=message):
        Memory.build(make(), make_tokenizer(), TEXTS, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(ModelError, match=message):
        attach(make(), memory)


@pytest.mark.parametrize("given", ["gpt2", None, 5, make_tokenizer().backend_tokenizer])
def test_what_is_no_tokenizer_is_named(
    given: Any, tmp_path: Path, tiny_model: PreTrainedModel
) -> None:
    with pytest.raises(ModelError, match=r"a tokenizer is needed, and this is a .*AutoTokenizer"):
        Memory.build(tiny_model, given, TEXTS, tmp_path / "m")


@pytest.mark.parametrize("given", ["law.memory", Path("law.memory"), 5, [3]])
def test_what_is_no_memory_is_named(given: Any, tiny_model: PreTrainedModel) -> None:
    with pytest.raises(SettingError, match=r"Memory\.open"):
        attach(tiny_model, given)


def test_a_data_parallel_model_is_the_one_inside(
    memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = evaluate(make_model(), memory, TEXTS, tokenizer=tiny_tokenizer, lam=0.3)
    wrapped = nn.DataParallel(make_model())
    assert evaluate(wrapped, memory, TEXTS, tokenizer=tiny_tokenizer, lam=0.3).nll == expected.nll


def test_a_refused_model_is_named_where_its_name_is_known(
    memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert memory.manifest.model.name == ""
    changed = make_model()
    with torch.no_grad():
        changed.transformer.h[1].ln_1.weight[3] += 1
    with pytest.raises(ModelError, match="Load the model that built it, build a memory"):
        attach(changed, memory)


def test_a_model_with_a_memory_is_not_pickled(memory: Memory) -> None:
    model = make_model()
    with attach(model, memory), pytest.raises(SettingError, match=r"detach.*save_pretrained"):
        pickle.dumps(model)
    assert torch.equal(pickle.loads(pickle.dumps(model)).lm_head.weight, model.lm_head.weight)


def test_only_a_model_is_detached() -> None:
    with pytest.raises(ModelError, match="this is a NoneType"):
        detach(None)  # type: ignore[arg-type]


# --- chats ----------------------------------------------------------------------------------------


def test_special_tokens_in_a_message_are_text_unless_asked_for(tiny_model: PreTrainedModel) -> None:
    tokenizer = chatting()
    messages = [{"role": "u", "content": "a<eos>b<bos>"}, {"role": "a", "content": "<eos>"}]
    read = prompt_tokens(tiny_model, tokenizer, messages)
    assert tokenizer.decode(read.inputs) == "<bos>u:a<eos>b<bos><eos>a:<eos><eos>"
    assert [read.inputs.count(token) for token in (0, 1)] == [1, 2]  # those of the template
    asked = prompt_tokens(tiny_model, tokenizer, messages, special_tokens=True)
    assert [asked.inputs.count(token) for token in (0, 1)] == [2, 4]
    plain = [{"role": "u", "content": "ab"}]
    expected = tokenizer("<bos>u:ab<eos>", add_special_tokens=False)["input_ids"]
    assert prompt_tokens(tiny_model, tokenizer, plain).inputs == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "cannot be used"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
            "{% endif %}",
            "no system role",
        ),
    ],
)
def test_what_a_chat_template_refuses_is_said(
    template: str, message: str, memory: Memory, tiny_model: PreTrainedModel
) -> None:
    with pytest.raises(SettingError, match=message):
        Chat(tiny_model, chatting(template), memory, system="be brief")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        ["a", "b"],
        5,
        None,
    ],
)
def test_what_are_no_messages_is_named(
    messages: Any, memory: Memory, tiny_model: PreTrainedModel
) -> None:
    with pytest.raises(SettingError, match=r"messages, each with a 'role' and a 'content'"):
        generate(tiny_model, chatting(), memory, messages, max_new_tokens=1)


def test_no_new_tokens_are_refused(memory: Memory, tiny_model: PreTrainedModel) -> None:
    with pytest.raises(NearestError, match="at least 1"):
        generate(tiny_model, make_tokenizer(), memory, "ab", max_new_tokens=0)
