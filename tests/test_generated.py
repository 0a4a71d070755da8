"""Texts that models write, scored: metrics against their packages, texts against `generate`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from conftest import make_documents, make_model, make_tokenizer
from nearest import Document, Memory, Settings, evaluate_generated, tune_generated
from nearest.errors import NearestError
from nearest.verbs.generate import generate
from nearest.verbs.text_metrics import Metric, metrics_named, scores_of
from pairs import make_pair_model, make_pair_tokenizer, pair_documents
from test_cli import invoke, json_lines, write_jsonl

REFERENCES = [
    "the third of march nineteen eighty four",
    "four thousand seven hundred and eleven",
    "section twelve",
    "half past nine",
    "no",
]
GOOD = [REFERENCES[0], "four thousand seven hundred eleven", "section twelve", "past nine", "yes"]
BAD = ["the march", "four hundred", "section", "half", ""]
KNN = {"lam": 0.9, "temperature": 30.0, "k": 8}


def test_scores_are_those_of_the_packages() -> None:
    metrics = metrics_named(["bleu", "chrf", "rouge", "exact"])
    found = {m.name: [s.value for s in scores_of(m, [BAD, GOOD], REFERENCES)] for m in metrics}
    for n, texts in enumerate((BAD, GOOD)):
        assert found["bleu"][n] == pytest.approx(sacrebleu.corpus_bleu(texts, [REFERENCES]).score)
        assert found["chrf"][n] == pytest.approx(sacrebleu.corpus_chrf(texts, [REFERENCES]).score)
        scorer = RougeScorer(["rouge1", "rougeL"])
        for name in ("rouge1", "rougeL"):
            pairs = zip(REFERENCES, texts, strict=True)
            mean = np.mean([scorer.score(*pair)[name].fmeasure for pair in pairs])
            assert found[name][n] == pytest.approx(100 * mean)
    assert found["exact"] == [0.0, 40.0]


def test_intervals_are_those_of_resampled_texts() -> None:
    """A mean's paired bootstrap has a closed form: the binomial of each text's difference."""
    rng = np.random.default_rng(0)
    wanted = ["a"] * 400
    first, second = (["a" if x < p else "b" for x in rng.random(400)] for p in (0.3, 0.5))
    (exact,) = metrics_named(["exact"])
    one, other = scores_of(exact, [first, second], wanted)
    right = np.array([[text == "a" for text in texts] for texts in (first, second)], dtype=float)
    assert (one.value, other.value) == tuple(100 * right.mean(axis=1))
    assert one.low is not None
    assert one.high is not None
    assert one.high - one.low == pytest.approx(2 * 1.96 * 100 * right[0].std() / 20, rel=0.1)
    differences = right[1] - right[0]
    assert other.delta == pytest.approx(100 * differences.mean())
    assert other.delta_low is not None
    assert other.delta_high is not None
    width = other.delta_high - other.delta_low
    assert width == pytest.approx(2 * 1.96 * 100 * differences.std() / 20, rel=0.1)
    (alone,) = scores_of(exact, [["a"]], ["a"])
    assert alone == (100.0, None, None, None, None, None)


def test_a_paired_interval_knows_that_texts_are_the_same() -> None:
    metric = Metric("mean", lambda a, b: np.array([[float(x), 1.0] for x in a]), lambda s: s[0])
    texts = [str(n) for n in range(50)]
    _, same = scores_of(metric, [texts, texts], texts)
    assert (same.delta, same.delta_low, same.delta_high) == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("generated")
    model, tokenizer = make_pair_model(), make_pair_tokenizer()
    documents = pair_documents(6, longest=30)
    memory = Memory.build(model, tokenizer, documents, folder / "m", keys="fp16")
    return SimpleNamespace(
        folder=folder, model=model, tokenizer=tokenizer, documents=documents, memory=memory
    )


@pytest.mark.slow
def test_batches_write_what_single_prompts_do(pairs: Any) -> None:
    others = [replace(document, id=f"other-{document.id}") for document in pair_documents(3, 5)]
    asked = [*pairs.documents[:3], *others]
    options = {"max_new_tokens": 12, "tokenizer": pairs.tokenizer}
    methods = ["base", "knn", "retomaton"]
    results = evaluate_generated(pairs.model, pairs.memory, asked, methods, **options, **KNN)
    for result in results:
        for document, text in zip(asked, result.texts, strict=True):
            settings = {} if result.method == "base" else KNN
            alone = generate(
                pairs.model,
                pairs.tokenizer,
                pairs.memory,
                document.encoder_text or "",
                method=result.method,
                settings=settings,
                sources=False,
                max_new_tokens=12,
            )
            assert text == alone.text
    base, knn, _ = results
    assert base.texts != knn.texts
    assert (base.settings_from, knn.settings_from) == (None, "defaults")
    assert (knn.settings["lam"], knn.to_dict()["lam"]) == (0.9, 0.9)
    for size in (1, 4):
        (again,) = evaluate_generated(
            pairs.model, pairs.memory, asked, "knn", batch_size=size, **options, **KNN
        )
        assert again.texts == knn.texts


def test_a_memory_of_the_references_writes_them(pairs: Any) -> None:
    """λ = 1, k = 1 and a cold temperature: each step is the stored token of that very state."""
    (found,) = evaluate_generated(
        pairs.model,
        pairs.memory,
        pairs.documents,
        tokenizer=pairs.tokenizer,
        metrics=["bleu", "exact"],
        max_new_tokens=40,
        **{"lam": 1.0, "temperature": 0.001, "k": 1},
    )
    assert found.scores["exact"].value == 100
    assert found.scores["bleu"].value == pytest.approx(100)
    assert found.texts == [document.text for document in pairs.documents]
    assert found.tokens == sum(len(d.text) + 1 for d in pairs.documents)  # EOS too


def test_a_causal_model_continues_its_prompts() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    asked = [Document(f"d{n}", "shall", encoder_text="the law" + " of" * n) for n in range(3)]
    (found,) = evaluate_generated(
        model, None, asked, "base", tokenizer=tokenizer, max_new_tokens=9, metrics=["chrf"]
    )
    for document, text in zip(asked, found.texts, strict=True):
        ids = [0, *tokenizer(document.encoder_text, add_special_tokens=False)["input_ids"]]
        prompt = torch.tensor([ids])
        output = model.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=1)
        assert text == tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert found.to_pandas()["encoder_text"].tolist() == [d.encoder_text for d in asked]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["comet"]}, "'comet' is unknown: choose among bleu, chrf, rouge, exact"),
        ({"metrics": []}, "at least one metric"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"method": "magic"}, "'magic' is unknown"),
        ({"method": "in-context+knn"}, "one text at a time"),
        ({"method": ["knn", "knn"]}, "each only once"),
        ({"method": "base", "lam": 0.5}, "the base model has none"),
        ({"documents": []}, "no documents"),
        ({"documents": make_documents(1, 4)}, "no text for the encoder"),
    ],
)
def test_what_cannot_be_scored_is_explained(pairs: Any, options: Any, message: str) -> None:
    documents = options.pop("documents", pairs.documents)
    with pytest.raises(NearestError, match=message):
        evaluate_generated(
            pairs.model, pairs.memory, documents, tokenizer=pairs.tokenizer, **options
        )


def test_a_causal_model_needs_prompts_and_room() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    plain = make_documents(1, 4)
    with pytest.raises(NearestError, match="has no prompt"):
        evaluate_generated(model, None, plain, "base", tokenizer=tokenizer)
    asked = [Document("d", "text", encoder_text="the law")]
    with pytest.raises(NearestError, match="exceed the model's 64 positions"):
        evaluate_generated(model, None, asked, "base", tokenizer=tokenizer)


@pytest.mark.slow
def test_tuning_by_text_finds_what_writes_best(pairs: Any, tmp_path: Path) -> None:
    """No setting that it tried, nor a step from the best, writes better; evaluation agrees."""
    memory = Memory.open(shutil.copytree(pairs.memory.path, tmp_path / "m"))
    options = {"tokenizer": pairs.tokenizer, "max_new_tokens": 20}
    asked = pairs.documents[:3]
    tuned = tune_generated(pairs.model, memory, asked, metric="chrf", **options)
    assert tuned.score == max(score for _, score in tuned.tried) > tuned.base_score

    def chrf(settings: Settings) -> float:
        (found,) = evaluate_generated(
            pairs.model, memory, asked, metrics=["chrf"], settings=settings, **options
        )
        return found.scores["chrf"].value

    assert chrf(tuned.settings) == pytest.approx(tuned.score)
    for lam in (0.1, 0.5, 0.9):
        assert chrf(replace(tuned.settings, lam=lam)) <= tuned.score
    assert memory.settings_from("knn") == "tuned"
    assert memory.settings("knn")["lam"] == tuned.settings.lam
    assert Memory.open(memory.path).settings("knn")["tuned_by"] == "chrf"
    with pytest.raises(NearestError, match="trained by the texts' probabilities"):
        tune_generated(pairs.model, memory, asked, method="knn+buckets", **options)
    with pytest.raises(NearestError, match="choose rouge1 or rouge2 or rougeL"):
        tune_generated(pairs.model, memory, asked, metric="rouge", **options)


@pytest.mark.slow
def test_the_command_prints_and_keeps_what_was_written(pairs: Any) -> None:
    folder = pairs.folder
    pairs.model.save_pretrained(folder / "t5")
    pairs.tokenizer.save_pretrained(folder / "t5")
    corpus = write_jsonl(folder / "pairs.jsonl", pairs.documents)
    memory = folder / "built"
    json_lines("build", folder / "t5", corpus, "--out", memory)
    written = folder / "written.jsonl"
    options = ["--text", corpus, "--generate", "--metrics", "chrf,exact", "--max-new-tokens", 40]
    settings = ["--lam", 1, "--knn-temperature", 0.001, "--k", 1]
    base, knn = json_lines("eval", memory, *options, *settings, "--written", written)
    assert (base["method"], knn["method"]) == ("base", "knn")
    assert knn["exact"] == 100
    assert knn["chrf_delta"] == pytest.approx(knn["chrf"] - base["chrf"])
    assert base["chrf_delta"] is None
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["texts"]["knn"] for row in rows] == [d.text for d in pairs.documents]
    assert [row["encoder_text"] for row in rows] == [d.encoder_text for d in pairs.documents]
    shown = invoke("eval", memory, *options, *settings)
    assert "knn − base: exact" in shown.out
    for wrong, message in (
        (["--stream"], "--stream is of texts that are given"),
        (["--records", folder / "r.parquet"], "--records is of texts that are given"),
        (["--written", folder / "none" / "x"], "does not exist"),
        (["--metrics", "comet"], "unknown"),
    ):
        refused = invoke("eval", memory, *options, *wrong)
        assert (refused.code, message in refused.err.replace("\n", " ")) == (2, True)
    by = ["tune", memory, "--text", corpus, "--by", "chrf", "--max-new-tokens", 8, "--k", 4]
    (tuned,) = json_lines(*by)
    assert (tuned["k"], tuned["tuned_by"]) == (4, "chrf")
    assert tuned["tuned_score"] >= tuned["tuned_base_score"]
    for more in (["--leave-one-out"], ["--start", memory]):
        both = invoke(*by, *more)
        assert (both.code, f"{more[0]} is of texts" in both.err.replace("\n", " ")) == (2, True)
    alone = invoke("eval", memory, "--text", corpus, "--written", written)
    assert (alone.code, "--written is for" in alone.err) == (2, True)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearest.errors.find_spec", lambda _: None)
    with pytest.raises(NearestError, match=r"pip install '\.\[text-metrics\]'"):
        metrics_named(["bleu"])
    assert [metric.name for metric in metrics_named(["exact"])] == ["exact"]
