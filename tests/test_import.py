"""Datastores as `knn-transformers` and RetoMaton write them, made into memories."""

import json
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import make_documents, snapshot
from nearest import Memory, attach, evaluate
from nearest.build.importing import ImportOptions, import_store
from nearest.build.knn_store import find_store, open_store
from nearest.build.pickled_members import read_members
from nearest.build.reproduce import reproduction_problems
from nearest.cli import app
from nearest.errors import CorpusError, NearestError
from nearest.store.verify import verify

EOS = 1
VOCABULARY = 258
TEXT = [d.text for d in make_documents(6, 30)]


def tokens_of(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The stream: each text, then EOS."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXT]
    return np.concatenate([[*one, EOS] for one in ids])


def keys_of(model: PreTrainedModel, tokens: np.ndarray, start: int = 0) -> np.ndarray:
    """Inputs of the last MLP's first matrix, windows of 64 without overlap, all positions."""
    found = []
    inputs = np.concatenate([[start], tokens[:-1]])
    layer: Any = model.transformer.h[-1].mlp.c_fc
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0][0].numpy()))
    with torch.no_grad():
        for first in range(0, len(inputs), 64):
            model(torch.from_numpy(inputs[None, first : first + 64]))
    handle.remove()
    return np.concatenate(found)


class Written:
    """A datastore on the disk."""

    def __init__(self, folder: Path, keys: np.ndarray, values: np.ndarray, name: str = "dstore"):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.keys, self.values = folder, keys, values
        self.prefix = folder / f"{name}_gpt2_{len(values)}_{keys.shape[1]}"
        keys.tofile(f"{self.prefix}_keys.npy")
        values.tofile(f"{self.prefix}_vals.npy")

    def with_index(self) -> "Written":
        dim, count = self.keys.shape[1], len(self.keys)
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dim), dim, 4, 8, 8)
        index.train(self.keys.astype(np.float32))
        index.add_with_ids(self.keys.astype(np.float32), np.arange(count))
        faiss.write_index(index, str(self.folder / f"index_gpt2_{count}_{dim}.indexed"))
        return self

    def with_members(self, labels: np.ndarray, protocol: int = 4) -> "Written":
        path = self.folder / f"members_gpt2_{len(self.keys)}_{self.keys.shape[1]}_9_9.pkl"
        path.write_bytes(pickled_members(labels, protocol))
        return self


