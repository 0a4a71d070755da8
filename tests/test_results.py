"""What results are printed as, and handed on as."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from conftest import make_documents
from nearest import Memory, Settings, evaluate, sweep
from nearest.verbs.generate import decode_pieces
from nearest.verbs.records import RecordTable

TEXT = make_documents(3, 12, seed=5)


@pytest.fixture(scope="module")
def memory(build_memory: Callable[..., Memory], tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, make_documents(6, 20, seed=6))


def test_a_result_shows_its_perplexity_and_interval(
    tiny_model: PreTrainedModel, memory: Memory, tiny_tokenizer: Any
) -> None:
    result = evaluate(tiny_model, memory, TEXT, tokenizer=tiny_tokenizer, lam=0.3)
    assert result.nll_low is not None
    assert result.nll_high is not None
    for figure in (result.ppl, np.exp(result.nll_low), np.exp(result.nll_high)):
        assert f"{figure:.2f}" in repr(result)
    assert result.to_dict()["ppl"] == result.ppl
    alone = evaluate(tiny_model, memory, TEXT[:1], tokenizer=tiny_tokenizer, lam=0.3)
    assert f"{alone.ppl:.2f}" in repr(alone)


def test_a_result_is_a_table_of_documents(
    tiny_model: PreTrainedModel, memory: Memory, tiny_tokenizer: Any
) -> None:
    pytest.importorskip("pandas")
    result = evaluate(tiny_model, memory, TEXT, tokenizer=tiny_tokenizer, lam=0.3)
    frame = result.to_pandas()
    assert len(frame) == len(TEXT)
    assert frame["tokens"].sum() == result.tokens
    assert frame["nll"].sum() == pytest.approx(result.nll * result.tokens)


def test_typed_settings_take_the_place_of_stored_ones(
    tiny_model: PreTrainedModel, memory: Memory, tiny_tokenizer: Any
) -> None:
    settings = Settings(lam=0.7, temperature=9.0, k=5)
    given = {"tokenizer": tiny_tokenizer}
    typed = evaluate(tiny_model, memory, TEXT, settings=settings, **given)
    named = evaluate(tiny_model, memory, TEXT, lam=0.7, temperature=9.0, k=5, **given)
    assert typed.nll == named.nll
    other = evaluate(tiny_model, memory, TEXT, settings=settings, lam=0.1, **given)
    assert (other.lam, other.temperature, other.k) == (0.1, 9.0, 5)


def test_records_and_points_become_frames(
    tiny_model: PreTrainedModel, memory: Memory, tiny_tokenizer: Any
) -> None:
    pytest.importorskip("pandas")
    table = RecordTable()
    given = {"tokenizer": tiny_tokenizer}
    results = evaluate(tiny_model, memory, TEXT, ["base", "knn"], records=table, lam=0.3, **given)
    frame = table.to_pandas()
    assert len(frame) == 2 * results[0].tokens
    for result in results:
        nll = frame[frame.method == result.method].nll.mean()
        assert nll == pytest.approx(result.nll, rel=1e-6)
    swept = sweep(
        tiny_model, memory, TEXT, ["knn", "retomaton"], min_knns=[1, 3], skip=[0], **given
    )
    points = swept.to_pandas()
    assert points.ppl.tolist() == [point.result.ppl for point in swept.points]
    assert points.setting.tolist()[-2:] == ["min_knns", "min_knns"]


@pytest.mark.parametrize("before", [0, 4])
def test_pieces_of_text_come_with_the_token_that_ends_a_character(
    tiny_tokenizer: Any, before: int
) -> None:
    ids = tiny_tokenizer("naïve 😀, 日本")["input_ids"]
    for end in (len(ids), len(ids) - 1):  # the last character whole, and not
        given, new = ids[:before], ids[before:end]
        pieces = decode_pieces(tiny_tokenizer, given, new)
        assert len(pieces) == len(new)
        done = tiny_tokenizer.decode(given)
        assert done + "".join(pieces) == tiny_tokenizer.decode(ids[:end])
        assert "\ufffd" not in "".join(pieces[:-1])
    assert decode_pieces(tiny_tokenizer, ids, []) == []
