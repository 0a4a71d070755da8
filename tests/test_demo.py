"""The demo: its split, its page, the folders it may touch, and the whole of it."""

import dataclasses
import io
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents, make_tokenizer
from nearest import Document, Memory, NearestError, evaluate, read_documents
from nearest.demo import run
from nearest.demo.corpus import Split, repeated_share, split_topics, write_jsonl
from nearest.demo.passage import Passage, score_passage, typical_document
from nearest.demo.report import Story, Writing, render
from nearest.errors import FolderError
from nearest.retrieval.gates.fitting import KS, TEMPERATURES
from nearest.retrieval.settings import Settings
from nearest.verbs.generate import DocumentShare, GeneratedToken, Generation
from nearest.verbs.results import Checks, Result
from nearest.verbs.settings_search import LAMS, Tuned

HOSTILE = (
    '</div><script src="https://evil.example/x.js">alert("1")</script><img src=x> & $title $x$'
)


def names(split: Split) -> list[set[str]]:
    return [{item.id for item in part} for part in (split.memory, split.tuning, split.test)]


def test_split_does_not_depend_on_order() -> None:
    assert split_topics(topics) == split_topics(dict(reversed(topics.items())))


def test_split_is_disjoint_and_covers_every_topic() -> None:
    split = split_topics(topics)
    parts = [*names(split), set(split.repeated)]
    assert sum(map(len, parts)) == len(topics)
    assert set().union(*parts) == set(topics)


def test_split_is_balanced() -> None:
    split = split_topics(topics)
    sizes = [sum(len(item.text) for item in part) for part in split[:3]]
    shares = [size / sum(sizes) for size in sizes]
    assert shares == pytest.approx([0.75, 0.10, 0.15], abs=0.05)
    assert min(len(split.tuning), len(split.test)) >= 8


def test_what_is_scored_stands_nowhere_else() -> None:
    split = split_topics(topics)
    memory, tuning, test = ([item.text for item in part] for part in split[:3])
    assert repeated_share(test, memory + tuning) < 0.01
    assert repeated_share(tuning, memory) < 0.01


def test_a_topic_that_repeats_a_longer_one_is_left_out() -> None:
    words = [f"word{i}" for i in range(400)]
    some = {
        "whole": " ".join(words),
        "part": " ".join(words[100:200]),
        "same": " ".join(words),
        "other": "nothing of the above stands here at all, honestly",
        "tiny": "short",
    }
    split = split_topics(some)
    assert split.repeated == ["part", "whole"]  # "same" is as long as "whole" and comes first
    assert set().union(*names(split)) == {"same", "other", "tiny"}


def test_chapters_go_to_the_memory() -> None:
    chapters = {f"chapter {i}": f"{i} " * 9_000 for i in range(10)}
    assert names(split_topics(chapters))[0] == set(chapters)


def test_documents_written_are_read_back(tmp_path: Path) -> None:
    split = split_topics(topics)
    write_jsonl(tmp_path / "test.jsonl", split.test)
    read = list(read_documents([tmp_path / "test.jsonl"]))
    assert [(d.id, d.text, d.metadata) for d in read] == [
        (d.id, d.text, d.metadata) for d in split.test
    ]


def test_passage_gains_sum_to_what_evaluate_says(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_memory: Memory
) -> None:
    document = next(d for d in make_documents(20, 30, seed=5) if 70 < len(d.text) < 200)
    base, knn = evaluate(
        tiny_model, tiny_memory, [document], ["base", "knn"], tokenizer=tiny_tokenizer
    )
    passage = score_passage(tiny_model, tiny_tokenizer, tiny_memory, document)
    assert "".join(text for text, _ in passage.tokens) == document.text
    gain = sum(gain for _, gain in passage.tokens)
    assert gain == pytest.approx(float((base.document_nll - knn.document_nll)[0]), rel=1e-5)


def test_a_character_of_several_tokens_is_shown_whole(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_memory: Memory
) -> None:
    passage = score_passage(tiny_model, tiny_tokenizer, tiny_memory, Document("d", "a“中”"))
    assert [text for text, _ in passage.tokens] == ["a", "“", "中", "”"]


