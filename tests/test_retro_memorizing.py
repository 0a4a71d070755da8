"""RETRO with layers that attend to earlier segments of a document: against plain loops."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nearest.errors import ModelError, SettingError
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
from nearest.models.memorizing.decoder import DecoderMemory
from nearest.retro import RetroForCausalLM
from nearest.retro.attention import SelfAttention
from nearest.retro.convert import to_norlund, to_retro_pytorch
from nearest.retro.positions import linear_buckets, log_buckets
from retro_models import (
    CHUNK,
    PRESETS,
    found,
    naive_rotate,
    neighbours,
    rounding,
    tiny_config,
    tiny_model,
    tokens,
)

LAYERS = [0, 2]
NEW = 2 * CHUNK + 1
QUIET = {f"{kind}_dropout": 0.0 for kind in ("attention", "residual", "feed_forward")}


def memorizing(preset: str = "norlund", k: int | None = 3, **settings) -> RetroForCausalLM:
    return tiny_model(preset, memorizing_layers=LAYERS, memorizing_k=k, **settings)


def after(model: RetroForCausalLM, rows: int, segments: int = 2, seed: int = 9) -> DecoderMemory:
    """What is remembered of some segments of seven tokens."""
    memory = model.empty_memory(rows)
    with torch.no_grad():
        for i in range(segments):
            memory = model(tokens(rows, 7, seed=seed + i), memory=memory).memory
    return memory


def naive_bias(layer: SelfAttention, relative: int, head: int) -> Tensor | float:
    if layer.bias is None:
        return 0.0
    config, distance = layer.config, torch.tensor(relative)
    if config.bucket_spacing == "linear":
        bucket = linear_buckets(distance, config.decoder_buckets, causal=True)
    else:
        bucket = log_buckets(distance, config.decoder_buckets, True, config.bucket_max_distance)
    return layer.bias.weight[bucket, head]


def naive_segment(
    layer: SelfAttention, x: Tensor, past: list[list[tuple[Tensor, Tensor]]], k: int | None
) -> Tensor:
    """One unpadded segment x (n, dim) of one document; `past`: each head's pairs, which grows."""
    config, dim = layer.config, layer.config.decoder_head_dim
    heads = []
    for head in range(layer.heads):
        part = slice(head * dim, (head + 1) * dim)
        q, keys, values = (
            x @ layer.q.weight[part].T,
            *(x @ weight[part].T for weight in layer.kv.weight.chunk(2)),
        )
        if layer.bias is None:
            q, keys = (
                torch.stack([naive_rotate(v, p, config.rotary_dim) for p, v in enumerate(vectors)])
                for vectors in (q, keys)
            )
        gate = 1 / (1 + math.exp(-layer.memorizing.gate[head]))
        rows = []
        for p in range(len(x)):
            scores = [
                q[p] @ keys[j] * layer.scale + naive_bias(layer, j - p, head) for j in range(p + 1)
            ]
            row = torch.stack(scores).softmax(0) @ values[: p + 1]
            if past[head]:
                ranked = sorted(past[head], key=lambda pair: -float(q[p] @ pair[0]))[:k]
                weights = torch.stack([q[p] @ key * layer.scale for key, _ in ranked]).softmax(0)
                recalled = weights @ torch.stack([value for _, value in ranked])
                row = gate * recalled + (1 - gate) * row
            rows.append(row)
        past[head] += zip(keys, values, strict=True)
        heads.append(torch.stack(rows))
    return layer.out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("k", [None, 3, 1000])
