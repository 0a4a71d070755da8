"""Drafts: the same text in fewer passes, for as long as they pay."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    SynthIDTextWatermarkingConfig,
)

from conftest import BYTES_AND_SPECIALS, pass_widths
from nearest import Memory, attach
from nearest.models import drafting
from nearest.models.arguments import TextArguments
from nearest.models.drafting import Experience, PassTimes, can_draft
from nearest.models.generated import Prompt
from nearest.retrieval.drafts import CLASSES, Acceptance, Draft, _vote, draft, pooled, worth

LIKELY = {"lam": 0.95, "temperature": 1000.0}  # so that the memory is followed


def passes_take_a_second(monkeypatch: pytest.MonkeyPatch, widths: list[int]) -> None:
    """As drafting's clock shows, however busy the machine is; each further token a twentieth."""
    clock = SimpleNamespace(perf_counter=lambda: sum(0.95 + 0.05 * width for width in widths))
    monkeypatch.setattr(drafting, "time", clock)


def prompt(memory: Memory, length: int = 6) -> Tensor:
    return torch.from_numpy(memory.document_tokens(0)[:length].astype(np.int64))[None]


def written(
    model: PreTrainedModel,
    memory: Memory,
    method: str,
    *,
    drafts: bool,
    clock: Callable[[list[int]], None] = lambda _: None,
    **options: Any,
) -> tuple[Tensor, list[int]]:
    """A text, and the widths of its passes, which `clock` is given before the first."""
    settings = {"suffix_k": 20} if method == "suffix" else {"k": 12}
    ids = prompt(memory)
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 1, "eos_token_id": -1}
    with (
        attach(model, memory, method, draft=drafts, guard=False, **LIKELY, **settings),
        pass_widths(model) as widths,
    ):
        clock(widths)
        return model.generate(ids, **options), widths


@pytest.mark.slow
@pytest.mark.parametrize("method", ["suffix", "knn", "retomaton"])
def test_greedy_search_gives_the_same_text_in_fewer_passes(
    tiny_model: PreTrainedModel,
    tiny_memory: Memory,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = partial(passes_take_a_second, monkeypatch)
    options: dict[str, Any] = {"max_new_tokens": 30, "clock": clock}
    plain, alone = written(tiny_model, tiny_memory, method, drafts=False, **options)
    drafted, widths = written(tiny_model, tiny_memory, method, drafts=True, **options)
    assert drafted.tolist() == plain.tolist()
    assert len(alone) == 30
    if method == "suffix":
        assert len(widths) < 20
        assert max(widths[1:]) > 1


def test_what_it_has_learnt_is_kept_by_thread_and_the_model_is_given_back(
    tiny_model: PreTrainedModel, tiny_memory: Memory
) -> None:
    before = dict(vars(tiny_model))
    ids = prompt(tiny_memory)
    with attach(tiny_model, tiny_memory, "suffix", draft=True, **LIKELY) as session:
        tiny_model.generate(ids, max_new_tokens=8, pad_token_id=1, eos_token_id=-1)
        assert len(session.sources()) == 8
        with session.disabled(), pass_widths(tiny_model) as widths:
            tiny_model.generate(ids, max_new_tokens=8, pad_token_id=1, eos_token_id=-1)
        assert len(widths) == 8
    assert dict(vars(tiny_model)) == before


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}],
    ids=["beams", "several", "no cache"],
)
def test_other_ways_of_writing_are_not_drafted_for(
    tiny_model: PreTrainedModel, tiny_memory: Memory, options: dict[str, Any]
) -> None:
    results = []
    for drafts in (False, True):
        torch.manual_seed(0)
        results.append(
            written(tiny_model, tiny_memory, "suffix", drafts=drafts, max_new_tokens=8, **options)[
                0
            ]
        )
    assert results[0].tolist() == results[1].tolist()


@pytest.mark.parametrize("kind", ["static", "dynamic", "filled"])
def test_a_cache_that_cannot_give_drafts_back_is_written_to_without(
    tiny_model: PreTrainedModel, tiny_memory: Memory, kind: str
) -> None:
    """Nor is one that holds a part of the prompt, which assisted decoding would read again."""
    config = tiny_model.config
    results = []
    for drafts in (False, True):
        cache = StaticCache(config, max_cache_len=20) if kind == "static" else DynamicCache()
        if kind == "filled":
            with torch.no_grad():
                tiny_model(prompt(tiny_memory)[:, :4], past_key_values=cache)
        ids, _ = written(
            tiny_model, tiny_memory, "suffix", drafts=drafts, max_new_tokens=8,
            past_key_values=cache,
        )  # fmt: skip
        results.append((ids.tolist(), cache.get_seq_length()))
    assert results[0] == results[1]


def test_a_watermark_that_remembers_is_not_drafted_for(
    tiny_model: PreTrainedModel, tiny_memory: Memory
) -> None:
    watermark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=5)
    named = {"input_ids": prompt(tiny_memory)}
    read = Prompt.of(TextArguments.of(tiny_model), named)
    assert can_draft(tiny_model, read, named)
    assert not can_draft(tiny_model, read, {**named, "watermarking_config": watermark})


