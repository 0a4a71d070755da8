"""What does not fit is refused with a message; what is merely unusual works."""

import pytest
import torch

from nearest.errors import SettingError
from nearest.retro import AskedNeighbours, FixedNeighbours, NeighbourCache, RetroConfig
from retro_models import CHUNK, PRESETS, VOCAB, neighbours, tiny_model, tokens, variant


def wrong(kind: str) -> torch.Tensor:
    ids = torch.full((2, 3, 2, 6), 5)
    return {
        "batch": ids[:1],
        "chunks": ids[:, :2],
        "dims": ids[:, :, 0],
        "float": ids.float(),
        "bool": ids.bool(),
        "above": ids + VOCAB,
        "below": ids - 7,
        "no neighbours": ids[:, :, :0],
        "no tokens": ids[..., :0],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("batch", r"\(1, 3, 2, 6\).*= \(2, 3, …\)"),
        ("chunks", r"12 tokens after 0 in chunks of 4"),
        ("dims", r"\(batch, chunks, neighbours, length\)"),
        ("float", "float32"),
        ("bool", "bool"),
        ("above", "55 … 55.*vocabulary has 50"),
        ("below", "-2 … -2"),
        ("no neighbours", "no tokens"),
        ("no tokens", "no tokens"),
    ],
)
def test_neighbours_that_do_not_fit(kind, message):
    for preset in PRESETS:
        with pytest.raises(SettingError, match=message):
            tiny_model(preset)(tokens(2, 12), neighbour_ids=wrong(kind))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("batch", r"\(1, 3, 2, 6\).*= \(2, …\)"),
        ("dims", r"\(batch, chunks, neighbours, length\)"),
        ("float", "float32"),
        ("bool", "bool"),
        ("above", "55 … 55.*vocabulary has 50"),
        ("below", "-2 … -2"),
        ("no neighbours", "no tokens"),
        ("no tokens", "no tokens"),
    ],
)
def test_neighbours_given_to_generate_that_do_not_fit(kind, message):
    for preset in PRESETS:
        with pytest.raises(SettingError, match=message):
            tiny_model(preset).generate(tokens(2, 12), neighbour_ids=wrong(kind), max_new_tokens=2)


def test_minus_one_is_padding_and_so_is_the_padding_token():
    model = tiny_model("norlund")
    ids = neighbours(model, 1, 12)
    ids[0, 1, 0, 3:] = 0
    expected = model(tokens(1, 12), neighbour_ids=ids).logits
    ids[0, 1, 0, 3:] = -1
    assert torch.equal(model(tokens(1, 12), neighbour_ids=ids).logits, expected)
    assert torch.equal(model(tokens(1, 12), neighbour_ids=ids.int()).logits, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_short_and_uneven_inputs(preset):
    """Below a chunk nothing acts yet; unused neighbours of an unfinished chunk change nothing."""
    model = tiny_model(preset)
    for length in range(1, CHUNK):
        on = model(tokens(1, length), neighbour_ids=neighbours(model, 1, length)).logits
        assert torch.equal(on, model(tokens(1, length)).logits)
    ids = neighbours(model, 1, CHUNK + 1)
    expected = model(tokens(1, CHUNK + 1), neighbour_ids=ids).logits
    ids[:, 1:] = 7
    assert torch.equal(model(tokens(1, CHUNK + 1), neighbour_ids=ids).logits, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_all_neighbours_empty(preset):
    """Finite everywhere, and in generation as in one pass."""
    model = tiny_model(preset)
    empty = torch.full_like(neighbours(model, 1, 14), -1)
    logits = model(tokens(1, 14), neighbour_ids=empty).logits
    assert logits.isfinite().all()
    out = model.generate(
        tokens(1, 14),
        max_new_tokens=6,
        eos_token_id=None,
        neighbours=lambda chunks: torch.full((len(chunks), 2, 6), -1),
    )
    plain = model.generate(tokens(1, 14), max_new_tokens=6, eos_token_id=None)
    if preset != "retro-pytorch":  # which has a null neighbour
        assert torch.equal(out, plain)


def test_masks_that_do_not_fit():
    model = tiny_model("norlund")
    for shape in ((1, 12), (2, 11), (2, 1, 12)):
        with pytest.raises(SettingError, match=r"= \(2, 12\)"):
            model(tokens(2, 12), attention_mask=torch.ones(shape))
    cache = model(tokens(2, 12)).past_key_values
    with pytest.raises(SettingError, match=r"= \(2, 13\)"):
        model(tokens(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_a_row_of_padding_alone():
    for name in ("norlund", "retro-pytorch"):
        model = variant(name)
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[1] = 0
        ids = neighbours(model, 2, 9)
        logits = model(tokens(2, 9), attention_mask=mask, neighbour_ids=ids).logits
        alone = model(tokens(2, 9)[:1], neighbour_ids=ids[:1]).logits
        torch.testing.assert_close(logits[:1], alone)
        assert logits.isfinite().all()


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_outside_the_vocabulary(token):
    input_ids = tokens(1, 9)
    input_ids[0, 4] = token
    with pytest.raises(SettingError, match="vocabulary has 50 tokens"):
        tiny_model("norlund")(input_ids)


def test_more_tokens_than_positions():
    model = tiny_model("retro-pytorch", max_position_embeddings=40)
    assert model(tokens(1, 40)).logits.shape == (1, 40, VOCAB)
    with pytest.raises(SettingError, match=r"41 tokens long.*40 positions"):
        model(tokens(1, 41))


def test_neighbours_for_a_model_without_layers_that_read_them():
    model = tiny_model("norlund", cca_layers=[])
    assert model.encoder is None
    with pytest.raises(SettingError, match="cca_layers is empty"):
        model(tokens(1, 12), neighbour_ids=neighbours(model, 1, 12))


def test_unknown_arguments():
    model = tiny_model("norlund")
    with pytest.raises(SettingError, match="neighbor_ids"):
        model(tokens(1, 12), neighbor_ids=neighbours(model, 1, 12))
    with pytest.raises(ValueError, match="neighbor_ids"):
        model.generate(tokens(1, 12), neighbor_ids=neighbours(model, 1, 12))


def test_sources_of_neighbours_that_do_not_fit(tiny_tokenizer):
    with pytest.raises(SettingError, match="size"):
        NeighbourCache(lambda chunks: chunks[:, None], size=0)
    with pytest.raises(SettingError, match="one each"):
        NeighbourCache(lambda chunks: chunks[:1, None])(tokens(2, CHUNK))
    with pytest.raises(SettingError, match="no passages"):
        FixedNeighbours([], tiny_tokenizer, 9)
    with pytest.raises(SettingError, match="count"):
        AskedNeighbours(tiny_tokenizer, 0, 9)


@pytest.mark.parametrize(
    "setting",
    [{"cca_layers": 1}, {"cca_layers": ["5"]}, {"decoder_dim": "wide"}, {"decoder_layers": 2.5}],
)
def test_settings_of_another_type(setting):
    (name,) = setting
    with pytest.raises(SettingError, match=f"{name} is .*: expected"):
        RetroConfig(**setting)
