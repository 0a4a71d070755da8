"""The recipes of published tables: every command runs, on small models and texts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*/*.sh"))


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the examples as a module, with its own folder before all others."""
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=[f"{s.parent.name}-{s.stem}" for s in SCRIPTS])
def test_a_script_is_well_formed(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o100, "it can be executed"


def test_articles_begin_at_their_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    articles = loaded(EXAMPLES / "wikitext103/articles.py", monkeypatch).articles
    lines = ["", " \n", " = A b = \n", " text = x = \n", " = = C = = \n", " t \n", " = D = \n", ""]
    assert list(articles(lines)) == [
        {
            "id": "article-0",
            "title": "A b",
            "text": " = A b = \n text = x = \n = = C = = \n t \n",
        },
        {"id": "article-1", "title": "D", "text": " = D = \n"},
    ]
    assert list(articles(["", " \n"])) == []


def test_law_is_made_of_the_councils_xml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law = loaded(EXAMPLES / "law_corpus.py", monkeypatch)
    monkeypatch.setattr(law, "SHORTEST", 40)
    code = tmp_path / "us/dc/council/code/titles/1/sections"
    code.mkdir(parents=True)
    head = '<section xmlns="https://code.dccouncil.us/schemas/dc-library"><num>{}</num>'
    body = """<heading>Of  bees.</heading><text>A hive <cite>(§ 2)</cite> is kept so:</text>
    <para><num>(1)</num><heading>Where. -</heading><text>Outside.</text><para><num>(A)</num>
    <text>Alone.</text></para><text>Or not.</text></para><table><td>1</td> <td>2</td></table>
    <annotations><text>An amendment.</text></annotations></section>"""
    for number in ("1-1163.10", "1-1001.02", "1-1001.01"):  # valid, train, the reserve
        (code / f"{number}.xml").write_text(head.format(number) + body)
    (code / "short.xml").write_text(head.format("1-2") + "<text>Repealed.</text></section>")
    (code / "index.xml").write_text("<container><num>1</num></container>")
    out = tmp_path / "corpus"
    monkeypatch.setattr(sys, "argv", ["law", str(tmp_path), "--out", str(out), "--tokens", "1"])
    law.main()
    lines = "\n(1) Where. - Outside.\n(A) Alone.\nOr not.\n1 2"
    text = "§ 1-1163.10. Of bees.\nA hive (§ 2) is kept so:" + lines
    (row,) = map(json.loads, (out / "valid.jsonl").read_text("utf-8").splitlines())
    assert row == {"id": "dc-1-1163.10", "title": "Of bees.", "text": text}
    (row,) = map(json.loads, (out / "train.jsonl").read_text("utf-8").splitlines())
    assert row["id"] == "dc-1-1001.02"
    assert (out / "test.jsonl").read_text() == ""
    assert (out / "train-2m.jsonl").read_bytes() == (out / "train.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("script", "said"),
    [("wikitext103/articles.py", "name the files"), ("law_mt/sentences.py", "name one file")],
)
def test_a_script_without_files_says_what_it_needs(script: str, said: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / script], capture_output=True, text=True)
    assert (done.returncode, said in done.stderr) == (1, True)


def test_sentences_keep_the_numbers_of_their_lines(tmp_path: Path) -> None:
    (tmp_path / "dev.en").write_text("One .\n\n  Two é .\n", encoding="utf-8")
    script = [sys.executable, EXAMPLES / "law_mt/sentences.py", tmp_path / "dev.en"]
    done = subprocess.run(script, capture_output=True, check=True, encoding="utf-8")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows == [{"id": "dev-1", "text": "One ."}, {"id": "dev-3", "text": "Two é ."}]


def test_figures_are_read_out_right(monkeypatch: pytest.MonkeyPatch) -> None:
    task = loaded(EXAMPLES / "translation/task.py", monkeypatch)
    said = {7: "seven", 40: "forty", 99: "ninety nine", 300: "three hundred"}
    said |= {1012: "one thousand twelve", 20_305: "twenty thousand three hundred five"}
    assert {number: task.cardinal(number) for number in said} == said
    assert task.cardinal(1012, "and") == "one thousand and twelve"
    assert task.cardinal(20_305, "and") == "twenty thousand three hundred and five"
    assert len({task.cardinal(number) for number in range(10_000)}) == 10_000
    ordinals = {1: "first", 2: "second", 8: "eighth", 12: "twelfth", 20: "twentieth"}
    ordinals |= {31: "thirty first", 44: "forty fourth"}
    assert {number: task.ordinal(number) for number in ordinals} == ordinals


def test_pairs_are_different_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = loaded(EXAMPLES / "translation/task.py", monkeypatch)
    for domain in (task.general, task.statutes):
        rows = task.pairs(domain, 200, 3)
        assert len({row["source"] for row in rows}) == len({row["id"] for row in rows}) == 200
        assert rows == task.pairs(domain, 200, 3)
        for row in rows:
            assert not any(character.isdigit() for character in row["text"])
            assert "{" not in row["source"] + row["text"]


MADE = {
    "wikitext103": ["figure/sweep.html", "published.memory/manifest.json"],
    "law_mt": ["figure/sweep.png", "finetuned.memory/manifest.json"],
    "massive_open_text": ["overlap/overlap.html", "run/model/config.json"],
    "train_base": ["base.json", "finetuned.json"],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MADE)
def test_every_command_of_a_recipe_runs(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniature = loaded(EXAMPLES / "miniature.py", monkeypatch)
    miniature.run(recipe, tmp_path)
    for name in MADE[recipe]:
        assert (tmp_path / "out" / name).stat().st_size > 0, name


@pytest.mark.slow
def test_translation_goes_from_rules_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe: Any = loaded(EXAMPLES / "translation/recipe.py", monkeypatch)
    monkeypatch.setattr(recipe, "TRAINED", 500)
    small = ["--steps", "3", "--memory-pairs", "60", "--held-out", "12", "--longest", "12"]
    monkeypatch.setattr("sys.argv", ["recipe.py", "--work", str(tmp_path), *small])
    recipe.main()
    results = json.loads((tmp_path / "test-tuned-on-statutes.json").read_text())
    assert [result["method"] for result in results] == recipe.METHODS.split(",")
    assert "hybrid" in capsys.readouterr().out
    sources: dict[str, set[str]] = {}
    for name in ("memory", "valid", "test", "general-valid", "general-test"):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        sources[name] = {json.loads(line)["source"] for line in lines}
    assert not sources["test"] & (sources["memory"] | sources["valid"])
    assert not sources["valid"] & sources["memory"]
    some = ["--tune-on", "both", "--encoder-texts", "4", "--methods", "base,knn,suffix"]
    monkeypatch.setattr("sys.argv", ["recipe.py", "--work", str(tmp_path), *small, *some])
    recipe.main()
    near = json.loads((tmp_path / "test-tuned-on-both-near-4.json").read_text())
    assert [result["method"] for result in near] == ["base", "knn", "suffix"]
    assert near[0]["bleu"] == results[0]["bleu"]
