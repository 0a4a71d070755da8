"""The command line: what each verb prints, and that numbers are those of the library."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from conftest import make_documents
from nearest import Document, Memory, evaluate, read_documents
from nearest.cli import app
from nearest.store.manifest import FORMAT
from nearest.store.verify import verify

NEAREST = Path(sys.executable).with_name("nearest")
EVAL_KEYS = [
    "method",
    "tokens",
    "nll",
    "nll_low",
    "nll_high",
    "ppl",
    "word_ppl",
    "bpb",
    "foss",
    "tok_s",
    "seconds",
    "added_ms",
    "lam",
    "temperature",
    "k",
    "delta_nll",
    "delta_low",
    "delta_high",
    "settings_from",
]
CHECK_KEYS = ["memory_prob", "chance_prob", "useless_neighbours", "harm", "leak"]


def invoke(*arguments: Any) -> SimpleNamespace:
    """Run a command in this process: its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def json_lines(*arguments: Any) -> list[dict[str, Any]]:
    """What a command prints with --json: strictly one object a line, and nothing else."""
    result = invoke(*arguments, "--json")
    assert result.code == 0, result.err
    assert result.out.endswith("\n")
    lines = result.out.removesuffix("\n").split("\n")
    records = [json.loads(line, parse_constant=no_constant) for line in lines]
    assert all(isinstance(record, dict) for record in records)
    return records


