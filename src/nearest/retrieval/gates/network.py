"""A small network as plain arrays: trained with torch elsewhere, applied here with numpy alone."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Network:
    """Standardised inputs, linear layers, and GELU between them; float32.

    Attributes:
        mean, scale: of each input on the text it was trained on.
        weights, biases: of each layer, [inputs, outputs] and [outputs].
    """

    mean: Float[np.ndarray, " inputs"]
    scale: Float[np.ndarray, " inputs"]
    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def __call__(self, inputs: Float[np.ndarray, "q inputs"]) -> Float[np.ndarray, "q outputs"]:
        """The last layer's outputs."""
        hidden: Float[np.ndarray, "q outputs"] = ((inputs - self.mean) / self.scale).astype(
            np.float32
        )
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer:
                hidden = _gelu(hidden)
            hidden = hidden @ weight + bias
        return hidden

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return len(self.biases[-1])

    def check(self, inputs: int | None, outputs: int) -> None:
        """Refuse what is not finite, or does not fit together or to these sizes (ValueError).

        `inputs` None: any number.
        """
        vectors = (self.mean, self.scale, *self.biases)
        sizes = [vector.size for vector in (self.mean, *self.biases)]
        if (
            any(vector.ndim != 1 for vector in vectors)
            or self.scale.size != sizes[0]
            or [weight.shape for weight in self.weights] != list(itertools.pairwise(sizes))
            or sizes[-1] != outputs
            or inputs not in (None, sizes[0])
        ):
            raise ValueError(f"a network's arrays, of sizes {sizes}, do not fit together")
        arrays = (*vectors, *self.weights)
        if not all(one.dtype == np.float32 and np.isfinite(one).all() for one in arrays):
            raise ValueError("a network has weights that are no finite float32")

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """By name, to be stored."""
        named = {f"{prefix}.mean": self.mean, f"{prefix}.scale": self.scale}
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            named |= {f"{prefix}.{layer}.weight": weight, f"{prefix}.{layer}.bias": bias}
        return named

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> "Network":
        """From stored arrays (KeyError when there are none of this name)."""
        layers = sum(name.startswith(f"{prefix}.") and name.endswith(".bias") for name in arrays)
        return cls(
            arrays[f"{prefix}.mean"],
            arrays[f"{prefix}.scale"],
            tuple(arrays[f"{prefix}.{layer}.weight"] for layer in range(layers)),
            tuple(arrays[f"{prefix}.{layer}.bias"] for layer in range(layers)),
        )


def _gelu(x: Float[np.ndarray, "q hidden"]) -> Float[np.ndarray, "q hidden"]:
    """x·Φ(x), approximated by tanh as torch's GELU(approximate="tanh") does (arXiv:1606.08415)."""
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)
    result: Float[np.ndarray, "q hidden"] = np.float32(0.5) * x * (1 + np.tanh(inner))
    return result
