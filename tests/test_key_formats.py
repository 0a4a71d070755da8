"""Keys in every format: the kernels against numpy, parts as one, and what rounding costs."""

import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nearest import Document, Memory, evaluate, read_documents, read_text
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import SettingError
from nearest.index.distances import scaled_key_distances
from nearest.index.keys import FORMATS, Int8Format, Int8Keys, JoinedKeys, Keys, key_format
from nearest.index.neighbours import Metric
from plain_kernels import plain_scaled_key_distances

METRICS = ["l2", "ip"]
CORPORA = Path(__file__).parents[2] / "shared" / "corpora"


def decoded(keys: Keys, ids: np.ndarray) -> np.ndarray:
    """Keys [q, k, dim] in float64; those of id -1 are anything."""
    rows = keys.rows(ids.clip(0).ravel()).astype(np.float64)
    return rows.reshape(*ids.shape, keys.dim)


def expected_distances(keys: Keys, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    rows, wide = decoded(keys, ids), queries[:, None].astype(np.float64)
    found = ((rows - wide) ** 2).sum(-1) if keys.metric == "l2" else -(rows * wide).sum(-1)
    return np.where(ids < 0, np.inf, found)


@given(
    dim=st.integers(1, 150),
    rows=st.integers(1, 40),
    queries=st.integers(0, 5),
    k=st.integers(0, 20),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 1000),
)
def test_the_int8_kernel_equals_numpy(
    dim: int, rows: int, queries: int, k: int, metric: Metric, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, size=(rows, dim), dtype=np.int8)
    scales = rng.exponential(size=rows).astype(np.float32)
    asked = rng.normal(scale=30, size=(queries, dim)).astype(np.float32)
    ids = rng.integers(-1, rows, size=(queries, k))
    found = scaled_key_distances(codes, scales, asked, ids, metric)
    expected = plain_scaled_key_distances(codes, scales, asked, ids, metric)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[ids < 0], np.inf)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-2 * float(scales.max()))


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_threads_share_the_queries(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keys = Int8Format().open(Int8Format().encode(rng.normal(size=(90, 24)).astype("f")), "l2")
    queries = rng.normal(size=(31, 24)).astype(np.float32)
    ids = rng.integers(-1, 90, size=(31, 7))
    monkeypatch.setattr(faiss, "omp_get_max_threads", lambda: threads)
    np.testing.assert_allclose(
        keys.distances(queries, ids), expected_distances(keys, queries, ids), rtol=1e-5
    )


def test_the_int8_kernel_measures_a_stored_key_as_zero() -> None:
    """Also one of large values near to which the squares of query and key would cancel."""
    rows = np.random.default_rng(0).normal(loc=1000, size=(50, 64)).astype(np.float32)
    form = Int8Format()
    keys = form.open(form.encode(rows), "l2")
    ids = np.arange(50)[:, None]
    np.testing.assert_allclose(keys.distances(keys.rows(ids[:, 0]), ids), 0, atol=1e-3)


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 9)),
        elements=st.floats(-(2.0**49), 2.0**49, width=32),
    )
)
@settings(max_examples=300)
def test_int8_is_within_half_a_step(rows: np.ndarray) -> None:
    """Zeros, subnormals and values near the largest included."""
    form = Int8Format()
    encoded = form.encode(rows)
    keys = form.open(encoded, "l2")
    found = keys.rows(np.arange(len(rows))).astype(np.float64)
    assert np.isfinite(found).all()
    largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
    tiny = 127 * float(np.finfo(np.float32).smallest_subnormal)  # of whose step no float is half
    assert (np.abs(found - rows) <= largest * (0.5 / 127 + 1e-6) + tiny).all()
    assert ((encoded["scales"] == 0) == ~encoded["keys"].any(axis=1)).all()
    assert keys.problems() == []


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("metric", METRICS)
def test_parts_are_as_one(form: object, metric: Metric) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 12)).astype(np.float32)
    whole = form.open(form.encode(rows), metric)
    bounds = [0, 25, 26, 60]
    parts = [form.open(form.encode(rows[a:b]), metric) for a, b in itertools.pairwise(bounds)]
    joined = JoinedKeys(parts, bounds)
    assert (joined.dim, joined.metric, joined.problems()) == (12, metric, [])
    ids = rng.integers(-1, 60, size=(9, 40))
    queries = rng.normal(size=(9, 12)).astype(np.float32)
    np.testing.assert_array_equal(joined.rows(ids[ids >= 0]), whole.rows(ids[ids >= 0]))
    found = joined.distances(queries, ids)
    np.testing.assert_allclose(found, whole.distances(queries, ids), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, expected_distances(whole, queries, ids), rtol=1e-4, atol=1e-5)


def test_wrong_scales_are_noticed() -> None:
    codes = np.array([[3, -4], [0, 0]], np.int8)
    for scales in ([np.nan, 0], [np.inf, 0], [-1, 0], [0, 0], [1, 1]):
        keys = Int8Keys(codes, np.array(scales, np.float32), "l2")
        assert keys.problems() == ["a scale between rows 0 and 65536 is wrong"]
    assert Int8Keys(codes, np.array([1, 0], np.float32), "l2").problems() == []


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(SettingError, match="key format 'int4' is unknown: choose among fp16, int8"):
        key_format("int4")


# --- in a memory ----------------------------------------------------------------------------------


def take(path: Path, count: int) -> list[Document]:
    return [document for document, _ in zip(read_documents([path]), range(count), strict=False)]


@pytest.mark.slow
@pytest.mark.skipif(not CORPORA.is_dir(), reason=f"{CORPORA} is not there")
def test_int8_keys_cost_less_than_half_a_percent_of_perplexity(tmp_path: Path) -> None:
    """Law of one city in either format, and the demo's model."""
    model, tokenizer = load_model_and_tokenizer(
        str(Path(__file__).parents[1] / "src/nearest/demo/general-gpt2-7m")
    )
    documents = take(CORPORA / "dclaw/train-2m.jsonl", 30)
    fp16, int8 = (
        Memory.build(model, tokenizer, documents, tmp_path / keys, keys=keys)
        for keys in ("fp16", "int8")
    )
    text = take(CORPORA / "dclaw/valid.jsonl", 8)
    read = read_text(model, fp16, text, tokenizer=tokenizer)
    base, knn = evaluate(model, fp16, read, ["base", "knn"], lam=0.5, temperature=10.0, k=256)
    (rounded,) = evaluate(model, int8, read, ["knn"], lam=0.5, temperature=10.0, k=256)
    assert knn.ppl < 0.8 * base.ppl  # the memory matters, so the rounding could
    assert rounded.ppl == pytest.approx(knn.ppl, rel=0.005)
    dim, tokens = fp16.keys.dim, fp16.tokens
    stored = {kind: file.size for kind, file in int8.segments[0].record.files.items()}
    assert stored["keys"] + stored["scales"] <= tokens * (dim + 4) + 2 * 128
    assert sum(stored.values()) - stored["documents"] <= int8.entries * (dim + 16)