def test_the_passage_shown_is_of_the_median_topic() -> None:
    base = result("base", [10.0, 20.0, 30.0], [10, 10, 10])
    knn = result("knn", [1.0, 19.0, 25.0], [10, 10, 10])
    assert typical_document(base, knn) == 2  # changes −0.9, −0.1, −0.5


def result(method: str, nll: list[float], tokens: list[int]) -> Result:
    mean = sum(nll) / sum(tokens)
    plain = dict.fromkeys((field.name for field in dataclasses.fields(Result)), None)
    plain["checks"] = Checks()
    numbers = {"nll": mean, "ppl": math.exp(mean), "tok_s": 1.0, "seconds": 1.0, "added_ms": 0.0}
    arrays = {"document_nll": np.array(nll), "document_tokens": np.array(tokens)}
    return Result(**{**plain, "method": method, "tokens": sum(tokens), **numbers, **arrays})


@pytest.fixture
def hostile_story() -> Story:
    """A story in which every text that comes from outside tries to break the page."""
    base = result("base", [40.0, 44.0], [10, 10])
    knn = dataclasses.replace(
        result("knn", [30.0, 45.0], [10, 10]), delta_nll=-0.45, delta_low=-1.0, delta_high=0.1
    )
    share = DocumentShare(HOSTILE, {"title": HOSTILE}, 0.6, HOSTILE, HOSTILE, HOSTILE)
    generation = Generation(HOSTILE, HOSTILE, [GeneratedToken(HOSTILE, 0.4, [])], [share])
    nlls = np.full((len(TEMPERATURES), len(KS)), 3.0)
    curves = np.full((len(TEMPERATURES), len(LAMS)), 3.0)
    return Story(
        python=HOSTILE,
        model=HOSTILE,
        parameters=7_000_000,
        split=Split(
            [Document("a", "text")],
            [Document("b", "text")],
            [Document(HOSTILE, HOSTILE), Document("d$e$f", "text")],
            ["e"],
        ),
        entries=100,
        tuned=Tuned(
            "knn",
            Settings(LAMS[10], TEMPERATURES[0], k=KS[0]),
            3.0,
            4.0,
            50,
            nlls,
            np.full_like(nlls, LAMS[10]),
            curves,
            "k",
            KS,
        ),
        base=base,
        knn=knn,
        passage=Passage(HOSTILE, [(HOSTILE, 1.0), (HOSTILE, -0.2), ("x", 0.0)]),
        writings=[Writing(generation, generation)],
        writing_temperature=1.0,
        seconds=1.0,
    )


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(html: str) -> None:
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "a"}
    for name, value in page.attributes:
        assert name not in {"src", "srcset", "href", "action", "data"}
        assert not name.startswith("on")
        assert name != "xlink:href" or value.startswith("#")
        assert "://" not in value
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#")


def test_page_escapes_what_comes_from_outside(hostile_story: Story) -> None:
    html = render(hostile_story)
    assert_self_contained(html)
    text = Page(html).text
    assert text.count(HOSTILE) == 16
    assert HOSTILE[:29] + "…" in text  # an axis has room for no more
    assert "d$e$f" in text


def test_page_says_the_measured_numbers(hostile_story: Story) -> None:
    text = " ".join(Page(render(hostile_story)).text.split())
    assert f"{math.exp(4.2):.1f} → {math.exp(3.75):.1f}" in text
    assert "−36 % (95 % interval −63 % to +11 %, paired by topic)" in text
    assert "1 of 2 are predicted better" in text
    assert "−1.0000 … 0.1000" in text


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearest.errors.find_spec", lambda name: None)
    with pytest.raises(NearestError, match=r"matplotlib .* pip install '\.\[plots\]'"):
        run.run_demo(tmp_path / "demo", Console(), Console())
    assert not (tmp_path / "demo").exists()