@pytest.mark.parametrize("preset", PRESETS)
def test_equals_plain_loops_over_segments_of_documents(preset, k):
    """Three segments of two documents; the second one ends with the first segment."""
    model = memorizing(preset, k, bias=True)
    memory = model.empty_memory(2)
    for number in LAYERS:  # no head's gate is like another's
        layer = model.layers[number].self_attention.body
        torch.nn.init.normal_(layer.memorizing.gate)
    pads = [(0, 0), (0, 2), (1, 0)]
    seen: list[tuple[int, Tensor, Tensor]] = []
    for number in LAYERS:
        model.layers[number].self_attention.body.register_forward_hook(
            lambda _, args, out, number=number: seen.append((number, args[0], out))
        )
    past = {(number, row): [[], []] for number in LAYERS for row in range(2)}
    for step, padded in enumerate(pads):
        mask = torch.ones(2, 6, dtype=torch.int64)
        for row, pad in enumerate(padded):
            mask[row, :pad] = 0
        seen.clear()
        with torch.no_grad():
            output = model(
                tokens(2, 6, seed=step),
                attention_mask=mask,
                neighbour_ids=neighbours(model, 2, 6),
                memory=memory,
            )
            for number, x, out in seen:
                layer = model.layers[number].self_attention.body
                for row, pad in enumerate(padded):
                    expected = naive_segment(layer, x[row, pad:], past[number, row], k)
                    torch.testing.assert_close(out[row, pad:], expected, rtol=0, atol=1e-6)
        memory = output.memory
        if step == 0:
            memory = memory.cleared(torch.tensor([False, True]))
            for number in LAYERS:
                past[number, 1] = [[], []]
        assert memory.lengths.tolist() == [len(past[0, row][0]) for row in range(2)]
    assert memory.lengths.tolist() == [17, 10]


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_memory_it_is_the_model_without_such_layers(preset):
    model, plain = memorizing(preset), tiny_model(preset)
    model.load_state_dict(plain.state_dict(), strict=False)
    input_ids, ids = tokens(2, 9), neighbours(plain, 2, 9)
    expected = plain(input_ids, neighbour_ids=ids).logits
    output = model(input_ids, neighbour_ids=ids)
    assert torch.equal(output.logits, expected)
    assert output.memory is None
    empty = model(input_ids, neighbour_ids=ids, memory=model.empty_memory(2)).logits
    assert torch.equal(empty, expected)
    full = model(input_ids, neighbour_ids=ids, memory=after(model, 2)).logits
    assert ((full - expected).abs().amax(-1) > 1e-3).all()


def test_a_cleared_row_is_a_new_document_and_others_go_on():
    model, input_ids = memorizing(), tokens(2, 9)
    memory = after(model, 2)
    whole = model(input_ids, memory=memory).logits
    half = model(input_ids, memory=memory.cleared(torch.tensor([True, False]))).logits
    torch.testing.assert_close(half[0], model(input_ids).logits[0])
    torch.testing.assert_close(half[1], whole[1])
    assert memory.lengths.tolist() == [14, 14]  # the one that was given is as it was


def test_rows_read_their_own_memory_only():
    model, input_ids = memorizing(), tokens(3, 9)
    memory = after(model, 3)
    whole = model(input_ids, memory=memory).logits
    rows = torch.tensor([2, 0])
    some = model(input_ids[rows], memory=memory.rows(rows)).logits
    torch.testing.assert_close(some, whole[rows])


def test_padding_is_not_remembered_and_no_more_than_the_capacity():
    input_ids = tokens(2, 9)
    input_ids[1, :4] = 0
    for preset, hides in (("norlund", True), ("retro-pytorch", False)):
        model = memorizing(preset, memorizing_capacity=6)
        output = model(input_ids, memory=model.empty_memory(2))
        assert output.memory.lengths.tolist() == [6, 5 if hides else 6]
        mask = (input_ids != 0).long()
        output = model(input_ids, attention_mask=mask, memory=model.empty_memory(2))
        assert output.memory.lengths.tolist() == [6, 5]


def test_an_index_finds_the_same_pairs():
    model, input_ids = memorizing(), tokens(2, 9)
    indexed = model.empty_memory(
        2, index=lambda keys: ExactIndex(FloatKeys(keys, "ip"), np.arange(len(keys)))
    )
    scanned = model.empty_memory(2)
    for seed in range(3):
        with torch.no_grad():
            one, other = (model(tokens(2, 9, seed=seed), memory=m) for m in (scanned, indexed))
        torch.testing.assert_close(other.logits, one.logits)
        scanned, indexed = one.memory, other.memory
    assert not torch.allclose(model(input_ids).logits, model(input_ids, memory=scanned).logits)


def generated_logits(model: RetroForCausalLM, prompt: Tensor, **options) -> tuple[Tensor, Tensor]:
    passes: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: passes.append(output.logits[:, -1]))
    sequences = model.generate(prompt, max_new_tokens=NEW, eos_token_id=None, **options)
    hook.remove()
    return sequences, torch.stack(passes, dim=1)


