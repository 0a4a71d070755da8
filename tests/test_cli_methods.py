"""RetoMaton and suffix retrieval on the command line, with and without keys."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import make_documents
from nearest import Memory, evaluate, read_documents
from test_bad_input import invoke, refused, works


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> SimpleNamespace:
    """A memory with keys and clusters, one without keys, and a text to be scored."""
    folder = tmp_path_factory.mktemp("methods")
    for name, documents in (
        ("corpus.jsonl", make_documents(12, 30)),
        ("text.jsonl", make_documents(2, 20, seed=1)),
    ):
        lines = [json.dumps({"id": d.id, "text": d.text}) for d in documents]
        (folder / name).write_text("\n".join(lines))
    memory, textual = folder / "law.memory", folder / "text.memory"
    works("build", model_folder, folder / "corpus.jsonl", "--out", memory)
    works("cluster", memory, "--clusters", 60)
    works("build", model_folder, folder / "corpus.jsonl", "--out", textual, "--keys", "none")
    return SimpleNamespace(memory=memory, textual=textual, text=folder / "text.jsonl")


RETOMATON = {"lam": 0.6, "temperature": 40.0, "k": 12, "min_knns": 3, "max_knns": 50}
SUFFIX = {"lam": 0.6, "temperature": 40.0, "suffix_k": 9, "length_power": 2.5}


def as_options(settings: dict[str, Any]) -> list[Any]:
    flags = {name: f"--{name.replace('_', '-')}" for name in settings}
    flags |= {"temperature": "--knn-temperature"}
    return [part for name, value in settings.items() for part in (flags[name], value)]


@pytest.mark.parametrize(
    ("method", "settings", "more"),
    [
        ("retomaton", RETOMATON, {}),
        ("retomaton", RETOMATON | {"min_knns": "inf", "length_power": 1.5}, {"dedup": True}),
        ("retomaton", RETOMATON | {"min_knns": 0}, {"dedup": False}),
        ("retomaton", RETOMATON | {"distances": "index"}, {}),
        ("suffix", SUFFIX, {}),
        ("knn", {"lam": 0.6, "temperature": 40.0, "k": 12, "length_power": 2.0}, {}),
    ],
)
def test_eval_takes_every_setting(
    world: SimpleNamespace,
    tiny_model: Any,
    tiny_tokenizer: Any,
    method: str,
    settings: dict[str, Any],
    more: dict[str, bool],
) -> None:
    """As the library does with the same."""
    flags = ["--dedup" if value else "--no-dedup" for value in more.values()]
    where = [world.memory, "--text", world.text, "--method", method]
    (record,) = works("eval", *where, *as_options(settings), *flags)
    given = {name: float("inf") if v == "inf" else v for name, v in settings.items()} | more
    text = list(read_documents([world.text]))
    memory = Memory.open(world.memory)
    expected = evaluate(tiny_model, memory, text, method, tokenizer=tiny_tokenizer, **given)
    assert record["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert record["foss"] == pytest.approx(expected.foss)
    assert record["k"] == given.get("k")


@pytest.mark.parametrize(
    ("method", "options", "stored"),
    [
        ("retomaton", ["--min-knns", "inf", "--k", 20, "--dedup"], {"min_knns": "inf", "k": 20}),
        ("retomaton", ["--max-knns", 7], {"max_knns": 7, "dedup": False}),
        ("suffix", ["--suffix-k", 30], {"suffix_k": 30}),
        ("suffix", ["--length-power", 1.5], {"length_power": 1.5}),
    ],
)
def test_what_was_tuned_is_used(
    world: SimpleNamespace, method: str, options: list[Any], stored: dict[str, Any]
) -> None:
    (tuned,) = works("tune", world.memory, "--text", world.text, "--method", method, *options)
    assert tuned.items() >= {"method": method, **stored}.items()
    (record,) = works("eval", world.memory, "--text", world.text, "--method", method)
    assert record["nll"] == pytest.approx(tuned["tuned_nll"], rel=1e-4)
    assert record["lam"] == tuned["lam"]
    (info,) = works("info", world.memory)
    assert info[f"settings_of_{method}"].items() >= tuned.items() - {("method", method)}
    assert info["settings_found"][method] == "tuned"
    options = ["--prompt", "the court", "--max-new-tokens", 6, "--method", method]
    (generated,) = works("generate", world.memory, *options, "--sources")
    assert 0 < len(generated["tokens"]) <= 6


def test_several_methods_each_take_their_own_settings(world: SimpleNamespace) -> None:
    options = ["--method", "base,retomaton,suffix", "--min-knns", 5, "--suffix-k", 9, "--lam", 0.3]
    base, retomaton, suffix = works("eval", world.memory, "--text", world.text, *options)
    assert (base["lam"], retomaton["lam"], suffix["lam"]) == (None, 0.3, 0.3)
    assert (base["foss"], suffix["foss"], suffix["k"]) == (None, 1.0, None)
    assert 0 <= retomaton["foss"] < 1
    assert suffix["delta_nll"] == pytest.approx(suffix["nll"] - base["nll"])


def test_several_methods_are_tuned_as_each_alone(world: SimpleNamespace) -> None:
    where = ["tune", world.memory, "--text", world.text]
    own = {"knn": ["--k", 12], "suffix": ["--suffix-k", 9], "knn+buckets": ["--k", 12]}
    options = ["--k", 12, "--suffix-k", 9]
    together = works(*where, "--method", ",".join(own), *options)
    assert [one["method"] for one in together] == list(own)
    for one in together:
        (alone,) = works(*where, "--method", one["method"], *own[one["method"]])
        assert one.keys() == alone.keys()
        for name, value in one.items():
            assert value == (alone[name] if isinstance(value, str) else pytest.approx(alone[name]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "knn,sufix"], "sufix"),
        (["--method", "knn,base"], "base"),
        (["--method", ""], "at least one method"),
        (["--method", "knn,suffix", "--by", "bleu"], "take one method, and 2 are named"),
        (["--method", "knn,suffix", "--min-knns", 3], "min_knns"),
    ],
)
def test_methods_that_cannot_be_tuned_are_refused_before_any_is(
    world: SimpleNamespace, options: list[str], said: str
) -> None:
    before = works("info", world.memory)
    assert said in refused("tune", world.memory, "--text", world.text, *options)
    assert works("info", world.memory) == before


@pytest.mark.parametrize("method", ["retomaton", "suffix"])
def test_generate_continues_with_sources(world: SimpleNamespace, method: str) -> None:
    settings = RETOMATON if method == "retomaton" else SUFFIX
    options = ["--prompt", "the court shall", "--max-new-tokens", 8, "--method", method]
    options += as_options(settings | {"lam": 0.9})
    (found,) = works("generate", world.memory, *options, "--sources", "--replay", "full")
    (again,) = works("generate", world.memory, *options, "--replay", "full")
    (beams,) = works("generate", world.memory, *options, "--sources", "--num-beams", 3)
    assert again["text"] == found["text"]
    originals = {d.id: d.text for d in make_documents(12, 30)}
    for generated in (found, beams):
        assert max(token["memory_weight"] for token in generated["tokens"]) > 0.5
        for share in generated["documents"]:
            passage = share["before"] + share["token"] + share["after"]
            assert passage in originals[share["id"]]


BAD: list[tuple[str, list[Any], str]] = [
    ("retomaton", ["--min-knns", -1], "min_knns must be at least 0, got -1"),
    ("retomaton", ["--min-knns", "nan"], "min_knns must be at least 0, got nan"),
    ("retomaton", ["--max-knns", 0], "max_knns must be at least 1, got 0"),
    ("retomaton", ["--length-power", "inf"], "length_power must be at least 0 and finite"),
    ("retomaton", ["--suffix-k", 5], "'suffix_k' is no setting of retomaton: choose among"),
    ("suffix", ["--suffix-k", 0], "suffix_k must be at least 1, got 0"),
    ("suffix", ["--length-power", -1], "length_power must be at least 0 and finite, got -1"),
    ("suffix", ["--k", 5], "'k' is no setting of suffix: choose among"),
    ("suffix", ["--min-knns", 1], "'min_knns' is no setting of suffix"),
    ("suffix", ["--dedup"], "'dedup' is no setting of suffix"),
    ("suffix", ["--distances", "keys"], "'distances' is no setting of suffix"),
    ("knn", ["--max-knns", 5], "'max_knns' is no setting of knn"),
]


@pytest.mark.parametrize("verb", ["eval", "tune", "generate"])
@pytest.mark.parametrize(("method", "options", "message"), BAD, ids=str)
def test_settings_that_a_method_does_not_have(
    world: SimpleNamespace, verb: str, method: str, options: list[Any], message: str
) -> None:
    required = ["--prompt", "a"] if verb == "generate" else ["--text", world.text]
    assert message in refused(verb, world.memory, *required, "--method", method, *options)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--min-knns", "few"), ("--max-knns", "inf"), ("--suffix-k", "1.5"), ("--length-power", "x")],
)
def test_numbers_that_are_none(world: SimpleNamespace, option: str, value: str) -> None:
    result = invoke("eval", world.memory, "--text", world.text, option, value)
    assert (result.code, result.out) == (2, "")
    assert option in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("replay", ["-1", "some", "1.5", ""])
def test_replay_that_means_nothing(world: SimpleNamespace, replay: str) -> None:
    options = ["--prompt", "a", "--method", "retomaton", "--replay", replay]
    message = refused("generate", world.memory, *options)
    assert f'replay must be a number of positions or "full", got {replay!r}' in message


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("method", "option"), [("suffix", "--suffix-k"), ("retomaton", "--max-knns")]
)
def test_more_candidates_than_entries_are_all_of_them(
    world: SimpleNamespace, method: str, option: str
) -> None:
    """Not an array of a thousand million columns."""
    where = ["eval", world.memory, "--text", world.text, "--method", method, "--lam", 0.5, option]
    (all_of_them,) = works(*where, 10**9)
    (many,) = works(*where, 20_000)
    assert all_of_them["nll"] == pytest.approx(many["nll"], rel=1e-6)


# --- no keys --------------------------------------------------------------------------------------


def test_suffix_needs_no_keys(world: SimpleNamespace) -> None:
    where = [world.textual, "--text", world.text, "--method", "suffix"]
    (tuned,) = works("tune", *where)
    (record,) = works("eval", *where)
    assert record["nll"] == pytest.approx(tuned["tuned_nll"], rel=1e-4)
    assert tuned["tuned_nll"] < tuned["tuned_base_nll"] - 0.5
    options = ["--prompt", "the court", "--max-new-tokens", 6, "--method", "suffix", "--sources"]
    (generated,) = works("generate", world.textual, *options)
    assert max(token["memory_weight"] for token in generated["tokens"]) > 0.3
    shown = invoke("generate", world.textual, *options)
    assert shown.code == 0
    assert "strongest passage" in shown.out


@pytest.mark.parametrize("verb", ["eval", "tune", "generate"])
@pytest.mark.parametrize(
    ("method", "options"), [("knn", []), ("retomaton", []), ("retomaton", ["--min-knns", 0])]
)
def test_what_needs_keys_says_so(
    world: SimpleNamespace, verb: str, method: str, options: list[Any]
) -> None:
    required = ["--prompt", "a"] if verb == "generate" else ["--text", world.text]
    message = refused(verb, world.textual, *required, "--method", method, *options)
    assert "has no keys (it was built with --keys none, or" in message
    assert "use the method suffix" in message


def test_a_texts_own_entries_are_left_out_on_request(
    world: SimpleNamespace, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    corpus = world.memory.parent / "corpus.jsonl"
    given = ["--method", "knn", *as_options({"lam": 0.6, "temperature": 40.0, "k": 12})]
    (kept,) = works("eval", world.memory, "--text", corpus, *given)
    (left_out,) = works("eval", world.memory, "--text", corpus, *given, "--leave-one-out")
    memory, text = Memory.open(world.memory), list(read_documents([corpus]))
    expected = evaluate(
        tiny_model, memory, text, "knn", tokenizer=tiny_tokenizer, leave_one_out=True,
        lam=0.6, temperature=40.0, k=12,
    )  # fmt: skip
    assert left_out["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert left_out["nll"] > kept["nll"] + 0.5
    (tuned,) = works("tune", world.memory, "--text", corpus, "--k", 12)
    (without,) = works("tune", world.memory, "--text", corpus, "--k", 12, "--leave-one-out")
    assert without["tuned_nll"] > tuned["tuned_nll"] + 0.5


def test_several_memories(
    world: SimpleNamespace, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Any
) -> None:
    """As the library does with the same; weights that were found can be given."""
    both, text = [world.memory, "--memory", world.textual], ["--text", world.text]
    (tuned,) = works("tune", *both, *text, "--method", "suffix")
    assert len(tuned["weights"]) == 2
    weights = ",".join(map(str, tuned["weights"]))
    (record,) = works("eval", *both, *text, "--method", "suffix", "--weights", weights)
    assert record["nll"] == pytest.approx(tuned["nll"], abs=1e-3)
    memories = [Memory.open(path) for path in (world.memory, world.textual)]
    documents = list(read_documents([world.text]))
    expected = evaluate(tiny_model, memories, documents, "suffix", tokenizer=tiny_tokenizer)
    (record,) = works("eval", *both, *text, "--method", "suffix")
    assert record["nll"] == pytest.approx(expected.nll, rel=1e-6)
    arguments = ["--prompt", "the court", "--method", "suffix", "--max-new-tokens", 4, "--sources"]
    (made,) = works("generate", *both, *arguments, "--weights", "0,1")
    assert {s["memory"] for token in made["tokens"] for s in token["sources"]} == {1}
    for weights, message in {
        "0.5": "1 weights for 2 memories: give one for each",
        "0.8,0.8": "they must not exceed 1",
        "a,b": "--weights 'a,b' is no list of numbers: write them with commas, as in 0.7,0.3",
    }.items():
        assert message in refused("eval", *both, *text, "--method", "suffix", "--weights", weights)
        assert message in refused("generate", *both, *arguments, "--weights", weights)
    message = refused("eval", *both, *text, "--method", "knn")
    assert f"{world.textual} has no keys" in message
    for more in (["--gate", "buckets"], ["--start", world.memory], ["--leave-one-out"]):
        message = refused("tune", *both, *text, *more)
        assert "tune gates first" in message
        assert more[0] in message
    missing = refused("eval", world.memory, "--memory", tmp_path / "none", *text)
    assert "does not exist" in missing
