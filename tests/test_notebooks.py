"""Notebooks run, cell by cell; figures and what notebooks show of results."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest

from conftest import make_documents, make_model, make_tokenizer
from nearest import Memory, attach, evaluate, plots, sweep, tune
from nearest.errors import NearestError
from nearest.models.sources import Source, TokenSources
from nearest.pages.published import PUBLISHED
from nearest.verbs.generate import generate

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))
MARK = re.compile(r"^# %%(.*)\n", re.MULTILINE)
PNG = b"\x89PNG"


def cells(path: Path) -> list[str]:
    """The code cells of a notebook in the py:percent form; text cells are comments only."""
    parts = MARK.split(path.read_text(encoding="utf-8"))
    assert not parts[0].strip()
    kinds, bodies = parts[1::2], parts[2::2]
    for kind, body in zip(kinds, bodies, strict=True):
        if "[markdown]" in kind:
            assert all(line.startswith("#") for line in body.splitlines() if line), path
    return [b for kind, b in zip(kinds, bodies, strict=True) if "[markdown]" not in kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_well_formed(path: Path) -> None:
    for number, code in enumerate(cells(path)):
        compile(code, f"{path.name}, cell {number}", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_every_cell_of_a_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEAREST_NOTEBOOKS", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(cells(path)):
        exec(compile(code, f"{path.name}, cell {number}", "exec"), names)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A memory of random words, and what methods make of others."""
    model, tokenizer = make_model(), make_tokenizer()
    folder = tmp_path_factory.mktemp("plots") / "m"
    memory = Memory.build(model, tokenizer, make_documents(8, 20), folder, tune=False)
    text = make_documents(5, 20, seed=1)
    options = {"tokenizer": tokenizer, "lam": 0.4, "temperature": 20.0, "k": 16}
    base, knn = evaluate(model, memory, text, ["base", "knn"], **options)
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, memory=memory, text=text, base=base, knn=knn
    )


def test_intervals_are_drawn_where_they_are(world: Any) -> None:
    (axes,) = plots.methods([world.base, world.knn]).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [world.base.nll, world.knn.nll]
    spans = [list(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2]
    assert spans == [[one.nll_low, one.nll_high] for one in (world.base, world.knn)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "knn"]
    for wrong, message in (([], "no result"), ([world.knn], "has no bleu")):
        with pytest.raises(NearestError, match=message):
            plots.methods(wrong, "bleu")


def test_documents_are_drawn_by_what_they_gain(world: Any) -> None:
    names = [document.id for document in world.text]
    (axes,) = plots.documents(world.base, world.knn, names).axes
    change = (world.knn.document_nll - world.base.document_nll) / world.base.document_tokens
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches[:5]], np.sort(change)[::-1])
    drawn = [label.get_text() for label in axes.get_yticklabels()]
    assert drawn == [names[i] for i in np.argsort(-change)]
    with pytest.raises(NearestError, match="a name for each document"):
        plots.documents(world.base, world.knn, ["one"])


def test_the_bars_of_tokens_are_what_documents_gave(world: Any) -> None:
    def source(name: str, weight: float) -> Source:
        return Source(0, 0, name, {}, 0, weight)

    named = [
        TokenSources(100, 0.5, [source("a", 0.5), source("b", 0.25), source("a", 0.25)]),
        TokenSources(101, 0.0, []),
        TokenSources(102, 1.0, [source(f"c{n}", 1 / 8) for n in range(8)]),
    ]
    shown = TokenSources(100, 0.5, [source("<a>", 1.0)])._repr_html_()
    assert "token 100: 50% from the memory" in shown
    assert "<td>100%</td><td>&lt;a&gt;</td><td>0</td>" in shown
    (axes,) = plots.sources(named, world.tokenizer).axes
    heights = np.array([bar.get_height() for bar in axes.patches]).reshape(-1, 3)
    np.testing.assert_allclose(heights.sum(axis=0), [0.5, 0.0, 1.0])
    assert heights[0].tolist() == [0.375, 0.0, 0.0]  # "a" gave most in all
    assert axes.get_legend_handles_labels()[1][-1] == "others"
    with pytest.raises(NearestError, match="no token"):
        plots.sources([], world.tokenizer)
    ids = world.tokenizer("court", return_tensors="pt")["input_ids"]
    with attach(world.model, world.memory, lam=0.5, temperature=20.0, k=8) as session:
        world.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
        real = session.sources(0)
    (axes,) = plots.sources(real, world.tokenizer).axes
    drawn = np.array([bar.get_height() for bar in axes.patches]).reshape(-1, len(real)).sum(axis=0)
    np.testing.assert_allclose(drawn, [token.memory_weight for token in real], atol=1e-6)


def test_tuning_and_sweep_are_drawn_and_show_themselves(world: Any) -> None:
    before = dict(matplotlib.rcParams)
    options = {"tokenizer": world.tokenizer}
    tuned = tune(world.model, world.memory, world.text, store=False, **options)
    drawing = plots.tuning(tuned)
    (axes,) = drawing.axes
    marked = next(line for line in axes.lines if line.get_marker() == "o")
    assert marked.get_xdata()[0] == tuned.settings.lam
    assert drawing._repr_png_().startswith(PNG)
    swept = sweep(world.model, world.memory, world.text, ["knn"], **options)
    assert len(plots.sweep(swept).axes) == 2
    assert len(plots.sweep(swept, [PUBLISHED["law-mt"]]).axes) == 3
    shown = swept._repr_html_()
    assert shown.count("<tr>") == 1 + len(swept.points)
    assert f"<td>knn</td><td>random_skip 1</td><td>{swept.points[-1].result.ppl:.2f}</td>" in shown
    assert dict(matplotlib.rcParams) == before


def test_results_show_themselves_in_notebooks(world: Any) -> None:
    shown = world.knn._repr_html_()
    assert f"{world.knn.ppl:.2f}" in shown
    assert f"[{world.knn.delta_low:+.4f}, {world.knn.delta_high:+.4f}]".replace("-", "−") in shown
    assert "first method" not in world.base._repr_html_()
    assert f"<td>{world.memory.documents}</td>" in world.memory._repr_html_()


def test_text_of_others_is_shown_as_text(world: Any) -> None:
    """Documents and prompts are not ours: what they hold of HTML is escaped."""
    answer = generate(
        world.model,
        world.tokenizer,
        world.memory,
        "<script>",
        settings={"lam": 0.5, "temperature": 20.0, "k": 8},
        max_new_tokens=6,
    )
    shown = answer._repr_html_()
    assert shown.startswith("<p><b>&lt;script&gt;</b><span style=")
    assert shown.count("<span") == len(answer.tokens) == 6
    for document in answer.documents[:5]:
        assert f"<td>{document.id}</td>" in shown
