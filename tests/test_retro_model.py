"""What a RETRO decoder may depend on, shown by gradients; position buckets; saving."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.t5.modeling_t5 import T5Attention

from nearest.encode.layers import find_key_layer
from nearest.retro import RetroConfig, RetroForCausalLM
from nearest.retro.blocks import FeedForward
from nearest.retro.positions import BucketBias, linear_buckets, log_buckets
from retro_models import CHUNK, PRESETS, VARIANTS, found, neighbours, tiny_model, tokens, variant

LENGTH = 14  # three chunks of 4, and two tokens


class Traced:
    """A forward pass whose embedded tokens and neighbours can be differentiated by."""

    def __init__(
        self,
        model: RetroForCausalLM,
        input_ids: Tensor,
        neighbour_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        seen: list[Tensor] = []
        own_table = model.embed_neighbours is not None
        tables = [model.embed_tokens, model.embed_neighbours] if own_table else [model.embed_tokens]
        handles = [
            table.register_forward_hook(lambda _, __, output: seen.append(output))
            for table in tables
        ]
        self.logits = model(
            input_ids, attention_mask=attention_mask, neighbour_ids=neighbour_ids
        ).logits
        for handle in handles:
            handle.remove()
        self.embedded = seen

    def influence(self, rows: int | slice, positions: int | slice) -> list[Tensor]:
        """Summed absolute gradients of some logits, by token, by neighbour token."""
        weights = torch.randn(self.logits.shape[-1], dtype=torch.float64)  # a plain sum cancels
        total = (self.logits[rows, positions] * weights).sum()
        gradients = torch.autograd.grad(total, self.embedded, retain_graph=True)
        return [gradient.abs().sum(-1) for gradient in gradients]


@pytest.fixture(params=sorted(VARIANTS))
def model(request: pytest.FixtureRequest) -> RetroForCausalLM:
    return variant(request.param)


def test_causality(model):
    trace = Traced(model, tokens(1, LENGTH), neighbours(model, 1, LENGTH))
    for position in range(LENGTH):
        by_token, _ = trace.influence(0, position)
        assert (by_token[0, : position + 1] > 0).all()
        assert (by_token[0, position + 1 :] == 0).all()


def test_neighbours_act_from_the_last_token_of_their_chunk_on(model):
    trace = Traced(model, tokens(1, LENGTH), neighbours(model, 1, LENGTH))
    for position in range(LENGTH):
        _, by_neighbour = trace.influence(0, position)
        for chunk in range(LENGTH // CHUNK):
            acts = by_neighbour[0, chunk] > 0
            assert acts.all() if position >= (chunk + 1) * CHUNK - 1 else not acts.any()


def test_the_last_layer_reads_only_the_chunk_before():
    """One layer of chunked cross-attention and none after: block b sees chunk b − 1 alone."""
    for preset in PRESETS:
        model = tiny_model(preset, cca_layers=[2])
        trace = Traced(model, tokens(1, LENGTH), neighbours(model, 1, LENGTH))
        for position in range(LENGTH):
            _, by_neighbour = trace.influence(0, position)
            acting = {c for c in range(3) if (by_neighbour[0, c] > 0).any()}
            assert acting == ({(position + 1) // CHUNK - 1} if position >= CHUNK - 1 else set())


def test_neighbours_are_encoded_in_the_light_of_their_own_chunk_only(model):
    input_ids, neighbour_ids = tokens(1, LENGTH), neighbours(model, 1, LENGTH)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.encoder.register_forward_hook(lambda _, args, out: seen.append((args[2], out)))
    model(input_ids, neighbour_ids=neighbour_ids)
    handle.remove()
    context, encoded = seen[0]
    for chunk in range(3):
        weights = torch.randn_like(encoded[0, chunk])
        gradient = torch.autograd.grad(
            (encoded[0, chunk] * weights).sum(), context, retain_graph=True
        )
        by_chunk = gradient[0].abs().sum((0, 2, 3))
        assert [value > 0 for value in by_chunk.tolist()] == [c == chunk for c in range(3)]


def test_rows_of_a_batch_are_independent(model):
    trace = Traced(model, tokens(3, LENGTH), neighbours(model, 3, LENGTH))
    for by_something in trace.influence(1, slice(None)):
        rows = by_something.flatten(1).sum(1)
        assert rows[1] > 0
        assert rows[0] == rows[2] == 0


def test_neighbours_of_a_chunk_and_of_others_do_not_meet_in_the_encoder(model):
    neighbour_ids = neighbours(model, 2, LENGTH)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.encoder.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(tokens(2, LENGTH), neighbour_ids=neighbour_ids)
    handle.remove()
    embedded, encoded = seen[0]
    one = encoded.unflatten(2, neighbour_ids.shape[2:])[1, 2, 1]
    gradient = torch.autograd.grad((one * torch.randn_like(one)).sum(), embedded)[0]
    by_token = gradient.abs().sum(-1)
    assert (by_token[1, 2, 1] > 0).all()
    by_token[1, 2, 1] = 0
    assert by_token.sum() == 0


@pytest.mark.parametrize("padding", [0, -1])
def test_padding_of_neighbours_is_not_read(model, padding):
    neighbour_ids = neighbours(model, 1, LENGTH)
    neighbour_ids[0, 0, 0, -2:] = padding
    _, by_neighbour = Traced(model, tokens(1, LENGTH), neighbour_ids).influence(0, slice(None))
    assert (by_neighbour[0, 0, 0, :-2] > 0).all()
    assert (by_neighbour[0, 0, 0, -2:] == 0).all()
    assert (by_neighbour[0, 0, 1] > 0).all()


@pytest.mark.parametrize(("preset", "hides"), [("norlund", 1), ("paper", 1), ("retro-pytorch", 0)])
def test_padding_of_the_chunk_is_read_by_the_encoder_where_the_settings_say_so(preset, hides):
    model = tiny_model(preset)
    mask = torch.ones(1, LENGTH, dtype=torch.int64)
    mask[0, 6] = 0
    trace = Traced(model, tokens(1, LENGTH), neighbours(model, 1, LENGTH), mask)
    by_token, _ = trace.influence(0, slice(7, None))
    assert (by_token[0, 6] == 0) == hides
    assert (by_token[0, [4, 5, 7]] > 0).all()


def test_without_mask_padding_tokens_are_hidden_where_the_settings_say_so():
    input_ids = tokens(1, LENGTH)
    input_ids[0, 5] = 0
    for preset, hides in (("norlund", True), ("retro-pytorch", False)):
        model = tiny_model(preset)
        trace = Traced(model, input_ids, neighbours(model, 1, LENGTH))
        assert (trace.influence(0, LENGTH - 1)[0][0, 5] == 0) == hides


def test_padding_of_neighbours_is_not_read_within_the_encoder(model):
    neighbour_ids = neighbours(model, 1, LENGTH)
    neighbour_ids[0, 0, 0, -2:] = 0
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.encoder.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(tokens(1, LENGTH), neighbour_ids=neighbour_ids)
    handle.remove()
    embedded, encoded = seen[0]
    gradient = torch.autograd.grad(
        (encoded[0, 0, 0] * torch.randn_like(encoded[0, 0, 0])).sum(), embedded
    )[0]
    by_token = gradient.abs().sum(-1)[0, 0, 0]
    assert (by_token[:-2] > 0).all()
    assert (by_token[-2:] == 0).all()


def test_no_gradient_reaches_neighbours_that_are_all_padding(model):
    neighbour_ids = neighbours(model, 1, LENGTH)
    neighbour_ids[0, 0] = -1
    _, by_neighbour = Traced(model, tokens(1, LENGTH), neighbour_ids).influence(0, slice(None))
    assert (by_neighbour[0, 0] == 0).all()
    assert (by_neighbour[0, 1:3] > 0).all()


@pytest.mark.parametrize("preset", ["norlund", "paper"])
def test_a_chunk_without_neighbours_adds_exactly_nothing(preset):
    model = tiny_model(preset)
    input_ids, neighbour_ids = tokens(2, LENGTH), neighbours(model, 2, LENGTH)
    off = model(input_ids).logits
    assert torch.equal(
        model(input_ids, neighbour_ids=torch.full_like(neighbour_ids, -1)).logits, off
    )
    neighbour_ids[:, 1:] = 0
    some = model(input_ids, neighbour_ids=neighbour_ids)
    assert not torch.allclose(some.logits[:, CHUNK - 1 : 2 * CHUNK - 1], off[:, 3:7])
    _, by_neighbour = Traced(model, input_ids, neighbour_ids).influence(slice(None), slice(None))
    assert (by_neighbour[:, 1:] == 0).all()


def test_a_null_neighbour_speaks_where_there_is_none():
    model = tiny_model("retro-pytorch")
    input_ids = tokens(1, LENGTH)
    empty = torch.full_like(neighbours(model, 1, LENGTH), -1)
    difference = (model(input_ids, neighbour_ids=empty).logits - model(input_ids).logits).abs()
    assert difference[0, : CHUNK - 1].max() == 0
    assert (difference[0, CHUNK - 1 :].amax(-1) > 0).all()


def test_an_unfinished_chunk_is_read_as_the_start_of_a_whole_one(model):
    input_ids = tokens(2, LENGTH)
    whole = model(input_ids, neighbour_ids=neighbours(model, 2, LENGTH)).logits
    for length in range(1, LENGTH):
        ids = neighbours(model, 2, LENGTH)[:, : model.config.chunks(length)]
        part = model(input_ids[:, :length], neighbour_ids=ids).logits
        torch.testing.assert_close(part, whole[:, :length], rtol=0, atol=1e-10)


def test_padding_on_the_left_changes_nothing(model):
    lengths, longest = [3, 9, 14, 1], 14
    input_ids, neighbour_ids = tokens(4, longest), neighbours(model, 4, longest)
    padded = torch.zeros(4, longest, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, length in enumerate(lengths):
        padded[row, longest - length :] = input_ids[row, :length]
        mask[row, longest - length :] = 1
    logits = model(padded, attention_mask=mask, neighbour_ids=neighbour_ids).logits
    for row, length in enumerate(lengths):
        ids = neighbour_ids[row : row + 1, : model.config.chunks(length)]
        alone = model(input_ids[row : row + 1, :length], neighbour_ids=ids).logits
        torch.testing.assert_close(logits[row : row + 1, -length:], alone, rtol=0, atol=1e-10)


def test_linear_buckets_by_hand():
    relative = torch.arange(5)[None] - torch.arange(5)[:, None]
    ones = torch.ones_like(relative)
    assert torch.equal(linear_buckets(relative, 2, causal=False), ones.triu(1))
    assert torch.equal(linear_buckets(relative, 3, causal=False), relative.sign() + 1)
    assert torch.equal(linear_buckets(relative, 2, causal=True), ones.triu())
    assert torch.equal(linear_buckets(relative, 3, causal=True), ones.triu() + ones.triu(-1))
    assert linear_buckets(relative, 3, causal=False).tolist()[1:3] == [
        [0, 1, 2, 2, 2],
        [0, 0, 1, 2, 2],
    ]
    assert linear_buckets(relative, 2, causal=False)[0].tolist() == [0, 1, 1, 1, 1]
    assert linear_buckets(relative, 4, causal=False)[2].tolist() == [0, 0, 1, 2, 3]
    assert linear_buckets(relative, 3, causal=True)[3].tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets", [8, 32])
def test_log_buckets_are_those_of_t5(causal, buckets):
    relative = torch.arange(-300, 300)
    expected = T5Attention._relative_position_bucket(relative, not causal, buckets, 128)
    assert torch.equal(log_buckets(relative, buckets, causal, 128), expected)


@pytest.mark.parametrize("hide", [True, False])
@pytest.mark.parametrize("spacing", ["linear", "log"])
def test_biases_along_diagonals_equal_those_looked_up_one_by_one(spacing, hide):
    bias = BucketBias(6, 3, causal=False, spacing=spacing, max_distance=20)
    torch.nn.init.normal_(bias.weight)
    laid = bias(4, 9, shift=2, hide_later=hide)
    for i in range(4):
        for j in range(9):
            relative = torch.tensor(j - i - 2)
            if spacing == "linear":
                bucket = linear_buckets(relative, 6, causal=False)
            else:
                bucket = log_buckets(relative, 6, causal=False, max_distance=20)
            hidden = hide and relative > 0
            assert torch.equal(laid[:, i, j], bias.weight[bucket] - (torch.inf if hidden else 0))


def test_saved_and_loaded_by_the_auto_classes(model, tmp_path: Path):
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    input_ids, neighbour_ids = tokens(1, LENGTH), neighbours(model, 1, LENGTH)
    expected = model(input_ids, neighbour_ids=neighbour_ids).logits
    logits = again(input_ids, neighbour_ids=neighbour_ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_a_tied_head_is_saved_once_and_stays_tied(tmp_path: Path):
    model = tiny_model("norlund", tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = RetroForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.lm_head.weight is again.embed_tokens.weight
    input_ids = tokens(1, LENGTH)
    torch.testing.assert_close(again(input_ids).logits, model(input_ids).logits)


def test_hidden_states_are_those_of_every_layer(model):
    input_ids = tokens(1, LENGTH)
    output = model(input_ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.decoder_layers + 1
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    kept = model(input_ids, logits_to_keep=2).logits
    torch.testing.assert_close(kept, output.logits[:, -2:])


def test_several_continuation_chunks_are_all_read(model):
    """Neighbours of a chunk and four that follow it."""
    ids = neighbours(model, 1, LENGTH, count=3, width=5 * CHUNK)
    _, by_neighbour = Traced(model, tokens(1, LENGTH), ids).influence(0, slice(None))
    assert (by_neighbour[:, : LENGTH // CHUNK] > 0).all()


def test_half_precision(model):
    """As a model in bfloat16 and by autocast, trained and generating."""
    input_ids, ids = tokens(2, LENGTH), neighbours(model, 2, LENGTH)
    model.float()
    half = copy.deepcopy(model).bfloat16()
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    inputs = {"attention_mask": mask, "neighbour_ids": ids}
    with torch.no_grad():
        expected = model(input_ids, **inputs).logits[mask.bool()]
        logits = [half(input_ids, **inputs).logits]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits.append(model(input_ids, **inputs).logits)
    for answer in logits:
        difference = (answer[mask.bool()].float() - expected).square().mean().sqrt()
        assert difference < 0.15 * expected.std()
    options = {"attention_mask": mask, "neighbours": found, "max_new_tokens": 9}
    assert half.generate(input_ids, **options).shape[0] == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(input_ids, labels=input_ids, **inputs).loss.backward()
    assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)


def test_its_keys_are_found_as_in_any_language_model(model):
    """So that a memory of keys can be built with a RETRO model."""
    key_layer = find_key_layer(model, "last_ffn_input")
    assert key_layer.path == "layers.2.feed_forward.body.up"
    assert key_layer.dim == model.config.decoder_dim


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_the_gated_layer_and_its_gradients_are_those_of_plain_torch(activation: str) -> None:
    """Its gradient is written by hand: by finite differences, and against automatic ones."""
    config = RetroConfig.preset(
        "norlund", decoder_dim=6, decoder_ffn_dim=10, activation=activation, bias=True
    )
    layer = FeedForward(config, "decoder").double().eval()
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    gate, linear = layer.up(x).chunk(2, dim=-1)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    expected = layer.down(F.gelu(gate, approximate=approximate) * linear)
    weights = [x, *layer.parameters()]
    grown = torch.randn_like(expected)
    torch.testing.assert_close(layer(x), expected)
    for one, other in zip(
        torch.autograd.grad(layer(x), weights, grown),
        torch.autograd.grad(expected, weights, grown),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
