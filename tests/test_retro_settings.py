"""Every setting of a RETRO model does what it says: against closed forms and plain loops."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from nearest.errors import SettingError
from nearest.retro import RetroConfig, RetroForCausalLM
from nearest.retro.blocks import FeedForward, Residual
from nearest.retro.chunked import ChunkedCrossAttention, Encoded, Retrieved
from nearest.retro.layout import ChunkLayout
from nearest.retro.norms import make_norm
from nearest.retro.positions import linear_buckets, log_buckets
from retro_models import (
    CHUNK,
    LOG_BUCKETS,
    PRESETS,
    naive_rotate,
    neighbours,
    stir,
    tiny_config,
    tiny_model,
    tokens,
)


def naive_cca(layer: ChunkedCrossAttention, x: Tensor, encoded: Tensor, seen: Tensor) -> Tensor:
    """Position by position, head by head, key by key: one sequence x (n, dim), all in float64."""
    config, heads = layer.config, layer.heads
    m, (_, count, length) = config.chunk_size, seen.shape
    out = torch.zeros_like(x)
    for p in range(m - 1, len(x)):
        chunk, row = (p + 1) // m - 1, (p + 1) % m
        if not seen[chunk].any() and layer.null is None:
            continue
        mixed = []
        for head in range(heads):
            inner = config.decoder_attention_dim // heads
            part = slice(head * inner, (head + 1) * inner)
            q = (layer.q.weight @ x[p])[part]
            k_weight, v_weight = layer.kv.weight.chunk(2)
            if layer.bias is None:
                place = row + m - 1
                if config.cca_rotary == "public":
                    place = 2 * m - 2 if row == 0 else 0
                q = naive_rotate(q, place, config.rotary_dim)
            scores, values = [], []
            if layer.null is not None:
                null_k, null_v = layer.null.chunk(2)
                scores.append(q @ null_k[part] * layer.scale)
                values.append(null_v[part])
            for n in range(count):
                for j in range(length):
                    if not seen[chunk, n, j]:
                        continue
                    state = encoded[chunk, n * length + j]
                    k = (k_weight @ state)[part]
                    if layer.bias is None:
                        score = q @ naive_rotate(k, j, config.rotary_dim) * layer.scale
                    else:
                        relative = torch.tensor(n * length + j - row)
                        if config.cca_buckets == "shared":
                            relative = torch.tensor(j - (row + m - 1))
                        buckets = config.cca_bucket_count
                        if config.bucket_spacing == "linear":
                            bucket = linear_buckets(relative, buckets, causal=False)
                        else:
                            distance = config.bucket_max_distance
                            bucket = log_buckets(relative, buckets, False, distance)
                        score = q @ k * layer.scale + layer.bias.weight[bucket, head]
                    scores.append(score)
                    values.append((v_weight @ state)[part])
            weights = torch.stack(scores).softmax(0)
            mixed.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        out[p] = layer.out(torch.cat(mixed))
    return out


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("norlund", {}),
        ("norlund", {"cca_buckets": "shared", "cca_bucket_count": 7}),
        ("norlund", {"bucket_spacing": "log", **LOG_BUCKETS, "cca_bucket_count": 8}),
        ("paper", {}),
        ("paper", {"null_neighbour": True}),
        ("retro-pytorch", {}),
        ("retro-pytorch", {"cca_rotary": "public", "rotary_dim": 4}),
        ("retro-pytorch", {"chunk_size": 3}),
    ],
)
def test_chunked_cross_attention_equals_plain_loops(preset, settings):
    config = tiny_config(preset, **settings)
    layer = ChunkedCrossAttention(config, 1).eval()
    stir(layer)
    layer.double()
    m, length = config.chunk_size, 11
    chunks = length // m
    random = torch.Generator().manual_seed(0)
    x = torch.randn(length, config.decoder_dim, dtype=torch.float64, generator=random)
    shape = (chunks, 2 * 5, config.encoder_output_dim)
    encoded = torch.randn(shape, dtype=torch.float64, generator=random)
    seen = torch.ones(chunks, 2, 5, dtype=torch.bool)
    seen[0, 0, 3:] = False
    seen[1] = False
    stack = F.pad(seen.flatten(1), (int(config.null_neighbour), 0), value=True)
    layout = ChunkLayout(m, length, 0, (0,))
    hidden = torch.zeros(stack.shape, dtype=torch.float64).masked_fill(~stack, -1e9)
    silent = None if config.null_neighbour else ~stack.any(-1)[None, :, None, None]
    read = Encoded({1: encoded[None]}, None, seen.flatten(1)[None])
    retrieved = Retrieved(layout, 5, read, hidden[:, None, None], silent, None)
    with torch.no_grad():
        expected = naive_cca(layer, x, encoded, seen)
        torch.testing.assert_close(layer(x[None], retrieved)[0], expected, rtol=0, atol=1e-6)
    assert expected[m:].abs().max() > 0.1


def test_shared_buckets_do_not_mind_the_order_of_neighbours():
    input_ids = tokens(1, 10)
    for preset, changes in (("paper", False), ("norlund", True)):
        model = tiny_model(preset)
        ids = neighbours(model, 1, 10)
        one, other = (model(input_ids, neighbour_ids=n).logits for n in (ids, ids.flip(2)))
        assert torch.allclose(one, other) != changes


def test_distances_beyond_the_buckets_are_one():
    """With as many buckets as distances the farthest key still has a bias of its own."""
    for buckets, near in ((3, 2), (9, 8)):
        model = tiny_model("norlund", decoder_buckets=buckets)
        assert model.layers[0].self_attention.body.bias.weight.shape == (buckets, 2)
        bias = model.layers[0].self_attention.body.bias(10, 10)
        assert (bias[:, 9, : 10 - near] == bias[:, 9, :1]).all()
        assert (bias[:, 9, 10 - near] != bias[:, 9, 0]).all()


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_norms(scale):
    x = torch.randn(3, 8, dtype=torch.float64) * scale
    rms = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(make_norm("rms", 8, False).double()(x), x / (rms + 1e-8))
    expected = x / rms.clamp(min=1e-8)
    torch.testing.assert_close(make_norm("rms_clamped", 8, False).double()(x), expected)
    gated = make_norm("rms_clamped", 8, True).double()
    torch.testing.assert_close(gated(x), expected * torch.sigmoid(x))
    torch.nn.init.constant_(gated.gate, 3.0)
    torch.nn.init.constant_(gated.weight, 0.5)
    torch.testing.assert_close(gated(x), 0.5 * expected * torch.sigmoid(3 * x))
    torch.testing.assert_close(make_norm("layer", 8, False).double()(x), F.layer_norm(x, (8,)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_feed_forward(bias, activation):
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    x = torch.randn(2, 5, 32) * 3
    for kind in ("geglu", "mlp"):
        layer = FeedForward(
            tiny_config("norlund", feed_forward=kind, activation=activation, bias=bias), "decoder"
        ).eval()
        inner = x @ layer.up.weight.T + (layer.up.bias if bias else 0)
        if kind == "geglu":
            inner = F.gelu(inner[..., :40], approximate=approximate) * inner[..., 40:]
        else:
            inner = F.gelu(inner, approximate=approximate)
        expected = inner @ layer.down.weight.T + (layer.down.bias if bias else 0)
        torch.testing.assert_close(layer(x), expected)
        assert (layer.up.bias is None) != bias
        attention_out = tiny_model("norlund", bias=bias).layers[1].self_attention.body.out
        assert (attention_out.bias is None) != bias


def test_deepnet_norms_after_a_weighted_sum():
    x = torch.randn(2, 5, 32)
    config = tiny_config("retro-pytorch", deepnet=True, norm="layer")
    for side, weight in (("decoder", 9**0.25), ("encoder", 0.81 * (2**4 * 3) ** (1 / 16))):
        dim = 32 if side == "decoder" else 20
        body = torch.nn.Linear(dim, dim)
        part = x[..., :dim]
        expected = F.layer_norm(weight * part + body(part), (dim,))
        torch.testing.assert_close(Residual(config, side, body)(part), expected)
    plain = tiny_config("retro-pytorch", norm="layer")
    body = torch.nn.Linear(32, 32)
    torch.testing.assert_close(
        Residual(plain, "decoder", body)(x), x + body(F.layer_norm(x, (32,)))
    )


def test_scaled_scores_are_scaled_queries():
    scaled = tiny_model("norlund", scale_scores=True)
    plain = tiny_model("norlund")
    for name, weight in plain.named_parameters():
        if name.endswith("body.q.weight"):
            heads = 2
            weight.data *= (len(weight) // heads) ** -0.5
    input_ids, ids = tokens(1, 10), neighbours(plain, 1, 10)
    expected = plain(input_ids, neighbour_ids=ids).logits
    torch.testing.assert_close(scaled(input_ids, neighbour_ids=ids).logits, expected)


def test_absolute_positions_are_added():
    model, input_ids = tiny_model("norlund", absolute_positions=True), tokens(1, 6)
    with_positions = model(input_ids).logits
    torch.nn.init.zeros_(model.embed_positions.weight)
    assert not torch.allclose(model(input_ids).logits, with_positions)
    assert tiny_model("norlund").embed_positions is None


def test_relative_positions_alone_forget_where_a_text_starts():
    """Without absolute positions, equal windows of a sequence with period 3 predict the same."""
    for preset in ("norlund", "paper", "retro-pytorch"):
        model = tiny_model(preset, absolute_positions=False, decoder_layers=1, cca_layers=[])
        logits = model(torch.tensor([[5, 6, 7] * 2]), attention_mask=torch.ones(1, 6)).logits
        shifted = model(torch.tensor([[7] + [5, 6, 7] * 2]), attention_mask=None).logits
        assert not torch.allclose(logits, shifted[:, 1:])  # it does read what stands before
        mask = torch.ones(1, 7, dtype=torch.int64)
        mask[0, 0] = 0
        hidden = model(torch.tensor([[7] + [5, 6, 7] * 2]), attention_mask=mask).logits
        torch.testing.assert_close(hidden[:, 1:], logits)


def test_one_table_or_two():
    apart = tiny_model("norlund")
    assert apart.embed_neighbours.weight.shape == (50, 20)
    assert apart.embed_project is None
    shared = tiny_model("norlund", share_embeddings=True)
    assert shared.embed_neighbours is None
    assert shared.embed_tokens.weight.shape == (50, 20)
    assert shared.embed_project.weight.shape == (32, 20)
    equal = tiny_model("norlund", share_embeddings=True, encoder_dim=32)
    assert equal.embed_project is None


def test_head_bias_is_added():
    model, input_ids = tiny_model("norlund", head_bias=True), tokens(1, 6)
    before = model(input_ids).logits
    model.lm_head.bias.data += 2
    torch.testing.assert_close(model(input_ids).logits, before + 2)
    assert tiny_model("norlund").lm_head.bias is None


def test_projected_encoder_output():
    model = tiny_model("norlund", project_encoder_output=True)
    body = model.layers[1].chunked_cross_attention.body
    assert body.kv.weight.shape == (48, 32)
    seen: list[Tensor] = []
    model.encoder.project.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    ids = neighbours(model, 1, 10)
    model(tokens(1, 10), neighbour_ids=ids)
    rms = (seen[0] / model.encoder.norm.weight).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms))
    deepnet = tiny_model("norlund", project_encoder_output=True, deepnet=True, norm="layer")
    assert isinstance(deepnet.encoder.norm, torch.nn.Identity)
    assert isinstance(deepnet.norm, torch.nn.Identity)


def test_hiding_the_chunk_s_padding_from_the_encoder_or_not():
    input_ids = tokens(1, 10)
    mask = torch.ones_like(input_ids)
    mask[0, 1] = 0
    for hides in (True, False):
        model = tiny_model("norlund", mask_encoder_context=hides)
        ids = neighbours(model, 1, 10)
        one = model(input_ids, attention_mask=mask, neighbour_ids=ids).logits
        input_ids[0, 1] += 1
        other = model(input_ids, attention_mask=mask, neighbour_ids=ids).logits
        assert torch.allclose(one[:, 2:], other[:, 2:]) == hides


def test_the_score_of_hidden_keys_matters_only_where_all_are_hidden():
    """A number leaves differences between scores; the least number drowns them: a plain mean."""
    input_ids = tokens(1, 12)
    mask = torch.ones_like(input_ids)
    models = [tiny_model("norlund", masked_score=score) for score in (-10_000.0, None)]
    ids = neighbours(models[0], 1, 12)
    for hidden, equal in ((slice(5, 6), True), (slice(4, 8), False)):
        mask[0, hidden] = 0
        one, other = (
            model(input_ids, attention_mask=mask, neighbour_ids=ids).logits for model in models
        )
        assert torch.allclose(one[:, 8:], other[:, 8:]) == equal


@pytest.mark.parametrize(("rule", "counts"), [("ceil", [1, 1, 2, 2]), ("floor", [0, 1, 1, 2])])
def test_chunks_that_neighbours_are_given_for(rule, counts):
    model = tiny_model("norlund", chunk_count=rule)
    for length, count in zip((3, 4, 7, 8), counts, strict=True):
        assert model.config.chunks(length) == count
        model(tokens(1, length), neighbour_ids=torch.full((1, count, 2, 6), 5))
        for wrong in (count - 1, count + 1):
            if wrong >= 0:
                with pytest.raises(SettingError, match=f"= \\(1, {count}, …\\)"):
                    model(tokens(1, length), neighbour_ids=torch.full((1, wrong, 2, 6), 5))


def test_layers_that_attend_to_neighbours_and_to_the_chunk():
    model = tiny_model("norlund", cca_layers=[2, 0], encoder_cross_layers=[1])
    has = [layer.chunked_cross_attention is not None for layer in model.layers]
    assert has == [True, False, True]
    assert [layer.context_attention is not None for layer in model.encoder.layers] == [False, True]
    reads: list[Tensor] = []
    model.encoder.register_forward_hook(lambda _, args, __: reads.append(args[2]))
    ids = neighbours(model, 1, 8)
    model(tokens(1, 8), neighbour_ids=ids)
    x = model.layers[0].self_attention(model.embed_tokens(tokens(1, 8)), None, None, None)
    torch.testing.assert_close(reads[0], x.unflatten(1, (2, CHUNK)))


def test_labels_are_shifted_here_or_by_the_data_set():
    model, input_ids = tiny_model("norlund"), tokens(2, 9)
    labels = input_ids.clone()
    labels[0, 4] = -100
    logits = model(input_ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(input_ids, labels=labels).loss, expected)
    model.config.shift_labels = False
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(input_ids, labels=labels).loss, expected)
    summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = model(input_ids, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(loss, summed / 7)


def test_labels_that_are_padding():
    input_ids = tokens(2, 9)
    input_ids[1, 6:] = 0
    for ignored in (True, False):
        model = tiny_model("retro-pytorch", ignore_pad_labels=ignored)
        logits = model(input_ids).logits
        labels = input_ids[:, 1:].flatten()
        expected = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels, ignore_index=0 if ignored else -100
        )
        torch.testing.assert_close(model(input_ids, labels=input_ids).loss, expected)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["attention", "residual", "feed_forward"])
def test_dropout_in_training_only(preset, name):
    none = {f"{kind}_dropout": 0.0 for kind in ("attention", "residual", "feed_forward")}
    input_ids = tokens(1, 10)
    for share in (0.0, 0.5):
        model = tiny_model(preset, **{**none, f"{name}_dropout": share})
        ids = neighbours(model, 1, 10)
        quiet = model(input_ids, neighbour_ids=ids).logits
        torch.testing.assert_close(model(input_ids, neighbour_ids=ids).logits, quiet)
        loud = model.train()(input_ids, neighbour_ids=ids).logits
        assert torch.allclose(loud, quiet) == (share == 0)


def test_a_cache_is_returned_where_it_is_wanted():
    model, input_ids = tiny_model("norlund"), tokens(1, 5)
    assert model(input_ids).past_key_values.get_seq_length() == 5
    assert model(input_ids, use_cache=False).past_key_values is None
    assert model(input_ids, labels=input_ids).past_key_values is None
    assert model.train()(input_ids).past_key_values is None
    assert tiny_model("norlund", use_cache=False)(input_ids).past_key_values is None


def test_initial_weights():
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "decoder_dim": 64, "encoder_dim": 48, "decoder_attention_dim": 64}
    norlund = RetroForCausalLM(tiny_config("norlund", **sizes))
    assert norlund.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert norlund.embed_neighbours.weight.std().item() == pytest.approx(1, rel=0.05)
    assert norlund.layers[0].self_attention.body.bias.weight.abs().max() == 0
    other = RetroForCausalLM(tiny_config("retro-pytorch", **sizes))
    assert other.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    null = other.layers[1].chunked_cross_attention.body.null
    assert null.std().item() == pytest.approx(1, rel=0.3)
    uniform = other.layers[0].feed_forward.body.up.weight
    assert uniform.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)  # PyTorch's default


@pytest.mark.parametrize("preset", PRESETS)
def test_retrieval_that_begins_at_zero(preset: str, tmp_path: Path):
    config = tiny_config(preset, zero_init_retrieval=True, project_encoder_output=False)
    model = RetroForCausalLM(config).eval()
    ids = neighbours(model, 1, 14)
    off, on = model(tokens(1, 14)).logits, model(tokens(1, 14), neighbour_ids=ids).logits
    assert torch.equal(on, off)
    x = torch.randn(1, 3, 2, 6, config.encoder_dim)
    encoded = model.encoder(
        x, torch.ones(x.shape[:-1], dtype=torch.bool), torch.randn(1, 3, 4, 32), None
    )
    torch.testing.assert_close(encoded, x.flatten(2, 3))
    assert all(layer.feed_forward.body.down.weight.abs().max() > 0 for layer in model.layers)
    stir(model)  # weights that were learned are read as they are
    model.save_pretrained(tmp_path)
    again = RetroForCausalLM.from_pretrained(tmp_path)
    expected = model(tokens(1, 14), neighbour_ids=ids).logits
    assert torch.equal(again(tokens(1, 14), neighbour_ids=ids).logits, expected)


def test_deepnet_s_initial_weights():
    torch.manual_seed(0)
    sizes = {
        "decoder_dim": 96,
        "encoder_dim": 80,
        "decoder_attention_dim": 64,
        "encoder_attention_dim": 64,
        "decoder_ffn_dim": 128,
        "encoder_ffn_dim": 128,
    }
    model = RetroForCausalLM(tiny_config("retro-pytorch", deepnet=True, norm="layer", **sizes))

    def gain(weight: Tensor) -> float:
        return weight.std().item() / math.sqrt(2 / sum(weight.shape))

    decoder, encoder = 36**-0.25, 0.87 * (2**4 * 3) ** (-1 / 16)
    for layers, side in ((model.layers, decoder), (model.encoder.layers, encoder)):
        attention, feed = layers[0].self_attention.body, layers[0].feed_forward.body
        keys, values = attention.kv.weight.chunk(2)
        assert gain(attention.q.weight) == pytest.approx(1, rel=0.05)
        assert gain(keys) == pytest.approx(1, rel=0.05)
        for weight in (values, attention.out.weight, feed.up.weight, feed.down.weight):
            assert gain(weight) == pytest.approx(side, rel=0.05)
        for bias in (attention.out.bias, feed.up.bias, feed.down.bias):
            assert bias.abs().max() == 0
    assert gain(model.encoder.project.weight) == pytest.approx(1, rel=0.05)


def test_presets_are_those_of_the_published_models():
    norlund = RetroConfig.preset("norlund")
    assert (norlund.decoder_dim, norlund.decoder_layers, norlund.cca_layers) == (
        1536,
        12,
        [5, 8, 11],
    )
    assert norlund == RetroConfig()
    other = RetroConfig.preset("retro-pytorch", chunk_size=32)
    assert (other.vocab_size, other.encoder_dim, other.decoder_head_dim) == (28_996, 896, 64)
    assert other.chunk_size == 32
    paper = RetroConfig.preset("paper")
    assert (paper.decoder_dim, paper.decoder_heads, paper.encoder_head_dim) == (896, 16, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 1}, "chunk_size"),
        ({"norm": "layer", "gated_norm": True}, "gates RMS norms"),
        ({"norm": "batch"}, "rms or rms_clamped or layer"),
        ({"pad_token_id": 50}, "vocabulary"),
        ({"decoder_heads": 5}, "divisible"),
        ({"encoder_heads": 0}, "divisible"),
        ({"cca_layers": [3]}, "cca_layers"),
        ({"cca_layers": [1, 1]}, "different"),
        ({"encoder_cross_layers": [-1]}, "encoder_cross_layers"),
        ({"positions": "rotary", "rotary_dim": 7}, "even"),
        ({"positions": "rotary", "rotary_dim": 16}, "at most"),
        ({"bucket_spacing": "log", **LOG_BUCKETS, "bucket_max_distance": 9}, "must exceed 16"),
        ({"bucket_spacing": "log", **LOG_BUCKETS, "encoder_buckets": 256}, "encoder_buckets 256"),
        ({"bucket_spacing": "log", **LOG_BUCKETS, "cca_bucket_count": 3}, "cca_bucket_count"),
        ({"encoder_cross_buckets": 0}, "encoder_cross_buckets must be at least 1"),
        ({"memorizing_layers": [3]}, "memorizing_layers"),
        ({"share_embeddings": True, "tie_word_embeddings": True}, "tied"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        tiny_config("norlund", **settings)


def test_an_unknown_preset_is_refused():
    with pytest.raises(SettingError, match="norlund, retro-pytorch, paper"):
        RetroConfig.preset("gpt")


def test_the_padding_token_is_a_setting():
    model = tiny_model("norlund", pad_token_id=5)
    input_ids, ids = tokens(1, 10) % 4 + 6, neighbours(model, 1, 10) % 4 + 6
    for replaced, reads in ((0, True), (5, False)):
        given = ids.clone()
        given[0, 0, 0, -1] = replaced
        hidden = ids.clone()
        hidden[0, 0, 0, -1] = -1
        one, other = (model(input_ids, neighbour_ids=n).logits for n in (given, hidden))
        assert torch.equal(one, other) != reads
        tokens_with = input_ids.clone()
        tokens_with[0, 2] = replaced
        mask = torch.ones_like(input_ids)
        mask[0, 2] = 0
        one, other = model(tokens_with).logits, model(tokens_with, attention_mask=mask).logits
        assert torch.equal(one, other) != reads