def pickled_members(labels: np.ndarray, protocol: int, module: str = "scipy.sparse._csr") -> bytes:
    """What pickling SciPy's csr_matrix of clusters by entries gives, without SciPy."""
    order = np.argsort(labels, kind="stable").astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(labels))]).astype(np.int32)
    fake = types.ModuleType(module)
    matrix = type("csr_matrix", (), {"__module__": module})
    fake.csr_matrix = matrix  # type: ignore[attr-defined]
    made = matrix()
    made.__dict__.update(
        _shape=(len(indptr) - 1, len(labels)), maxprint=50, indices=order, indptr=indptr,
        data=np.ones(len(labels), np.int64), _has_canonical_format=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        for parent in ("scipy", "scipy.sparse"):
            patched.setitem(sys.modules, parent, types.ModuleType(parent))
        patched.setitem(sys.modules, module, fake)
        return pickle.dumps(made, protocol)


@pytest.fixture(scope="module")
def stream(tiny_tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    return tokens_of(tiny_tokenizer)


@pytest.fixture(scope="module")
def keys(tiny_model: PreTrainedModel, stream: np.ndarray) -> np.ndarray:
    return keys_of(tiny_model, stream)


Write = Callable[..., Written]
Import = Callable[..., Memory]


@pytest.fixture
def write(tmp_path: Path, keys: np.ndarray, stream: np.ndarray) -> Write:
    def made(key: str = "<f2", value: str = "<i4") -> Written:
        return Written(tmp_path / "store", keys.astype(key), stream.astype(value))

    return made


@pytest.fixture
def imported(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Import:
    def made(given: Path, **options: Any) -> Memory:
        path = tmp_path / "m"
        import_store(given, path, tiny_model, tiny_tokenizer, ImportOptions(**options))
        assert verify(path) == []
        return Memory.open(path)

    return made


@pytest.mark.parametrize("key", ["<f2", "<f4"])
@pytest.mark.parametrize("value", ["<i4", "<i8"])
@pytest.mark.parametrize("split", [False, True])
def test_every_entry_is_what_the_datastore_says(
    key: str, value: str, split: bool, write: Write, imported: Import, stream: np.ndarray,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    store = write(key, value)
    memory = imported(store.folder, split=split)
    entries = memory.valued_entries()
    segment = memory.segments[0]
    np.testing.assert_array_equal(segment.tokens[entries + 1], stream)
    expected = store.keys.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(segment.keys.rows(entries), expected)
    assert memory.documents == (len(TEXT) if split else 1)
    texts = [memory.document(number).text for number in range(memory.documents)]
    assert "".join(texts) == tiny_tokenizer.decode(stream)
    assert texts[0].startswith(TEXT[0])
    last = memory.document(memory.documents - 1)
    assert last.metadata["entries"][1] == len(stream)
    assert last.id == f"{store.prefix.name}:{memory.documents}"


def test_a_search_finds_what_brute_force_over_the_datastore_finds(
    write: Write, imported: Import, keys: np.ndarray
) -> None:
    memory = imported(write().folder, keys="fp16")
    queries = keys[::37] + np.float32(0.01)
    stored = keys.astype(np.float16).astype(np.float32)
    exact = ((queries[:, None] - stored) ** 2).sum(-1)
    found = memory.search(queries.astype(np.float32), 5)
    np.testing.assert_allclose(found.distances, np.sort(exact, 1)[:, :5], rtol=1e-3, atol=1e-4)


def test_the_memory_is_evaluated_attached_and_verified(
    write: Write, imported: Import, tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    memory = imported(write().with_members(np.arange(len(tokens_of(tiny_tokenizer))) % 7).folder)
    base, knn, automaton = evaluate(
        tiny_model, memory, [TEXT[0]], tokenizer=tiny_tokenizer,
        method=["base", "knn", "retomaton"], k=8, temperature=10.0,
    )  # fmt: skip
    assert knn.nll < base.nll  # the text stands in the memory
    assert automaton.nll < base.nll
    inputs = torch.tensor([[0, *tiny_tokenizer(TEXT[0][:20])["input_ids"]]])
    with attach(tiny_model, memory, method="knn", k=8, tokenizer=tiny_tokenizer) as session:
        tiny_model.generate(inputs, max_new_tokens=2, do_sample=False, pad_token_id=1)
        assert all(token.sources for token in session.sources(0))


def test_keys_that_were_read_in_other_windows_are_told(
    write: Write, imported: Import, tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    (told,) = reproduction_problems(imported(write().folder), tiny_model, tiny_tokenizer)
    assert "keys differ from what the model makes: imported" in told
    assert "windows than 64 tokens, 32 new" in told


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", ["scipy.sparse.csr", "scipy.sparse._csr"])
def test_clusters_are_read(protocol: int, module: str, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 9, size=100)
    path = tmp_path / "members.pkl"
    path.write_bytes(pickled_members(labels, protocol, module))
    found = read_members(path, 100)
    for cluster in range(9):
        part = found.entries[found.offsets[cluster] : found.offsets[cluster + 1]]
        assert part.tolist() == np.flatnonzero(labels == cluster).tolist()


@pytest.mark.parametrize("split", [False, True])
def test_clusters_are_the_memorys(split: bool, write: Write, imported: Import) -> None:
    store = write()
    labels = np.arange(len(store.values)) % 5
    memory = imported(store.with_members(labels).folder, split=split)
    segment = memory.segments[0]
    np.testing.assert_array_equal(segment.labels[memory.valued_entries()], labels)
    assert memory.manifest.clusters is not None
    assert memory.manifest.clusters.clusters == 5


def test_what_a_datastore_does_not_tell_is_unknown(write: Write, imported: Import) -> None:
    keys = imported(write().folder).manifest.keys
    assert keys is not None
    assert keys.dtype is None


def test_clusters_may_be_left_out(write: Write, imported: Import) -> None:
    store = write()
    (store.folder / "members_x.pkl").write_bytes(b"anything")
    assert imported(store.folder, members=False).manifest.clusters is None


class _Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def _array_of_objects() -> bytes:
    return pickle.dumps(np.array([_Plain()], dtype=object))


class _Plain:
    pass


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a call": lambda: pickle.dumps(_Harm()),
    "a call in a list": lambda: pickle.dumps([np.arange(3), _Harm()]),
    "builtins": lambda: b"cbuiltins\neval\n(V1\ntR.",
    "numpy's loader": lambda: b"cnumpy\nload\n(Vx\ntR.",
    "another class": lambda: pickle.dumps(_Plain()),
    "objects": _array_of_objects,
    "a list": lambda: pickle.dumps([1, 2]),
    "nothing": lambda: b"",
    "no pickle": lambda: b"\x93NUMPY",
    "cut short": lambda: pickled_members(np.arange(50), 4)[:-40],
    "more entries than there are": lambda: pickled_members(np.zeros(5000, int), 4),
    "a huge array": lambda: (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99999999999999\ntVb\ntR."
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_else_a_pickle_may_be_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "members.pkl"
    path.write_bytes(HOSTILE[case]())
    with pytest.raises(CorpusError, match=r"members\.pkl.*--no-members"):
        read_members(path, 100)
    assert not (tmp_path / "harmed").exists()


def test_mutated_pickles_are_read_or_refused(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "members.pkl"
    whole, refused = pickled_members(np.arange(30) % 3, 4), 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(len(whole)))] = int(rng.integers(256))
        path.write_bytes(changed)
        try:
            read_members(path, 30)
        except CorpusError:
            refused += 1
    assert refused > 100


def test_their_index_is_read_where_the_user_trusts_it(write: Write, imported: Import) -> None:
    store = write().with_index()
    memory = imported(store.folder, trust=True)
    record = memory.segments[0].record.index
    assert record is not None
    assert (record.spec, record.entries) == ("IVF4,PQ8", len(store.values))
    queries = store.keys[:8].astype(np.float32)
    theirs = faiss.read_index(str(next(store.folder.glob("*.indexed"))))
    theirs.nprobe = record.nprobe
    distances, ids = theirs.search(queries, 3)
    ours = memory.search(queries, 3, "index")
    np.testing.assert_allclose(ours.distances, distances, rtol=1e-5)
    for row in range(len(queries)):  # of entries as far as the last, FAISS takes others
        nearer = distances[row] < distances[row, -1]
        assert set(ids[row, nearer]) <= set(ours.ids[row])


def test_retomatons_own_names_are_found(write: Write, imported: Import) -> None:
    store = write().with_index()
    (index,) = store.folder.glob("*.indexed")
    index.rename(store.folder / "knn16.index")
    members = store.folder / "dstore16_kmeans_members.pkl"
    members.write_bytes(b"")
    found = find_store(store.folder)
    assert (found.index, found.members) == (store.folder / "knn16.index", members)
    members.unlink()
    assert imported(store.folder, trust=True).segments[0].record.index is not None


def test_their_index_is_not_touched_otherwise(write: Write, imported: Import) -> None:
    store = write()
    (store.folder / f"index_{store.prefix.name.partition('_')[2]}.indexed").write_bytes(b"hostile")
    assert imported(store.folder).segments[0].record.index is not None


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: None, {"trust": True}, "holds no index"),
        (lambda s: s.with_index(), {"trust": True, "split": True}, "leave out either --trust"),
        (lambda s: s.with_index(), {"trust": True, "index": "IVF4,SQ8"}, "not both"),
        (
            lambda s: (s.folder / "a.indexed").write_bytes(b"x"),
            {"trust": True},
            "no FAISS index",
        ),
        (lambda s: Path(f"{s.prefix}_vals.npy").unlink(), {}, "_vals.npy does not exist"),
        (lambda s: Path(f"{s.prefix}_vals.npy").write_bytes(b"123"), {}, "fit no number of keys"),
        (lambda s: Path(f"{s.prefix}_keys.npy").write_bytes(b""), {}, "fit no number of keys"),
        (lambda s: None, {"entries": 10**9}, "has room for"),
        (lambda s: None, {"entries": 0}, "has room for"),
        (lambda s: (s.values + 1000).tofile(f"{s.prefix}_vals.npy"), {}, "no tokens of the model"),
        (lambda s: (s.values * 0 - 1).tofile(f"{s.prefix}_vals.npy"), {}, "no tokens of the model"),
        (lambda s: (s.keys * np.nan).tofile(f"{s.prefix}_keys.npy"), {}, "is not finite"),
        (lambda s: Written(s.folder, s.keys[:5], s.values[:5]), {}, "must hold one datastore"),
        (lambda s: None, {"window": 1000}, "longer than the model's"),
        (lambda s: None, {"metric": "cosine"}, "metric 'cosine' is unknown"),
        (lambda s: None, {"index": "IVF99999,Flat"}, "more lists than"),
    ],
)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(
    change: Callable[[Written], Any], options: dict[str, Any], message: str,
    write: Write, imported: Import, tmp_path: Path,
) -> None:  # fmt: skip
    change(store := write())
    with pytest.raises(NearestError, match=message):
        imported(store.folder, **options)
    assert not (tmp_path / "m").exists()


def test_room_that_was_never_written_is_left_out(
    tmp_path: Path, keys: np.ndarray, stream: np.ndarray, imported: Import
) -> None:
    padded = np.concatenate([keys, np.zeros((20, keys.shape[1]))]).astype("<f2")
    values = np.concatenate([stream, np.zeros(20)]).astype("<i4")
    store = Written(tmp_path / "store", padded, values)
    with pytest.warns(UserWarning, match="the last 20 of .* were never written"):
        memory = imported(store.folder)
    assert memory.entries == len(stream)
    files = find_store(store.folder)
    assert len(open_store(files, keys.shape[1], VOCABULARY, len(stream) + 20).values) == len(values)


def test_sizes_alone_do_not_tell_and_values_do(tmp_path: Path) -> None:
    """32-bit values beside 16-bit keys have the sizes of 64 beside 32 and half as many entries."""
    rng = np.random.default_rng(0)
    for key, value in (("<f2", "<i4"), ("<f4", "<i8")):
        values = rng.integers(0, VOCABULARY, size=64).astype(value)
        keys = rng.normal(size=(64, 8)).astype(key)
        store = Written(tmp_path / key[1:], keys, values)
        found = open_store(find_store(store.folder), 8, VOCABULARY)
        np.testing.assert_array_equal(found.values, values)
        np.testing.assert_array_equal(found.keys, keys)
    with pytest.raises(CorpusError, match=r"fit no number|no tokens"):
        open_store(find_store(store.folder), 7, VOCABULARY)


def test_the_command(write: Write, model_folder: str, tmp_path: Path) -> None:
    store, out = write().with_index(), tmp_path / "m"
    before = snapshot(store.folder)
    call = ["import", str(store.folder), model_folder, "--out", str(out), "--json"]
    result = CliRunner().invoke(app, [*call, "--trust"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["entries"] == len(store.values)
    assert snapshot(store.folder) == before
    for prefix in (f"{store.prefix}_keys.npy", str(store.prefix)):
        again = CliRunner().invoke(app, ["import", prefix, *call[2:4], str(out) + prefix[-3:]])
        assert again.exit_code == 0, again.output
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 2
    assert "is already a memory" in result.output
