"""Our logits with the public implementations' weights are theirs; see fixtures/retro/README.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nearest.retro.convert import from_norlund, from_retro_pytorch, to_norlund, to_retro_pytorch

FIXTURES = sorted((Path(__file__).parent / "fixtures" / "retro").glob("*.safetensors"))


class Recorded:
    """A fixture: weights, the settings they do not tell, and cases."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.settings = json.loads(file.metadata()["settings"])
        self.weights = {
            name.removeprefix("weights/"): tensor.float()
            for name, tensor in tensors.items()
            if name.startswith("weights/")
        }
        self.cases: list[tuple[Tensor, Tensor | None, Tensor]] = [
            (tensors[f"{i}/input_ids"], tensors.get(f"{i}/neighbour_ids"), tensors[f"{i}/logits"])
            for i in range(4)
            if f"{i}/input_ids" in tensors
        ]
        norlund = path.name.startswith("norlund")
        self.load = from_norlund if norlund else from_retro_pytorch
        self.save = to_norlund if norlund else to_retro_pytorch

    def model(self):
        return self.load(self.weights, **self.settings)


@pytest.fixture(params=FIXTURES, ids=lambda path: path.stem)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.param)


def test_every_variant_is_there():
    assert len(FIXTURES) == 9


def test_every_choice_of_the_two_families_is_in_the_fixtures():
    configs = [recorded.model().config for recorded in map(Recorded, FIXTURES)]
    choices: dict[str, set[object]] = {
        "norm": {"rms", "rms_clamped", "layer"},
        "feed_forward": {"geglu", "mlp"},
        "activation": {"gelu_tanh", "gelu"},
        "positions": {"buckets", "rotary"},
        "chunk_count": {"ceil", "floor"},
        "masked_score": {-10_000.0, None},
    }
    for name in (
        *("gated_norm", "deepnet", "scale_scores", "bias", "absolute_positions", "head_bias"),
        *("share_embeddings", "project_encoder_output", "null_neighbour"),
        *("mask_encoder_context", "mask_input_pads"),
    ):
        choices[name] = {True, False}
    for name, values in choices.items():
        assert {getattr(config, name) for config in configs} == values, name
    crossed = {tuple(config.encoder_cross_layers) for config in configs if config.cca_layers}
    assert crossed >= {(), (1,), (0, 1)}
    for family in ("buckets", "rotary"):  # dims of encoder and decoder
        mine = [c for c in configs if c.positions == family and c.cca_layers]
        assert {c.encoder_dim == c.decoder_dim for c in mine} == {True, False}
        assert {config.cca_rotary for config in configs if config.positions == "rotary"} == {
            "public"
        }


def test_logits_are_those_of_the_public_code(recorded: Recorded):
    model = recorded.model()
    for input_ids, neighbour_ids, expected in recorded.cases:
        with torch.no_grad():
            logits = model(input_ids, neighbour_ids=neighbour_ids).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert expected.abs().max() > 1  # nothing was compared with zeros


def test_weights_come_back_as_they_were(recorded: Recorded):
    back = recorded.save(recorded.model())
    assert set(back) == set(recorded.weights)
    for name, weight in recorded.weights.items():
        if name.endswith("inv_freq"):
            torch.testing.assert_close(back[name], weight)
        else:
            assert torch.equal(back[name], weight), name


def test_the_public_rotations_differ_from_the_aligned_ones():
    recorded = Recorded(next(path for path in FIXTURES if path.stem == "retro-pytorch"))
    input_ids, neighbour_ids, expected = recorded.cases[0]
    aligned = recorded.load(recorded.weights, **recorded.settings, cca_rotary="aligned")
    with torch.no_grad():
        difference = (aligned(input_ids, neighbour_ids=neighbour_ids).logits - expected).abs()
    assert difference[:, :3].max() < 1e-4  # before the first chunk ends
    assert difference[:, 4:].max() > 1e-2
