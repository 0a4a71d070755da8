"""RetoMaton: each step against plain lists, the method against a simulation of the paper's."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automaton_oracle import Corpus, Oracle, log_softmax
from conftest import documents_apart, in_two_segments, make_documents, make_tokenizer
from nearest import Document, Memory, evaluate
from nearest.build.cluster import GreedyMerge, KMeans, cluster_memory
from nearest.corpus.windows import windows
from nearest.encode import encoder
from nearest.index.clusters import Clusters
from nearest.index.neighbours import NO_ENTRY
from nearest.models.scoring import ScoredBlock, Scorer
from nearest.progress import no_progress
from nearest.retrieval import automaton, step
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.queries import Queries
from nearest.retrieval.settings import resolve_settings
from oracle import keys_and_logits
from plain_kernels import plain_extend

INF = float("inf")

# --- one step -------------------------------------------------------------------------------------

ENTRIES = st.integers(NO_ENTRY, 14)


def rows_of(width: int) -> st.SearchStrategy[np.ndarray]:
    row = st.lists(ENTRIES, min_size=width, max_size=width)
    rows = st.lists(row, min_size=1, max_size=4)
    return rows.map(lambda lists: np.array(lists, dtype=np.int64).reshape(len(lists), width))


pointer_rows = st.integers(0, 12).flatmap(rows_of)
clusterings = st.lists(st.integers(-1, 4), min_size=15, max_size=15).map(
    lambda labels: Clusters.from_labels(np.array(labels), 5)
)


def as_lists(ids: np.ndarray) -> list[list[int]]:
    return [[i for i in row if i != NO_ENTRY] for row in ids.tolist()]


@given(pointer_rows, st.none() | clusterings, st.integers(1, 20))
@settings(max_examples=300)
def test_extending_equals_plain_lists(
    pointers: np.ndarray, clusters: Clusters | None, most: int
) -> None:
    extended = automaton.extend(pointers, clusters, most)
    assert as_lists(extended) == plain_extend(pointers, clusters, most)
    assert extended.shape[1] <= most
    for row in extended.tolist():  # the filling stands at the end
        assert NO_ENTRY not in row[: row.index(NO_ENTRY) if NO_ENTRY in row else None]


@given(pointer_rows, rows_of(6))
def test_repeated_entries_are_dropped(ids: np.ndarray, others: np.ndarray) -> None:
    others = np.resize(others, (len(ids), 6))
    kept = automaton.without_repeated(ids, others)
    for row, other, found in zip(ids.tolist(), others.tolist(), kept.tolist(), strict=True):
        for place, entry in enumerate(row):
            repeated = entry in other or entry in row[:place]
            assert found[place] == (NO_ENTRY if repeated else entry)


@given(st.data())
def test_those_that_agreed_stand_nearest_first(data: st.DataObject) -> None:
    ids = data.draw(pointer_rows)
    numbers = st.lists(st.integers(0, 3), min_size=ids.size, max_size=ids.size)
    distances = np.array(data.draw(numbers), dtype=np.float32).reshape(ids.shape)
    values = np.array(data.draw(numbers), dtype=np.int64).reshape(ids.shape)
    values[ids == NO_ENTRY], distances[ids == NO_ENTRY] = NO_ENTRY, np.inf
    tokens = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids))))
    expected = []
    for i, token in enumerate(tokens):
        right = [j for j in range(ids.shape[1]) if ids[i, j] >= 0 and values[i, j] == token]
        expected.append([int(ids[i, j]) for j in sorted(right, key=lambda j: distances[i, j])])
    assert as_lists(automaton.agreeing(ids, distances, values, tokens)) == expected


def test_many_clusters_and_pointers_at_full_width() -> None:
    """Sizes at which a hash table collides, with numbers of clusters far apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 100_000, size=20_000) // 7 * 7
    clusters = Clusters.from_labels(labels, 100_000)
    pointers = rng.integers(-1, 20_000, size=(5, 900))
    pointers[0] = pointers[0, 0]
    pointers[1, 40:] = NO_ENTRY
    for most in (50, 900, 1024, 5000):
        extended = automaton.extend(pointers, clusters, most)
        assert as_lists(extended) == plain_extend(pointers, clusters, most)


