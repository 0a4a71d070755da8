"""From documents to tables of neighbours: against brute force, in parts, and after kills."""

import dataclasses
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from nearest import Memory
from nearest.errors import FolderError, ModelError, SettingError
from nearest.index.vectors import build_vector_index
from nearest.retro.data import database as database_module
from nearest.retro.data import stages
from nearest.retro.data.chunks import Chunks
from nearest.retro.data.database import ChunkDatabase, Part
from nearest.retro.data.dataset import RetroDataset
from nearest.retro.data.embedders import Embedder
from nearest.retro.data.filters import Filters, Judge
from nearest.retro.data.folders import save_array
from nearest.retro.data.live import MemoryNeighbours
from nearest.retro.data.search import valid_neighbours
from nearest.retro.data.stages import (
    Databases,
    TableOptions,
    check_table,
    chunk_documents,
    chunk_memory,
    differing_rows,
    make_table,
)
from nearest.retro.data.table import NeighbourTable
from nearest.store.chunks import ChunkVectors
from retro_data import M, database, documents, embedder, stored, tokenizer, words

TEXTS = documents(20, longest=20)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(database_module, "BLOCK", 7)
    monkeypatch.setattr(stages, "BLOCK", 7)


def brute_force(
    vectors: np.ndarray, queries: np.ndarray, allowed: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """ids and squared distances of the k nearest allowed ones, −1 and +inf after the last."""
    far = ((queries[:, None].astype(np.float64) - vectors[None]) ** 2).sum(-1)
    far = np.where(allowed, far, np.inf)
    order = np.argsort(far, axis=1, kind="stable")[:, :k]
    distances = np.take_along_axis(far, order, 1)
    ids = np.where(np.isinf(distances), -1, order)
    missing = k - ids.shape[1]
    pads = ((0, 0), (0, max(missing, 0)))
    return np.pad(ids, pads, constant_values=-1), np.pad(distances, pads, constant_values=np.inf)


def same(table: NeighbourTable, ids: np.ndarray, distances: np.ndarray) -> None:
    np.testing.assert_allclose(table.distances, distances, atol=1e-4)
    apart = np.abs(table.distances - distances) < 1e-4
    assert ((table.ids == ids) | apart).all()
    assert ((table.ids == -1) == (ids == -1)).all()


def test_neighbours_are_the_nearest_of_other_documents(tmp_path: Path) -> None:
    texts = [*TEXTS, TEXTS[3]]  # a copy under another name
    own = database(tmp_path / "d", texts)
    table = make_table(own, None, tmp_path / "t", TableOptions(neighbours=5))
    owner = own.chunks.document_of(np.arange(len(own.chunks)))
    owner = np.where(owner == len(texts) - 1, 3, owner)
    vectors = np.asarray(own.embeddings, np.float32)
    same(table, *brute_force(vectors, vectors, owner[:, None] != owner[None], 5))
    assert table.record["counts"]["short"] == 0
    assert table.record["counts"]["struck"]["same_document"] > len(table)  # at least itself


def test_another_corpus_and_several_databases(tmp_path: Path) -> None:
    one, two = database(tmp_path / "1", TEXTS[:8]), database(tmp_path / "2", TEXTS[8:])
    queries = database(tmp_path / "q", [*documents(4, seed=5), TEXTS[9]])
    table = make_table([one, two], queries, tmp_path / "t", TableOptions(neighbours=3))
    vectors = np.concatenate([one.embeddings, two.embeddings]).astype(np.float32)
    whole = Chunks.of(TEXTS, M)
    owner = whole.document_of(np.arange(len(whole)))
    asked = queries.chunks.document_of(np.arange(len(queries.chunks)))
    allowed = ~((asked[:, None] == 4) & (owner[None] == 9))
    same(table, *brute_force(vectors, queries.embeddings.astype(np.float32), allowed, 3))
    table.check(queries.chunks, Databases([one, two]).chunks)


def test_rows_that_stay_short_are_counted_and_the_margin_grows(tmp_path: Path) -> None:
    """Two documents, one of many chunks: all of a chunk's nearest are its own document's."""
    own = database(tmp_path / "d", [list(range(2, 38)) * 4, [2, 3, 4, 5, 6]])
    table = make_table(own, None, tmp_path / "t", TableOptions(neighbours=3))
    long = len(own.chunks) - 2
    assert table.ids[:long].tolist() != []
    assert sorted(table.ids[0].tolist()) == [-1, long, long + 1]
    assert table.record["counts"]["short"] == long
    assert (table.ids[long:] >= 0).all()


@pytest.mark.parametrize("texts", [[[5]], [[5, 6]], [[5, 6], [7, 8]], [[2, 3], [3, 4, 5], [9]]])
def test_tiny_corpora(texts: list[list[int]], tmp_path: Path) -> None:
    own = database(tmp_path / "d", texts)
    table = make_table(own, None, tmp_path / "t", TableOptions(neighbours=2))
    assert table.ids.shape == (len(own.chunks), 2)
    assert table.saved == 2


def test_sixteen_chunks_with_an_index_that_has_more_lists(tmp_path: Path) -> None:
    own = database(tmp_path / "d", documents(8, longest=8), indexed=False)
    own.embed(embedder(), words)
    for spec in ("IVF64,Flat", "IVF16,PQ4"):
        assert own.build_index(spec).record.recall == 1.0
        assert ChunkDatabase.open(own.path).index.record.spec == "exact"
    with pytest.raises(SettingError, match="nonsense"):
        own.build_index("nonsense")


def test_an_index_of_lists_reaches_its_recall() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(2000, 16)).astype(np.float16)
    index = build_vector_index(vectors, "IVF32,SQ8", recall=0.95)
    assert index.recall >= 0.95
    assert 1 <= index.nprobe <= 32
    queries = random.normal(size=(50, 16)).astype(np.float32)
    exact = build_vector_index(vectors, "exact").searcher(vectors).search(queries, 4)
    found = index.searcher(vectors).search(queries, 4)
    assert (
        np.mean([len(np.intersect1d(*rows)) / 4 for rows in zip(found.ids, exact.ids, strict=True)])
        > 0.9
    )
    near = found.ids == exact.ids
    np.testing.assert_allclose(found.distances[near], exact.distances[near], rtol=1e-5)