def test_a_batch_is_written_without_drafts(
    tiny_model: PreTrainedModel, tiny_memory: Memory
) -> None:
    ids = prompt(tiny_memory).repeat(2, 1)
    with (
        attach(tiny_model, tiny_memory, "suffix", draft=True, **LIKELY),
        pass_widths(tiny_model) as seen,
    ):
        tiny_model.generate(ids, max_new_tokens=8, pad_token_id=1, eos_token_id=-1)
    assert len(seen) == 8


@pytest.mark.parametrize(
    "draws",
    [pytest.param(400, marks=pytest.mark.slow), pytest.param(20_000, marks=pytest.mark.long)],
)
def test_sampling_keeps_the_distribution(
    draws: int, tiny_model: PreTrainedModel, tiny_memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequencies of the eight texts of three tokens, beside their exact probabilities (χ²)."""
    monkeypatch.setattr("nearest.models.drafting.worth", lambda rates, *_: len(rates))
    ids = prompt(tiny_memory)
    options = {"do_sample": True, "top_k": 2, "pad_token_id": 1, "eos_token_id": -1}
    settings = {"lam": 0.5, "temperature": 1000.0}
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    with attach(tiny_model, tiny_memory, "suffix", **settings):
        for _ in range(3):
            longer = {}
            for new, probability in expected.items():
                text = torch.cat([ids, torch.tensor([new], dtype=torch.int64)], dim=1)
                top = tiny_model(text).logits[0, -1].detach().topk(2)
                for token, share in zip(top.indices, top.values.softmax(-1), strict=True):
                    longer[*new, int(token)] = probability * float(share)
            expected = longer
    counts = dict.fromkeys(expected, 0)
    torch.manual_seed(0)
    with (
        attach(tiny_model, tiny_memory, "suffix", draft=True, **settings),
        pass_widths(tiny_model) as widths,
    ):
        for _ in range(draws):
            text = tiny_model.generate(ids, max_new_tokens=3, **options)
            counts[tuple(text[0, ids.shape[1] :].tolist())] += 1
    assert sum(width > 1 for width in widths) > draws  # the prompt's, and drafts
    chi = sum((counts[new] - draws * p) ** 2 / (draws * p) for new, p in expected.items())
    assert chi < 24.3  # seven degrees of freedom: one in a thousand


ROWS = st.lists(st.lists(st.integers(-1, 4), min_size=5, max_size=5), min_size=1, max_size=8)


@given(rows=ROWS, data=st.data())
def test_votes_are_those_of_a_dictionary(rows: list[list[int]], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    tokens, shares, matched = _vote(np.array(rows), np.array(lengths), 0, 3.0)
    left = dict(enumerate(lengths))
    for place, (token, share, longest) in enumerate(zip(tokens, shares, matched, strict=True)):
        votes: dict[int, float] = {}
        for row, length in left.items():
            votes[rows[row][place]] = votes.get(rows[row][place], 0.0) + (1 + length) ** 3
        assert token > 0
        assert votes[token] == max(weight for other, weight in votes.items() if other > 0)
        assert share == pytest.approx(votes[token] / sum(votes.values()))
        left = {row: length for row, length in left.items() if rows[row][place] == token}
        assert longest == max(left.values()) + place
    if len(tokens) < 5:
        ended = {row: rows[row][len(tokens)] for row in left}
        weight = sum((1 + left[row]) ** 3 for row in left)
        for other in set(ended.values()) - {0, -1}:
            own = sum((1 + left[row]) ** 3 for row in left if ended[row] == other)
            assert own < weight / 3 * (1 + 1e-9)


def test_drafts_go_on_as_documents_do(tiny_memory: Memory) -> None:
    tokens = tiny_memory.document_tokens(0).astype(np.int64)
    for length in range(24, len(tokens) - 4):
        found = draft([tiny_memory], tokens[:length], 4).tokens.tolist()
        assert found == tokens[length : length + 4].tolist()


def test_a_repeated_text_drafts_for_itself(tiny_memory: Memory) -> None:
    text = np.array([0, *[200, 201, 202, 203] * 4])
    assert draft([tiny_memory], text, 6).tokens.tolist() == [200, 201, 202, 203]


def test_no_draft_where_nothing_matches(tiny_memory: Memory) -> None:
    unseen = BYTES_AND_SPECIALS - 1
    assert not len(draft([tiny_memory], np.array([0, unseen]), 4).tokens)


@given(rates=st.lists(st.floats(0, 1), max_size=8), step=st.floats(0, 2), a_token=st.floats(0, 2))
def test_the_worth_is_the_best_of_all_lengths(
    rates: list[float], step: float, a_token: float
) -> None:
    seconds = [1 + (n > 0) * step + a_token * n for n in range(len(rates) + 1)]
    speeds = [
        (1 + sum(np.prod(rates[: i + 1]) for i in range(n))) / seconds[n]
        for n in range(len(rates) + 1)
    ]
    found = worth(np.array(rates), np.array(seconds))
    if found:
        assert speeds[found] == pytest.approx(max(speeds))
    else:
        assert max(speeds) <= 1.03 * (1 + 1e-9)


RATES = st.lists(st.lists(st.floats(0, 1), max_size=5), min_size=1, max_size=5)


@given(rates=RATES)
def test_pooled_rates_expect_as_many_tokens_as_the_rows_do(rates: list[list[float]]) -> None:
    found = pooled([np.array(one) for one in rates])
    assert len(found) == max(map(len, rates))
    for length in range(len(found) + 1):
        each = [np.cumprod(one[:length]).sum() for one in rates]
        assert np.cumprod(found[:length]).sum() == pytest.approx(np.mean(each))


def test_rates_follow_what_was_accepted() -> None:
    acceptance = Acceptance.start()
    good, bad = np.array([0, 0]), np.array([CLASSES - 1])
    assert acceptance.rates(good).max() < 0.2  # short matches that disagree
    assert acceptance.rates(bad) > 0.8  # long ones that agree
    for _ in range(60):
        acceptance = acceptance.after(good, 2).after(bad, 0)
    assert acceptance.rates(good[:1]) > 0.9
    assert acceptance.rates(bad) < 0.15
    for _ in range(60):
        acceptance = acceptance.after(good, 0)
    assert acceptance.rates(good[:1]) < 0.4


def test_times_are_those_that_were_measured() -> None:
    times = PassTimes()
    assert not times.known
    for n in (0, 4, 0, 2, 8, 1, 0, 3):
        times.saw(n, 5.0 if n == 0 else 7.0 + 0.25 * n)
    assert times.known
    assert times.seconds(3) == pytest.approx([5.0, 7.25, 7.5, 7.75], rel=2e-3)


def test_a_pass_is_filled_up_to_what_costs_least() -> None:
    times = PassTimes(4)
    for _ in range(5):
        times.saw(0, 5.0)
        times.saw(2, 7.0)  # of four
        times.saw(8, 8.0)
    assert times.seconds(6) == pytest.approx([5.0, 7.0, 7.0, 7.0, 7.0, 7.25, 7.5], rel=5e-3)


def test_one_slow_pass_says_little() -> None:
    times = PassTimes()
    for _ in range(8):
        times.saw(0, 1.0)
    times.saw(0, 1000.0)
    assert times.seconds(0)[0] < 2


def lost(step: float, passes: int, accepted: int, looking: float = 0.0) -> tuple[float, Experience]:
    """What drafts cost in a text that takes so many passes alone, in passes."""
    experience = Experience()
    spent = written = 0.0
    while written < passes:
        spent, written = (
            total + more
            for total, more in zip(
                (spent, written), one_pass(experience, step, accepted, looking), strict=True
            )
        )
    return spent - written, experience


def one_pass(
    experience: Experience, step: float, accepted: int, looking: float = 0.0
) -> tuple[float, int]:
    """Of a pass with a draft as long as is said to pay, its seconds and its tokens."""
    found = Draft(np.arange(8), np.full(8, CLASSES - 1))
    sought = not experience.resting
    length = experience.length(experience.acceptance.rates(found.classes)) if sought else 0
    seconds = 1.0 + (step + 0.1 * length if length else 0.0)
    right = min(accepted, length)
    experience.saw([found.first(length)], [right], seconds, looking * sought)
    return seconds + looking * sought, right + 1


@pytest.mark.parametrize("looking", [0.0, 0.05])
@pytest.mark.parametrize("step", [0.0, 0.5, 1.5])
def test_drafts_that_never_fit_cost_little(step: float, looking: float) -> None:
    for passes in (50, 500, 5000):
        # The account, its last draft, and what it is allowed; a draft may cost more than is known.
        assert lost(step, passes, 0, looking)[0] < 1 + (step + 0.8) + 0.011 * passes


def test_what_is_nearly_sure_is_drafted_where_the_account_is_overdrawn() -> None:
    experience = Experience()
    for _ in range(3):
        experience.saw([Draft(*np.empty((2, 0), np.int64))], [0], 1.0)
    experience.account = -1.0
    assert experience.length(np.full(8, 0.99)) == 8
    assert experience.length(np.full(8, 0.8)) == 0
    looked = 0
    for _ in range(100):
        looked += not experience.resting
        looking = 0.0 if experience.resting else 0.05
        experience.saw([Draft(*np.empty((2, 0), np.int64))], [0], 1.0, looking)
    assert 5 <= looked <= 15  # one in ten: half of the hundredth that each pass allows


def test_drafts_that_fit_are_made_at_once_and_come_back() -> None:
    assert lost(0.5, 200, 8)[0] < -100
    experience = lost(0.5, 2000, 0)[1]
    before = sum(one_pass(experience, 0.5, 8)[1] for _ in range(500))
    assert before > 1000
    assert sum(one_pass(experience, 0.5, 8)[1] for _ in range(50)) > 300
