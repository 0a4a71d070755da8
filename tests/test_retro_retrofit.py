"""A frozen model with neighbours: off it is itself, on it generates as it reads."""

import copy
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, T5Config
from transformers.models.t5 import T5ForConditionalGeneration

from nearest.encode.hooks import captured_input
from nearest.encode.layers import find_key_layer
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


@pytest.fixture(params=[*((kind, "base") for kind in KINDS), ("gpt2", "own")])
def fitted(request: pytest.FixtureRequest) -> RetrofitForCausalLM:
    kind, encoder = request.param
    return make_fitted(kind, encoder=encoder)


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


def test_the_base_reads_neighbours_as_texts_and_what_follows_is_found():
    """Beside a plain re-computation, token by token, in layers one after the other."""
    model = make_fitted("gpt2")
    sequence, whole = tokens(1, 14)[0], 14 // CHUNK
    ids = found(sequence[: whole * CHUNK].reshape(whole, CHUNK))
    states: dict[int, list[Tensor]] = {}
    with torch.no_grad(), ExitStack() as hooks:
        blocks = model.base.transformer.h
        for number in (1, 4):
            states[number] = []
            hook = blocks[number].register_forward_hook(
                lambda _, __, out, n=number: states[n].append(out[0] if len(out) == 2 else out)
            )
            hooks.callback(hook.remove)
        texts = [text[text >= 0] for text in ids.flatten(0, 1)]
        for text in texts:
            model.base(text[None])

    def adding(number: int):
        layer, norm = model.adapter.layers[str(number)].body, model.adapter.layers[str(number)].norm
        keys, values = layer.kv.weight.chunk(2)
        read = [
            state.reshape(len(text), -1) for state, text in zip(states[number], texts, strict=True)
        ]

        def hook(_, __, output):
            x = (output[0] if isinstance(output, tuple) else output)[0].clone()
            for place in range(CHUNK - 1, len(x)):
                block, row = divmod(place + 1, CHUNK)
                query = (layer.q.weight @ norm(x[place])).reshape(layer.heads, -1)
                scores, tokens_after = [], []
                for which in (2 * (block - 1), 2 * block - 1):
                    bias = layer.bias(CHUNK, ids.shape[-1], CHUNK - 1)[:, row]
                    for i, state in enumerate(read[which][:-1]):
                        key = (keys @ layer.state_norm(state)).reshape(layer.heads, -1)
                        scores.append((query * key).sum(-1) * layer.scale + bias[:, i])
                        after = model.base.transformer.wte.weight[texts[which][i + 1]]
                        tokens_after.append(
                            (values @ layer.token_norm(after)).reshape(layer.heads, -1)
                        )
                weights = torch.stack(scores).softmax(0)[..., None]
                x[place] += (
                    layer.out.weight @ (weights * torch.stack(tokens_after)).sum(0).flatten()
                )
            return (x[None], *output[1:]) if isinstance(output, tuple) else x[None]

        return hook

    expected_from = read(model, sequence)
    with torch.no_grad(), ExitStack() as hooks:
        for number in (1, 4):
            hooks.callback(blocks[number].register_forward_hook(adding(number)).remove)
        expected = model.base(sequence[None]).logits[0]
    torch.testing.assert_close(expected_from, expected, rtol=0, atol=rounding(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_attention_copies_what_followed_the_same_text(kind):
    """A neighbour that goes on as the text does tells its next tokens; another one does not."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = retrofit(make_base(kind), [6], chunk_size=CHUNK)
    nn.init.eye_(model.adapter.layers["6"].body.out.weight)
    table = model.base.get_input_embeddings().weight
    model.base.get_output_embeddings().weight = table  # what is found is a token
    sequence = tokens(1, 3 * CHUNK)
    losses = []
    for text in (sequence, tokens(1, 3 * CHUNK, seed=5)):
        ids = text[:, None, None].expand(-1, 3, 1, -1)
        with torch.no_grad():
            logits = model(sequence, neighbour_ids=ids).logits
        losses.append(F.cross_entropy(logits[0, CHUNK - 1 : -1], sequence[0, CHUNK:]))
    assert losses[0] < losses[1] - 0.5


def test_padding_and_repeated_neighbours_of_the_base():
    """A neighbour of padding alone is none, and one that two chunks share is read once."""
    model = make_fitted("gpt2")
    text, passage = tokens(1, 2 * CHUNK + 1), tokens(1, 6, seed=3)
    once = passage.expand(2, 1, 6)[None]
    padded = torch.full((1, 2, 3, 8), -1)
    padded[:, :, 1, :6] = passage
    passes: list[Tensor] = []
    hook = model.base.transformer.h[0].register_forward_pre_hook(lambda _, x: passes.append(x[0]))
    with torch.no_grad():
        plain, beside = (model(text, neighbour_ids=ids).logits for ids in (once, padded))
    hook.remove()
    torch.testing.assert_close(beside, plain)
    assert [len(states) for states in passes] == [1, 1, 2, 1]  # neighbours, the text; with padding


def test_who_looks_at_the_model_sees_its_own_pass_alone():
    model = make_fitted("gpt2")
    layer = find_key_layer(model, "last_ffn_input")
    text = tokens(1, 2 * CHUNK)
    with captured_input(layer.module) as seen, torch.no_grad():
        model(text, neighbour_ids=found(text.reshape(-1, CHUNK))[None])
    assert [states.shape[:2] for states in seen] == [text.shape]


def test_neighbours_that_the_base_cannot_read(fitted):
    ids = torch.ones(1, 2, 1, 65, dtype=torch.int64)
    if fitted.adapter.encoder is not None:
        fitted(tokens(1, 8), neighbour_ids=ids)
        return
    with pytest.raises(SettingError, match="64 positions"):
        fitted(tokens(1, 8), neighbour_ids=ids)


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


def test_adapters_of_before_have_an_encoder_of_their_own(tmp_path: Path):
    """Their settings do not name it."""
    model = make_fitted("gpt2", encoder="own")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["retro"]["encoder"]
    path.write_text(json.dumps(config))
    again, sequence = load_retrofit(make_base("gpt2"), tmp_path), tokens(1, 14)[0]
    assert torch.equal(read(again, sequence), read(model, sequence))


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
    content["retro"]["cca_bucket_count"] = 8
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
        make_base("llama"),
        [0],
        encoder="own",
        encoder_layers=1,
        encoder_dim=12,
        positions="rotary",
        rotary_dim=2,
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
    with pytest.raises(SettingError, match="encoder_layers is of an encoder of its own"):
        retrofit(base, [1], encoder_layers=1)
    with pytest.raises(SettingError, match="from scratch"):
        RetroForCausalLM(tiny_config(encoder="base"))
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