def write_jsonl(path: Path, documents: list[Document]) -> Path:
    lines = [
        json.dumps(
            {"id": d.id, "text": d.text, **d.metadata}
            | ({} if d.encoder_text is None else {"source": d.encoder_text})
        )
        for d in documents
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> SimpleNamespace:
    """A corpus, a text to be scored, and a memory built by the command."""
    folder = tmp_path_factory.mktemp("cli")
    corpus = write_jsonl(folder / "corpus.jsonl", make_documents(12, 30))
    text = write_jsonl(folder / "text.jsonl", make_documents(4, 20, seed=1))
    memory = folder / "law.memory"
    (record,) = json_lines("build", model_folder, corpus, "--out", memory)
    return SimpleNamespace(corpus=corpus, text=text, memory=memory, built=record)


@pytest.fixture
def memory(world: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(world.memory, tmp_path / "law.memory"))


# --- build, info, verify, index -------------------------------------------------------------------


def test_build_and_info_say_what_the_memory_holds(
    world: SimpleNamespace, model_folder: str
) -> None:
    memory = Memory.open(world.memory)
    (info,) = json_lines("info", world.memory)
    assert info | {"corpus": {"documents": 12, "skipped": {}}} == world.built
    records = memory.manifest.file_records()
    assert sum(info["files"].values()) == info["bytes"] == sum(r.size for r in records)
    assert (
        info.items()
        >= {
            "memory": str(world.memory),
            "format": FORMAT,
            "snapshot": 1,
            "documents": 12,
            "tokens": sum(1 + len(d.text) for d in make_documents(12, 30)),
            "entries": sum(len(d.text) for d in make_documents(12, 30)),
            "bytes_per_entry": round(info["bytes"] / memory.entries, 1),
            "model": str(Path(model_folder).resolve()),
            "windows": "64 with a stride of 32",
        }.items()
    )
    assert info["index_of_segment_000001"]["spec"] == "exact"


def test_the_tables_for_people_hold_the_same_figures(world: SimpleNamespace) -> None:
    shown = invoke("info", world.memory)
    words = shown.out.split()
    assert shown.code == 0
    assert f"{world.built['entries']:,}" in words
    assert f"{world.built['tokens']:,}" in words
    assert "exact," in words
    sound = invoke("verify", world.memory)
    assert " ".join(sound.out.split()) == f"{world.memory} is sound"


def test_build_takes_folders_files_and_settings(
    tmp_path: Path, world: SimpleNamespace, model_folder: str
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("first text, which is longer than a window\r\n")
    (tmp_path / "corpus/b.md").write_text("second")
    (record,) = json_lines(
        "build",
        model_folder,
        tmp_path / "corpus",
        world.corpus,
        "--out",
        tmp_path / "m",
        "--key-layer",
        "last_hidden",
        "--window",
        16,
        "--stride",
        4,
        "--metric",
        "ip",
        "--index",
        "Flat",
        "--recall",
        0.5,
        "--batch-size",
        2,
    )
    memory = Memory.open(tmp_path / "m")
    keys, index = memory.manifest.keys, memory.segments[0].record.index
    assert (keys.layer, keys.module, keys.metric) == ("last_hidden", "lm_head", "ip")
    assert (keys.window, keys.stride) == (16, 4)
    assert (index.spec, index.recall_target) == ("Flat", 0.5)
    texts = [memory.document(number).text for number in range(3)]
    assert texts == [
        "first text, which is longer than a window\n",
        "second",
        make_documents(1, 30)[0].text,
    ]
    assert memory.document(2).metadata == {"title": "Title 0"}
    assert record["documents"] == memory.documents == 14


def test_verify_reports_damage_on_both_streams(memory: Path) -> None:
    assert json_lines("verify", memory) == [{"memory": str(memory), "sound": True, "problems": []}]
    keys = memory / "segments/000001/keys.npy"
    keys.write_bytes(keys.read_bytes()[:-1] + b"\x01")
    result = invoke("verify", memory, "--json")
    problem = "segments/000001/keys.npy differs from its checksum"
    assert json.loads(result.out) == {
        "memory": str(memory),
        "sound": False,
        "problems": [problem],
    }
    assert result.code == 2
    assert f"error: {memory} is damaged: {problem}" in result.err


def test_index_gives_another_generation(memory: Path) -> None:
    (record,) = json_lines("index", memory, "--index", "IVF4,Flat", "--nprobe", 4)
    assert record["snapshot"] == 2
    index = record["index_of_segment_000001"]
    assert (index["spec"], index["nprobe"]) == ("IVF4,Flat", 4)
    # Every list is probed; FAISS rounds, and the last places are close.
    assert index["recall@1024"] == pytest.approx(1, abs=1e-3)
    assert record == json_lines("info", memory)[0]
    assert verify(memory) == []
    (record,) = json_lines("index", memory)
    assert record["snapshot"] == 3
    assert record["index_of_segment_000001"]["spec"] == "exact"


def test_build_stores_keys_as_asked(
    tmp_path: Path, world: SimpleNamespace, model_folder: str
) -> None:
    sizes = {}
    for keys in ("fp16", "int8", "none"):
        path = tmp_path / keys
        (record,) = json_lines("build", model_folder, world.corpus, "--out", path, "--keys", keys)
        assert record.pop("corpus") == {"documents": 12, "skipped": {}}
        assert record == json_lines("info", path)[0]
        assert (keys == "none") == (record["keys"] == "none") == (record["windows"] == "none")
        assert f"{keys}" in record["keys"]
        assert json_lines("verify", path)[0]["sound"]
        sizes[keys] = record["files"]
    assert sizes["int8"].keys() - sizes["fp16"].keys() == {"scales"}
    assert sizes["fp16"].keys() - sizes["none"].keys() == {"keys"}
    assert sizes["none"]["suffixes"] == 4 * world.built["entries"] + 128
    text = ["--text", world.text]
    (base,) = json_lines("eval", tmp_path / "none", *text, "--method", "base")
    assert base["tokens"] > 0
    for verb in (["eval", *text, "--method", "knn"], ["index"], ["cluster", "--clusters", 3]):
        result = invoke(verb[0], tmp_path / "none", *verb[1:])
        assert result.code == 2
        assert "has no keys (it was built with --keys none, or" in result.err


def test_cluster_gives_another_generation(memory: Path) -> None:
    assert json_lines("info", memory)[0]["clusters"] == "none"
    options = ["--clusters", 20, "--sample", 100, "--iterations", 2]
    (record,) = json_lines("cluster", memory, *options)
    assert record == json_lines("info", memory)[0]
    assert record["snapshot"] == 2
    assert record["clusters"] == {
        "made_by": "k-means",
        "clusters": 20,
        "members": record["entries"],
    }
    assert verify(memory) == []
    (record,) = json_lines("cluster", memory, "--greedy-merge", "--neighbours", 4)
    assert record["clusters"]["made_by"] == "greedy merge"
    assert 0 < 2 * record["clusters"]["clusters"] <= record["clusters"]["members"]
    assert "greedy merge" in invoke("info", memory).out
    assert record["files"]["clusters"] == sum(
        path.stat().st_size for path in memory.rglob("g000003.clusters.*.npy")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --clusters"),
        (["--clusters", 3, "--greedy-merge"], "give either --clusters"),
        (["--sample", 9, "--greedy-merge"], "give either --clusters"),
        (["--clusters", 3, "--neighbours", 4], "give either --clusters"),
        (["--neighbours", 4], "give either --clusters"),
        (["--sample", 9], "give --clusters"),
        (["--clusters", 10**6], "clusters must be from 1 to the memory's"),
    ],
)
def test_cluster_explains_what_cannot_be(memory: Path, options: list[Any], message: str) -> None:
    result = invoke("cluster", memory, *options)
    assert result.code == 2
    assert message in result.err


@pytest.mark.slow
def test_compress_gives_another_generation(memory: Path, world: SimpleNamespace) -> None:
    options = ["--keys", "pq8", "--pca", 16, "--merge", "--neighbours", 5]
    (record,) = json_lines("compress", memory, *options, "--index", "Flat", "--recall", 0.5)
    assert record == json_lines("info", memory)[0]
    assert record["snapshot"] == 2
    assert "16 of 32 dims, pq8, l2" in record["keys"]
    assert record["kept_entries"] < record["entries"] == world.built["kept_entries"]
    assert record["files"].keys() - world.built["files"].keys() == {
        "index",
        "rows",
        "weights",
        "codebooks",
        "projection",
    }
    assert record["files"]["keys"] == 8 * record["kept_entries"] + 128
    assert record["bytes"] == sum(record["files"].values())
    index = record["index_of_segment_000001"]
    assert (index["spec"], index["recall_target"]) == ("Flat", 0.5)
    assert verify(memory) == []
    (knn,) = json_lines("eval", memory, "--text", world.text, "--method", "knn", "--k", 5)
    assert knn["tokens"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing is to be compressed"),
        (["--keys", "fp8"], "key format 'fp8' is unknown"),
        (["--pca", 32], "pca must be from 1 to 31"),
        (["--keys", "int8", "--neighbours", 3], "neighbours are for merging"),
    ],
)
def test_compress_explains_what_cannot_be(memory: Path, options: list[Any], message: str) -> None:
    result = invoke("compress", memory, *options)
    assert result.code == 2
    assert message in result.err
    assert json_lines("info", memory)[0]["snapshot"] == 1


