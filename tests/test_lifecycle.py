"""Memories that live: documents come, change and go, and every answer is that of what is left."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents, make_model, random_documents, snapshot
from folders import Build, copied, files, live_files
from nearest import Document, Memory, evaluate
from nearest.build.add import tail_to_merge
from nearest.build.cluster import GreedyMerge, KMeans, cluster_memory
from nearest.build.compact import plan_compaction
from nearest.build.compress import Compression, compress_memory
from nearest.corpus.unique import id_hash
from nearest.errors import CorpusError, FolderError, ModelError, SettingError
from nearest.index import ngrams
from nearest.store import new_segment
from nearest.store.documents import DocumentReader
from nearest.store.parts import index as index_files
from nearest.store.verify import verify

DOCUMENTS = [
    Document(d.id, d.text, {"secret": f"only in {d.id}", "number": i, "half": i % 2})
    for i, d in enumerate(random_documents())
]
TEXT = [Document("text", DOCUMENTS[1].text[:60] + DOCUMENTS[6].text[:50]), *make_documents(2, 12)]

# What memories may be made of; each is built, then changed.
KINDS: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
    "fp16": ({}, lambda path: None),
    "int8, inner product": ({"keys": "int8", "metric": "ip"}, lambda path: None),
    "no keys": ({"keys": "none"}, lambda path: None),
    "flat index": ({"index": "Flat"}, lambda path: None),
    "lists": ({"index": "IVF4,SQ8", "recall": 1.0}, lambda path: None),
    "graph": ({"index": "HNSW8"}, lambda path: None),
    "k-means": ({}, lambda path: cluster_memory(path, KMeans(20))),
    "greedy merge": ({}, lambda path: cluster_memory(path, GreedyMerge())),
    "projected": ({}, lambda path: compress_memory(path, Compression(pca=16))),
    "product codes": ({}, lambda path: compress_memory(path, Compression(keys="pq8"))),
    "merged": ({}, lambda path: compress_memory(path, Compression(merge=True))),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def started(build_memory: Build, tiny_model: PreTrainedModel, kind: str) -> Path:
    """A memory of the first documents."""
    options, change = KINDS[kind]
    path = build_memory(tiny_model, DOCUMENTS[:5], **options).path
    change(path)
    return path


@pytest.fixture
def folder(started: Path, tmp_path: Path) -> Path:
    return copied(started, tmp_path)


@pytest.fixture
def add(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    return lambda memory, documents: memory.add(tiny_model, tiny_tokenizer, documents)


def ids_of(memory: Memory) -> list[str]:
    return [memory.document(number).id for number in range(memory.documents)]


def test_what_was_added_removed_and_compacted_is_sound(folder: Path, add: Any) -> None:
    memory = add(add(Memory.open(folder), DOCUMENTS[5:7]), DOCUMENTS[7:])
    assert verify(folder) == []
    assert ids_of(memory) == [d.id for d in DOCUMENTS]
    memory = memory.remove(["doc-2", "doc-5", "doc-6"])
    assert verify(folder) == []
    assert files(folder) == live_files(folder)
    left = [d for d in DOCUMENTS if d.id not in ("doc-2", "doc-5", "doc-6")]
    assert ids_of(memory) == [d.id for d in left]
    before = {m: memory.document_tokens(m).tolist() for m in range(memory.documents)}
    memory = memory.compact()
    assert verify(folder) == []
    assert files(folder) == live_files(folder)
    assert len(memory.segments) == 1
    assert ids_of(memory) == [d.id for d in left]
    assert {m: memory.document_tokens(m).tolist() for m in range(memory.documents)} == before


# --- the same answers as of one memory built at once ----------------------------------------------


def rebuilt(
    memory: Memory, build_memory: Build, model: PreTrainedModel, kind: str, **options: Any
) -> Memory:
    """A memory built at once of what is left in another."""
    documents = [memory.document(number) for number in range(memory.documents)]
    built = build_memory(model, documents, **{**KINDS[kind][0], **options})
    KINDS[kind][1](built.path)
    return Memory.open(built.path)


def named(memory: Memory, ids: np.ndarray) -> list[Any]:
    """Entries as (document id, position): entry ids differ between memories of one content."""
    places = [memory.place(i) if i >= 0 else None for i in ids.ravel().tolist()]
    return [p and (memory.document(p.document).id, p.position) for p in places]


@pytest.mark.parametrize("spec", ["Flat", "SQ8", "HNSW8", "PCA16,HNSW8", "IVF4,Flat"])
def test_segments_with_indexes_of_their_own_are_found_in(
    spec: str,
    add: Any,
    build_memory: Build,
    tiny_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As large ones have; of small ones that are added the index is exact."""
    monkeypatch.setattr(index_files, "EXACT_BELOW", 0)
    monkeypatch.setattr(index_files, "training_rows", lambda *_: 0)
    options = {"index": spec, "recall": 1.0}
    memory = build_memory(tiny_model, DOCUMENTS[:4], **options)
    memory = add(add(memory, DOCUMENTS[4:8]), DOCUMENTS[8:])
    assert all(segment.has_index for segment in memory.segments)
    found = memory.search(memory.keys.rows(memory.valued_entries()[::9]), 1)
    itself = np.isclose(found.distances, 0, atol=1e-3)
    assert itself.mean() > 0.95  # a graph may pass it by


