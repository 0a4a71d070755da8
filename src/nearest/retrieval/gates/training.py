"""Train small networks with torch, and give them as plain arrays."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearest.errors import SettingError
from nearest.retrieval.gates.network import Network

_LEAST_TOKENS = 200
_BATCH = 2_048
_LEARNING_RATE = 4e-3
_WEIGHT_DECAY = 1e-2
_DROPOUT = 0.1
_CHECKS = 20  # how often held-out rows are looked at
_STEPS = 600
_FEW = 30_000  # predictions, of which a network learns too much by heart in so many steps
_STEPS_OF_FEW = (40, 80, 160, 320, _STEPS)
_FOLDS = 5

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
    steps: int = _STEPS,
    seed: int = 0,
    emphasis: Float[np.ndarray, " inputs"] | None = None,
    start: Float[np.ndarray, " outputs"] | None = None,
    left_out: Bool[np.ndarray, " n"] | None = None,
    held_out: Bool[np.ndarray, " n"] | None = None,
) -> Network:
    """Fit an MLP (GELU, dropout .1, AdamW with one cycle); same data and seed, same network.

    Args:
        inputs: float32, a row for each prediction.
        loss: of some rows.
        outputs: of the network.
        hidden, layers: width and number of the hidden layers.
        steps: of training.
        seed: of weights, batches and dropout.
        emphasis: standard deviation of each input as the first layer sees it; 1 when None.
        start: what the untrained network gives for every input; random when None.
        left_out: rows that are not looked at.
        held_out: rows that do not train. The network that predicts them best is kept, of the
            untrained one and those after every twentieth of the steps; when None, the last one.
    """
    none = np.zeros(len(inputs), dtype=bool)
    held_out = none if held_out is None else held_out
    chosen = ~held_out if left_out is None else ~(held_out | left_out)
    training, checked = (torch.from_numpy(np.flatnonzero(rows)) for rows in (chosen, held_out))
    mean, scale = inputs[chosen].mean(axis=0), inputs[chosen].std(axis=0) + np.float32(1e-6)
    if emphasis is not None:
        scale = (scale / emphasis).astype(np.float32)
    standard = torch.from_numpy((inputs - mean) / scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _mlp([inputs.shape[1], *[hidden] * layers, outputs], start)
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=steps)
        best, least = None, np.inf
        for step in range(steps + 1):
            if len(checked) and step % max(1, steps // _CHECKS) == 0:
                error = _checked(model, standard, checked, loss)
                if error < least:
                    best, least = _network(model, mean, scale), error
            if step == steps:
                break
            rows = training[torch.randint(len(training), (min(_BATCH, len(training)),))]
            optimiser.zero_grad()
            loss(rows, model(standard[rows])).backward()
            optimiser.step()
            schedule.step()
    return _network(model, mean, scale) if best is None else best


def cross_fitted(
    inputs: Float[np.ndarray, "n inputs"],
    loss: Loss,
    outputs: int,
    folds: Int[np.ndarray, " n"],
) -> Network:
    """`train_network` for as many steps as suit the amount of text.

    Of little text that is the number after which networks trained without a fold (`folds_of`)
    predict it best, each fold being left out once; more are tried until that gets worse.
    """
    if len(folds) >= _FEW:
        return train_network(inputs, loss, outputs)

    def left_out_loss(steps: int) -> float:
        total = 0.0
        for fold in range(_FOLDS):
            left_out = folds == fold
            if left_out.any():
                network = train_network(inputs, loss, outputs, steps=steps, left_out=left_out)
                rows = np.flatnonzero(left_out)
                found = torch.from_numpy(network(inputs[rows]))
                total += len(rows) * float(loss(torch.from_numpy(rows), found))
        return total

    best, least = 0, np.inf
    for steps in _STEPS_OF_FEW:
        found = left_out_loss(steps)
        if found > least:
            break
        best, least = steps, found
    return train_network(inputs, loss, outputs, steps=best)


def folds_of(documents: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Parts of about equal size: of whole documents, or of runs of predictions if these are few."""
    numbers, of, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if len(numbers) < _FOLDS:
        return np.arange(len(documents)) * _FOLDS // len(documents)
    filled = np.zeros(_FOLDS, dtype=np.int64)
    folds = np.empty(len(numbers), dtype=np.int64)
    for document in np.argsort(-sizes, kind="stable"):
        folds[document] = filled.argmin()
        filled[folds[document]] += sizes[document]
    return folds[of]


def held_out_documents(
    documents: Int[np.ndarray, " n"], share: float = 0.1, seed: int = 0
) -> Bool[np.ndarray, " n"]:
    """Which predictions are of this share of the documents, chosen at random; of one, its end."""
    numbers = np.unique(documents)
    if len(numbers) < 2:
        return np.arange(len(documents)) >= round((1 - share) * len(documents))
    count = max(1, round(share * len(numbers)))
    chosen = np.random.default_rng(seed).choice(numbers, size=count, replace=False)
    return np.isin(documents, chosen)


def _mlp(sizes: Sequence[int], start: Float[np.ndarray, " outputs"] | None) -> nn.Sequential:
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    if start is not None:
        nn.init.zeros_(linear[-1].weight)
        linear[-1].bias.data = torch.from_numpy(start.astype(np.float32))
    model = nn.Sequential(linear[0])
    for layer in linear[1:]:
        model.extend([nn.GELU(approximate="tanh"), nn.Dropout(_DROPOUT), layer])
    return model


def _checked(
    model: nn.Sequential, inputs: Float[Tensor, "n inputs"], rows: Int[Tensor, " r"], loss: Loss
) -> float:
    """The loss of rows, without dropout."""
    model.eval()
    with torch.no_grad():
        error = float(loss(rows, model(inputs[rows])))
    model.train()
    return error


def _network(
    model: nn.Sequential, mean: Float[np.ndarray, " inputs"], scale: Float[np.ndarray, " inputs"]
) -> Network:
    """The model's present weights."""
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    return Network(
        mean,
        scale,
        tuple(layer.weight.detach().numpy().T.copy() for layer in linear),
        tuple(layer.bias.detach().numpy().copy() for layer in linear),
    )
