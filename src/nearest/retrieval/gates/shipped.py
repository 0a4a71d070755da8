"""The gate of hybrid that ships with the package, for memories that have none of their own.

It was trained on texts of several corpora, as several models and memories saw them
(`benchmarks/ship_gate.py`). What it looks at means the same everywhere: probabilities, counts,
lengths of matches, and distances in a unit of each memory's own.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file

from nearest.retrieval.gates.gate import View, quantiles_of
from nearest.retrieval.gates.mixture import MixtureConfig, MixtureGate

SHIPPED = Path(__file__).with_name("shipped.safetensors")
_CONFIG = "config"  # in the file's metadata
_DIGITS = 3  # of quantiles and unit: the same bytes with any number of threads


@cache
def shipped_gate() -> MixtureGate:
    """The gate as it was trained, in units of 1; `adapted` makes one for a memory of it."""
    return read_gate(SHIPPED)


def read_gate(path: Path) -> MixtureGate:
    """A gate that `write_gate` wrote."""
    with safe_open(path, framework="pt") as file:
        config = msgspec.convert(json.loads(file.metadata()[_CONFIG]), MixtureConfig)
        return MixtureGate(config, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def write_gate(path: Path, gate: MixtureGate) -> None:
    """Write a gate, in units of 1, as a file of its own."""
    config = MixtureConfig.over(gate.config.kinds, 1.0)
    metadata = {_CONFIG: json.dumps(msgspec.to_builtins(config))}
    save_file({name: one.contiguous() for name, one in gate.state_dict().items()}, path, metadata)


def adapted(gate: MixtureGate, unit: float, views: Iterable[View]) -> MixtureGate:
    """The gate for another memory: its networks as they are, what they mean set by this memory.

    Args:
        gate: one that decides about searches.
        unit: of the memory's distances (`fit_mixture.distance_unit`).
        views: of text that the memory does not hold, without dense candidates; what a search is
            estimated to gain there says which searches are among those that `skip` saves.
    """
    assert gate.search is not None
    config = MixtureConfig.over(gate.config.kinds, float(f"{unit:.{_DIGITS}g}"))
    gains = [gate.search(config.features_before(view))[:, 0] for view in views]
    quantiles = quantiles_of(np.round(np.concatenate(gains), _DIGITS))
    return MixtureGate(config, {**gate.state_dict(), "quantiles": quantiles})
