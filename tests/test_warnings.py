"""Where warnings point: at the line that asked the package for something."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nearest import Memory, attach, evaluate
from nearest.corpus.documents import Document
from nearest.corpus.report import CorpusWarning
from nearest.errors import SettingsWarning, warn_caller


@pytest.fixture(autouse=True)
def no_wrappers(request: pytest.FixtureRequest) -> None:
    """Checks of annotations at each call stand between the package and its caller."""
    if request.config.getoption("--jaxtyping-packages", None):
        pytest.skip("functions are wrapped")


TEXTS = ["the court", "", "the law of the court"]


def only_warning(category: type[Warning], work: Callable[[], Any]) -> warnings.WarningMessage:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", category)
        work()
    (one,) = [one for one in caught if one.category is category]
    return one


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.strip() == text]
    return number


def test_what_was_left_out_of_a_corpus_is_told_where_it_was_given(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def build() -> None:
        Memory.build(tiny_model, tiny_tokenizer, TEXTS, tmp_path / "memory")

    one = only_warning(CorpusWarning, build)
    wanted = line_of('Memory.build(tiny_model, tiny_tokenizer, TEXTS, tmp_path / "memory")')
    assert (one.filename, one.lineno) == (__file__, wanted)


def test_settings_are_warned_of_where_they_are_used(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    build_memory: Callable[..., Memory],
) -> None:
    memory = build_memory(tiny_model)

    def attached() -> None:
        attach(tiny_model, memory).detach()

    def evaluated() -> None:
        evaluate(tiny_model, memory, TEXTS[2:], tokenizer=tiny_tokenizer)

    calls = {
        attached: "attach(tiny_model, memory).detach()",
        evaluated: "evaluate(tiny_model, memory, TEXTS[2:], tokenizer=tiny_tokenizer)",
    }
    for work, line in calls.items():
        one = only_warning(SettingsWarning, work)
        assert (one.filename, one.lineno) == (__file__, line_of(line))


def test_what_others_call_back_lies_between(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A generator of the caller's own, in which the package is used, is not the caller."""

    def documents() -> Iterator[Document]:
        yield Document("one", TEXTS[0])
        warn_caller("from within", UserWarning)

    def outer() -> None:
        Memory.build(tiny_model, tiny_tokenizer, documents(), tmp_path / "memory")

    one = only_warning(UserWarning, outer)
    wanted = line_of('Memory.build(tiny_model, tiny_tokenizer, documents(), tmp_path / "memory")')
    assert (one.filename, one.lineno) == (__file__, wanted)


def test_a_warning_without_the_package_around_it_is_of_who_warns() -> None:
    with pytest.warns(UserWarning, match="here") as caught:
        warn_caller("here")
    assert caught[0].filename == __file__