def read(
    model: RetroForCausalLM,
    sequence: Tensor,
    memory: DecoderMemory,
    retrieve: Callable[[Tensor], Tensor] = found,
) -> Tensor:
    """One unpadded sequence in one pass without a cache, with the neighbours of its chunks."""
    whole = len(sequence) // CHUNK
    ids = torch.full((1, model.config.chunks(len(sequence)), 2, 6), -1)
    if whole:
        ids[0, :whole] = retrieve(sequence[: whole * CHUNK].reshape(whole, CHUNK))
    mask = torch.ones_like(sequence)[None]
    with torch.no_grad():
        output = model(
            sequence[None], attention_mask=mask, neighbour_ids=ids, memory=memory, use_cache=False
        )
    return output.logits[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_cached_generation_equals_reading_anew(preset):
    """Every prompt length, alone and in one ragged batch."""
    model = memorizing(preset)
    lengths, longest = range(1, 3 * CHUNK + 1), 3 * CHUNK
    memory = after(model, len(lengths))
    prompt, mask = torch.zeros(2, len(lengths), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mine = memory.rows(torch.tensor([row]))
        start = longest - length
        prompt[row, start:] = tokens(1, length, seed=row)
        mask[row, start:] = 1
        sequences, logits = generated_logits(
            model, prompt[row : row + 1, start:], neighbours=found, memory=mine
        )
        expected = read(model, sequences[0, :-1], mine)[length - 1 :]
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=rounding(expected))
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        sequences, logits = generated_logits(
            model, prompt, attention_mask=mask, neighbours=found, memory=memory
        )
        for row, length in enumerate(lengths):
            mine = memory.rows(torch.tensor([row]))
            expected = read(model, sequences[row, longest - length : -1], mine)[length - 1 :]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=rounding(expected))
    assert (memory.lengths == 14).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_beams_and_samples_of_a_document_read_its_memory(preset):
    model, prompt = memorizing(preset), tokens(2, 2 * CHUNK + 1)
    memory = after(model, 2)
    options = {"max_new_tokens": NEW, "num_return_sequences": 3, "neighbours": found}
    for search in ({"num_beams": 3}, {"do_sample": True, "top_k": 20}):
        answers = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            answers.append(
                model.generate(prompt, memory=memory, use_cache=use_cache, **options, **search)
            )
        assert torch.equal(*answers)
    beams = model.generate(prompt, memory=memory, num_beams=3, **options)
    alone = model.generate(
        prompt[1:], memory=memory.rows(torch.tensor([1])), num_beams=3, **options
    )
    for one, other in zip(beams[3:], alone, strict=True):
        width = min(len(one), len(other))
        assert torch.equal(one[:width], other[:width])
    drafted = model.generate(
        prompt[:1],
        memory=memory.rows(torch.tensor([0])),
        prompt_lookup_num_tokens=3,
        max_new_tokens=9,
    )
    plain = model.generate(prompt[:1], memory=memory.rows(torch.tensor([0])), max_new_tokens=9)
    assert torch.equal(drafted, plain)