# --- the memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_successors_stop_where_a_document_ends(
    cut: int, build_memory: Callable[..., Memory], tiny_model: Any, tmp_path: Path
) -> None:
    """Documents down to a single token, in one segment or in two."""
    lengths = np.random.default_rng(cut).integers(1, 6, size=40).tolist()
    documents = [Document(f"doc-{i}", "x" * length) for i, length in enumerate(lengths)]
    parts = [part for part in (documents[:cut], documents[cut:]) if part]
    memories = [build_memory(tiny_model, part, keys="none") for part in parts]
    memory = in_two_segments(memories, tmp_path / "m") if cut else memories[0]
    ends = (np.cumsum([length + 1 for length in lengths]) - 1).tolist()  # after its start token
    valued = [i for i in range(memory.tokens) if i not in ends]
    expected = [i + 1 if i + 1 in valued else NO_ENTRY for i in valued]
    assert len({i for i in expected if i >= 0}) == sum(lengths) - len(lengths)
    ids = np.array([NO_ENTRY, *valued, NO_ENTRY])
    assert memory.successors(ids).tolist() == [NO_ENTRY, *expected, NO_ENTRY]
    square = np.stack([ids, ids[::-1]])
    np.testing.assert_array_equal(memory.successors(square)[1], memory.successors(ids)[::-1])
    assert memory.successors(np.empty((2, 0), np.int64)).shape == (2, 0)


DOCUMENTS = documents_apart(12, 30)


@pytest.fixture(scope="module")
def joined(
    build_memory: Callable[..., Memory],
    tiny_model: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Memory, Memory]:
    """One memory in two segments, and in one."""
    parts = [build_memory(tiny_model, part) for part in (DOCUMENTS[:5], DOCUMENTS[5:])]
    path = tmp_path_factory.mktemp("joined") / "joined.memory"
    return in_two_segments(parts, path), build_memory(tiny_model, DOCUMENTS)


