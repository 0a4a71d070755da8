"""The methods by name, and what each leaves open."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any

from nearest.errors import SettingError, warn_caller
from nearest.memory import Memory
from nearest.retrieval.candidates import MEMORY_KINDS
from nearest.store.searched import DISTANCES

BASE = "base"
_INFINITE = "inf"
_WEIGHING = ("lam", "temperature", "length_power")
_RENAMED = {"candidates": "rerank", "matches": "suffix_k"}  # as memories of before 0.1 name them
_OF_KIND = {
    "dense": ("k", "distances", "rerank", "encoder_texts"),
    "pointers": ("min_knns", "max_knns", "dedup"),
    "suffix": ("suffix_k",),
}
_OF_PASSAGES = ("passages", "passage_tokens", "passage_stride", "query_tokens")


@dataclass(frozen=True)
class Method:
    """Which kinds give a method its candidates, and what weighs them.

    Attributes:
        kinds: among "dense", "pointers" and "suffix", in this order.
        gate: the kind of trained gate that weighs them; None for a fixed λ.
        asks: whether the gate decides about dense searches.
        defaults: settings whose defaults are not those of `Settings`.
        text: whether its gate weighs earlier places of the text itself, too.
        in_context: whether the model reads passages of the memory before the text.
    """

    kinds: tuple[str, ...]
    gate: str | None = None
    asks: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    text: bool = False
    in_context: bool = False

    @property
    def weighed(self) -> tuple[str, ...]:
        """The kinds of candidates that a gate trained for it weighs."""
        return (*self.kinds, "text") if self.text else self.kinds

    @property
    def settings(self) -> tuple[str, ...]:
        """The names of the settings it has."""
        passages = _OF_PASSAGES if self.in_context else ()
        if not self.kinds:
            return passages
        names = list(() if self.gate else _WEIGHING)
        for kind in self.kinds:
            names += _OF_KIND[kind]
        if self.asks:
            names = [*(name for name in names if name != "min_knns"), "skip"]
        return (*names, "guard", *passages)


# kNN-LM arXiv:1911.00172, RetoMaton arXiv:2201.12431, buckets arXiv:2210.15859, meta-k
# arXiv:2105.13022, AdaptRet arXiv:2109.04212; suffix retrieval and the mixture are our own.
_KNN, _RETOMATON, _SUFFIX = ("dense",), ("dense", "pointers"), ("suffix",)
_METHODS = {
    "knn": Method(_KNN),
    "knn+buckets": Method(_KNN, "buckets"),
    "knn+meta-k": Method(_KNN, "meta-k"),
    "knn+adaptret": Method(_KNN, "adaptret", asks=True, defaults={"skip": 0.5}),
    "knn+mixture": Method(_KNN, "mixture"),
    "retomaton": Method(_RETOMATON),
    "retomaton+mixture": Method(_RETOMATON, "mixture"),
    "suffix": Method(_SUFFIX, defaults={"lam": 0.5, "temperature": 64.0, "length_power": 4.0}),
    "suffix+mixture": Method(_SUFFIX, "mixture"),
    "hybrid": Method(
        MEMORY_KINDS, "mixture", asks=True, defaults={"guard": True, "skip": 0.5}, text=True
    ),
}
MEMORY_METHODS = tuple(_METHODS)
# The model reads passages of the memory before the text (arXiv:2302.00083): alone, or with any of
# the others, whose queries are then what the model makes of both.
IN_CONTEXT = "in-context"
_METHODS[IN_CONTEXT] = Method((), in_context=True)
for _name in MEMORY_METHODS:
    _METHODS[f"{IN_CONTEXT}+{_name}"] = replace(_METHODS[_name], in_context=True)
METHODS = (BASE, *_METHODS)


def check_method(method: str, known: Sequence[str] = METHODS) -> None:
    """Refuse a method that is not known here (SettingError)."""
    if method not in known:
        raise SettingError(f"method {method!r} is unknown: choose among {', '.join(known)}")


def method_named(name: str) -> Method:
    """A memory's method (SettingError when there is none of this name)."""
    check_method(name, tuple(_METHODS))
    return _METHODS[name]


