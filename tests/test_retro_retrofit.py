"""A frozen model with neighbours: off it is itself, on it generates as it reads."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, T5Config
from transformers.models.t5 import T5ForConditionalGeneration

from nearest.errors import FolderError, ModelError, SettingError
from nearest.retro import RetrofitForCausalLM, RetroForCausalLM, load_retrofit, retrofit
from retro_models import CHUNK, VOCAB, found, rounding, stir, tiny_config, tokens

KINDS = ("gpt2", "llama")
NEW = 2 * CHUNK + 1


def make_base(kind: str) -> PreTrainedModel:
    """GPT-2; Llama with grouped queries (4 heads, 2 of keys) and rotary positions."""
    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = {
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=7, n_head=4, n_positions=64, **common),
        "llama": lambda: LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **common,
        ),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    stir(model)
    return model.double()


def make_fitted(kind: str, layers: tuple[int, ...] = (1, 4), **settings) -> RetrofitForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = retrofit(make_base(kind), layers, chunk_size=CHUNK, **settings)
    stir(model.adapter)
    return model


def read(model: RetrofitForCausalLM, sequence: Tensor) -> Tensor:
    """Logits of one sequence without padding, with the neighbours of its whole chunks."""
    whole = len(sequence) // CHUNK
    ids = torch.full((1, whole, 2, 6), -1)
    if whole:
        ids[0] = found(sequence[: whole * CHUNK].reshape(whole, CHUNK))
    with torch.no_grad():
        return model(sequence[None], neighbour_ids=ids, use_cache=False).logits[0]


@pytest.fixture(params=KINDS)
def fitted(request: pytest.FixtureRequest) -> RetrofitForCausalLM:
    return make_fitted(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_base_bit_for_bit(kind):
    plain, model = make_base(kind), make_fitted(kind)
    prompt = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, plain(prompt).logits)
        assert torch.equal(model(prompt, labels=prompt).loss, plain(prompt, labels=prompt).loss)
    for options in ({"do_sample": False}, {"num_beams": 3}):
        expected = plain.generate(prompt, max_new_tokens=9, **options)
        assert torch.equal(model.generate(prompt, max_new_tokens=9, **options), expected)
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.base.state_dict()[name], weight)


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_neighbours_change_nothing(kind):
    model = retrofit(make_base(kind), [1, 4], chunk_size=CHUNK)
    ids = found(tokens(2, 8).reshape(-1, CHUNK)).unflatten(0, (2, 2))
    with torch.no_grad():
        on, off = model(tokens(2, 8), neighbour_ids=ids).logits, model(tokens(2, 8)).logits
    assert torch.equal(on, off)


def test_neighbours_act_from_the_last_token_of_their_chunk_on(fitted):
    sequence = tokens(1, 14)[0]
    on, off = read(fitted, sequence), fitted(sequence[None]).logits[0]
    assert torch.equal(on[: CHUNK - 1], off[: CHUNK - 1])
    assert ((on - off)[CHUNK - 1 :].abs().amax(-1) > 1e-3).all()
    changed = sequence.clone()
    changed[9] = changed[9] % (VOCAB - 2) + 2  # in the third chunk: neither it nor its neighbours
    later = read(fitted, changed)
    torch.testing.assert_close(later[:9], on[:9], rtol=0, atol=1e-12)
    assert not torch.allclose(later[9:], on[9:])


def test_cached_generation_equals_reading_anew(fitted):
    for length in range(1, 3 * CHUNK + 1):
        passes: list[Tensor] = []
        hook = fitted.register_forward_hook(lambda _, __, out: passes.append(out.logits[:, -1]))  # noqa: B023
        sequence = fitted.generate(
            tokens(1, length), max_new_tokens=NEW, eos_token_id=None, neighbours=found
        )
        hook.remove()
        expected = read(fitted, sequence[0, :-1])[length - 1 :]
        torch.testing.assert_close(torch.cat(passes), expected, rtol=0, atol=rounding(expected))


def test_batches_of_mixed_lengths_and_beams(fitted):
    lengths = [2, 5, 9, 12]
    prompt, mask = torch.zeros(2, 4, 12, dtype=torch.int64)
    for row, length in enumerate(lengths):
        prompt[row, 12 - length :] = tokens(1, length, seed=row)
        mask[row, 12 - length :] = 1
    options = {"max_new_tokens": NEW, "eos_token_id": None, "neighbours": found}
    batch = fitted.generate(prompt, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = fitted.generate(tokens(1, length, seed=row), **options)
        assert torch.equal(batch[row, 12 - length :], alone[0])
    cached = fitted.generate(tokens(2, 6), num_beams=3, **options)
    assert torch.equal(
        cached, fitted.generate(tokens(2, 6), num_beams=3, use_cache=False, **options)
    )


def test_training_moves_the_new_weights_only(fitted):
    before = copy.deepcopy(fitted.state_dict())
    sequence = tokens(2, 12)
    ids = found(sequence.reshape(-1, CHUNK)).unflatten(0, (2, 3))
    fitted.train()
    assert not fitted.base.training
    new = [name for name, weight in fitted.named_parameters() if weight.requires_grad]
    assert all(name.startswith("adapter.") for name in new)
    optimizer = torch.optim.AdamW([w for w in fitted.parameters() if w.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = fitted(sequence, neighbour_ids=ids, labels=sequence).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9
    for name, weight in fitted.state_dict().items():
        moved = not torch.equal(weight, before[name])
        assert moved == name.startswith("adapter."), name


def test_gradient_checkpointing_changes_no_gradient(fitted):
    sequence = tokens(1, 8)
    ids = found(sequence.reshape(-1, CHUNK))[None]
    gradients = []
    fitted.train()
    for module in fitted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    fitted.retro_config.attention_dropout = 0.0
    for checkpointing in (False, True):
        if checkpointing:
            fitted.activation_checkpointing_enable()
        fitted.zero_grad()
        fitted(sequence, neighbour_ids=ids, labels=sequence).loss.backward()
        gradients.append(
            {n: w.grad.clone() for n, w in fitted.named_parameters() if w.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_folder_holds_the_new_weights_only(kind, tmp_path: Path):
    model = make_fitted(kind)
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    weights = sum(weight.numel() for weight in model.adapter.parameters())
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 8 * weights < size < 8 * weights + 20_000
    again = load_retrofit(make_base(kind), tmp_path / "adapter")
    sequence = tokens(1, 14)[0]
    assert torch.equal(read(again, sequence), read(model, sequence))
    assert again.retro_config.cca_layers == [1, 4]


def test_an_adapter_of_other_weights_is_refused(tmp_path: Path):
    make_fitted("gpt2").save_pretrained(tmp_path)
    other = make_base("gpt2")
    other.transformer.wte.weight.data += 0.1
    with pytest.raises(ModelError, match="weights"):
        load_retrofit(other, tmp_path)
    assert isinstance(load_retrofit(other, tmp_path, force=True), RetrofitForCausalLM)


def test_damaged_adapters_are_refused(tmp_path: Path):
    with pytest.raises(FolderError, match="no adapter"):
        load_retrofit(make_base("gpt2"), tmp_path)
    make_fitted("gpt2").save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(FolderError, match="damaged"):
        load_retrofit(make_base("gpt2"), tmp_path)
    weights.write_bytes(whole)
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(FolderError, match="newer"):
        load_retrofit(make_base("gpt2"), tmp_path)
    content["retro"]["encoder_dim"] = 8
    config.write_text(json.dumps(content))
    with pytest.raises(FolderError, match="does not fit"):
        load_retrofit(make_base("gpt2"), tmp_path)
    for text in ("{", "[]", "{}"):
        config.write_text(text)
        with pytest.raises(FolderError, match="no adapter"):
            load_retrofit(make_base("gpt2"), tmp_path)


def test_layers_by_default_are_every_third_from_the_sixth():
    assert retrofit(make_base("gpt2")).retro_config.cca_layers == [5]
    deeper = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=8, n_layer=12, n_head=2, vocab_size=VOCAB)
    )
    assert retrofit(deeper).retro_config.cca_layers == [5, 8, 11]


def test_settings_are_those_of_the_new_layers():
    model = retrofit(
        make_base("llama"), [0], encoder_layers=1, encoder_dim=12, positions="rotary", rotary_dim=2
    )
    assert len(model.adapter.encoder.layers) == 1
    assert model.adapter.layers["0"].body.bias is None


def test_models_and_layers_that_do_not_fit_are_refused():
    base = make_base("gpt2")
    with pytest.raises(SettingError, match="cca_layers"):
        retrofit(base, [7])
    with pytest.raises(SettingError, match="name layers"):
        retrofit(base, [])
    for unused in ({"deepnet": True}, {"decoder_dim": 8}, {"memorizing_layers": [0]}):
        with pytest.raises(SettingError, match=f"{next(iter(unused))} is of the model itself"):
            retrofit(base, [1], **unused)
    with pytest.raises(ModelError, match="already"):
        retrofit(retrofit(base, [1]), [1])
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=VOCAB)
    )
    with pytest.raises(ModelError, match="encoder"):
        retrofit(t5, [0])


def test_unknown_arguments(fitted):
    with pytest.raises(SettingError, match="neighbor_ids"):
        fitted(tokens(1, 8), neighbor_ids=found(tokens(2, 4))[None])


def test_neighbours_cannot_begin_in_the_middle(fitted):
    cache = fitted(tokens(1, 6), use_cache=True).past_key_values
    with pytest.raises(SettingError, match="without neighbours"):
        fitted(tokens(1, 2), neighbour_ids=found(tokens(1, 4))[None], past_key_values=cache)


def test_drafts_are_taken_back(fitted):
    prompt = tokens(1, 11) % 3 + 2
    options = {"max_new_tokens": 20, "eos_token_id": None, "neighbours": found}
    drafted = fitted.generate(prompt, prompt_lookup_num_tokens=CHUNK + 1, **options)
    assert torch.equal(drafted, fitted.generate(prompt, **options))


def test_a_base_without_padding_reads_every_token_of_a_neighbour():
    """GPT-2 has none: its token 0 is a word."""
    base = make_base("gpt2")
    base.config.pad_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = retrofit(base, (1, 4), chunk_size=CHUNK)
    stir(model.adapter)
    ids = tokens(1, CHUNK + 2)
    given = tokens(2, 6).reshape(1, 1, 2, 6)
    word, padding = given.clone(), given.clone()
    word[..., 2], padding[..., 2] = 0, -1
    with torch.no_grad():
        read, hidden = (model(ids, neighbour_ids=n).logits for n in (word, padding))
    assert not torch.allclose(read, hidden)
    with pytest.raises(SettingError, match="rows are padded"):
        RetroForCausalLM(tiny_config(pad_token_id=-1))