def test_two_segments_point_and_match_as_one(joined: tuple[Memory, Memory]) -> None:
    two, one = joined
    rng = np.random.default_rng(0)
    ids = np.concatenate([one.valued_entries(), [NO_ENTRY] * 7])
    rng.shuffle(ids)
    ids = ids[: len(ids) // 4 * 4].reshape(4, -1)
    np.testing.assert_array_equal(two.values(ids), one.values(ids))
    np.testing.assert_array_equal(two.successors(ids), one.successors(ids))
    queries = rng.normal(scale=3, size=(4, 32)).astype(np.float32)
    np.testing.assert_allclose(  # keys of batches of other shapes may round differently
        two.key_distances(queries, ids), one.key_distances(queries, ids), rtol=2e-3
    )
    context = one.segments[0].tokens[300:500].astype(np.int64)
    ends = np.array([3, 60, 100, 199])
    np.testing.assert_array_equal(
        two.match_lengths(ids, context, ends), one.match_lengths(ids, context, ends)
    )
    for most in (1, 5, 64, 10_000):
        found, expected = (m.longest_matches(context, ends, most) for m in joined)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        np.testing.assert_array_equal(found.longest, expected.longest)
        np.testing.assert_array_equal(found.lengths, two.match_lengths(found.ids, context, ends))
    for ours, theirs in zip(found.ids, expected.ids, strict=True):  # where all of them fit
        assert sorted(ours) == sorted(theirs)


# --- the whole method -----------------------------------------------------------------------------

TOKENIZER = make_tokenizer()
TEXTS = [
    np.array([0, *TOKENIZER(d.text, add_special_tokens=False)["input_ids"]])
    for d in make_documents(4, 34, seed=9)
]
TEXTS[1:1] = [np.array([0]), np.array([0, TEXTS[0][1]])]  # nothing to predict, and one token
WEIGHING = {"lam": 0.4, "temperature": 60.0}


@dataclass(frozen=True)
class World:
    """A memory of `tiny_model`, what the model makes of the texts, and the same by plain passes."""

    memory: Memory
    corpus: Corpus
    blocks: list[ScoredBlock]
    states: list[tuple[np.ndarray, np.ndarray]]

    texts: list[np.ndarray]

    def walked(self, method: str, **given: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each text, the log-probability of every token and whether there was a search."""
        lookup = Lookup(self.memory, method, resolve_settings(method, self.memory, **given))
        found: list[list[float]] = [[] for _ in self.texts]
        searched: list[list[bool]] = [[] for _ in self.texts]
        states: dict[int, step.State] = {}
        for block in self.blocks:
            log_probs, made = np.empty(len(block.targets)), np.empty(len(block.targets), bool)
            known = block.queries, block.sequences, block.targets, block.lm_log_probs
            for one in step.steps(lookup, *known, states):
                log_probs[one.rows] = one.log_probs
                made[one.rows] = one.prediction.candidates.searched
            for document, value, search in zip(block.documents, log_probs, made, strict=True):
                found[document].append(value)
                searched[document].append(search)
        return [np.array(row) for row in found], [np.array(row) for row in searched]


def states_in_windows(memory: Memory, model: Any, tokens: np.ndarray) -> tuple[Any, Any]:
    """Keys and log-probabilities at all positions but the last, every window on its own."""
    keys, log_probs = [np.empty((0, 32))], [np.empty((0, 258))]
    for part in windows(len(tokens), 64, 32):
        window = torch.from_numpy(tokens[part.start : part.stop])
        hidden, logits = keys_and_logits(model, window)
        new = slice(part.first - part.start, None)
        keys.append(hidden.double().numpy()[new])
        log_probs.append(log_softmax(logits)[new])
    return np.concatenate(keys), np.concatenate(log_probs)


def world_of(memory: Memory, model: Any, texts: list[np.ndarray] = TEXTS, **options: Any) -> World:
    blocks = list(Scorer.prepare(model, memory, texts, **options).blocks(no_progress, ""))
    states = [states_in_windows(memory, model, tokens) for tokens in texts]
    return World(memory, Corpus(memory), blocks, states, texts)


@pytest.fixture(scope="module")
def worlds(
    build_memory: Callable[..., Memory],
    tiny_model: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, World]:
    """Memories of several documents and of one, in segments and with clusters of either kind."""
    text = " ".join(d.text for d in make_documents(9, 30, seed=4))
    plain = {
        "documents": build_memory(tiny_model, DOCUMENTS),
        "one document": build_memory(tiny_model, [Document("one", text)]),
        "segments": in_two_segments(
            [build_memory(tiny_model, part) for part in (DOCUMENTS[:5], DOCUMENTS[5:])],
            tmp_path_factory.mktemp("joined") / "joined.memory",
        ),
    }
    plain["no keys"] = build_memory(tiny_model, DOCUMENTS, keys="none")
    found = {name: world_of(memory, tiny_model) for name, memory in plain.items()}
    for name, how in (("k-means", KMeans(60)), ("greedy merge", GreedyMerge())):
        for kind in ("documents", "one document"):
            path = tmp_path_factory.mktemp("clustered") / "c.memory"
            shutil.copytree(plain[kind].path, path)
            cluster_memory(path, how)
            memory = Memory.open(path)
            found[f"{kind}, {name}"] = replace(found[kind], memory=memory, corpus=Corpus(memory))
    return found


CASES: list[tuple[str, dict[str, Any]]] = [
    ("documents", {"k": 24}),
    ("documents", {"k": 24, "min_knns": INF}),
    ("documents", {"k": 24, "min_knns": 3, "dedup": True}),
    ("documents", {"k": 24, "min_knns": 20, "max_knns": 5}),
    ("documents", {"k": 24, "min_knns": 0}),
    ("documents", {"k": 10_000, "min_knns": 2}),
    ("documents", {"k": 24, "min_knns": 3, "length_power": 2.0}),
    ("segments", {"k": 24, "min_knns": 3}),
    ("documents, k-means", {"k": 24}),
    ("documents, k-means", {"k": 24, "min_knns": 20}),
    ("documents, k-means", {"k": 24, "min_knns": 20, "max_knns": 5}),
    ("documents, k-means", {"k": 24, "min_knns": INF, "max_knns": 9, "dedup": True}),
    ("documents, greedy merge", {"k": 24, "min_knns": 3}),
    ("documents, greedy merge", {"k": 24, "min_knns": INF, "dedup": True}),
    ("one document", {"k": 3}),
    ("one document", {"k": 3, "min_knns": 3, "max_knns": 1}),
    ("one document", {"k": 3, "min_knns": INF, "dedup": True}),
    ("one document, k-means", {"k": 3, "min_knns": 3, "dedup": True}),
    ("one document, k-means", {"k": 3, "min_knns": 20, "max_knns": 5}),
    ("one document, greedy merge", {"k": 3, "min_knns": 3, "length_power": 3.0}),
]


def check_against_the_simulation(
    world: World, method: str, given: dict[str, Any], own: Sequence[int | None] = (None,) * 99
) -> None:
    log_probs, searched = world.walked(method, **WEIGHING, **given)
    compared = 0
    for tokens, states, found, made, entry in zip(
        world.texts, world.states, log_probs, searched, own[: len(world.texts)], strict=True
    ):
        oracle = Oracle(world.corpus, method, **WEIGHING, **given, own=entry)
        told = oracle.predict(*states, tokens.tolist())
        clear = np.array([one.clear for one in told], dtype=bool)
        expected = np.array([p.log_probs[t] for p, t in zip(told, tokens[1:], strict=True)])
        np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-3, atol=1e-4)
        assert made[clear].tolist() == [one.searched for one in told if one.clear]
        compared += clear.sum()
    assert compared > 0.8 * sum(len(tokens) - 1 for tokens in world.texts)


@pytest.mark.filterwarnings("ignore:k = ")
@pytest.mark.parametrize(("kind", "given"), CASES, ids=str)
def test_every_token_equals_the_simulation(
    worlds: dict[str, World], kind: str, given: dict[str, Any]
) -> None:
    check_against_the_simulation(worlds[kind], "retomaton", given)


@pytest.mark.parametrize(
    ("kind", "method", "given"),
    [
        ("documents", "knn", {"k": 24, "length_power": 3.0}),
        ("documents", "suffix", {"suffix_k": 5, "length_power": 0.0}),
        ("documents", "suffix", {"suffix_k": 40, "length_power": 4.0}),
        ("segments", "suffix", {"suffix_k": 10_000, "length_power": 2.0}),
        ("segments", "knn", {"k": 24, "length_power": 1.0}),
        ("no keys", "suffix", {"suffix_k": 5, "length_power": 1.0}),
        ("no keys", "suffix", {"suffix_k": 64, "length_power": 4.0}),
    ],
    ids=str,
)
def test_match_lengths_weigh_as_a_scan_says(
    worlds: dict[str, World], kind: str, method: str, given: dict[str, Any]
) -> None:
    check_against_the_simulation(worlds[kind], method, given)


@pytest.mark.parametrize(
    ("kind", "method", "given"),
    [
        ("documents", "knn", {"k": 24}),
        ("documents", "knn", {"k": 10_000}),
        ("documents", "retomaton", {"k": 24, "min_knns": 3}),
        ("documents, k-means", "retomaton", {"k": 24, "min_knns": 20, "max_knns": 5}),
        ("documents", "suffix", {"suffix_k": 5, "length_power": 4.0}),
        ("segments", "suffix", {"suffix_k": 10_000, "length_power": 4.0}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:k = ")
def test_a_text_that_stands_in_the_memory_is_predicted_without_itself(
    worlds: dict[str, World], tiny_model: Any, kind: str, method: str, given: dict[str, Any]
) -> None:
    """Left out by id, wherever it stands among the candidates."""
    memory = worlds[kind].memory
    starts = np.cumsum([0, *(len(memory.document_tokens(i)) for i in range(6))])
    world = world_of(
        memory,
        tiny_model,
        [memory.document_tokens(i).astype(int) for i in (5, 2)],
        leave_one_out=True,
    )
    check_against_the_simulation(world, method, given, [int(starts[i]) for i in (5, 2)])


@pytest.mark.parametrize("method", ["knn", "retomaton", "suffix"])
def test_a_text_costs_more_without_itself_and_a_new_one_the_same(
    worlds: dict[str, World], tiny_model: Any, method: str
) -> None:
    memory = worlds["segments"].memory
    texts = [memory.document_tokens(6).astype(int), TEXTS[0]]
    given = {"suffix_k": 10_000} if method == "suffix" else {"k": 24}
    kept, left_out = (
        evaluate(tiny_model, memory, texts, method, **WEIGHING, **given, leave_one_out=exclude)
        for exclude in (False, True)
    )
    dearer = left_out.document_nll - kept.document_nll
    assert dearer[0] > 1
    assert dearer[1] == pytest.approx(0, abs=1e-4)


# No neighbour that is the last to be chosen, so that rounding decides nothing.
ALL = {**WEIGHING, "k": 1129, "min_knns": 30, "max_knns": 1200}


@pytest.mark.parametrize("kind", ["documents", "documents, k-means"])
def test_evaluation_sums_what_was_predicted(
    worlds: dict[str, World], kind: str, tiny_model: Any
) -> None:
    world = worlds[kind]
    log_probs, searched = world.walked("retomaton", **ALL)
    knn, found = evaluate(tiny_model, world.memory, TEXTS, ["knn", "retomaton"], **ALL)
    assert world.memory.entries == ALL["k"]
    np.testing.assert_allclose(found.document_nll, [-row.sum() for row in log_probs], rtol=1e-6)
    made = np.concatenate(searched)
    assert found.foss == pytest.approx(1 - made.mean())
    assert 0.1 < found.foss < 1
    assert knn.foss == 0
    assert abs(knn.nll - found.nll) > 0.01  # else the pointers were not there


@pytest.mark.slow
@pytest.mark.parametrize("method", ["retomaton", "suffix"])
def test_neither_blocks_nor_batches_nor_company_change_a_document(
    worlds: dict[str, World], tiny_model: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    memory = worlds["documents, k-means"].memory
    given = ALL if method == "retomaton" else WEIGHING

    def nll(texts: list[np.ndarray], **options: Any) -> np.ndarray:
        return evaluate(tiny_model, memory, texts, method, **given, **options).document_nll

    expected = nll(TEXTS)
    np.testing.assert_allclose(nll(TEXTS[2:3])[0], expected[2], rtol=1e-5)
    np.testing.assert_allclose(nll(TEXTS[::-1], batch_size=3)[::-1], expected, rtol=1e-5)
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "_GROUP_BYTES", 1)
        patched.setattr(step, "_AT_ONCE", 2)
        scorer = Scorer.prepare(tiny_model, memory, TEXTS, batch_size=1)
        blocks = list(scorer.blocks(no_progress, ""))
        longest = int(np.argmax([len(tokens) for tokens in TEXTS]))
        assert sum(longest in block.documents for block in blocks) >= 3
        assert any(len(set(block.documents.tolist())) > 1 for block in blocks)
        twice = nll([*TEXTS, *TEXTS], batch_size=1)
        np.testing.assert_allclose(twice, [*expected, *expected], rtol=1e-5)
    joined = nll([np.concatenate(TEXTS)])  # as one document it is another prediction
    assert abs(joined[0] - expected.sum()) > 0.1


# --- distances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("distances", ["keys", "index"])
def test_neighbours_and_pointers_are_measured_alike(
    build_memory: Callable[..., Memory], tiny_model: Any, metric: str, distances: str
) -> None:
    """By coarse codes or by keys, never by both in one softmax; smaller is nearer."""
    memory = build_memory(tiny_model, DOCUMENTS, index="IVF4,PQ4x4", nprobe=4, metric=metric)
    settings = resolve_settings("retomaton", memory, distances=distances, min_knns=INF, k=300)
    lookup = Lookup(memory, "retomaton", settings)
    entries = memory.valued_entries()[::7][:60]
    keys = memory.keys.rows(entries[:5]) + np.float32(0.1)
    queries = Queries(keys, np.zeros(1, np.int64), np.zeros(5, np.int64))
    found = lookup.candidates(queries, np.tile(entries, (5, 1)))
    rows = memory.keys.rows(np.arange(memory.tokens)).astype(np.float64)
    stored = ((rows - keys[:, None]) ** 2).sum(-1) if metric == "l2" else -(keys @ rows.T)
    dense, pointed = found.of("dense"), found.of("pointers")
    both = 0
    for i in range(5):
        near = dict(zip(found.ids[i, dense], found.distances[i, dense], strict=True))
        for entry, distance in zip(found.ids[i, pointed], found.distances[i, pointed], strict=True):
            if distances == "keys":
                assert distance == pytest.approx(stored[i, entry], rel=1e-3, abs=1e-2)
            if entry in near:
                both += 1
                assert distance == pytest.approx(near[entry], rel=1e-3, abs=1e-2)
    assert both > 50
    errors = np.abs(found.distances - np.take_along_axis(stored, found.ids, 1))
    errors = errors[found.ids >= 0]
    assert (errors.max() > 1) == (distances == "index")  # codes are not the keys


def test_settings_that_older_memories_name_otherwise_are_read(
    worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {"matches": 7, "lam": 0.3}
    monkeypatch.setattr(Memory, "settings", lambda *_: stored)
    settings = resolve_settings("suffix", worlds["documents"].memory)
    assert (settings.suffix_k, settings.lam) == (7, 0.3)
    stored |= {"candidates": 99, "k": 5}
    assert resolve_settings("knn", worlds["documents"].memory).rerank == 99
