"""Which entries contributed to the tokens of a finished sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from nearest.index.neighbours import NO_ENTRY
from nearest.markup import table
from nearest.memory import Memory
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.queries import Queries
from nearest.retrieval.step import steps
from nearest.store.snapshot import Place

_SHOWN = 3  # entries of a token, where it is printed


@dataclass(frozen=True)
class Source:
    """An entry that contributed to a token: where it is, and its share of the memory's weight."""

    entry: int
    document: int
    document_id: str
    metadata: Mapping[str, Any]
    position: int  # of the entry in its document's tokens; the token it gave stands one later
    weight: float
    memory: int = 0  # its number among those that are attached


@dataclass(frozen=True, repr=False)
class TokenSources:
    """A generated token, how much of its probability the memory gave, and which entries did.

    The sources' weights sum to 1, or there are none where the memory gave the token nothing.
    `text_weight` is the part of its probability that earlier places of the text itself gave, which
    are no entries of a memory.
    """

    token: int
    memory_weight: float
    sources: list[Source]
    text_weight: float = 0.0

    def __repr__(self) -> str:
        """Token, the memory's share, and the strongest entries as document@position."""
        named = [f"{one.document_id}@{one.position} {one.weight:.0%}" for one in self.sources]
        more = ", …" if len(named) > _SHOWN else ""
        entries = f": {', '.join(named[:_SHOWN])}{more}" if named else ""
        text = f", this text {self.text_weight:.0%}" if self.text_weight else ""
        return f"TokenSources(token {self.token}, memory {self.memory_weight:.0%}{entries}{text})"

    def _repr_html_(self) -> str:
        """Its sources as a table, for notebooks."""
        rows = [(f"{one.weight:.0%}", one.document_id, str(one.position)) for one in self.sources]
        told = f"token {self.token}: {self.memory_weight:.0%} from the memory"
        if self.text_weight:
            told += f", {self.text_weight:.0%} from this text"
        return table((told, "document", "position"), rows)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


class _Contribution(NamedTuple):
    """What each entry added to a token's probability (strongest first), the model and the text."""

    token: int
    entries: dict[tuple[int, int], float]  # number of the memory, and entry
    from_lm: float
    from_text: float


def token_sources(
    ensemble: Ensemble,
    queries: Queries,
    targets: Int[np.ndarray, " n"],
    lm_log_probs: Float[Tensor, " n"],
    skip: int,
) -> list[TokenSources]:
    """Sources of the tokens of one sequence, whose first `skip` only lead up to them.

    `lm_log_probs` are the model's of the targets, in nats.
    """
    each = [
        _contributions(number, lookup, queries, targets, lm_log_probs, skip)
        for number, lookup in enumerate(ensemble.lookups)
        if ensemble.weights[number]
    ]
    weights = [weight for _, weight in ensemble.used]
    alone = (1 - sum(weights)) * lm_log_probs[skip:].double().exp().numpy()
    contributions = []
    for token, rest, *of_token in zip(targets[skip:].tolist(), alone.tolist(), *each, strict=True):
        entries = {
            entry: weight * share
            for one, weight in zip(of_token, weights, strict=True)
            for entry, share in one.entries.items()
        }
        from_lm = sum(w * one.from_lm for one, w in zip(of_token, weights, strict=True))
        strongest = dict(sorted(entries.items(), key=lambda item: -item[1]))
        from_text = sum(w * one.from_text for one, w in zip(of_token, weights, strict=True))
        contributions.append(_Contribution(token, strongest, from_lm + rest, from_text))
    return _placed([lookup.memory for lookup in ensemble.lookups], contributions)


def _contributions(
    number: int,
    lookup: Lookup,
    queries: Queries,
    targets: Int[np.ndarray, " n"],
    lm_log_probs: Float[Tensor, " n"],
    skip: int,
) -> list[_Contribution]:
    """What entries of one memory, and the model, added to each token's probability."""
    contributions: list[_Contribution] = []
    sequences = np.zeros(len(targets), dtype=np.int64)
    for one in steps(lookup, queries, sequences, targets, lm_log_probs, {}):
        prediction, trust = one.prediction, one.prediction.trust
        agreeing = prediction.candidates.values == one.targets[:, None]
        right = np.where(agreeing, prediction.weights.candidates, 0) * trust[:, None]
        base = one.lm_log_probs.double().exp().numpy()
        from_lm = base * (prediction.weights.lm * trust + 1 - trust)
        for i, row in enumerate(one.rows.tolist()):
            if row >= skip:
                ids = prediction.candidates.ids[i]
                entries = _totals(number, ids, right[i])
                from_text = float(right[i, ids == NO_ENTRY].sum())
                one_token = _Contribution(int(targets[row]), entries, float(from_lm[i]), from_text)
                contributions.append(one_token)
    return contributions


def _totals(
    memory: int, ids: Int[np.ndarray, " c"], weights: Float[np.ndarray, " c"]
) -> dict[tuple[int, int], float]:
    """Total weight of each entry; one that is a candidate twice counts twice."""
    some = (weights > 0) & (ids != NO_ENTRY)
    entries, at = np.unique(ids[some], return_inverse=True)
    totals = np.bincount(at, weights[some], minlength=len(entries))
    return {
        (memory, entry): total
        for entry, total in zip(entries.tolist(), totals.tolist(), strict=True)
    }


def _placed(memories: Sequence[Memory], contributions: list[_Contribution]) -> list[TokenSources]:
    """Look up where the entries stand; each document is read once, in the file's order."""
    of_memory: dict[int, list[int]] = {}
    for memory, entry in sorted({entry for one in contributions for entry in one.entries}):
        of_memory.setdefault(memory, []).append(entry)
    places: dict[tuple[int, int], Place] = {}
    for memory, ids in of_memory.items():
        documents_of, positions = memories[memory].places(np.array(ids, dtype=np.int64))
        found = map(Place, documents_of.tolist(), positions.tolist())
        places |= {(memory, entry): place for entry, place in zip(ids, found, strict=True)}
    needed = sorted({(memory, place.document) for (memory, _), place in places.items()})
    documents = {(memory, number): memories[memory].document(number) for memory, number in needed}
    result = []
    for token, entries, from_lm, from_text in contributions:
        total = sum(entries.values())
        sources = [
            Source(
                entry,
                places[memory, entry].document,
                documents[memory, places[memory, entry].document].id,
                documents[memory, places[memory, entry].document].metadata,
                places[memory, entry].position,
                weight / total,
                memory,
            )
            for (memory, entry), weight in entries.items()
        ]
        whole = total + from_lm + from_text
        parts = (total / whole, from_text / whole) if whole else (0.0, 0.0)
        result.append(TokenSources(token, parts[0], sources, parts[1]))
    return result
