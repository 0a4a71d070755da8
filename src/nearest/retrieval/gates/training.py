"""Train small networks with torch, and give them as plain arrays."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearest.errors import SettingError
from nearest.retrieval.gates.network import Network

_LEAST_TOKENS = 200
_BATCH = 2_048
_LEARNING_RATE = 4e-3
_WEIGHT_DECAY = 1e-2
_DROPOUT = 0.1

# Rows of the data and the network's outputs for them → their mean loss.
Loss = Callable[[Int[Tensor, " rows"], Float[Tensor, "rows outputs"]], Tensor]


def check_enough(tokens: int) -> None:
    """Refuse a text in which there is too little to fit anything (SettingError)."""
    if tokens < _LEAST_TOKENS:
        raise SettingError(
            f"the tuning text has {tokens:,} tokens, too few to train a gate: give it at least "
            f"{_LEAST_TOKENS}"
        )


def train_network(
    inputs: Float[np.ndarray, "n inputs"],
    loss: Loss,
    outputs: int,
    *,
    hidden: int = 64,
    layers: int = 2,
    steps: int = 600,
    seed: int = 0,
) -> Network:
    """Fit an MLP (GELU, dropout .1, AdamW with one cycle); same data and seed, same network."""
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0) + np.float32(1e-6)
    standard = torch.from_numpy((inputs - mean) / scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [inputs.shape[1], *[hidden] * layers, outputs]
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        model = nn.Sequential(linear[0])
        for layer in linear[1:]:
            model.extend([nn.GELU(approximate="tanh"), nn.Dropout(_DROPOUT), layer])
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(inputs), (min(_BATCH, len(inputs)),))
            optimiser.zero_grad()
            loss(rows, model(standard[rows])).backward()
            optimiser.step()
            schedule.step()
    return Network(
        mean,
        scale,
        tuple(layer.weight.detach().numpy().T.copy() for layer in linear),
        tuple(layer.bias.detach().numpy().copy() for layer in linear),
    )
