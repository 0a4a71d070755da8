"""The look-ups of a memory as servers answer them: arrays in and arrays out, by name.

What comes in may have been made by a stranger, and is checked. A shard, which holds some segments
of a memory, answers of these alone; `remote.sharded` puts the answers together.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from nearest.errors import SettingError
from nearest.index.ngrams import SAMPLED
from nearest.index.search import Fetched
from nearest.memory import Memory

MOST_NUMBERS = 1 << 22  # of one array in an answer

Arrays = Mapping[str, np.ndarray]


class Options(NamedTuple):
    """What a look-up takes beside arrays; each uses those that it needs."""

    k: int = 16
    distances: Literal["keys", "index"] = "keys"
    rerank: int = 0
    ordered: bool = True
    length: int = 1


class _Call(NamedTuple):
    """A look-up: the arrays that it takes, with their dimensions, and what it answers."""

    takes: Mapping[str, int]
    answer: Callable[[Memory, Arrays, Options], dict[str, np.ndarray]]


def names() -> list[str]:
    """Of all look-ups."""
    return list(_CALLS)


def answered(memory: Memory, call: str, arrays: Arrays, options: Options) -> dict[str, np.ndarray]:
    """The answer to a look-up.

    Raises:
        SettingError: it is none, or it was not asked as it has to be.
    """
    if call not in _CALLS:
        raise SettingError(f"there is no look-up {call!r}: choose {', '.join(_CALLS)}")
    given = _checked(arrays, _CALLS[call].takes, memory)
    rows = max((len(given[name]) for name in given if name != "context"), default=0)
    if rows * options.k > MOST_NUMBERS:
        raise SettingError("this asks for too much at once: ask for fewer rows, or a smaller k")
    return _CALLS[call].answer(memory, given, options)


def warm_up(memory: Memory) -> None:
    """Read and compile what first look-ups need, before anyone waits for them."""
    if not memory.segments:
        return
    first = int(memory.valued_entries()[0])
    ids, ends = np.array([[first]]), np.zeros(1, np.int64)
    context = np.array([memory.manifest.model.start_token])
    memory.values(ids)
    memory.longest_matches(context, ends, 1)
    memory.match_lengths(ids, context, ends)
    memory.ngram_samples(context, ends, 1)
    if memory.manifest.keys is not None:
        memory.search(np.zeros((1, memory.keys_record.dim), np.float32), 1)


def _checked(arrays: Arrays, takes: Mapping[str, int], memory: Memory) -> dict[str, np.ndarray]:
    """The arrays, each what a look-up may be given."""
    given = dict(arrays)
    if set(given) != set(takes):
        raise SettingError(f"send the arrays {', '.join(takes)}, got {', '.join(given)}")
    for name, dims in takes.items():
        array = given[name]
        if array.ndim != dims or array.dtype.kind not in ("f" if name == "queries" else "iu"):
            raise SettingError(f"{name} must be {dims}-dimensional numbers")
        if name == "queries":
            given[name] = array.astype(np.float32)
            if not np.isfinite(given[name]).all():
                raise SettingError("queries must be finite")
            continue
        given[name] = array.astype(np.int64)
        least, limit = _range_of(name, given, memory)
        if array.size and not (given[name].min() >= least and given[name].max() < limit):
            raise SettingError(f"{name} must lie in [{least}, {limit})")
    rows = {len(given[name]) for name in takes if name in ("queries", "ids", "ends")}
    if len(rows) > 1:
        raise SettingError("the arrays have different numbers of rows")
    return given


def _range_of(name: str, arrays: Arrays, memory: Memory) -> tuple[int, int]:
    if name == "ids":
        return -1, memory.positions
    if name == "ends":
        return 0, len(arrays["context"]) + 1
    if name == "wanted":
        return 0, memory.positions + 1
    return -1, 2**32  # tokens; -1 stands between contexts


def _search(memory: Memory, given: Arrays, options: Options) -> dict[str, np.ndarray]:
    k, distances, rerank, ordered, _ = options
    found = memory.search(given["queries"], k, distances, rerank, ordered=ordered)
    return {**found._asdict(), "values": memory.values(found.ids)}


def _fetch(memory: Memory, given: Arrays, options: Options) -> dict[str, np.ndarray]:
    """So many entries of each group, one group's columns after another's."""
    wanted = given["wanted"].tolist()
    if len(wanted) != len(memory.searcher.groups):
        raise SettingError("say how many are wanted of each group")
    if len(given["queries"]) * sum(wanted) > MOST_NUMBERS:
        raise SettingError("this asks for too much at once: ask for fewer rows, or fewer of each")
    every = memory.fetch(given["queries"], wanted, options.distances)
    found = [_without_gaps(one, many) for one, many in zip(every, wanted, strict=True)]
    if not found:
        return {}
    ids, codes, distances = (np.concatenate(arrays, 1) for arrays in zip(*found, strict=True))
    return {
        "widths": np.array([one.ids.shape[1] for one in found]),
        "ids": ids,
        "codes": codes,
        "distances": distances,
        "values": memory.values(ids),
    }


def _without_gaps(found: Fetched, wanted: int) -> Fetched:
    """In no more columns than were wanted: missing entries may stand among the others."""
    if found.ids.shape[1] <= wanted:
        return found
    order = np.argsort(found.ids < 0, axis=1, kind="stable")[:, :wanted]
    return Fetched(*(np.take_along_axis(array, order, axis=1) for array in found))


def _distances(memory: Memory, given: Arrays, options: Options) -> dict[str, np.ndarray]:
    measured = memory.key_distances if options.distances == "keys" else memory.index_distances
    ids = given["ids"]
    return {"distances": measured(given["queries"], ids), "values": memory.values(ids)}


def _longest_matches(memory: Memory, given: Arrays, options: Options) -> dict[str, np.ndarray]:
    found = memory.longest_matches(*_text(given), options.k)
    return {**found._asdict(), "values": memory.values(found.ids)}


def _equal_documents(memory: Memory, given: Arrays, _: Options) -> dict[str, np.ndarray]:
    documents = np.split(given["context"], given["ends"])[:-1]
    return {"ids": memory.equal_documents(list(documents))}


def _spans_stand(memory: Memory, given: Arrays, options: Options) -> dict[str, np.ndarray]:
    if options.length < 2 or given["ends"].min(initial=options.length) < options.length - 1:
        raise SettingError("spans have at least 2 tokens, and begin inside the context")
    return {"stand": memory.spans_stand(*_text(given), options.length)}


def _places(memory: Memory, given: Arrays, _: Options) -> dict[str, np.ndarray]:
    if (given["ids"] < 0).any():
        raise SettingError("entries must be at least 0")
    documents, positions = memory.places(given["ids"])
    return {"documents": documents, "positions": positions}


def _document_tokens(memory: Memory, given: Arrays, _: Options) -> dict[str, np.ndarray]:
    numbers = given["ids"].tolist()
    if len(numbers) != 1 or not 0 <= numbers[0] < memory.documents:
        raise SettingError("give the number of one document")
    return {"tokens": memory.document_tokens(numbers[0])}


def _clusters(memory: Memory, _given: Arrays, _: Options) -> dict[str, np.ndarray]:
    if memory.clusters is None:
        raise SettingError("the memory has no clusters")
    return cast(dict[str, np.ndarray], vars(memory.clusters))


def _text(given: Arrays) -> tuple[np.ndarray, np.ndarray]:
    if given["ends"].size and given["ends"].max() >= len(given["context"]):
        raise SettingError("ends must lie inside the context")
    return given["context"], given["ends"]


def _of_ids(name: str) -> _Call:
    def answer(memory: Memory, given: Arrays, _: Options) -> dict[str, np.ndarray]:
        return {name: getattr(memory, name)(given["ids"])}

    return _Call({"ids": 1}, answer)


def _of_text(
    answer: Callable[[Memory, tuple[np.ndarray, np.ndarray], int], Mapping[str, Any]],
    numbers: int = 1,
) -> _Call:
    """With so many numbers of each n-gram in an answer."""

    def work(memory: Memory, given: Arrays, options: Options) -> dict[str, np.ndarray]:
        if len(given["ends"]) * options.length * numbers > MOST_NUMBERS:
            raise SettingError("this asks for too much at once: ask for fewer rows, or shorter")
        return dict(answer(memory, _text(given), options.length))

    return _Call({"context": 1, "ends": 1}, work)


_CALLS = {
    "search": _Call({"queries": 2}, _search),
    "fetch": _Call({"queries": 2, "wanted": 1}, _fetch),
    "distances": _Call({"queries": 2, "ids": 2}, _distances),
    "values": _of_ids("values"),
    "successors": _of_ids("successors"),
    "log_weights": _of_ids("log_weights"),
    "longest_matches": _Call({"context": 1, "ends": 1}, _longest_matches),
    "match_lengths": _Call(
        {"context": 1, "ends": 1, "ids": 2},
        lambda m, given, _: {"lengths": m.match_lengths(given["ids"], *_text(given))},
    ),
    "ngrams": _of_text(lambda m, text, longest: m.ngrams(*text, longest)._asdict()),
    "ngram_samples": _of_text(
        lambda m, text, longest: m.ngram_samples(*text, longest)._asdict(), SAMPLED
    ),
    "spans_stand": _Call({"context": 1, "ends": 1}, _spans_stand),
    "equal_documents": _Call({"context": 1, "ends": 1}, _equal_documents),
    "places": _Call({"ids": 1}, _places),
    "document_tokens": _Call({"ids": 1}, _document_tokens),
    "clusters": _Call({}, _clusters),
    "labels": _Call({}, lambda m, _given, _: {"labels": m.labels()}),
}
