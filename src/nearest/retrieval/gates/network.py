"""Small networks, and how they are trained: cross-validation and the final network in one run.

A network soon learns a short text by heart. So six copies are trained side by side, as one batched
network: five leave out a fifth of the documents each, the sixth sees everything. After how many
steps the sixth is kept is where the five predict best what they have not seen. Of a long text one
fifth says enough: then there are two copies, and each sees more of it in as many steps.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nearest.errors import SettingError
from nearest.fast_exp import fast_exp
from nearest.machine import code_can_be_cached
from nearest.progress import Progress, no_progress

FOLDS = 5
LEAST_TOKENS = 200
_LEAST_TO_LEARN_ON = 20  # tokens, from a gate that has learned already
STEPS = 600
_SEED = 0  # of weights and batches
_ROWS = 3_072  # predictions a step, of all copies together
_MUCH = 50_000  # predictions, of which one left-out fold says enough
_CHECK_EVERY = 20  # steps
_PATIENCE = 8  # checks in a row that are no better
_CHECKED = 4_096  # left-out predictions of each fold that a check looks at, at most
_LEARNING_RATE = 4e-3
_GENTLE_RATE = 1e-3  # from a network that has learned already
_CONSTANT = 1e-3  # spread of an input that says nothing
_WARM_UP = 20  # steps
_WEIGHT_DECAY = 1e-2
_PER_GELU, _CUBED = np.float32(np.sqrt(2 / np.pi)), np.float32(0.044715)
_AVERAGING = 0.95  # of the weights, from step to step: takes the place of a falling learning rate

# Numbers of predictions, and the network's outputs for them → mean loss of each copy.
Loss = Callable[[Int[Tensor, "copies rows"], Float[Tensor, "copies rows outputs"]], Tensor]


class Network(nn.Module):
    """Standardised inputs, linear layers, and GELU between them; float32.

    Its state: `mean` and `scale` of each input on the text that it was trained on, and for each
    layer `{layer}.weight` [inputs, outputs] and `{layer}.bias` [outputs].
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Take the state over; nothing is copied.

        Raises:
            KeyError, ValueError: something is missing, not finite float32, or does not fit.
        """
        super().__init__()
        self.register_buffer("mean", state["mean"])
        self.register_buffer("scale", state["scale"])
        for layer in range(sum(name.endswith(".bias") for name in state)):
            self.add_module(str(layer), _Layer(state[f"{layer}.weight"], state[f"{layer}.bias"]))
        own = self.state_dict()
        if not all(one.dtype == torch.float32 and one.isfinite().all() for one in own.values()):
            raise ValueError("a network has weights that are not finite float32")
        self._layers = [one for name, one in self.named_buffers() if "." in name]
        sizes = [self.mean.numel(), *(bias.numel() for bias in self._layers[1::2])]
        shapes = {"mean": sizes[:1], "scale": sizes[:1]}
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            shapes |= {f"{layer}.weight": [inputs, outputs], f"{layer}.bias": [outputs]}
        if len(sizes) < 2 or {name: list(one.shape) for name, one in own.items()} != shapes:
            raise ValueError(f"a network's arrays, of sizes {sizes}, do not fit together")
        if not (self.scale > 0).all():
            raise ValueError("a network's inputs have a spread that is not above 0")
        self.inputs, self.outputs = sizes[0], sizes[-1]

    @classmethod
    def of(
        cls, state: Mapping[str, Tensor], prefix: str, inputs: int | None, outputs: int
    ) -> "Network":
        """The part of a gate's state that is this network's; `inputs` None: any number.

        Raises:
            KeyError, ValueError: it is no network of these sizes.
        """
        prefix += "."
        own = {n.removeprefix(prefix): one for n, one in state.items() if n.startswith(prefix)}
        network = cls(own)
        if network.outputs != outputs or inputs not in (None, network.inputs):
            raise ValueError(
                f"a network of {network.inputs} inputs and {network.outputs} outputs stands where "
                f"one of {inputs or 'any'} and {outputs} belongs"
            )
        return network

    def forward(self, inputs: Float[np.ndarray, "q inputs"]) -> Float[np.ndarray, "q outputs"]:
        """The last layer's outputs, of each row the same whatever the others are."""
        arrays = [one.numpy() for one in self._layers]
        outputs: np.ndarray = (inputs - self.mean.numpy()) / self.scale.numpy()
        for layer in range(0, len(arrays), 2):
            weight, bias = arrays[layer : layer + 2]
            hidden, outputs = outputs, np.empty((len(inputs), len(bias)), dtype=np.float32)
            _of_layer(hidden, weight, bias, layer + 2 < len(arrays), outputs)
        return outputs

    def copies(self, count: int) -> list[Tensor]:
        """Weights and biases in turn, to be trained, with a dimension of copies in front."""
        alike = [one if one.ndim == 2 else one[None] for one in self._layers]
        return [one.repeat(count, 1, 1).requires_grad_() for one in alike]


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy",
            fastmath={"reassoc", "contract", "nsz"})
