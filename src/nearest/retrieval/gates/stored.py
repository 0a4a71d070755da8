"""Gates as a memory keeps them: which kinds there are, and the one of a method."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.retrieval.gates.adaptret import AdaptRetGate
from nearest.retrieval.gates.buckets import BucketsGate
from nearest.retrieval.gates.gate import StoredGate
from nearest.retrieval.gates.meta_k import MetaKGate
from nearest.retrieval.gates.mixture import MixtureGate
from nearest.retrieval.settings import method_named, tuning_options
from nearest.store.parts.gates import NewGate
from nearest.store.tuned import what_keys

GATES: dict[str, type[StoredGate]] = {
    "buckets": BucketsGate,
    "meta-k": MetaKGate,
    "adaptret": AdaptRetGate,
    "mixture": MixtureGate,
}


def load_gate(memory: Memory, method: str) -> StoredGate | None:
    """The gate trained for a method; None for a method with a fixed λ.

    Raises:
        SettingError: the memory has no gate for the method, or one of another kind, for other keys,
            or that makes no sense.
        FolderError: its file is damaged.
    """
    chosen = method_named(method)
    if chosen.gate is None:
        return None
    cure = f"train it with `nearest tune {memory.path} {tuning_options(method)} --text …`"
    file = memory.gate(method)
    if file is None:
        raise SettingError(f"{memory.path} has no gate for {method}: {cure}")
    if file.record.kind != chosen.gate:
        raise SettingError(
            f"the gate of {memory.path} for {method} is of another kind, {file.record.kind!r}: "
            f"{cure}"
        )
    config, keys = file.record.config, what_keys(memory.manifest)
    if config.get("keys", keys) != keys:
        raise SettingError(
            f"the gate of {memory.path} for {method} was trained with other keys "
            f"({config['keys']}; they are {keys} now), so distances mean something else to it: "
            f"{cure}"
        )
    try:
        if config["method"] != method:
            raise ValueError(f"it was trained for {config['method']}")
        gate = restored(chosen.gate, config, file.arrays())
        if foreign := {one for c in gate.components for one in c.kinds} - set(chosen.weighed):
            raise ValueError(f"it weighs {min(foreign)} candidates, which {method} has not")
        if isinstance(gate, AdaptRetGate) and gate.key_dim != memory.keys_record.dim:
            raise ValueError(f"it looks at keys of {gate.key_dim} dims")
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(
            f"the gate of {memory.path} for {method} makes no sense ({error}): {cure}"
        ) from error
    return gate


def restored(kind: str, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> StoredGate:
    """The gate of a kind that has this configuration and these arrays.

    Raises:
        KeyError, TypeError, ValueError: they make no such gate.
    """
    gate_class = GATES[kind]
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    gate = gate_class(msgspec.convert(config, gate_class.Config), state)
    if unknown := sorted(set(state) - set(gate.state_dict())):
        raise ValueError(f"it has no array {unknown[0]!r}")
    return gate


def to_store(gate: StoredGate, memory: Memory, method: str) -> NewGate:
    """A trained gate as it goes into the memory, with the method and the keys it is for."""
    config = {
        **msgspec.to_builtins(gate.config),
        "method": method,
        "keys": what_keys(memory.manifest),
    }
    arrays = {name: tensor.numpy() for name, tensor in gate.state_dict().items()}
    return NewGate(str(method_named(method).gate), config, arrays)