def test_a_cache_continues_a_segment_and_remembers_nothing():
    model, input_ids = memorizing(), tokens(1, 9)
    memory = after(model, 1)
    whole = model(input_ids, memory=memory)
    first = model(input_ids[:, :5], memory=memory, use_cache=True)
    rest = model(input_ids[:, 5:], memory=memory, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole.logits[:, 5:])
    assert rest.memory is None
    assert whole.memory.lengths.tolist() == [23]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_gates_learn_and_checkpointing_changes_nothing(preset):
    gradients = []
    for checkpointing in (False, True):
        model = memorizing(preset, **QUIET).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        memory = model.empty_memory(2)
        for step in range(3):
            input_ids = tokens(2, 9, seed=step)
            ids = neighbours(model, 2, 9)
            output = model(input_ids, neighbour_ids=ids, labels=input_ids, memory=memory)
            output.loss.backward()
            memory = output.memory
            assert not any(layer.keys.requires_grad for layer in memory.layers)
        gradients.append({n: w.grad for n, w in model.named_parameters() if w.grad is not None})
    for number in LAYERS:
        assert (gradients[0][f"layers.{number}.self_attention.body.memorizing.gate"] != 0).all()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_model_learns_to_look_back_at_the_segment_before():
    """The answer stands in the first segment of a document, the question in the second."""
    torch.manual_seed(0)
    changes = {"decoder_layers": 2, "cca_layers": [], "memorizing_layers": [0, 1]}
    model = RetroForCausalLM(tiny_config("norlund", **QUIET, **changes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def loss(with_memory: bool) -> Tensor:
        answer = torch.randint(3, 11, (32, 1))
        memory = model(answer.expand(-1, 4), memory=model.empty_memory(32)).memory
        question = torch.full((32, 3), 2)
        logits = model(question, memory=memory if with_memory else None).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits, answer[:, 0])

    for _ in range(60):
        optimizer.zero_grad()
        loss(True).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert loss(True) < 0.2 < 1.5 < loss(False)


def test_saved_with_the_model_and_added_to_one_that_was_trained_without(tmp_path: Path):
    model = memorizing("retro-pytorch", k=5, memorizing_capacity=11)
    model.save_pretrained(tmp_path / "with")
    again = RetroForCausalLM.from_pretrained(tmp_path / "with", dtype=torch.float64)
    assert (again.config.memorizing_layers, again.config.memorizing_k) == (LAYERS, 5)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    memory, input_ids = after(model, 2), tokens(2, 9)
    expected = model(input_ids, memory=memory)
    torch.testing.assert_close(again(input_ids, memory=memory).logits, expected.logits)
    assert after(again, 2).lengths.tolist() == [11, 11]

    tiny_model("retro-pytorch").save_pretrained(tmp_path / "without")
    added = RetroForCausalLM.from_pretrained(
        tmp_path / "without",
        memorizing_layers=[1],
        memorizing_initial_gate=0.2,
        dtype=torch.float64,
    )
    layer = added.layers[1].self_attention.body.memorizing
    torch.testing.assert_close(layer.gate.sigmoid(), torch.full((2,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(layer.scale, torch.full((2,), 12**-0.5, dtype=torch.float64))
    assert torch.equal(added(input_ids).logits, tiny_model("retro-pytorch")(input_ids).logits)
    assert added(input_ids, memory=after(added, 2)).logits.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision(preset):
    model = memorizing(preset).float()
    input_ids = tokens(2, 9)
    expected = model(input_ids, memory=after(model, 2)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loose = model(input_ids, memory=after(model, 2)).logits
    assert (loose - expected).square().mean().sqrt() < 0.15 * expected.std()
    half = model.bfloat16()
    memory = after(half, 2)
    assert memory.layers[0].keys.dtype == torch.bfloat16
    assert half.generate(input_ids, memory=memory, max_new_tokens=3).shape[0] == 2


def test_memories_that_do_not_fit_are_refused():
    model, input_ids = memorizing(), tokens(2, 9)
    plain = tiny_model("norlund")
    with pytest.raises(SettingError, match="name some in memorizing_layers"):
        plain.empty_memory(2)
    for other in (plain, tiny_model("norlund", memorizing_layers=[1])):
        with pytest.raises(SettingError, match="the memory is of 2 layers"):
            other(input_ids, memory=model.empty_memory(2))
    for memory in (after(model, 3), model.empty_memory(3)):
        with pytest.raises(ModelError, match="holds 3 rows"):
            model(input_ids, memory=memory)
    wide = memorizing(decoder_attention_dim=32)
    with pytest.raises(ModelError, match="keys of 16"):
        model(input_ids, memory=after(wide, 2))
    with pytest.raises(ModelError, match="say of each row"):
        after(model, 2).cleared(torch.tensor([True]))
    with pytest.raises(SettingError, match="capacity must be at least 1"):
        memorizing(memorizing_capacity=0).empty_memory(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memorizing_k": 0}, "k must be at least 1"),
        ({"memorizing_initial_gate": 1.0}, r"inside \(0, 1\)"),
        ({"memorizing_layers": [0, 0]}, "different"),
        ({"memorizing_layers": [3]}, "memorizing_layers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        tiny_model("norlund", **{"memorizing_layers": LAYERS, **settings})


def test_the_public_formats_cannot_hold_its_gates():
    for save, preset in ((to_norlund, "norlund"), (to_retro_pytorch, "retro-pytorch")):
        with pytest.raises(SettingError, match="memorizing_layers"):
            save(memorizing(preset, cca_rotary="aligned" if preset == "norlund" else "public"))
