"""The ways in which one text is read: with its neighbours, without, with fewer or wrong ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedModel

from nearest.errors import SettingError
from nearest.retro.data.chunks import Chunks
from nearest.retro.data.dataset import RetroDataset
from nearest.retro.data.table import NeighbourTable
from nearest.retro.evaluation.scoring import BASE, OFF, ON
from nearest.retro.retrofit import RetrofitForCausalLM

SHUFFLED, NO_CONTINUATION = "shuffled", "no-continuation"
_SEED = 0


@dataclass(frozen=True)
class Reading:
    """A way to read a text.

    Attributes:
        name: "on"; "off": the same weights without neighbours; "base": what a RETROfit was made
            of; "shuffled": each chunk has the neighbours of another, drawn at random among those
            of other documents;
            "no-continuation": neighbours without what follows them; "k=3": the 3 nearest.
        neighbours, continuation: read of each chunk; 0 where retrieval is off.
    """

    name: str
    neighbours: int
    continuation: int

    @property
    def kind(self) -> str:
        """ON, OFF or BASE."""
        return self.name if self.name in (OFF, BASE) else ON

    def table(self, table: NeighbourTable, chunks: Chunks) -> NeighbourTable:
        """The neighbours that are read of a text's chunks."""
        if self.name != SHUFFLED:
            return table
        order = others(chunks)
        return replace(table, ids=table.ids[order], distances=table.distances[order])


def others(chunks: Chunks) -> Int[np.ndarray, " chunks"]:
    """For each chunk one of another document; of a single document, another of its chunks."""
    random, ids, first = np.random.default_rng(_SEED), np.arange(len(chunks)), chunks.first
    if (np.diff(first) > 0).sum() < 2:  # every chunk counts as a document
        first = np.arange(len(ids) + 1)
    order, own = random.permutation(len(ids)), np.searchsorted(first, ids, side="right") - 1
    same = np.flatnonzero(own[order] == own)
    if len(ids) > 1 and len(same):
        begins, ends = first[own[same]], first[own[same] + 1]
        drawn = random.integers(len(ids) - (ends - begins))
        order[same] = np.where(drawn < begins, drawn, drawn + ends - begins)
    return order


def readings_of(
    names: Sequence[str],
    model: PreTrainedModel,
    table: NeighbourTable,
    neighbours: int = 2,
    continuation: int = 1,
) -> list[Reading]:
    """Readings by name; "k" is one for each number of neighbours that the table stores.

    Raises:
        SettingError: a name is unknown or named twice, or the model or table has nothing for it.
    """
    wide = [n for name in names for n in (_every_k(table) if name == "k" else [name])]
    if not wide or len(set(wide)) < len(wide):
        raise SettingError("name at least one reading, and each only once")
    return [_reading(name, model, table, neighbours, continuation) for name in wide]


def _every_k(table: NeighbourTable) -> list[str]:
    return [f"k={k}" for k in range(1, table.saved + 1)]


def _reading(
    name: str, model: PreTrainedModel, table: NeighbourTable, neighbours: int, continuation: int
) -> Reading:
    if name in (ON, SHUFFLED):
        found = Reading(name, neighbours, continuation)
    elif name in (OFF, BASE):
        if name == BASE and not isinstance(model, RetrofitForCausalLM):
            raise SettingError(
                "base is what a RETROfit was made of, and this model was trained from scratch: "
                "compare to off"
            )
        return Reading(name, 0, 0)
    elif name == NO_CONTINUATION:
        found = Reading(name, neighbours, 0)
    elif name.startswith("k=") and name[2:].isdecimal():
        found = Reading(name, int(name[2:]), continuation)
    else:
        raise SettingError(
            f"reading {name!r} is unknown: choose on, off, base, shuffled, no-continuation, k=1 … "
            f"k={table.saved}, or k for all of these"
        )
    table.first(found.neighbours)  # refuses more than there are
    return found


def dataset_for(
    reading: Reading, data: RetroDataset, table: NeighbourTable, max_len: int | None
) -> RetroDataset:
    """A text as a reading has it; `data` says of which corpora and documents."""
    return RetroDataset(
        data.chunks,
        data.database,
        reading.table(table, data.chunks),
        neighbours=max(reading.neighbours, 1),
        continuation=reading.continuation,
        max_len=max_len,
        subset=data.documents.tolist(),
    )
