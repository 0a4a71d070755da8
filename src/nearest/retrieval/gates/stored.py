"""Gates as a memory keeps them: which kinds there are, and the one of a method."""

from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.retrieval.gates.adaptret import AdaptRetGate
from nearest.retrieval.gates.buckets import BucketsGate
from nearest.retrieval.gates.gate import StoredGate
from nearest.retrieval.gates.meta_k import MetaKGate
from nearest.retrieval.gates.mixture import MixtureGate
from nearest.retrieval.settings import method_named
from nearest.store.parts.gates import NewGate

KINDS: dict[str, type[StoredGate]] = {
    "buckets": BucketsGate,
    "meta-k": MetaKGate,
    "adaptret": AdaptRetGate,
    "mixture": MixtureGate,
}


def load_gate(memory: Memory, method: str) -> StoredGate | None:
    """The gate trained for a method; None for a method with a fixed λ.

    Raises:
        SettingError: the method needs a gate and the memory has none, or none of this kind.
        FolderError: its file is damaged.
    """
    kind = method_named(method).gate
    if kind is None:
        return None
    base, _, _ = method.partition("+")
    cure = f"train it with `nearest tune {memory.path} --method {base} --gate {kind} --text …`"
    file = memory.gate(method)
    if file is None:
        raise SettingError(f"{memory.path} has no gate for {method}: {cure}")
    if file.record.kind != kind:
        raise SettingError(
            f"the gate of {memory.path} for {method} is of another kind, {file.record.kind!r}: "
            f"{cure}"
        )
    try:
        if file.record.config["method"] != method:
            raise ValueError(f"it was trained for {file.record.config['method']}")
        return KINDS[kind].restored(file.record.config, file.arrays())
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(
            f"the gate of {memory.path} for {method} makes no sense ({error}): {cure}"
        ) from error


def to_store(gate: StoredGate, method: str) -> NewGate:
    """A trained gate as it goes into the memory."""
    config, arrays = gate.stored()
    return NewGate(str(method_named(method).gate), {**config, "method": method}, arrays)
