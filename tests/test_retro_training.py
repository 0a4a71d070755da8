"""Training: gradients with and without checkpoints, and that a model learns to copy neighbours."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from nearest.retro import RetroForCausalLM
from retro_models import (
    CHUNK,
    VARIANTS,
    VOCAB,
    neighbours,
    tiny_config,
    tiny_model,
    tokens,
    variant,
)

QUIET = {f"{kind}_dropout": 0.0 for kind in ("attention", "residual", "feed_forward")}

SHALLOW = {
    "decoder_layers": 2,
    "cca_layers": [0, 1],
    "encoder_layers": 1,
    "encoder_cross_layers": [0],
}


def gradients(model: RetroForCausalLM, input_ids: Tensor, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids, neighbour_ids=ids, labels=input_ids).loss.backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_gradient_checkpointing_changes_no_gradient(name):
    model = variant(name, **QUIET).train()
    input_ids, ids = tokens(2, 14), neighbours(model, 2, 14)
    plain = gradients(model, input_ids, ids)
    model.activation_checkpointing_enable()
    calls: list[int] = []
    body = model.layers[0].feed_forward.body
    body.register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model, input_ids, ids)
    assert len(calls) == 2  # it was read a second time in the backward pass
    assert plain.keys() == again.keys()
    for weight, gradient in plain.items():
        torch.testing.assert_close(again[weight], gradient)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_weight_learns(name):
    model = variant(name, **QUIET).train()
    found = gradients(model, tokens(2, 14), neighbours(model, 2, 14))
    for weight, _ in model.named_parameters():
        assert found[weight].abs().max() > 0, weight


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["norlund", "retro-pytorch"])
def test_gradients_are_those_of_a_finite_difference(name, dropout):
    """The training path, which has its own attention, against the loss itself."""
    settings = {**QUIET, "attention_dropout": dropout}
    model = variant(name, **settings).train()
    input_ids, ids = tokens(1, 10), neighbours(model, 1, 10)
    ids[0, 0, 1, 3:] = -1

    def loss() -> Tensor:
        torch.manual_seed(0)
        logits = model(input_ids, neighbour_ids=ids).logits
        return F.cross_entropy(logits[0, :-1], input_ids[0, 1:])

    loss().backward()
    layer = model.layers[1]
    for weight in (
        layer.self_attention.body.kv.weight,
        layer.chunked_cross_attention.body.q.weight,
        model.encoder.layers[0].context_attention.body.kv.weight,
        *(
            []
            if layer.self_attention.body.bias is None
            else [layer.self_attention.body.bias.weight]
        ),
    ):
        step = torch.randn_like(weight) * 1e-6
        expected = (weight.grad * step).sum()
        with torch.no_grad():
            weight += step
            above = loss()
            weight -= 2 * step
            below = loss()
            weight += step
        torch.testing.assert_close((above - below) / 2, expected, rtol=1e-4, atol=1e-14)


def test_training_and_reading_attend_alike():
    """Without dropout the path with gradients of position biases gives the fused one's logits."""
    model = variant("norlund", **QUIET)
    input_ids, ids = tokens(2, 14), neighbours(model, 2, 14)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    with torch.no_grad():
        fused = model(input_ids, attention_mask=mask, neighbour_ids=ids).logits
    plain = model.train()(input_ids, attention_mask=mask, neighbour_ids=ids).logits
    torch.testing.assert_close(plain[0], fused[0])
    torch.testing.assert_close(plain[1, 3:], fused[1, 3:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norlund", "retro-pytorch", "paper"])
def test_a_model_learns_to_copy_its_neighbours(name):
    """The next chunk stands in the neighbours of this one and nowhere else."""
    torch.manual_seed(0)
    preset, changes = VARIANTS[name]
    model = RetroForCausalLM(tiny_config(preset, **{**changes, **QUIET, **SHALLOW})).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def batch() -> tuple[Tensor, Tensor]:
        chunks = torch.randint(2, 8, (16, 3, CHUNK))
        following = torch.cat([chunks[:, 1:], chunks[:, :1]], dim=1)
        return chunks.flatten(1), following[:, :, None]

    def later_loss(with_neighbours: bool) -> Tensor:
        input_ids, ids = batch()
        given = ids if with_neighbours else None
        logits = model(input_ids, neighbour_ids=given).logits[:, CHUNK - 1 : -1]
        return F.cross_entropy(logits.flatten(0, 1), input_ids[:, CHUNK:].flatten())

    for _ in range(70):
        optimizer.zero_grad()
        later_loss(True).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert later_loss(True) < 0.2 < 1.5 < later_loss(False)


def test_retrieval_is_on_or_off_for_each_call():
    model = tiny_model("paper")
    input_ids, ids = tokens(1, 9), neighbours(tiny_model("paper"), 1, 9)
    off = model(input_ids).logits
    on = model(input_ids, neighbour_ids=ids).logits
    assert not torch.allclose(on[:, CHUNK:], off[:, CHUNK:])
    assert torch.equal(model(input_ids).logits, off)
    assert off.shape == (1, 9, VOCAB)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_training_step_never_waits_for_a_device(name):
    """Tensors of the meta device refuse to tell their values, as every wait for a GPU would."""
    model = variant(name).to("meta").train()
    input_ids, ids = (t.to("meta") for t in (tokens(2, 14), neighbours(model, 2, 14)))
    with torch.device("meta"):
        loss = model(input_ids, neighbour_ids=ids, labels=input_ids).loss
        loss.backward()
    assert loss.is_meta