def _of_layer(inputs: Any, weight: Any, bias: Any, hidden: Any, outputs: Any) -> None:
    """Inputs · weight + bias, and GELU of it (approximated by tanh) in a hidden layer."""
    for i in range(len(inputs)):
        row = outputs[i]
        for j in range(len(row)):
            row[j] = bias[j]
        for k in range(inputs.shape[1]):
            one, weights = inputs[i, k], weight[k]
            for j in range(len(row)):
                row[j] += one * weights[j]
        if hidden:
            for j in range(len(row)):
                x = row[j]
                bent = _PER_GELU * (x + _CUBED * x * x * x)
                small = fast_exp(np.float32(-2) * abs(bent))  # tanh, of numbers that are not large
                tanh = (np.float32(1) - small) / (np.float32(1) + small)
                row[j] = np.float32(0.5) * x * (np.float32(1) + np.copysign(tanh, bent))
# fmt: on


class _Layer(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)


def _outputs(inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Of one network, or of several copies with a dimension in front of all tensors.

    `parameters`: the weight and the bias of each layer in turn.
    """
    hidden = inputs @ parameters[0] + parameters[1]
    for weight, bias in zip(parameters[2::2], parameters[3::2], strict=True):
        hidden = functional.gelu(hidden, approximate="tanh") @ weight + bias
    return hidden


def check_enough(tokens: int, *, learned: bool = False) -> None:
    """Refuse a text that is too short to fit anything (SettingError).

    `learned`: the gate is learned on from another, which needs less.
    """
    least = _LEAST_TO_LEARN_ON if learned else LEAST_TOKENS
    if tokens < least:
        raise SettingError(
            f"the tuning text has {tokens:,} tokens, too few to train a gate: give it at least "
            f"{least}"
        )


def train_network(
    inputs: Float[np.ndarray, "n inputs"],
    loss: Loss,
    start: Float[np.ndarray, " outputs"],
    folds: Int[np.ndarray, " n"],
    *,
    hidden: Sequence[int] = (64, 64),
    steps: int | None = None,
    emphasis: Float[np.ndarray, " inputs"] | None = None,
    begin: Network | None = None,
    may_stay_untrained: bool = True,
    progress: Progress = no_progress,
    stage: str = "train",
) -> Network:
    """Fit an MLP with AdamW; the same data give the same network.

    Args:
        inputs: float32, a row for each prediction.
        loss: see `Loss`.
        start: what the untrained network gives for every input.
        folds: which copy leaves each prediction out; see `folds_of`.
        hidden: widths of the hidden layers.
        steps: at most so many, fewer when left-out predictions get worse; STEPS when None.
        emphasis: standard deviation of each input as the first layer sees it; 1 when None.
        begin: a network of these sizes that is learned on from, more slowly, in place of an
            untrained one; `start`, `hidden` and `emphasis` are then not used.
        may_stay_untrained: whether `start` alone is the result where training makes it worse.
        progress, stage: told the stage, steps done, and all steps.
    """
    steps = STEPS if steps is None else steps
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0) + np.float32(1e-6)
    if emphasis is not None:
        scale = (scale / emphasis).astype(np.float32)
    if begin is not None:
        # What never varied there, such as a number of neighbours, taught nothing, and would be an
        # enormous deviation where it is another constant.
        constant = begin.scale.numpy() < _CONSTANT
        mean = np.where(constant, mean, begin.mean.numpy())
        scale = np.where(constant, np.float32(1), begin.scale.numpy())
    standard = torch.from_numpy((inputs - mean) / scale)
    rng = torch.Generator().manual_seed(_SEED)
    copies = 2 if len(inputs) >= _MUCH else FOLDS + 1
    seen, left_out = _seen_and_left_out(torch.from_numpy(folds), copies - 1, rng)
    if begin is None:
        parameters = _untrained([inputs.shape[1], *hidden, len(start)], start, copies, rng)
    else:
        parameters = begin.copies(copies)
    rate = _LEARNING_RATE if begin is None else _GENTLE_RATE
    averaged = [one.detach().clone() for one in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    best, least, since = [one[-1].clone() for one in averaged], np.inf, 0
    for step in range(steps + 1):
        check = step % _CHECK_EVERY == 0 or step == steps
        if check and (step or may_stay_untrained):
            progress(stage, step, steps)
            error = _left_out_loss(standard, averaged, loss, left_out)
            since += 1
            if error < least:
                best, least, since = [one[-1].clone() for one in averaged], error, 0
            if since == _PATIENCE:
                progress(stage, steps, steps)
                break
        if step == steps:
            break
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / _WARM_UP)
        optimiser.zero_grad()
        rows = seen(_ROWS // copies)
        loss(rows, _outputs(standard[rows], parameters)).sum().backward()
        optimiser.step()
        with torch.no_grad():
            keep = min(_AVERAGING, step / (step + 10))
            for average, one in zip(averaged, parameters, strict=True):
                average.lerp_(one, 1 - keep)
    state = {"mean": torch.from_numpy(mean), "scale": torch.from_numpy(scale)}
    for layer in range(len(best) // 2):
        state[f"{layer}.weight"], state[f"{layer}.bias"] = best[2 * layer], best[2 * layer + 1][0]
    return Network(state)


def folds_of(documents: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Parts of about equal size: of whole documents, or of runs of predictions if these are few."""
    numbers, of, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if len(numbers) < FOLDS:
        return np.arange(len(documents)) * FOLDS // len(documents)
    filled = np.zeros(FOLDS, dtype=np.int64)
    folds = np.empty(len(numbers), dtype=np.int64)
    for document in np.argsort(-sizes, kind="stable"):
        folds[document] = filled.argmin()
        filled[folds[document]] += sizes[document]
    return folds[of]


def _seen_and_left_out(
    folds: Int[Tensor, " n"], most: int, rng: torch.Generator
) -> tuple[Callable[[int], Int[Tensor, "copies count"]], list[Int[Tensor, " m"]]]:
    """What draws predictions that each copy may see, and some that each fold's copy may not.

    Copies are for the first `most` folds, and the last one for none.
    """
    order = folds.argsort(stable=True)  # then what a copy may not see is a run
    sizes = torch.bincount(folds, minlength=FOLDS)[:most]
    first = sizes.cumsum(0) - sizes
    left_out = []
    for begin, size in zip(first.tolist(), sizes.tolist(), strict=True):
        some = torch.randperm(size, generator=rng)[:_CHECKED].sort().values
        left_out.append(order[begin + some])
    first = torch.cat([first, torch.tensor([len(order)])])[:, None]
    sizes = torch.cat([sizes, torch.tensor([0])])[:, None]

    def seen(count: int) -> Int[Tensor, "copies count"]:
        uniform = torch.rand(len(sizes), count, generator=rng, dtype=torch.float64)
        drawn = (uniform * (len(order) - sizes)).long()
        return order[torch.where(drawn >= first, drawn + sizes, drawn)]

    return seen, left_out


@torch.inference_mode()
def _left_out_loss(
    inputs: Float[Tensor, "n inputs"],
    parameters: Sequence[Tensor],
    loss: Loss,
    left_out: Sequence[Int[Tensor, " _"]],
) -> float:
    """Mean over the predictions of all folds, each by the copy that has not seen them."""
    total = 0.0
    for fold, rows in enumerate(left_out):
        if len(rows):
            outputs = _outputs(inputs[rows][None], [one[fold : fold + 1] for one in parameters])
            total += len(rows) * float(loss(rows[None], outputs).sum())
    return total / sum(map(len, left_out))


def _untrained(
    sizes: Sequence[int], start: Float[np.ndarray, " outputs"], copies: int, rng: torch.Generator
) -> list[Tensor]:
    """Weights and biases in turn, the same in all copies; the last layer gives `start`."""
    parameters = []
    for inputs, outputs in itertools.pairwise(sizes):
        bound = inputs**-0.5  # as nn.Linear begins
        for rows in (inputs, 1):
            uniform = torch.rand(rows, outputs, generator=rng) * 2 * bound - bound
            parameters.append(uniform.repeat(copies, 1, 1))
    parameters[-2].zero_()
    parameters[-1][:] = torch.from_numpy(start.astype(np.float32))
    return [one.requires_grad_() for one in parameters]