@pytest.mark.parametrize("spec", ["IVF512,Flat", "IVF512,PQ4", "PQ4"])
def test_fewer_vectors_than_an_index_is_trained_on_are_scanned(spec: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float16)
    few = vectors if "IVF" in spec else vectors[:255]
    assert build_vector_index(few, spec).spec == "exact"


@pytest.mark.parametrize("method", ["bm25", "rerank", "fusion"])
def test_methods_by_words(method: str, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    own = database(tmp_path / "d", TEXTS)
    options = TableOptions(neighbours=4, method=method)
    table = make_table(own, None, tmp_path / "t", options)
    owner = own.chunks.document_of(np.arange(len(own.chunks)))
    held = table.ids >= 0
    assert held.any(1).all()
    assert (owner[table.ids][held] != np.broadcast_to(owner[:, None], held.shape)[held]).all()
    if method == "bm25":
        scores = -Databases([own]).bm25.distances(
            own.chunks.rows(np.arange(len(own.chunks))),
            np.tile(np.arange(len(own.chunks)), (len(own.chunks), 1)),
        )
        scores[owner[:, None] == owner[None]] = 0
        expected = -np.sort(-scores, axis=1)[:, :4]
        np.testing.assert_allclose(np.where(held, -table.distances, 0), expected, atol=1e-5)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_same_bytes_in_however_many_parts(tmp_path: Path) -> None:
    whole = database(tmp_path / "1", TEXTS)
    make_table(whole, None, tmp_path / "1" / "t")
    parts = database(tmp_path / "3", TEXTS, indexed=False)
    for number in (2, 3):
        assert not parts.embed(embedder(), words, part=Part(number, 3))
    assert parts.embed(embedder(), words, part=Part(1, 3))
    parts.build_index()
    for number in (3, 1):
        assert make_table(parts, None, tmp_path / "3" / "t", part=Part(number, 3)) is None
    assert make_table(parts, None, tmp_path / "3" / "t", part=Part(2, 3)) is not None
    assert bytes_of(tmp_path / "1" / "t") == bytes_of(tmp_path / "3" / "t")
    assert whole.embeddings.tobytes() == parts.embeddings.tobytes()
    assert not (tmp_path / "3" / "chunks.blocks").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import numpy as np
from nearest.retro.data import database as d, stages
from retro_data import database
from test_retro_data import TEXTS, bytes_of

d.BLOCK = stages.BLOCK = 7
real = {{name: getattr(os, name) for name in ("fsync", "replace", "unlink")}}


def run(path, at=None):
    # In a child: make the table, and be killed before the at-th change of the disk.
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    done = 0
    for name, call in real.items():
        def counted(*arguments, call=call, **options):
            nonlocal done
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        setattr(os, name, counted)
    try:
        made = database(path, TEXTS[:5])
        stages.make_table(made, None, path / "t")
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)