ALIKE = ["fp16", "int8, inner product", "flat index", "no keys"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALIKE, indirect=True)
@pytest.mark.parametrize("compacted", [False, True])
def test_candidates_and_perplexity_are_those_of_one_memory(
    folder: Path,
    add: Any,
    kind: str,
    compacted: bool,
    build_memory: Build,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """After adding, replacing and removing, by search, pointers and suffixes alike."""
    memory = add(add(Memory.open(folder), DOCUMENTS[5:8]), DOCUMENTS[8:])
    changed = Document("doc-3", DOCUMENTS[3].text[::-1], {"new": True})
    memory = memory.update(tiny_model, tiny_tokenizer, [changed]).remove(["doc-0", "doc-6"])
    if compacted:
        memory = memory.compact()
    expected = rebuilt(memory, build_memory, tiny_model, kind)
    assert (memory.documents, memory.entries) == (expected.documents, expected.entries)
    context = np.concatenate([[0], expected.document_tokens(4)[1:40]]).astype(np.int64)
    ends = np.arange(len(context))
    for found, known in zip(
        memory.ngrams(context, ends, 3), expected.ngrams(context, ends, 3), strict=True
    ):
        np.testing.assert_array_equal(found, known)
    everything = [m.longest_matches(context, ends, 10**6) for m in (memory, expected)]
    for i in range(len(ends)):
        one, other = (
            {*zip(named(m, all_.ids[i]), all_.lengths[i].tolist(), strict=True)} - {(None, 0)}
            for m, all_ in zip((memory, expected), everything, strict=True)
        )
        assert one == other
    options = {"lam": 0.6, "tokenizer": tiny_tokenizer}
    methods = {"suffix": {"suffix_k": 10**6}}
    if expected.manifest.keys is not None:
        queries = expected.keys.rows(expected.valued_entries()[::7]) + 0.25
        found, best = memory.search(queries, 9), expected.search(queries, 9)
        np.testing.assert_allclose(found.distances, best.distances, rtol=1e-5)
        for one, other, distances in zip(found.ids, best.ids, best.distances, strict=True):
            near = distances < distances[-1] - 1e-4 * abs(
                distances[-1]
            )  # of equals, either is right
            assert set(named(memory, one[near])) == set(named(expected, other[near]))
        methods |= {"knn": {"k": 40, "temperature": 30.0}, "retomaton": {"k": 40, "min_knns": 8}}
    for method, settings in methods.items():
        nll = [
            evaluate(tiny_model, m, TEXT, method, **options, **settings).nll
            for m in (memory, expected)
        ]
        assert nll[0] == pytest.approx(nll[1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16"], indirect=True)
@pytest.mark.parametrize("compacted", [False, True])
def test_samples_are_those_of_one_memory(
    folder: Path,
    add: Any,
    compacted: bool,
    build_memory: Build,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of more matches than are wanted, and of more successors than are looked at."""
    monkeypatch.setattr(ngrams, "SAMPLED", 7)
    memory = add(add(Memory.open(folder), DOCUMENTS[5:8]), DOCUMENTS[8:])
    if compacted:
        memory = memory.compact()
    expected = build_memory(tiny_model, DOCUMENTS)
    context = np.concatenate([[0], expected.document_tokens(4)[1:40]]).astype(np.int64)
    ends = np.arange(len(context))
    one, other = (m.ngrams(context, ends, 3) for m in (memory, expected))
    np.testing.assert_array_equal(one.fertility, other.fertility)
    for most in (3, 40):
        one, other = (m.longest_matches(context, ends, most) for m in (memory, expected))
        np.testing.assert_array_equal(np.sort(one.ids), np.sort(other.ids))
        nll = [
            evaluate(
                tiny_model, m, TEXT, "suffix", lam=0.6, suffix_k=most, tokenizer=tiny_tokenizer
            ).nll
            for m in (memory, expected)
        ]
        assert nll[0] == pytest.approx(nll[1], abs=1e-6)


@pytest.mark.parametrize("kind", ["lists", "graph", "projected", "product codes"], indirect=True)
def test_search_over_segments_finds_the_nearest_that_are_left(
    folder: Path, add: Any, kind: str
) -> None:
    """By the stored keys, among everything: approximate indexes are asked for all they have."""
    memory = add(add(Memory.open(folder), DOCUMENTS[5:8]), DOCUMENTS[8:]).remove(["doc-1", "doc-9"])
    entries = memory.valued_entries()
    queries = np.random.default_rng(0).normal(scale=3, size=(6, 32)).astype(np.float32)
    ids = np.tile(entries, (6, 1))
    truth = memory.key_distances(queries, ids)
    found = memory.search(queries, 12, rerank=10**6)
    if kind != "graph":  # which is not made to find everything
        np.testing.assert_allclose(found.distances, np.sort(truth, axis=1)[:, :12], rtol=1e-5)
    for distances in ("keys", "index"):
        some = memory.search(queries, 50, distances).ids
        assert set(some.ravel().tolist()) <= {*entries.tolist(), -1}
        assert (some >= 0).mean() > 0.9


def mean_of_some(memory: Memory, members: np.ndarray) -> np.ndarray:
    """The mean of the keys in the middles of eight equal parts of a cluster."""
    parts = min(8, len(members))
    middles = np.floor((np.arange(parts) + 0.5) * len(members) / parts).astype(int)
    return memory.keys.rows(members[middles]).mean(0)


@pytest.mark.parametrize("kind", ["k-means", "greedy merge"], indirect=True)
def test_clusters_take_in_what_is_added_and_lose_what_is_removed(
    folder: Path, add: Any, kind: str
) -> None:
    before = Memory.open(folder)
    memory = add(before, DOCUMENTS[5:7])
    clusters, added = memory.clusters, memory.segments[1].entries + before.positions
    assert clusters is not None
    if kind == "k-means":
        assert before.clusters is not None
        of = before.clusters.labels
        filled = np.unique(of[before.valued_entries()])
        means = np.array([mean_of_some(before, np.flatnonzero(of == c)) for c in filled])
        rows = memory.keys.rows(added)
        nearest = ((rows[:, None] - means) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(clusters.labels[added], filled[nearest])
    else:
        assert (clusters.labels[added] == -1).all()
    memory = memory.remove(["doc-2", "doc-5"])
    assert memory.clusters is not None
    np.testing.assert_array_equal(
        np.sort(memory.clusters.members),
        memory.valued_entries()[memory.clusters.labels[memory.valued_entries()] >= 0],
    )
    gone = np.setdiff1d(np.arange(memory.positions), memory.valued_entries())
    assert (memory.clusters.labels[gone] == -1).all()
    kept = memory.valued_entries()
    labels = memory.clusters.labels[kept]
    memory = memory.compact()
    assert memory.clusters is not None
    after = memory.clusters.labels[memory.valued_entries()]
    for label in np.unique(labels[labels >= 0]):  # the same entries are still together
        together = np.unique(after[labels == label])
        assert len(together) == 1
        assert ((after == together[0]) == (labels == label)).all()


@pytest.mark.parametrize("kind", ["merged"], indirect=True)
def test_merged_entries_of_removed_documents(folder: Path, add: Any) -> None:
    """What is left counts only what is left; what shared the key of one removed has none."""
    memory = add(Memory.open(folder), DOCUMENTS[5:7])
    (first, second) = memory.segments
    assert (first.merged is None, second.merged is None) == (False, True)
    stored_rows, stored_weights = np.array(first.merged.rows), np.array(first.merged.weights)
    memory = memory.remove(["doc-1", "doc-6"])
    for compacted in (False, True):
        if compacted:
            keys = memory.keys.rows(memory.keyed_entries())
            log_weights = memory.log_weights(memory.valued_entries())
            memory = memory.compact()
            np.testing.assert_array_equal(memory.keys.rows(memory.keyed_entries()), keys)
            np.testing.assert_array_equal(memory.log_weights(memory.valued_entries()), log_weights)
            break
        segment = memory.segments[0]
        heads = np.flatnonzero(stored_weights)
        for entry in first.entries.tolist():
            head = heads[stored_rows[entry]]
            if not segment.alive[entry]:
                assert entry not in segment.entries
            elif not segment.alive[head]:
                assert entry not in segment.keyed
                assert (
                    memory.key_distances(np.zeros((1, 32), np.float32), np.array([[entry]]))
                    == np.inf
                )
            else:
                sharing = [e for e in first.entries if stored_rows[e] == stored_rows[entry]]
                left = sum(segment.alive[e] for e in sharing)
                assert segment.merged.weights[head] == left
    assert verify(folder) == []


REFUSED: dict[str, tuple[Callable[[Memory, Any, Any], Any], type[Exception], str]] = {
    "an id twice": (
        lambda memory, *model: memory.add(*model, [Document("doc-1", "text")]),
        CorpusError,
        "'doc-1' in given in memory is in .* already: replace or skip it",
    ),
    "nothing to add": (lambda memory, *model: memory.add(*model, []), CorpusError, "no documents"),
    "an unknown id": (
        lambda memory, *model: memory.update(*model, [Document("new", "text")]),
        CorpusError,
        "'new' in given in memory is not in .*: add it",
    ),
    "an id to be removed": (
        lambda memory, *_: memory.remove(["doc-1", "doc-99"]),
        CorpusError,
        "no document with the id 'doc-99'",
    ),
    "metadata": (
        lambda memory, *_: memory.remove(where={"half": "0", "secret": "x"}),
        CorpusError,
        "no document with half=0, secret=x: nothing was removed",
    ),
    "all": (
        lambda memory, *_: memory.remove([f"doc-{i}" for i in range(5)]),
        CorpusError,
        "nothing would be left",
    ),
    "nothing": (lambda memory, *_: memory.remove(), SettingError, "say which documents"),
    "too much": (
        lambda memory, *_: memory.remove(["doc-1"], where={"a": "b"}),
        SettingError,
        "say which documents",
    ),
    "another model": (
        lambda memory, _, tokenizer: memory.add(make_model("llama"), tokenizer, ["text"]),
        ModelError,
        "is not the one that built",
    ),
}


@pytest.mark.parametrize("kind", ["fp16"], indirect=True)
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_changes_nothing(
    folder: Path,
    what: str,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    call, error, message = REFUSED[what]
    before = snapshot(folder)
    with pytest.raises(error, match=message):
        call(Memory.open(folder), tiny_model, tiny_tokenizer)
    assert snapshot(folder) == before


@pytest.mark.parametrize("kind", ["fp16"], indirect=True)
def test_documents_are_removed_by_metadata_and_by_id(folder: Path) -> None:
    assert ids_of(Memory.open(folder).remove(where={"half": "1"})) == ["doc-0", "doc-2", "doc-4"]
    assert ids_of(Memory.open(folder).remove(where={"half": "0", "number": "2"})) == [
        "doc-0",
        "doc-4",
    ]
    memory = Memory.open(folder).remove(["doc-4"])
    assert ids_of(memory) == ["doc-0"]
    with pytest.raises(CorpusError, match="no document with the id 'doc-4'"):
        memory.remove(["doc-4"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16"], indirect=True)
def test_readers_keep_their_generation_until_they_refresh(folder: Path, add: Any) -> None:
    reader = Memory.open(folder)
    assert reader.refresh() is reader
    queries = reader.keys.rows(reader.valued_entries()[:9])
    before = reader.search(queries, 5)
    add(reader, DOCUMENTS[5:]).remove(["doc-0"]).compact()
    assert ids_of(reader) == [d.id for d in DOCUMENTS[:5]]
    np.testing.assert_array_equal(reader.search(queries, 5).ids, before.ids)
    fresh = reader.refresh()
    assert ids_of(fresh) == [d.id for d in DOCUMENTS[1:]]
    assert (reader.manifest.version, fresh.manifest.version) == (1, 4)
    assert fresh.compact() is fresh  # nothing is left to be done


@pytest.mark.parametrize("kind", ["fp16"], indirect=True)
def test_compacting_needs_room(folder: Path, add: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = add(Memory.open(folder), DOCUMENTS[5:])
    needs = plan_compaction(folder)
    stored = sum(f.size for r in memory.manifest.segments for f in r.files.values())
    assert (needs.segments, needs.removed, needs.bytes_needed) == (2, 0, stored)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=stored - 1))
    before = snapshot(folder)
    with pytest.raises(FolderError, match=f"needs {stored:,} bytes until .* make room"):
        memory.compact()
    assert snapshot(folder) == before


# --- erased ---------------------------------------------------------------------------------------


def everything_in(folder: Path) -> bytes:
    """All bytes below a folder, names of files included, decompressed where they are."""
    parts = []
    for name, data in snapshot(folder).items():
        parts.append(name.encode())
        if name.endswith(".zst"):
            reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
            data = reader.read()
        parts.append(data or b"")
    return b"\0".join(parts)


def traces_of(memory: Memory, number: int) -> dict[str, list[bytes]]:
    """What tells of a document: pieces of its text and tokens, its id, metadata and keys."""
    document, tokens = memory.document(number), memory.document_tokens(number)
    text = json.dumps(document.text, ensure_ascii=False)[1:-1].encode()
    traces = {
        "text": [text[i : i + 12] for i in range(0, len(text) - 12, 5)],
        "tokens": [tokens[i : i + 8].tobytes() for i in range(1, len(tokens) - 8, 5)],
        "id": [document.id.encode(), id_hash(document.id).tobytes()],
        "metadata": [str(document.metadata["secret"]).encode()],
    }
    (segment,) = memory.segments
    if memory.manifest.keys is not None:
        entries = np.arange(segment.offsets[number], segment.offsets[number + 1] - 1)
        stored = np.load(segment.paths["keys"])
        if segment.merged is not None:
            heads = segment.searched
            entries = segment.merged.rows[heads[np.isin(heads, entries)]]
        traces["keys"] = [stored[row].tobytes() for row in entries[2:]]
    return traces


def test_compacting_erases_every_trace(folder: Path, kind: str, add: Any) -> None:
    memory = Memory.open(folder)
    traces = traces_of(memory, 3)
    memory = add(memory, DOCUMENTS[5:6])
    memory = memory.remove(["doc-3"])
    found = everything_in(folder)
    for pieces in traces.values():
        assert all(piece in found for piece in pieces)
    memory.compact()
    found = everything_in(folder)
    for what, pieces in traces.items():
        if (what, kind) != ("keys", "product codes"):  # a byte a part: other keys have the same
            assert not [piece for piece in pieces if piece in found], what


# --- segments of bounded size ---------------------------------------------------------------------

BOUNDED = ["no keys", "fp16", "lists", "k-means", "merged"]


@pytest.mark.parametrize("kind", BOUNDED, indirect=True)
def test_no_segment_grows_beyond_what_a_build_makes(
    folder: Path, add: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory.open(folder)
    largest = memory.positions
    monkeypatch.setattr(new_segment, "SEGMENT_TOKENS", largest)
    more = [replace(d, id=f"more-{d.id}", text=f"{d.text} once more") for d in DOCUMENTS]
    longest = 1 + max(len(d.text.encode()) for d in more)
    memory = add(memory, more)
    assert memory.manifest.version == Memory.open(folder).manifest.version
    assert len(memory.segments) > 2  # in one generation
    assert all(segment.record.tokens <= largest + longest for segment in memory.segments)
    assert ids_of(memory) == [*(d.id for d in DOCUMENTS[:5]), *(d.id for d in more)]
    assert verify(folder) == []
    tokens = [memory.document_tokens(n).tolist() for n in range(memory.documents)]

    for number in range(4):  # small ones, which are merged as long as they fit
        memory = add(memory, [Document(f"small-{number}", "the law is the law")])
    assert all(segment.record.tokens <= largest + longest for segment in memory.segments)
    untouched = memory.segments[0].record
    removed = [more[1].id, "small-2"]
    before = {n: memory.document_tokens(n).tolist() for n in range(memory.documents)}
    left = [name for name in ids_of(memory) if name not in removed]
    expected = [before[n] for n, name in enumerate(ids_of(memory)) if name not in removed]
    memory = memory.remove(removed)
    needs = plan_compaction(folder)
    assert needs.bytes_needed < sum(f.size for f in memory.manifest.file_records())
    memory = memory.compact()
    assert verify(folder) == []
    assert files(folder) == live_files(folder)
    assert needs.segments_after == len(memory.segments) > 1
    assert all(segment.record.tokens <= largest + longest for segment in memory.segments)
    assert memory.segments[0].record == untouched
    assert ids_of(memory) == left
    assert [memory.document_tokens(n).tolist() for n in range(memory.documents)] == expected
    assert tokens[0] == expected[0]
    assert more[1].text.encode() not in everything_in(folder)
    assert b"small-2" not in everything_in(folder)
    assert memory.compact() is memory
    if memory.manifest.keys is not None:  # each entry finds itself, or its equal
        queries = np.concatenate([s.keys.rows(s.searched[:3]) for s in memory.segments])
        found = memory.search(queries, 8).ids
        assert memory.key_distances(queries, found).min(axis=1).max() < 1e-3


@pytest.mark.parametrize("kind", ["lists"], indirect=True)
def test_segments_compacted_together_share_one_trained_index(
    folder: Path, add: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory.open(folder)
    monkeypatch.setattr(new_segment, "SEGMENT_TOKENS", memory.positions)
    memory = add(memory, DOCUMENTS[5:])
    for gone in (["doc-6"], ["doc-0", "doc-7"]):  # one segment stays; then none
        memory = memory.remove(gone).compact()
        assert verify(folder) == []
        indexes = [segment.record.index for segment in memory.segments]
        assert len({index.filled_from for index in indexes if index.filled_from}) <= 1
        assert sum(index.trained is not None for index in indexes) == 1


# --- many additions -------------------------------------------------------------------------------


def test_segments_of_a_size_are_merged_in_tiers() -> None:
    sizes: list[int] = [5000]
    copied_entries = 0
    for _ in range(600):
        sizes.append(10)
        tail = tail_to_merge(sizes, 10_000)
        if tail:
            copied_entries += sum(sizes[-tail:])
            sizes[-tail:] = [sum(sizes[-tail:])]
        assert len(sizes) <= 1 + 5 * 3
    assert sum(sizes) == 5000 + 6000
    assert sizes[0] == 5000
    assert copied_entries < 5 * 6000
    assert tail_to_merge([3], 1_000) == 0
    assert tail_to_merge([9] * 4, 1_000) == 4
    assert tail_to_merge([100, *[9] * 3], 1_000) == 0
    assert tail_to_merge([1, 100, *[9] * 4], 1_000) == 4
    assert tail_to_merge([*[40] * 3, *[9] * 4], 1_000) == 7  # the four make one more of the larger
    assert tail_to_merge([*[40] * 3, *[9] * 4], 100) == 4
    assert tail_to_merge([9] * 4, 35) == 0


@pytest.mark.parametrize("kind", ["fp16", "k-means"], indirect=True)
def test_many_additions_leave_few_segments(folder: Path, add: Any) -> None:
    memory = Memory.open(folder)
    for number in range(9):
        memory = add(memory, [Document(f"n{number}", f"{number} times the law")])
        if number == 2:
            memory = memory.remove(["n1"])
    assert len(memory.segments) == 4
    assert verify(folder) == []
    assert files(folder) == live_files(folder)
    names = [f"n{number}" for number in range(9) if number != 1]
    assert ids_of(memory) == [*(d.id for d in DOCUMENTS[:5]), *names]
    assert b"1 times the law" not in everything_in(folder)


def test_documents_whose_ids_have_one_hash_are_told_apart(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("nearest.store.stored_ids", "nearest.store.parts.corpus"):
        monkeypatch.setattr(f"{module}.id_hash", lambda name: np.uint64(len(name)))
    model = tiny_model, tiny_tokenizer
    documents = [Document(name, f"text of {name}") for name in ("aa", "bb", "ccc", "dd")]
    memory = Memory.build(*model, documents, tmp_path / "m", keys="none", tune=False)
    memory = memory.add(*model, [Document("ee", "new")]).remove(["dd", "aa"])
    memory = memory.update(*model, [Document("bb", "another")])
    with pytest.raises(CorpusError, match="'ff'"):
        memory.update(*model, [Document("ff", "not there")])
    with pytest.raises(CorpusError, match="'ff'"):
        memory.remove(["ff"])
    left = {d.id: d.text for d in map(memory.refresh().document, range(memory.documents))}
    assert left == {"ccc": "text of ccc", "ee": "new", "bb": "another"}


def test_frames_of_documents_are_read_once_whatever_the_order_of_the_ids(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nearest.store.documents._FRAME_BYTES", 256)
    model = tiny_model, tiny_tokenizer
    documents = [Document(f"doc-{i}", f"text {i}") for i in range(60)]
    memory = Memory.build(*model, documents, tmp_path / "m", keys="none", tune=False)
    frames, read = memory.segments[0].record.frames, list[int]()
    assert frames > 10

    def counted(reader: DocumentReader, frame: int) -> list[bytes]:
        read.append(frame)
        return read_frame(reader, frame)

    read_frame = DocumentReader._read_frame
    monkeypatch.setattr(DocumentReader, "_read_frame", counted)
    order = np.random.default_rng(0).permutation(60)[:40]
    memory.update(*model, [Document(f"doc-{i}", "new") for i in order])
    assert len(read) <= frames + 1
