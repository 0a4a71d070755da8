"""Memorizing attention against brute force in float64: loops, no mask, no batch."""

import doctest
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from conftest import make_model
from nearest.errors import FolderError, ModelError, SettingError
from nearest.index.approximate import ApproximateIndex
from nearest.index.building import build_index
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
from nearest.index.neighbours import Neighbours, VectorIndex
from nearest.models.memorizing import attention, memory
from nearest.models.memorizing.attention import MemorizingAttention, attend_memory
from nearest.models.memorizing.layers import memorize
from nearest.models.memorizing.memory import AttentionMemory

HEADS, DIM = 4, 8
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random_qkv(
    batch: int, length: int, kv_heads: int = HEADS, seed: int = 0, dtype: Any = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def make_layer(**options: Any) -> MemorizingAttention:
    """In float64, with gates and scales that differ from head to head."""
    layer = MemorizingAttention(HEADS, DIM, **options).double()
    with torch.no_grad():
        layer.gate.copy_(torch.linspace(-2, 2, HEADS))
        layer.scale.mul_(torch.linspace(0.5, 1.5, HEADS))
    return layer


def empty(batch: int, kv_heads: int = HEADS, **options: Any) -> AttentionMemory:
    options = {"capacity": 1000, "dtype": torch.float64, **options}
    return AttentionMemory.empty(batch, kv_heads, DIM, **options)


def softmax_average(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = np.exp(np.array([float(s) for s in scores]) - max(float(s) for s in scores))
    return sum(float(w) * v for w, v in zip(weights / weights.sum(), values, strict=True))


def brute_force(
    layer: MemorizingAttention,
    q: Tensor,
    segment: tuple[Tensor, Tensor],
    past: list[tuple[Tensor, Tensor]],
    head: int,
    position: int,
) -> Tensor:
    """One output: `q`, `segment` [length, dim] and `past` pairs [dim] are one row's and head's."""

    def unit(x: Tensor) -> Tensor:
        return x / x.norm() if layer.normalise else x

    def score(key: Tensor) -> Tensor:
        return (unit(q) @ unit(key)) * layer.scale[head].detach()

    keys, values = segment
    local = softmax_average(
        [score(key) for key in keys[: position + 1]], list(values[: position + 1])
    )
    if not past:
        return local
    ranked = sorted(past, key=lambda pair: -float(score(pair[0])))[: layer.k]
    remote = softmax_average([score(key) for key, _ in ranked], [value for _, value in ranked])
    gate = 1 / (1 + np.exp(-float(layer.gate[head])))
    return gate * remote + (1 - gate) * local


@pytest.mark.parametrize("k", [None, 1, 3, 1000])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@torch.no_grad()
def test_equals_brute_force_over_segments_with_ragged_documents(
    k: int | None, normalise: bool, kv_heads: int
) -> None:
    """Rows padded differently, documents ending in different segments, the oldest dropped."""
    layer, batch, length, capacity = make_layer(k=k, normalise=normalise), 3, 5, 9
    memory = empty(batch, kv_heads, capacity=capacity)
    past: list[list[int]] = [[], [], []]  # of each row, positions in `all_k`
    all_k, all_v = torch.empty(batch, kv_heads, 0, DIM), torch.empty(batch, kv_heads, 0, DIM)
    lengths = [[5, 3, 1], [5, 5, 2], [4, 5, 5], [1, 2, 3]]
    ends = [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]
    for step, (sizes, ended) in enumerate(zip(lengths, ends, strict=True)):
        q, keys, values = random_qkv(batch, length, kv_heads, seed=step)
        valid = torch.arange(length) < torch.tensor(sizes)[:, None]
        out = layer(q, keys, values, memory, valid)
        for row, size in enumerate(sizes):
            for head in range(HEADS):
                group = head * kv_heads // HEADS
                pairs = [(all_k[row, group, i], all_v[row, group, i]) for i in past[row]]
                local = keys[row, group], values[row, group]
                for i in range(size):
                    expected = brute_force(layer, q[row, head, i], local, pairs, head, i)
                    torch.testing.assert_close(out[row, head, i], expected, **EXACT)
        memory = layer.remember(memory, keys, values, valid)
        memory = memory.cleared(torch.tensor(ended).bool())
        for row, size in enumerate(sizes):
            new = list(range(step * length, step * length + size))
            past[row] = [] if ended[row] else [*past[row], *new][-capacity:]
        all_k, all_v = torch.cat([all_k, keys], 2), torch.cat([all_v, values], 2)
        assert memory.lengths.tolist() == [len(row) for row in past]


@torch.no_grad()
def test_with_everything_remembered_and_local_alike_it_is_plain_attention() -> None:
    """Closed form: the same softmax over earlier and local pairs, split by its own mass."""
    layer = make_layer(k=None, normalise=False)
    q, keys, values = random_qkv(1, 7)
    memory = layer.remember(empty(1), keys[:, :, :4], values[:, :, :4])
    scores = (q * layer.scale[:, None, None]) @ keys.mT
    scores = scores.masked_fill(~torch.ones(7, 7).bool().tril(), -torch.inf)
    expected = scores.softmax(-1) @ values
    for i in range(4, 7):
        mass = scores[0, :, i, :4].logsumexp(-1) - scores[0, :, i, 4 : i + 1].logsumexp(-1)
        layer.gate.copy_(mass)
        local = layer(q[:, :, 4:], keys[:, :, 4:], values[:, :, 4:], memory)
        torch.testing.assert_close(local[0, :, i - 4], expected[0, :, i], **EXACT)


@torch.no_grad()
def test_decoding_token_by_token_equals_the_whole_segment() -> None:
    layer = make_layer(k=3)
    past = random_qkv(2, 6, seed=1)
    memory = layer.remember(empty(2), *past[1:])
    q, keys, values = random_qkv(2, 5)
    valid = torch.tensor([[False, True, True, True, True], [True] * 5])
    bias = torch.randn(1, HEADS, 5, 5, dtype=torch.float64)
    whole = layer(q, keys, values, memory, valid, bias)
    for i in range(1, 5):
        upto = slice(None, i + 1)
        step = layer(
            q[:, :, i : i + 1],
            keys[:, :, upto],
            values[:, :, upto],
            memory,
            valid[:, upto],
            bias[:, :, i : i + 1, upto],
        )
        torch.testing.assert_close(step[:, :, 0], whole[:, :, i], **EXACT)


@torch.no_grad()
def test_bias_is_added_to_local_scores_alone() -> None:
    """A bias of −∞ but on the diagonal leaves each position its own value, and the memory as is."""
    layer = make_layer(k=None)
    memory = layer.remember(empty(1), *random_qkv(1, 6, seed=1)[1:])
    q, keys, values = random_qkv(1, 5)
    bias = torch.full((1, 1, 5, 5), -torch.inf, dtype=torch.float64)
    bias[0, 0].fill_diagonal_(0)
    gate = layer.gate.sigmoid()[:, None, None]
    unit = torch.nn.functional.normalize(q, dim=-1) * layer.scale[:, None, None]
    expected = gate * attend_memory(unit, memory, None) + (1 - gate) * values
    torch.testing.assert_close(layer(q, keys, values, memory, bias=bias), expected, **EXACT)


def filled_layer(k: int | None, lengths: list[int]) -> tuple[MemorizingAttention, AttentionMemory]:
    layer = make_layer(k=k)
    _, keys, values = random_qkv(len(lengths), max(lengths), seed=9)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return layer, layer.remember(empty(len(lengths)), keys, values, valid)


@pytest.mark.parametrize("k", [None, 2])
def test_no_gradient_from_the_future_and_none_to_the_memory(k: int | None) -> None:
    layer, memory = filled_layer(k, [6, 6])
    inputs = [x.requires_grad_() for x in random_qkv(2, 5)]
    out = layer(*inputs, memory)
    for i in range(5):
        grads = torch.autograd.grad(out[:, :, i].square().sum(), inputs, retain_graph=True)
        assert all((g[:, :, i + 1 :] == 0).all() for g in grads)
        assert (grads[0][:, :, i] != 0).any()
        assert (grads[0][:, :, :i] == 0).all()
        assert (grads[2][:, :, : i + 1] != 0).all()
    remembered = layer.remember(memory, *inputs[1:])
    assert not remembered.keys.requires_grad
    assert not remembered.values.requires_grad


@pytest.mark.parametrize("k", [None, 2])
def test_no_gradient_crosses_rows(k: int | None) -> None:
    layer, memory = filled_layer(k, [6, 2])
    inputs = [x.requires_grad_() for x in random_qkv(2, 5)]
    for row in range(2):
        out = layer(*inputs, memory)
        grads = torch.autograd.grad(out[row].square().sum(), inputs)
        assert all((g[1 - row] == 0).all() and (g[row] != 0).any() for g in grads)


@pytest.mark.parametrize("k", [None, 2])
@torch.no_grad()
def test_a_row_is_the_same_alone_and_in_a_batch(k: int | None) -> None:
    """Other rows' memories, shorter, longer and empty, change nothing: and NaN stays at home."""
    layer, memory = filled_layer(k, [6, 2, 4])
    memory = memory.cleared(torch.tensor([False, False, True]))
    q, keys, values = random_qkv(3, 5)
    out = layer(q, keys, values, memory)
    for row in range(3):
        one = torch.tensor([row])
        alone = layer(q[one], keys[one], values[one], memory.rows(one))
        torch.testing.assert_close(out[one], alone, **EXACT)
    q[1] = torch.nan
    poisoned = layer(q, keys, values, memory)
    torch.testing.assert_close(poisoned[[0, 2]], out[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("k", [None, 2, 1000])
@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_equal_finite_differences(k: int | None, normalise: bool) -> None:
    layer = make_layer(k=k, normalise=normalise)
    memory = layer.remember(empty(2), *random_qkv(2, 4, seed=1)[1:])
    memory = memory.cleared(torch.tensor([False, True]))

    def run(gate: Tensor, scale: Tensor, *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"gate": gate, "scale": scale}, (*inputs, memory))

    scale = layer.scale.detach().clone().requires_grad_(normalise)
    inputs = [x.requires_grad_() for x in random_qkv(2, 3, kv_heads=2)]
    memory = AttentionMemory(memory.keys[:, :2], memory.values[:, :2], memory.held, 1000)
    assert torch.autograd.gradcheck(run, (layer.gate.detach().requires_grad_(), scale, *inputs))


def test_gate_gradient_in_closed_form() -> None:
    """d out / d b = σ(b)·(1 − σ(b))·(memory − local), and 0 for rows without memory."""
    layer, memory = filled_layer(2, [6, 6])
    memory = memory.cleared(torch.tensor([False, True]))
    q, keys, values = random_qkv(2, 5)
    with torch.no_grad():
        local = layer(q, keys, values, memory.cleared(torch.tensor([True, True])))
        unit = torch.nn.functional.normalize(q, dim=-1) * layer.scale[:, None, None]
        gap = (attend_memory(unit, memory, 2) - local)[0].sum((1, 2))
        gate = layer.gate.sigmoid()
    layer(q, keys, values, memory).sum().backward()
    torch.testing.assert_close(layer.gate.grad, gate * (1 - gate) * gap)


@given(st.data())
@settings(max_examples=60)
@torch.no_grad()
def test_nearest_equals_brute_force(data: st.DataObject) -> None:
    batch, heads, k = (data.draw(st.integers(1, n)) for n in (3, 3, 12))
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    seed, block = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 40, 1 << 24]))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, max(lengths), DIM, generator=generator)
    queries = torch.randn(batch, heads, 4, DIM, generator=generator)
    valid = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    memory = AttentionMemory.empty(batch, heads, DIM, capacity=100).extended(keys, keys, valid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearest.models.memorizing.memory._SCORES_AT_ONCE", block)
        found = memory.nearest(queries, k)
    for row, length in enumerate(lengths):
        for head in range(heads):
            scores = (queries[row, head] @ keys[row, head, max(lengths) - length :].T).numpy()
            expected = np.argsort(-scores, axis=1)[:, :k] + max(lengths) - length
            missing = min(k, max(lengths)) - expected.shape[1]
            expected = np.pad(expected, ((0, 0), (0, missing)), constant_values=-1)
            np.testing.assert_array_equal(found[row, head].numpy(), expected)


def exact(keys: np.ndarray) -> VectorIndex:
    return ExactIndex(FloatKeys(keys, "ip"), np.arange(len(keys)))


def hnsw(keys: np.ndarray) -> VectorIndex:
    rng = np.random.default_rng(0)
    index = build_index(FloatKeys(keys, "ip"), np.arange(len(keys)), "HNSW16", rng)
    return ApproximateIndex(index, "ip")


@pytest.mark.parametrize("index", [exact, hnsw])
@torch.no_grad()
def test_an_index_finds_the_same_pairs(index: Any) -> None:
    layer, memory = filled_layer(3, [40, 2, 17, 0])
    indexed = AttentionMemory(memory.keys, memory.values, memory.held, 1000, index)
    q, keys, values = random_qkv(4, 5)
    expected = layer(q, keys, values, memory)
    torch.testing.assert_close(layer(q, keys, values, indexed), expected, **EXACT)
    shorter = layer.remember(indexed, keys, values).cleared(torch.tensor([1, 0, 0, 0]).bool())
    expected = layer(q, keys, values, layer.remember(memory, keys, values))[1:]
    torch.testing.assert_close(layer(q, keys, values, shorter)[1:], expected, **EXACT)


class FindsNothing:
    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        return Neighbours(np.full((len(queries), k), -1), np.full((len(queries), k), np.inf))


@torch.no_grad()
def test_an_index_that_finds_nothing_gives_nothing() -> None:
    layer, memory = filled_layer(3, [4, 4])
    memory = AttentionMemory(memory.keys, memory.values, memory.held, 9, lambda _: FindsNothing())
    q, keys, values = random_qkv(2, 5)
    local = layer(q, keys, values, memory.cleared(torch.tensor([True, True])))
    gate = layer.gate.sigmoid()[:, None, None]
    torch.testing.assert_close(layer(q, keys, values, memory), (1 - gate) * local, **EXACT)


def test_an_index_is_made_once_between_changes() -> None:
    made: list[int] = []

    def counting(keys: np.ndarray) -> VectorIndex:
        made.append(len(keys))
        return exact(keys)

    layer, memory = filled_layer(3, [4, 2])
    memory = AttentionMemory(memory.keys, memory.values, memory.held, 1000, counting)
    q, keys, values = random_qkv(2, 1)
    for _ in range(3):
        layer(q, keys, values, memory)
    assert made == [4] * HEADS + [2] * HEADS


def test_the_old_memory_stays_as_it_was() -> None:
    layer, memory = filled_layer(3, [4, 2])
    before = memory.keys.clone(), memory.values.clone(), memory.held.clone()
    layer.remember(memory, *random_qkv(2, 5)[1:]).cleared(torch.tensor([True, True]))
    for old, now in zip(before, (memory.keys, memory.values, memory.held), strict=True):
        torch.testing.assert_close(now, old, rtol=0, atol=0)


def test_nothing_of_a_cleared_document_remains_in_the_tensors() -> None:
    _, memory = filled_layer(3, [6, 2])
    memory = memory.cleared(torch.tensor([True, False]))
    assert memory.keys.shape[2] == 2
    assert (memory.keys[0] == 0).all()
    assert (memory.values[0] == 0).all()
    assert memory.cleared(torch.tensor([True, True])).keys.shape[2] == 0


def test_settings_have_their_effects() -> None:
    layer = MemorizingAttention(2, 64, initial_gate=0.2, scale=3.0)
    torch.testing.assert_close(layer.gate.sigmoid(), torch.full((2,), 0.2))
    torch.testing.assert_close(layer.scale.data, torch.full((2,), 3.0))
    assert {name for name, _ in layer.named_parameters()} == {"gate", "scale"}
    fixed = MemorizingAttention(2, 64, normalise=False)
    torch.testing.assert_close(fixed.scale, torch.full((2,), 1 / 8))
    assert {name for name, _ in fixed.named_parameters()} == {"gate"}
    torch.testing.assert_close(
        MemorizingAttention(2, 64).scale.data, torch.full((2,), np.log2(512 * 511).item())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    _, memory = filled_layer(3, [6, 2])
    memory = AttentionMemory(memory.keys.to(dtype), memory.values.to(dtype), memory.held, 7)
    memory.save(tmp_path / "m.safetensors")
    memory.save(str(tmp_path / "m.safetensors"))  # over the old one
    loaded = AttentionMemory.load(tmp_path / "m.safetensors", index=exact)
    assert (loaded.capacity, loaded.index) == (7, exact)
    for name in ("keys", "values", "held"):
        found, expected = getattr(loaded, name), getattr(memory, name)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("module", [attention, memory])
def test_the_examples_in_the_documentation_hold(module: object) -> None:
    results = doctest.testmod(module)
    assert results.attempted >= 1
    assert results.failed == 0


def test_an_empty_memory_is_saved_too(tmp_path: Path) -> None:
    empty(2).save(tmp_path / "m")
    assert AttentionMemory.load(tmp_path / "m").keys.shape == (2, HEADS, 0, DIM)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": -3}, "for every pair give None"),
        ({"initial_gate": 0.0}, "inside"),
        ({"initial_gate": 1.0}, "inside"),
        ({"initial_gate": float("nan")}, "inside"),
        ({"scale": 0.0}, "positive"),
        ({"scale": float("inf")}, "finite"),
        ({"heads": 0}, "at least 1"),
        ({"dim": 0}, "at least 1"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        MemorizingAttention(**{"heads": 2, "dim": 4, **options})


def test_capacity_must_be_positive() -> None:
    with pytest.raises(SettingError, match="capacity must be at least 1"):
        empty(1, capacity=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [1, 2])
def test_what_is_not_finite_is_not_remembered(bad: float, which: int) -> None:
    layer, tensors = make_layer(normalise=False), random_qkv(3, 5)
    tensors[which][1, 2, 3, 4] = bad
    with pytest.raises(ModelError, match=f"{['keys', 'values'][which - 1]} of batch row 1"):
        layer.remember(empty(3), *tensors[1:])
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[1, 3] = False  # unless it is padding
    assert layer.remember(empty(3), *tensors[1:], valid).keys.isfinite().all()


def test_values_beyond_the_memorys_dtype_are_refused() -> None:
    _, keys, values = random_qkv(1, 2)
    with pytest.raises(ModelError, match=r"not all finite in torch\.float16"):
        empty(1, dtype=torch.float16).extended(keys, values * 1e6)


@pytest.mark.parametrize(
    "memory", [empty(3), empty(2, 3), AttentionMemory.empty(2, HEADS, DIM + 1, 10)]
)
def test_a_memory_of_another_width_is_refused(memory: AttentionMemory) -> None:
    layer, tensors = make_layer(), random_qkv(2, 5)
    with pytest.raises(ModelError, match="begin an empty memory"):
        layer(*tensors, memory)
    with pytest.raises(ModelError, match="begin an empty memory"):
        layer.remember(memory, *tensors[1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[..., :4], k, v),
        lambda q, k, v: (q, k[..., :4], v),
        lambda q, k, v: (q[:, :3], k, v),
        lambda q, k, v: (q, k[:, :3], v[:, :3]),
        lambda q, k, v: (q, k[:, :2], v),
        lambda q, k, v: (q, k[:1], v),
        lambda q, k, v: (q, k, v[:, :, :2]),
        lambda q, k, v: (q, k[:, :, :4], v[:, :, :4]),
        lambda q, k, v: (q, k[:, :0], v[:, :0]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: Any) -> None:
    with pytest.raises(ModelError, match="do not fit a layer of 4 heads of 8"):
        make_layer()(*change(*random_qkv(2, 5)), empty(2))


@torch.no_grad()
def test_integers_mean_what_truth_values_mean() -> None:
    layer, tensors = make_layer(), random_qkv(2, 3)
    valid = torch.tensor([[1, 1, 0], [1, 1, 1]])
    memory = layer.remember(empty(2), *tensors[1:], valid).cleared(torch.tensor([0, 1]))
    assert memory.lengths.tolist() == [2, 0]
    found = layer(*tensors, memory, valid)
    torch.testing.assert_close(found, layer(*tensors, memory, valid.bool()), rtol=0, atol=0)


def test_validity_of_another_length_is_refused() -> None:
    with pytest.raises(ModelError, match="valid positions are"):
        empty(2).extended(*random_qkv(2, 5)[1:], torch.ones(2, 4, dtype=torch.bool))


def test_a_damaged_file_is_refused_wherever_the_damage(tmp_path: Path) -> None:
    _, memory = filled_layer(3, [3, 2])
    path = tmp_path / "m.safetensors"
    memory.save(path)
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 29), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(FolderError):
            AttentionMemory.load(path)
    for size in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FolderError):
            AttentionMemory.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(FolderError):
        AttentionMemory.load(path)


# --- In Hugging Face decoders ---------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "llama"])
def decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


def attention_of(model: PreTrainedModel, layer: int) -> Any:
    if model.config.model_type == "gpt2":
        return model.transformer.h[layer].attn
    return model.model.layers[layer].self_attn


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def heads_of(model: PreTrainedModel, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [heads, length, dim] of one row, by the weights; keys repeated."""
    attention, heads = attention_of(model, layer), 2
    length = hidden.shape[0]
    if model.config.model_type == "gpt2":
        parts = attention.c_attn(hidden).split(32, -1)
        return tuple(x.view(length, heads, 16).transpose(0, 1) for x in parts)
    q, k, v = (p(hidden) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    angle = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, 16, 2) / 16)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rotated(x: Tensor) -> Tensor:
        x = x.view(length, -1, 16).transpose(0, 1)
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    repeated = v.view(length, 1, 16).transpose(0, 1).expand(heads, -1, -1)
    return rotated(q), rotated(k).expand(heads, -1, -1), repeated


def hidden_before_and_after(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Input of the last layer's attention, and its output before the last projection."""
    seen: dict[str, Tensor] = {}
    attention = attention_of(model, 1)
    projection = attention.c_proj if model.config.model_type == "gpt2" else attention.o_proj
    handles = [
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(
                before=args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        ),
        projection.register_forward_pre_hook(lambda _, args: seen.update(after=args[0])),
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen["before"], seen["after"]


@pytest.mark.parametrize("k", [None, 3])
@torch.no_grad()
def test_in_a_decoder_it_equals_brute_force(decoder: PreTrainedModel, k: int | None) -> None:
    """Three segments of two rows; the second row's document ends after the first."""
    decoder.double()
    layer = MemorizingAttention(2, 16, k=k, normalise=False).double()
    with memorize(decoder, layers=[1], k=k) as session:
        session.gates.double()
        layer.gate.copy_(torch.tensor([-1.0, 1.5]))
        session.gates[0].gate.copy_(layer.gate)
        past: list[list[list[tuple[Tensor, Tensor]]]] = [[[], []], [[], []]]
        for step in range(3):
            before, after = hidden_before_and_after(decoder, tokens_of(2, 6, step))
            for row in range(2):
                q, keys, values = heads_of(decoder, before[row], 1)
                for head in range(2):
                    pairs = past[row][head]
                    local = keys[head], values[head]
                    for i in range(6):
                        expected = brute_force(layer, q[head, i], local, pairs, head, i)
                        found = after[row, i].view(2, 16)[head]
                        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
                    pairs += list(zip(keys[head], values[head], strict=True))
            session.remember(ended=torch.tensor([False, step == 0]))
            if step == 0:
                past[1] = [[], []]


@torch.no_grad()
def test_a_decoder_is_unchanged_without_memory_and_afterwards(decoder: PreTrainedModel) -> None:
    ids, config = tokens_of(2, 10), attention_of(decoder, 1).config
    plain = decoder(input_ids=ids).logits
    with memorize(decoder, layers=[0, 1]) as session:
        assert torch.equal(decoder(input_ids=ids).logits, plain)
        session.remember()
        assert not torch.allclose(decoder(input_ids=ids).logits, plain, atol=1e-2)
        session.remember(ended=torch.tensor([True, True]))
        assert torch.equal(decoder(input_ids=ids).logits, plain)
    assert torch.equal(decoder(input_ids=ids).logits, plain)
    assert attention_of(decoder, 1).config is config


@torch.no_grad()
def test_padding_is_neither_attended_to_nor_remembered(decoder: PreTrainedModel) -> None:
    """A batch of ragged rows, left-padded, gives each row what it gets alone."""
    segments = [[tokens_of(1, n, 10 * s + n)[0] for n in (7, 4)] for s in range(3)]
    together: list[list[Tensor]] = []
    with memorize(decoder, layers=[1], k=3) as session:
        for rows in segments:
            width = max(map(len, rows))
            ids = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0)) for r in rows])
            mask = torch.stack([torch.arange(width) >= width - len(r) for r in rows])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = decoder(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions
            ).logits
            together.append([logits[i, width - len(r) :] for i, r in enumerate(rows)])
            session.remember(mask.long())  # integers, as tokenizers give them
    for row in range(2):
        with memorize(decoder, layers=[1], k=3) as session:
            for rows, found in zip(segments, together, strict=True):
                alone = decoder(input_ids=rows[row][None]).logits[0]
                torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)
                session.remember()