folder = Path({folder!r})
assert run(folder / "whole") == 0
for at in range(1, 2000):
    path = folder / str(at)
    status = run(path, at)
    if status == 0:
        break
    assert status == signal.SIGKILL, (at, status)
    assert run(path) == 0, at
    assert bytes_of(path / "t") == bytes_of(folder / "whole" / "t"), at
print("kills", at - 1)
"""


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.rsplit("kills ", 1)[1]) > 40


def test_a_stage_that_stopped_goes_on(tmp_path: Path) -> None:
    """What was made is not made again."""
    whole = database(tmp_path / "whole", TEXTS)
    made = database(tmp_path / "d", TEXTS, indexed=False)
    calls: list[int] = []
    plain = embedder()

    def failing(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain._encode(texts)

    broken = Embedder(failing, plain.identity, plain.batch_size)
    with pytest.raises(KeyboardInterrupt):
        made.embed(broken, words)
    before = sum(calls[:2])
    assert made.embed(broken, words)
    assert sum(calls) - len(made.chunks) < before + 7
    np.testing.assert_array_equal(made.embeddings, whole.embeddings)


@pytest.mark.parametrize("stage", ["chunks", "embed", "index", "neighbours"])
def test_a_full_disk_is_told_and_mended(stage: str, tmp_path: Path, monkeypatch) -> None:
    """In the middle of a stage, which is then run again."""
    whole = database(tmp_path / "whole", TEXTS)
    stages_of = {
        "chunks": lambda: database(tmp_path / "d", TEXTS, indexed=False),
        "embed": lambda: ChunkDatabase.open(tmp_path / "d").embed(embedder(), words),
        "index": lambda: ChunkDatabase.open(tmp_path / "d").build_index("IVF2,Flat"),
        "neighbours": lambda: make_table(tmp_path / "d", None, tmp_path / "t"),
    }
    names = list(stages_of)
    for name in names[: names.index(stage)]:
        stages_of[name]()
    real, calls = os.fsync, []
    most = {"index": 1}.get(stage, 3)

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == most:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FolderError, match="disk is full"):
        stages_of[stage]()
    for name in names[names.index(stage) :]:
        stages_of[name]()
    made = ChunkDatabase.open(tmp_path / "d")
    np.testing.assert_array_equal(made.embeddings, whole.embeddings)
    whole.build_index("IVF2,Flat")
    make_table(whole, None, tmp_path / "u")
    assert bytes_of(tmp_path / "t") == bytes_of(tmp_path / "u")
    assert made.problems() == []


def test_filters_and_their_counts(tmp_path: Path) -> None:
    own = database(tmp_path / "d", documents(12, longest=16, vocab=5), dates=True)
    options = TableOptions(neighbours=3, filters=Filters(dates="older", longest_run=3, ngram=3))
    table = make_table(own, None, tmp_path / "t", options)
    judge = Judge(own.chunks, own.chunks, options.filters)
    reasons = judge(np.arange(len(own.chunks)), np.asarray(table.ids))
    assert not reasons.any()
    assert (table.ids[: own.chunks.first[1]] == -1).all()  # nothing is older than the first
    counts = table.record["counts"]["struck"]
    assert counts["not_older"] > 0
    assert counts["common_run"] > 0


def test_counts_do_not_depend_on_the_margin(tmp_path: Path) -> None:
    own = database(tmp_path / "d", TEXTS)
    searched = Databases([own])
    ids = np.arange(len(own.chunks))
    judge = Judge(own.chunks, own.chunks, Filters(longest_run=2))
    search = searched.search("dense", own.chunks.rows(ids), own.embeddings)
    one, other = (valid_neighbours(ids, search, judge, 3, margin) for margin in (0, 1000))
    np.testing.assert_array_equal(one.struck, other.struck)
    np.testing.assert_array_equal(one.kept.ids, other.kept.ids)
    assert one.struck.sum() > 0


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    own, other = database(tmp_path / "d", TEXTS), database(tmp_path / "e", TEXTS[:-1])
    table = make_table(own, None, tmp_path / "t", TableOptions(neighbours=2))
    with pytest.raises(SettingError, match="other database"):
        RetroDataset(own.chunks, other.chunks, table)
    with pytest.raises(SettingError, match="other queries"):
        table.check(other.chunks, own.chunks)
    with pytest.raises(SettingError, match="chunks of 4 tokens"):
        table.check(Chunks.of(TEXTS, 5), Chunks.of(TEXTS, 5))
    with pytest.raises(SettingError, match="stores 2"):
        RetroDataset(own.chunks, own.chunks, table, neighbours=3)
    wrong = dataclasses.replace(table, ids=np.full_like(table.ids, len(own.chunks)))
    with pytest.raises(SettingError, match="another one"):
        wrong.check(own.chunks, own.chunks)
    with pytest.raises(SettingError, match="multiple"):
        RetroDataset(own.chunks, own.chunks, table, max_len=M + 1)
    with pytest.raises(SettingError, match="numbered from 0"):
        RetroDataset(own.chunks, own.chunks, table, subset=[20])
    with pytest.raises(FolderError, match="made otherwise"):
        make_table(own, None, tmp_path / "t", TableOptions(neighbours=3))
    with pytest.raises(FolderError, match="other documents"):
        database(tmp_path / "d", TEXTS[:-1])
    with pytest.raises(FolderError, match="vectors of chunks of 4 tokens"):
        chunk_memory(tmp_path / "d", 5)


def test_another_embedder_is_refused(tmp_path: Path) -> None:
    own = database(tmp_path / "d", TEXTS)
    with pytest.raises(ModelError, match="dim 8"):
        MemoryNeighbours(own, embedder(dim=6), words)
    with pytest.raises(ModelError, match="weights '1'"):
        own.embed(embedder(version="2"), words)
    queries = database(tmp_path / "q", TEXTS[:2], dim=6)
    with pytest.raises(ModelError, match="dim"):
        make_table(own, queries, tmp_path / "t")
    live = MemoryNeighbours(own, embedder(), words)
    with pytest.raises(SettingError, match="--chunk-size 5"):
        live(torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(ModelError, match="by the function 'words'"):
        MemoryNeighbours(own, None, words)
    other = database(tmp_path / "o", TEXTS, indexed=False)
    other.embed(embedder(version="2"), words)
    other.build_index()
    with pytest.raises(ModelError, match="the table was embedded with weights '1'"):
        check_table(make_table(own), Databases([other]), other)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda texts: np.zeros((len(texts), 3)), "not"),
        (lambda texts: np.full((len(texts), 8), np.nan), "finite"),
    ],
)
def test_an_embedder_that_gives_something_else(give, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Embedder.of(give, "x", 8)(["a", "b"])


def test_verifying_a_table(tmp_path: Path) -> None:
    own = database(tmp_path / "d", TEXTS)
    options = TableOptions(neighbours=2)
    table = make_table(own, None, tmp_path / "t", options)
    assert differing_rows(table, [own], None, options, 1.0) == []
    ids = np.array(table.ids)
    ids[5, 0] = ids[5, 1]
    wrong = dataclasses.replace(table, ids=ids)
    assert differing_rows(wrong, [own], None, options, 1.0) == [5]
    assert own.problems() == []
    own.build_index("IVF2,Flat")
    with pytest.raises(SettingError, match="indexed anew"):
        differing_rows(table, [own], None, options, 1.0)
    (vectors,) = own.path.glob("segments/*/*chunks.vectors.npy")
    vectors.write_bytes(vectors.read_bytes()[:-2] + b"ab")
    (problem,) = own.problems()
    assert "chunks.vectors.npy differs from its checksum" in problem


def test_damaged_folders(tmp_path: Path) -> None:
    own = database(tmp_path / "d", TEXTS, indexed=False)
    with pytest.raises(FolderError, match="retro embed"):
        _ = own.embeddings
    own.embed(embedder(), words)
    with pytest.raises(FolderError, match="retro index"):
        _ = own.index
    with pytest.raises(FolderError, match="not a memory"):
        ChunkDatabase.open(tmp_path)
    Memory.build(None, tokenizer(), stored(TEXTS), tmp_path / "bare")
    with pytest.raises(FolderError, match="no chunks yet: run `nearest retro prepare"):
        ChunkDatabase.open(tmp_path / "bare")
    for text in ("0/3", "4/3", "x", "1"):
        with pytest.raises(SettingError, match="none"):
            Part.named(text)


def test_more_blocks_than_files_that_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is a file, and a mapped file an open one."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(database_module, "BLOCK", 1)
    monkeypatch.setattr(stages, "BLOCK", 1)
    texts = documents(40, longest=20)
    made = chunk_documents(stored(texts), tokenizer(), tmp_path / "d", M)
    assert len(made.chunks) > 60
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(file.name) for file in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
    try:
        assert made.embed(embedder(), words)
        made.build_index()
        table = make_table(made, options=TableOptions(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(table) == len(made.chunks)


def test_neighbours_take_no_memory_that_grows_with_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of several segments are read where they lie, and blocks joined one by one."""
    made = database(tmp_path / "d", TEXTS, indexed=False)
    made = ChunkDatabase(made.memory.add(None, tokenizer(), stored(TEXTS[:9], first=50)))
    assert made.embed(embedder(), words)
    made.build_index()
    expected = made.embeddings[: len(made.chunks)].astype(np.float32)

    def everything(_: ChunkVectors) -> None:
        raise AssertionError("all vectors at once")

    monkeypatch.setattr(ChunkVectors, "vectors", property(everything))
    ids = np.arange(len(made.chunks))[::-1]
    np.testing.assert_array_equal(made.vectors_of(ids), expected[ids])
    options = TableOptions(2)
    assert make_table(made, None, tmp_path / "t", options) is not None

    folder, rows = tmp_path / "large", 20_000
    (folder / "blocks").mkdir(parents=True)
    paths = [folder / "blocks" / f"{number}.npy" for number in range(12)]
    block = np.zeros(rows, [("ids", "<i8", (2,)), ("distances", "<f4", (2,)), ("struck", "<i8", 4)])
    for number, path in enumerate(paths):
        block["ids"], block["struck"] = number, number
        save_array(path, block)
    tracemalloc.start()
    stages._join_blocks(folder, paths, {"chunk_size": M}, options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * block.nbytes
    table = NeighbourTable.open(folder)
    np.testing.assert_array_equal(table.ids[:, 1], np.arange(12).repeat(rows))
    assert table.record["counts"]["struck"]["not_older"] == rows * 66
