"""What an attached model may be put through: threads, copies, drafts, failures, other weights."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import nearest
from conftest import make_documents, make_model, random_documents
from nearest import Memory, Settings, attach, detach
from nearest.encode.forward import encode_keys
from nearest.encode.hooks import captured_input, hooked
from nearest.encode.layers import find_key_layer
from nearest.encode.probe import probed, sensitivity_of
from nearest.errors import SettingError

SETTINGS = {"lam": 0.6, "temperature": 40.0, "k": 8}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("knn", SETTINGS),
    ("retomaton", {**SETTINGS, "guard": True}),
]
PROMPT = torch.randint(2, 258, (1, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def memories(build_memory: Callable[..., Memory]) -> list[Memory]:
    model = make_model("llama")
    return [build_memory(model, random_documents()), build_memory(model, make_documents(6, 20, 2))]


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = make_model("llama")
    yield model
    detach(model)


def generate(model: PreTrainedModel, prompt: Tensor = PROMPT, **options: Any) -> Tensor:
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    found: Tensor = model.generate(prompt, **{**how, **options})
    return found


# --- sources say what was mixed then --------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_sources_are_of_the_weights_that_generated(
    model: PreTrainedModel, memories: list[Memory], method: str, settings: dict[str, Any]
) -> None:
    with attach(model, memories, method, **settings) as session:
        with session.weighted(0.9, 0.0):
            tokens = generate(model)
            inside = session.sources(0)
        assert session.sources(0) == inside
        assert {source.memory for token in inside for source in token.sources} == {0}
        with session.weighted(0.0, 0.9):
            assert session.sources(0) == inside
        with session.disabled():
            base = generate(model)
        off = session.sources(0)
        with session.weighted(0, 0):
            assert torch.equal(generate(model), base)
        nothing = session.sources(0)
    assert [token.token for token in inside] == tokens[0, 6:].tolist()
    for named in (off, nothing):
        assert [token.token for token in named] == base[0, 6:].tolist()
        assert not any(token.memory_weight or token.sources for token in named)


# --- the model is given back ----------------------------------------------------------------------


def test_a_failing_attach_leaves_the_model_as_it_was(
    model: PreTrainedModel, memories: list[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(vars(model))
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]

    def fails(*_: Any) -> Any:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(nearest.models.attach.Session, "_wrap_generate", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        attach(model, memories[0])
    monkeypatch.undo()
    assert vars(model) == before
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    attach(model, memories[0], **SETTINGS).detach()


def test_a_model_that_cannot_generate_predicts_with_a_memory(
    memories: list[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    with attach(model, memories[0], **SETTINGS), torch.no_grad():
        expected = model(input_ids=PROMPT).logits
    for owner in type(model).__mro__:
        for name in ("generate", "prepare_inputs_for_generation"):
            if name in vars(owner):
                monkeypatch.delattr(owner, name)
    assert not hasattr(model, "generate")
    with attach(model, memories[0], **SETTINGS), torch.no_grad():
        assert torch.equal(model(input_ids=PROMPT).logits, expected)


def test_a_lost_session_is_detached_by_the_model(
    model: PreTrainedModel, memories: list[Memory]
) -> None:
    before = dict(vars(model))
    attach(model, memories[0], **SETTINGS)
    with pytest.raises(SettingError, match=r"nearest\.detach"):
        attach(model, memories[0])
    detach(model)
    detach(model)
    assert vars(model) == before


def test_a_copy_is_a_model_without_memory(model: PreTrainedModel, memories: list[Memory]) -> None:
    base = model(input_ids=PROMPT).logits
    with attach(model, memories[0], **SETTINGS):
        other = copy.deepcopy(model)
        outer = copy.deepcopy(nn.ModuleDict({"inner": model}))["inner"]
        mixed = model(input_ids=PROMPT).logits
    for one in (other, outer):
        assert torch.equal(one(input_ids=PROMPT).logits, base)
        assert not any(name in vars(one) for name in ("forward", "generate", "__deepcopy__"))
        assert not any(module._forward_pre_hooks for module in one.modules())
        with torch.no_grad():
            next(iter(one.parameters())).zero_()
        assert not torch.equal(one(input_ids=PROMPT).logits, base)
        with attach(one, memories[0], force=True, **SETTINGS):
            assert not torch.equal(one(input_ids=PROMPT).logits, mixed)
    assert torch.equal(model(input_ids=PROMPT).logits, base)


# --- drafts of the model itself -------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("how", ["early exit", "itself"])
def test_the_model_drafts_for_itself_without_memory(
    model: PreTrainedModel,
    memories: list[Memory],
    method: str,
    settings: dict[str, Any],
    how: str,
) -> None:
    with attach(model, memories[0], method, **settings) as session:
        plain = generate(model)
        named = session.sources(0)
        options = {"assistant_early_exit": 1} if how == "early exit" else {"assistant_model": model}
        assert torch.equal(generate(model, **options), plain)
        assert [one.token for one in session.sources(0)] == [one.token for one in named]


# --- threads --------------------------------------------------------------------------------------


class _GeneratesAgain(BaseStreamer):
    """Lets another thread generate while this one does."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run

    def put(self, value: Tensor) -> None:
        thread = threading.Thread(target=self.run)
        thread.start()
        thread.join()

    def end(self) -> None:
        pass


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_two_threads_generate_at_once(
    model: PreTrainedModel, memories: list[Memory], method: str, settings: dict[str, Any]
) -> None:
    other = PROMPT.flip(1)
    found: list[tuple[Tensor, list[Any]]] = []
    with attach(model, memories[0], method, **settings) as session:
        expected_other, named_other = generate(model, other), session.sources(0)
        expected, named = generate(model), session.sources(0)

        def again() -> None:
            found.append((generate(model, other), session.sources(0)))

        together = generate(model, streamer=_GeneratesAgain(again))
        assert torch.equal(together, expected)
        assert session.sources(0) == named
        assert len(found) == 6  # the prompt and five tokens
        for tokens, spoken in found:
            assert torch.equal(tokens, expected_other)
            assert spoken == named_other
        thread = threading.Thread(target=lambda: generate(model, other))
        thread.start()
        thread.join()
        names: list[Any] = []  # a thread that generated nothing asks for the last of any
        thread = threading.Thread(target=lambda: names.extend(session.sources(0)))
        thread.start()
        thread.join()
        assert names == named_other