def test_what_the_demo_did_not_make_is_left_alone(tmp_path: Path, tiny_memory: Memory) -> None:
    def refused(match: str) -> None:
        with pytest.raises(FolderError, match=match):
            run.run_demo(tmp_path / "demo", Console(quiet=True), Console(quiet=True))

    (tmp_path / "demo").write_text("mine")
    refused("a file is in the way")
    (tmp_path / "demo").unlink()

    path = tmp_path / "demo" / "python.memory"
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("mine")
    refused("is not empty")
    assert (path / "notes.txt").read_text() == "mine"
    shutil.rmtree(path)

    shutil.copytree(tiny_memory.path, path)
    refused("was not made by the demo")
    assert Memory.open(path).entries == tiny_memory.entries


def told_by_demo(folder: Path) -> tuple[str, str]:
    """What the demo prints, and its page."""
    out = Console(record=True, width=120, file=io.StringIO())
    run.run_demo(folder, out, Console(quiet=True))
    html = (folder / "report.html").read_text("utf-8")
    assert_self_contained(html)
    for private in (folder.resolve(), run.MODEL, Path.home(), sys.prefix):
        assert str(private) not in html
    return out.export_text(), Page(html).text


@pytest.mark.slow
def test_demo_of_short_topics_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "topics", {k: v for k, v in topics.items() if len(v) < 1_000})
    monkeypatch.setattr(run, "NEW_TOKENS", 4)
    first, page = told_by_demo(tmp_path / "demo")
    again, _ = told_by_demo(tmp_path / "demo")
    assert [line for line in again.split("\n") if "$ nearest" in line] == [
        line for line in first.split("\n") if "$ nearest" in line
    ]
    memory = Memory.open(tmp_path / "demo" / "python.memory")
    split = split_topics(run.topics)
    assert [memory.document(i).id for i in range(memory.documents)] == [d.id for d in split.memory]
    lam = memory.settings("knn")["lam"]
    assert f"λ {lam:g}" in first
    assert f"λ {lam:g}" in page
    for prompt in run.PROMPTS:
        assert page.count(prompt) >= 2
    assert not list((tmp_path / "demo").rglob("*.partial"))


@pytest.mark.slow
def test_another_model_stands_beside_the_one_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: str
) -> None:
    monkeypatch.setattr(run, "topics", {k: v for k, v in topics.items() if len(v) < 500})
    monkeypatch.setattr(run, "NEW_TOKENS", 4)
    out = Console(record=True, width=120, file=io.StringIO())
    run.run_demo(tmp_path / "demo", out, Console(quiet=True), Path(model_folder))
    told = out.export_text()
    html = (tmp_path / "demo" / "report.html").read_text("utf-8")
    assert_self_contained(html)
    page = " ".join(Page(html).text.split())
    both = re.findall(r"token perplexity +([\d.]+) +([\d.]+)", told)
    assert len(both) == 2
    for base, knn in both:
        assert f"{base}{knn}" in page.replace(" ", "")
    assert "which was made for this page" in page
    assert "7.0 million parameters" in page
    assert Memory.open(tmp_path / "demo" / "python-small.memory").manifest.keys.dim == 256


@pytest.mark.long
def test_the_whole_demo(tmp_path: Path) -> None:
    """As a user runs it: about a minute of one core."""
    told, page = told_by_demo(tmp_path / "demo")
    *_, low, high = re.findall(r"paired 95 % interval \[(-?[\d.]+), (-?[\d.]+)\]", told)[0]
    assert float(low) < float(high) < 0
    base, knn = re.findall(r"token perplexity +([\d.]+) +([\d.]+)", told)[0]
    assert float(knn) < 0.75 * float(base)
    assert f"Perplexity {float(base):.1f} → {float(knn):.1f}" in page


def test_a_memory_that_the_demo_made_with_another_model_is_its_own(
    tmp_path: Path, tiny_model: PreTrainedModel
) -> None:
    corpus, path = tmp_path / "memory.jsonl", tmp_path / "python.memory"
    write_jsonl(corpus, [Document("a", "one text"), Document("b", "another")])
    Memory.build(None, make_tokenizer(), read_documents(corpus), path, keys="none")
    run._remove_earlier(path, tiny_model, corpus)
    assert not path.exists()
    Memory.build(None, make_tokenizer(), ["my own"], path, keys="none")
    with pytest.raises(FolderError, match="was not made by the demo"):
        run._remove_earlier(path, tiny_model, corpus)