@dataclass(frozen=True)
class Settings:
    """What the methods leave open; the defaults are kNN-LM's and RetoMaton's.

    Attributes:
        lam: weight of the memory, 0 to 1.
        temperature: by which distances are divided.
        length_power: b in (1 + match length)^b, by which candidates are weighed too.
        k: neighbours of a dense search.
        distances: "keys" measures by the stored keys, "index" by the index's own codes.
        rerank: at least so many are fetched by a dense search and re-ranked by their keys.
        encoder_texts: a dense search is among the documents with so many encoder texts that are
            nearest to what the encoder reads, by BM25; 0 for all documents.
        min_knns: search when fewer pointers are left; infinity searches always, 0 never.
        max_knns: pointers and members of their clusters, at most.
        dedup: count an entry once that is a neighbour and a pointer, or a member of a cluster too.
        suffix_k: candidates of a suffix match, at most.
        skip: fraction of dense searches that the gate is to save, by what it saw when tuned.
        guard: weigh base and memory by how well each has predicted the document so far, which
            costs at most ln 2 nats a document and repairs a gate that is wrong.
        passages: of the memory that the model reads before the text, the best one last.
        passage_tokens: of each, at most.
        passage_stride: text tokens from one choice of passages to the next.
        query_tokens: the last ones of the text, by which passages are chosen.
    """

    lam: float = 0.25
    temperature: float = 1.0
    length_power: float = 0.0
    k: int = 1024
    distances: str = "keys"
    rerank: int = 0
    encoder_texts: int = 0
    min_knns: float = 1
    max_knns: int = 1024
    dedup: bool = False
    suffix_k: int = 256
    skip: float = 0.0
    guard: bool = False
    passages: int = 1
    passage_tokens: int = 128
    passage_stride: int = 32
    query_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("lam", "temperature", "length_power", "min_knns", "skip"):
            if not isinstance(getattr(self, name), Real):
                raise SettingError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("k", "rerank", "encoder_texts", "max_knns", "suffix_k", *_OF_PASSAGES):
            if not isinstance(getattr(self, name), Integral):
                raise SettingError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if self.encoder_texts < 0:
            raise SettingError(
                f"encoder_texts must be at least 1, or 0 for all, got {self.encoder_texts}"
            )
        if not 0 <= self.lam <= 1:
            raise SettingError(f"lam must lie inside [0, 1], got {self.lam}: it is a probability")
        if not 0 <= self.skip <= 1:
            raise SettingError(f"skip must lie inside [0, 1], got {self.skip}: it is a fraction")
        for name in ("dedup", "guard"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not 0 < self.temperature < float("inf"):
            raise SettingError(f"temperature must be above 0 and finite, got {self.temperature}")
        if not (isfinite(self.length_power) and self.length_power >= 0):
            raise SettingError(
                f"length_power must be at least 0 and finite, got {self.length_power}"
            )
        if not self.min_knns >= 0:
            raise SettingError(f"min_knns must be at least 0, got {self.min_knns}")
        for name in ("k", "max_knns", "suffix_k", *_OF_PASSAGES):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.distances not in DISTANCES:
            raise SettingError(f"distances {self.distances!r} is unknown: choose keys or index")

    @property
    def passage_room(self) -> int:
        """Tokens that stand before a text at most, with passages: theirs and a start token."""
        return 1 + self.passages * self.passage_tokens

    def of(self, method: str) -> dict[str, Any]:
        """The settings that the method has, by name."""
        values = asdict(self)
        return {name: values[name] for name in method_named(method).settings}


def as_stored(settings: Settings, method: str) -> dict[str, Any]:
    """The method's settings as JSON."""
    return to_json(settings.of(method))


def to_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, without infinity, which JSON does not know."""
    return {n: _INFINITE if v == float("inf") else v for n, v in values.items()}


def from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_json` was given."""
    return {n: float("inf") if v == _INFINITE else v for n, v in values.items()}


def resolve_settings(
    method: str, memory: Memory, settings: Settings | None = None, **given: Any
) -> Settings:
    """Settings as given, else as tuned, else the method's defaults; k at most the entries.

    Args:
        method: what they are for.
        memory: whose stored settings and entries count.
        settings: all of them, in place of those that are stored.
        **given: single ones, before all others; None for one that is not given.

    Raises:
        SettingError: one is unknown, not of this method or out of range.
    """
    check_settings([method], given)
    known = method_named(method).settings
    defaults = dict(method_named(method).defaults)
    stored = {_RENAMED.get(name, name): v for name, v in memory.settings(method).items()}
    tuned = {n: v for n, v in from_json(stored).items() if n in known}
    chosen = {name: v for name, v in given.items() if v is not None}
    if settings is not None:
        defaults, tuned = asdict(settings), {}
    try:
        Settings(**{**defaults, **tuned})
    except (SettingError, TypeError) as error:
        raise SettingError(
            f"the settings stored in {memory.path} make no sense: {tuned}. Tune it again "
            "(`nearest tune`)"
        ) from error
    settings = Settings(**{**defaults, **tuned, **chosen})
    if "dense" in method_named(method).kinds and settings.k > memory.entries:
        if "k" in chosen:
            warn_caller(
                f"k = {settings.k:,} is more than the memory's {memory.entries:,} entries: "
                "all of them are used"
            )
        settings = replace(settings, k=memory.entries)
    return settings


def check_methods(methods: Sequence[str], given: Mapping[str, Any], *, has_memory: bool) -> None:
    """Refuse methods, or settings for them, that cannot be used together (SettingError)."""
    for name in methods:
        check_method(name)
    if not methods or len(set(methods)) != len(methods):
        raise SettingError("name at least one method, and each only once")
    of_memory = [name for name in methods if name != BASE]
    if not of_memory and (unused := sorted(n for n, value in given.items() if value is not None)):
        raise SettingError(
            f"{unused[0]!r} is a setting of methods that use the memory, and the base model "
            "has none: leave it out, or name a method"
        )
    if of_memory and not has_memory:
        raise SettingError(f"method {of_memory[0]} needs a memory: pass one")
    check_settings(of_memory, given)


def check_settings(methods: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuse a setting that none of the methods has (SettingError)."""
    known = {name for method in methods for name in method_named(method).settings}
    if methods and (unknown := sorted({n for n, v in given.items() if v is not None} - known)):
        raise SettingError(
            f"{unknown[0]!r} is no setting of {' or '.join(methods)}: "
            f"choose among {', '.join(sorted(known))}"
        )


def settings_of(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings that the method has."""
    return {n: v for n, v in given.items() if n in method_named(method).settings}


def passage_settings(settings: Settings) -> dict[str, Any]:
    """The settings of passages, by name."""
    return {name: getattr(settings, name) for name in _OF_PASSAGES}


def tuning_options(method: str) -> str:
    """What `nearest tune` is told to tune this method."""
    gate = method_named(method).gate
    base = method.removesuffix(f"+{gate}")
    return f"--method {base}" if base == method else f"--method {base} --gate {gate}"