# --- eval -----------------------------------------------------------------------------------------


def test_eval_prints_what_the_library_measures(
    world: SimpleNamespace, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    settings = {"lam": 0.4, "temperature": 30.0, "k": 5}
    base, knn = json_lines(
        "eval", world.memory, "--text", world.text, "--lam", 0.4, "--knn-temperature", 30, "--k", 5
    )
    assert list(base) == list(knn) == EVAL_KEYS + CHECK_KEYS
    expected = evaluate(
        tiny_model,
        Memory.open(world.memory),
        read_documents([world.text]),
        ["base", "knn"],
        tokenizer=tiny_tokenizer,
        **settings,
    )
    texts = [document.text for document in read_documents([world.text])]
    timing = {"tok_s", "seconds", "added_ms"}
    for found, result in zip((base, knn), expected, strict=True):
        for key, value in result.to_dict().items():
            if isinstance(value, float) and key not in timing:
                value = pytest.approx(value, rel=1e-9)
            assert key in timing or found[key] == value, key
        total = found["nll"] * found["tokens"]
        assert found["tokens"] == sum(len(text) for text in texts)
        assert found["ppl"] == pytest.approx(math.exp(found["nll"]))
        words = sum(len(text.split()) for text in texts)
        assert found["word_ppl"] == pytest.approx(math.exp(total / words))
        utf8_bytes = sum(len(text.encode()) for text in texts)
        assert found["bpb"] == pytest.approx(total / math.log(2) / utf8_bytes)
        assert found["nll_low"] <= found["nll"] <= found["nll_high"]
        assert found["tok_s"] == pytest.approx(found["tokens"] / found["seconds"])
    assert (base["method"], knn["method"]) == ("base", "knn")
    assert (base["lam"], base["temperature"], base["k"], base["foss"]) == (None,) * 4
    assert (knn["lam"], knn["temperature"], knn["k"], knn["foss"]) == (0.4, 30.0, 5, 0.0)
    assert (base["delta_nll"], base["delta_low"], base["delta_high"]) == (None,) * 3
    assert knn["delta_nll"] == pytest.approx(knn["nll"] - base["nll"])
    assert knn["delta_low"] <= knn["delta_nll"] <= knn["delta_high"]
    assert base["added_ms"] == 0 < knn["added_ms"]


@pytest.mark.parametrize(
    ("arguments", "methods"),
    [
        (["--method", "knn"], ["knn"]),
        (["--method", "base"], ["base"]),
        (["--method", " knn , base "], ["knn", "base"]),
    ],
)
def test_eval_prints_a_line_for_each_method_asked_for(
    world: SimpleNamespace, arguments: list[str], methods: list[str]
) -> None:
    records = json_lines("eval", world.memory, "--text", world.text, *arguments)
    assert [record["method"] for record in records] == methods
    assert [list(record) for record in records] == [EVAL_KEYS + CHECK_KEYS] * len(methods)
    assert records[0]["delta_nll"] is None


@pytest.mark.parametrize("lam", [0, 1])
def test_eval_stays_json_at_the_ends_of_lam(world: SimpleNamespace, lam: int) -> None:
    """λ = 1 gives tokens that no neighbour votes for probability 0: nll is infinite."""
    base, knn = json_lines("eval", world.memory, "--text", world.text, "--lam", lam, "--k", 2)
    assert knn["lam"] == lam
    if lam == 0:
        assert knn["nll"] == pytest.approx(base["nll"], rel=1e-6)
    else:
        assert knn["nll"] is None or knn["nll"] > base["nll"]


def test_eval_of_one_document_has_no_interval(world: SimpleNamespace, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "one.jsonl", make_documents(1, 20, seed=5))
    for record in json_lines("eval", world.memory, "--text", text):
        assert record["nll_low"] is record["nll_high"] is record["delta_low"] is None


def test_eval_scores_the_ends_of_documents_when_asked(world: SimpleNamespace) -> None:
    (plain,) = json_lines("eval", world.memory, "--text", world.text, "--method", "base")
    (ended,) = json_lines(
        "eval", world.memory, "--text", world.text, "--method", "base", "--score-eos"
    )
    assert ended["tokens"] == plain["tokens"] + 4


def test_eval_takes_several_texts_and_its_own_windows(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    second = tmp_path / "second.txt"
    second.write_text("another text")
    one, both, narrow = (
        json_lines("eval", world.memory, "--method", "base", *arguments)[0]
        for arguments in (
            ["--text", world.text],
            ["--text", world.text, "--text", second],
            ["--text", world.text, "--window", 8, "--stride", 7, "--batch-size", 1],
        )
    )
    assert both["tokens"] == one["tokens"] + len("another text")
    assert narrow["tokens"] == one["tokens"]
    assert narrow["nll"] != pytest.approx(one["nll"], rel=1e-6)


def test_the_table_of_eval_holds_the_same_figures(world: SimpleNamespace) -> None:
    records = json_lines("eval", world.memory, "--text", world.text, "--k", 5)
    shown = invoke("eval", world.memory, "--text", world.text, "--k", 5)
    assert shown.code == 0
    words = shown.out.split()
    for record in records:
        assert words.count(f"{record['nll']:.4f}") == 1
        assert words.count(f"{record['ppl']:.2f}") == 1
    assert f"{records[1]['delta_nll']:+.4f}" in words


@pytest.mark.filterwarnings("default")
def test_a_k_above_the_entries_is_clamped_and_said_once(world: SimpleNamespace) -> None:
    result = invoke("eval", world.memory, "--text", world.text, "--k", 100_000, "--json")
    entries = world.built["entries"]
    assert result.code == 0
    assert [json.loads(line)["k"] for line in result.out.splitlines()] == [None, entries]
    notes = [line for line in result.err.splitlines() if line.startswith("note:")]
    untuned, clamped = notes
    assert "not tuned for knn" in untuned
    assert f"nearest tune {world.memory} --method knn" in untuned
    assert "k = 100,000" in clamped
    assert f"{entries:,} entries" in clamped


# --- tune and generate ----------------------------------------------------------------------------


def test_tune_stores_what_eval_then_uses(memory: Path, world: SimpleNamespace) -> None:
    (tuned,) = json_lines("tune", memory, "--text", world.text)
    assert tuned.keys() >= {"method", "lam", "temperature", "k", "distances", "tuned_nll"}
    assert tuned["method"] == "knn"
    (info,) = json_lines("info", memory)
    assert info["snapshot"] == 2
    found_on = {"tuned_keys": "int8, 32 dims, l2", "tuned_index": "auto"}
    assert {"method": "knn", **info["settings_of_knn"]} == tuned | found_on
    base, knn = json_lines("eval", memory, "--text", world.text)
    assert (knn["lam"], knn["temperature"], knn["k"]) == (
        tuned["lam"],
        tuned["temperature"],
        tuned["k"],
    )
    assert knn["nll"] == pytest.approx(tuned["tuned_nll"], rel=1e-3)
    assert base["nll"] == pytest.approx(tuned["tuned_base_nll"], rel=1e-4)
    assert knn["nll"] <= base["nll"] + 1e-6  # λ = 0 was among the choices
    (other,) = json_lines("eval", memory, "--text", world.text, "--method", "knn", "--lam", 0.9)
    assert (other["lam"], other["k"]) == (0.9, tuned["k"])


def test_generate_continues_with_and_without_sources(world: SimpleNamespace) -> None:
    options = ["--prompt", "the court", "--max-new-tokens", 8]
    (base,) = json_lines("generate", world.memory, *options, "--method", "base")
    (knn,) = json_lines("generate", world.memory, *options, "--sources", "--lam", 0.9, "--k", 4)
    (again,) = json_lines("generate", world.memory, *options, "--lam", 0.9, "--k", 4)
    (none,) = json_lines("generate", world.memory, *options, "--lam", 0)
    keys = ["prompt", "text", "tokens", "documents", "continues", "settings_from"]
    assert list(base) == list(knn) == keys
    assert base["continues"]
    assert (base["settings_from"], knn["settings_from"]) == (None, "defaults")
    assert base["prompt"] == "the court"
    assert (base["tokens"], base["documents"], again["tokens"]) == ([], [], [])
    assert none["text"] == base["text"]
    assert again["text"] == knn["text"]
    assert 0 < len(knn["tokens"]) <= 8
    assert all(0 <= token["memory_weight"] <= 1 for token in knn["tokens"])
    mean = np.mean([token["memory_weight"] for token in knn["tokens"]])
    assert sum(share["weight"] for share in knn["documents"]) == pytest.approx(mean, rel=1e-4)
    weights = [share["weight"] for share in knn["documents"]]
    assert weights == sorted(weights, reverse=True)
    originals = {d.id: d for d in make_documents(12, 30)}
    for share in knn["documents"]:
        passage = share["before"] + share["token"] + share["after"]
        assert passage in originals[share["id"]].text
        assert share["metadata"] == originals[share["id"]].metadata


def test_generate_shows_text_for_people(world: SimpleNamespace) -> None:
    shown = invoke(
        "generate",
        world.memory,
        "--prompt",
        "[bold]the :cat: law",
        "--sources",
        "--seed",
        3,
        "--max-new-tokens",
        5,
        "--sample",
        "--lam",
        1,
        "--show",
        2,
    )
    assert shown.code == 0
    assert shown.out.startswith("[bold]the :cat: law")
    assert "strongest passage" in shown.out


# --- the command itself ---------------------------------------------------------------------------

LOADED = """
import sys
from nearest.cli import app
try:
    app({arguments!r})
except SystemExit:
    pass
heavy = {{"torch", "transformers", "faiss", "numba", "numpy"}}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def loaded_by(*arguments: str) -> str:
    code = LOADED.format(arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1]


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("--help") == "[]"
    assert loaded_by("build", "--help") == "[]"


@pytest.mark.slow
def test_info_loads_neither_torch_nor_transformers(world: SimpleNamespace) -> None:
    loaded = loaded_by("info", str(world.memory))
    assert "torch" not in loaded
    assert "transformers" not in loaded


def helps(command: Any) -> Iterator[str]:
    """Every text of help of a command, and of what belongs to it."""
    yield command.help or ""
    yield from (getattr(one, "help", None) or "" for one in command.params)
    for one in getattr(command, "commands", {}).values():
        yield from helps(one)


def test_square_brackets_in_help_are_no_markup() -> None:
    texts = list(helps(typer.main.get_command(app)))
    assert len(texts) > 300
    shown = [Text.from_markup(text).plain for text in texts]
    assert shown == [text.replace("\\[", "[") for text in texts]


def test_help_names_every_verb() -> None:
    done = subprocess.run([NEAREST, "--help"], capture_output=True, text=True, check=True)
    for verb in (
        "build",
        "info",
        "verify",
        "index",
        "cluster",
        "compress",
        "tune",
        "eval",
        "sweep",
        "generate",
        "demo",
    ):
        assert f" {verb} " in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 2),
        (["no-such-verb"], 2),
        (["info"], 2),
        (["info", "a", "b"], 2),
        (["eval", "a"], 2),
        (["info", "a", "--no-such-option"], 2),
        (["build", "--help"], 0),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], expected: int) -> None:
    result = invoke(*arguments)
    assert result.code == expected
    if expected:
        assert "Traceback" not in result.err
        assert "Usage: " in result.err + result.out


@pytest.mark.slow
def test_the_real_command_keeps_reports_and_notes_apart(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    done = subprocess.run(
        [NEAREST, "eval", world.memory, "--text", world.text, "--k", "100000", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    records = [json.loads(line, parse_constant=no_constant) for line in done.stdout.splitlines()]
    assert [list(record) for record in records] == [EVAL_KEYS + CHECK_KEYS] * 2
    assert done.stderr.count("note:") == 2  # of settings that are defaults, and of k
    for said in ("not tuned for knn", "k = 100,000"):
        assert done.stderr.count(said) == 1
    assert "Warning" not in done.stderr