@torch.no_grad()
def test_generation_reads_the_memory_and_writes_nothing(decoder: PreTrainedModel) -> None:
    """Cached generation is what greedy search without cache gives, with the same memory."""
    ids = tokens_of(2, 6, 5)
    mask = torch.ones_like(ids)
    with memorize(decoder, layers=[1], k=3) as session:
        decoder(input_ids=tokens_of(2, 12))
        session.remember()
        memory = session.memory.layers[0]
        found = decoder.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert session.memory.layers[0] is memory
        expected = ids
        for _ in range(8):
            logits = decoder(input_ids=expected).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
        assert found.tolist() == expected.tolist()
        decoder(input_ids=ids, use_cache=False)
        decoder.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, eos_token_id=None
        )
        with pytest.raises(ModelError, match="no segment to remember"):
            session.remember()


def test_the_gates_learn_and_checkpointing_changes_nothing(decoder: PreTrainedModel) -> None:
    decoder.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            decoder.activation_checkpointing_enable()
        torch.manual_seed(0)
        with memorize(decoder, layers=[1], k=None) as session:
            for step in range(2):
                ids = tokens_of(2, 8, step)
                torch.manual_seed(step)
                decoder(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                session.remember()
            grads.append(session.gates[0].gate.grad.clone())
        decoder.zero_grad()
    assert (grads[0] != 0).all()
    torch.testing.assert_close(*grads)


def test_a_model_without_such_layers_is_refused(decoder: PreTrainedModel) -> None:
    def begin(layers: list[int], **options: Any) -> None:
        with memorize(decoder, layers, **options):
            pass

    with pytest.raises(ModelError, match="has 0 causal attention layers number 2"):
        begin([2])
    for layers in ([], [1, 1]):
        with pytest.raises(SettingError, match="each layer once, and at least one"):
            begin(layers)
    with pytest.raises(SettingError, match="k must be at least 1"):
        begin([1], k=0)
    with pytest.raises(SettingError, match="capacity must be at least 1"):
        begin([1], capacity=0)
    decoder.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        begin([0])


def test_a_session_refuses_what_it_cannot_remember(decoder: PreTrainedModel) -> None:
    with memorize(decoder, layers=[1]) as session:
        with pytest.raises(ModelError, match="no segment to remember"):
            session.remember()
        decoder(input_ids=tokens_of(2, 6))
        session.remember()
        memory = session.memory.layers[0]
        with pytest.raises(ModelError, match="begin an empty memory"):
            decoder(input_ids=tokens_of(3, 6))
        decoder(input_ids=tokens_of(2, 6))
        with pytest.raises(ModelError, match="say of each row"):
            session.remember(ended=torch.tensor([True, False, False]))
        assert session.memory.layers[0] is memory
        session.forget()
        decoder(input_ids=tokens_of(3, 6))
        session.remember()
        assert session.memory.layers[0].lengths.tolist() == [6, 6, 6]


def test_memories_of_rows_follow_their_order() -> None:
    _, memory = filled_layer(2, [6, 2, 4])
    order = [2, 2, 0]
    chosen = memory.rows(torch.tensor(order))
    assert chosen.lengths.tolist() == [4, 4, 6]
    for row, (old, length) in enumerate(zip(order, [4, 4, 6], strict=True)):
        assert torch.equal(chosen.keys[row, :, -length:], memory.keys[old, :, -length:])


def test_segments_of_any_lengths_make_the_same_memory() -> None:
    """Cutting a document elsewhere changes nothing of what is remembered at its end."""
    _, keys, values = random_qkv(2, 12)
    whole = empty(2, capacity=7).extended(keys, values)
    for cuts in ([0, 1, 12], [0, 5, 6, 12], [0, 12, 12]):
        memory = empty(2, capacity=7)
        for start, stop in pairwise(cuts):
            memory = memory.extended(keys[:, :, start:stop], values[:, :, start:stop])
        assert torch.equal(memory.keys, whole.keys)
        assert torch.equal(memory.keys, keys[:, :, -7:])
        assert torch.equal(memory.values, values[:, :, -7:])