def hooks_of(module: nn.Module) -> dict[int, Any]:
    return dict(module._forward_pre_hooks)


def test_a_hook_that_comes_or_goes_breaks_no_other_thread() -> None:
    """torch forgets that a hook takes keyword arguments before it forgets the hook."""
    module = nn.Linear(2, 2)
    with hooked(module):
        (number,) = hooks_of(module)
        del module._forward_pre_hooks_with_kwargs[number]  # as in the middle of its removal
        module(torch.ones(1, 2))
        module(input=torch.ones(1, 2))


def test_all_that_look_into_a_module_share_one_hook() -> None:
    module = nn.Linear(2, 2)
    with hooked(module):
        before = hooks_of(module)
        with captured_input(module) as outer, captured_input(module) as inner:
            assert hooks_of(module) == before
            module(input=torch.ones(1, 2))
        module(torch.zeros(1, 2))
        assert hooks_of(module) == before
        assert len(outer) == len(inner) == 1
        assert torch.equal(outer[0], torch.ones(1, 2))
        copied = copy.deepcopy(module)
    assert not hooks_of(module)
    with captured_input(module) as seen:  # the copy's calls are its own
        copied(torch.ones(1, 2))
    assert not seen


def test_a_session_keeps_its_hook_while_others_look(
    model: PreTrainedModel, memories: list[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    with attach(model, memories[0], **SETTINGS) as session:
        generate(model)
        refuse = pytest.fail
        monkeypatch.setattr(nn.Module, "register_forward_pre_hook", lambda *_, **__: refuse("came"))
        monkeypatch.setattr(RemovableHandle, "remove", lambda *_: refuse("went"))
        assert session.sources(0)
        monkeypatch.undo()
    assert not any(hooks_of(module) for module in model.modules())


def test_sessions_and_sources_come_and_go_while_others_run(
    model: PreTrainedModel, memories: list[Memory]
) -> None:
    """A thread that reads with the model never sees another's hooks, memory or noise."""
    wrong: list[BaseException] = []
    running = True
    layer = find_key_layer(model, "last_ffn_input")
    ids, wanted = PROMPT.numpy(), torch.ones_like(PROMPT, dtype=torch.bool).numpy()
    expected = encode_keys(model, layer, ids, wanted)

    def run() -> None:
        try:
            while running:
                assert torch.equal(encode_keys(model, layer, ids, wanted), expected)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        with attach(model, memories[0], **SETTINGS) as session:
            tokens = generate(model, max_new_tokens=2)
            assert [one.token for one in session.sources(0)] == tokens[0, -2:].tolist()
        sensitivity_of(model, layer, 258, probed(model, layer, 258, 16))
    running = False
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert not any(hooks_of(module) for module in model.modules())


# --- settings -------------------------------------------------------------------------------------


def test_settings_are_typed_or_named(model: PreTrainedModel, memories: list[Memory]) -> None:
    typed = Settings(lam=0.6, temperature=40.0, k=8)
    with attach(model, memories[0], **SETTINGS), torch.no_grad():
        expected = model(input_ids=PROMPT).logits
    with attach(model, memories[0], settings=typed) as session, torch.no_grad():
        assert torch.equal(model(input_ids=PROMPT).logits, expected)
        assert session.settings == typed
    with attach(model, memories[0], settings=typed, lam=0.1) as session:
        assert (session.settings.lam, session.settings.k) == (0.1, 8)
