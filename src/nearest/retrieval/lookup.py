"""One method over a memory: queries and pointers in, candidates and their weights out.

Each method has its own kinds of candidates and settings; nothing is kept between calls.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.errors import SettingError
from nearest.index.neighbours import Neighbours, sort_nearest_first
from nearest.memory import Memory
from nearest.retrieval import automaton
from nearest.retrieval.candidates import (
    Candidates,
    Part,
    no_part,
    scattered,
    side_by_side,
    without_own,
)
from nearest.retrieval.distribution import (
    Component,
    Weights,
    candidate_weights,
)
from nearest.retrieval.gates.gate import FixedGate, Gate, SearchGate, View
from nearest.retrieval.gates.stored import load_gate
from nearest.retrieval.present import Places, matching_places
from nearest.retrieval.queries import Queries
from nearest.retrieval.search_cache import Search
from nearest.retrieval.settings import Settings, method_named


class Ahead(NamedTuple):
    """What depends on a query alone, looked up before its pointers are known.

    Attributes:
        matched: None where the method has no suffix matches.
        dense: None where no search was made.
        text: None where no place of the text itself is weighed.
        searched: which queries get a dense search; None where their pointers decide.
    """

    matched: Part | None = None
    dense: Part | None = None
    searched: Bool[np.ndarray, " q"] | None = None
    text: Places | None = None

    def rows(self, rows: slice) -> "Ahead":
        """Those of some queries."""
        return Ahead(
            None if self.matched is None else self.matched.rows(rows),
            None if self.dense is None else self.dense.rows(rows),
            None if self.searched is None else self.searched[rows],
            None if self.text is None else self.text.rows(rows),
        )


class Lookup:
    """One method over one memory, with its settings and the gate that weighs its candidates.

    A method with a trained gate is given it (`gates.stored`); otherwise λ is fixed. Dense searches
    call `Memory.search`, or a search that several lookups share (`search_cache`). If `ordered`,
    they return candidates nearest first, otherwise in no particular order.
    """

    def __init__(
        self,
        memory: Memory,
        method: str,
        settings: Settings,
        gate: Gate | None = None,
        search: Search | None = None,
        *,
        ordered: bool = True,
    ) -> None:
        self.memory = memory
        self.method = method
        self.settings = settings
        self.kinds = method_named(method).kinds
        if self.kinds != ("suffix",):
            _ = memory.keys_record  # refuses a memory without keys before anything is computed
        if settings.encoder_texts and "dense" in self.kinds:
            _ = memory.encoder_texts  # and one without encoder texts
        self._asks = method_named(method).asks
        self._search = search or memory.search
        self._ordered = ordered
        self.gate = gate or FixedGate(
            Component(self.kinds, settings.temperature, settings.length_power), settings.lam
        )
        # Slow to ask at every token: what decides on dense searches, if anything does.
        self._chooser: SearchGate | None = None
        if self._asks and isinstance(self.gate, SearchGate):
            self._chooser = self.gate
        self.reads_text = any("text" in component.kinds for component in self.gate.components)
        self._measures_matches = any(component.length_power for component in self.gate.components)

    @classmethod
    def of(cls, memory: Memory, method: str, settings: Settings) -> "Lookup":
        """Load the memory's gate for the method, and sort candidates only where order matters.

        It matters to gates, which look at the nearest, and to pointers, which are kept in order.

        Raises:
            SettingError: the method needs a gate that the memory does not have.
        """
        gate = load_gate(memory, method)
        ordered = gate is not None or "pointers" in method_named(method).kinds
        return cls(memory, method, settings, gate, ordered=ordered)

    @property
    def keeps_state(self) -> bool:
        """Whether a prediction depends on those before it, and not on its context alone.

        Pointers go on from what dense searches found: without any there are none.
        """
        return "pointers" in self.kinds and not self._never_searches

    @property
    def _never_searches(self) -> bool:
        return self._chooser is not None and self.settings.skip >= 1

    @property
    def _searches_all(self) -> bool:
        """Whether every query gets a dense search, whatever else is found."""
        if self._chooser is not None:
            return self.settings.skip <= 0
        by_pointers = "pointers" in self.kinds and self.settings.min_knns < np.inf
        return "dense" in self.kinds and not by_pointers

    @property
    def needs_lm(self) -> bool:
        """Whether queries must say what the language model predicts."""
        return self.gate.needs_lm

    @property
    def needs_context(self) -> bool:
        """Whether predictions depend on the tokens before, and not on hidden states alone."""
        only_keys = self.kinds == ("dense",) and not (
            self._measures_matches or self._asks or self.settings.encoder_texts
        )
        return not only_keys or self.settings.guard

    def ahead(self, queries: Queries) -> Ahead:
        """What `candidates` needs no pointers for; many queries at once cost less each."""
        matched = self._matched(queries) if "suffix" in self.kinds else None
        text = self._places(queries)
        if self._chooser is None and not self._searches_all:
            return Ahead(matched, text=text)
        searched = self._to_search(queries, matched or no_part(len(queries.keys)), text)
        return Ahead(matched, self._dense_of(queries, searched), searched, text)

    def candidates(
        self,
        queries: Queries,
        pointers: Int[np.ndarray, "q p"] | None = None,
        ahead: Ahead | None = None,
    ) -> Candidates:
        """The candidates of every kind that the method has.

        `pointers` are what `follow` gave for the queries' sequences, None at their beginnings;
        `ahead` is what `ahead` gave for the queries, if it was asked.
        """
        count = len(queries.keys)
        known = ahead or Ahead()
        none = no_part(count)
        if self.kinds == ("dense",) and not self._asks:
            return self._joined(self._dense(queries), none, none, np.ones(count, dtype=bool))
        pointed = matched = none
        if pointers is not None and pointers.shape[1] and "pointers" in self.kinds:
            pointed = self._pointed(queries, pointers)
        if "suffix" in self.kinds:
            matched = self._matched(queries) if known.matched is None else known.matched
        text = self._places(queries) if known.text is None else known.text
        searched, dense = known.searched, known.dense
        if searched is None:
            searched = self._to_search(queries, matched, text, pointers)
            dense = self._dense_of(queries, searched)
        if dense is None or not searched.any():
            dense = none
        if self.settings.dedup:
            pointed = pointed.without(automaton.without_repeated(pointed.ids, dense.ids) < 0)
        return self._joined(dense, pointed, matched, searched, text)

    def _joined(
        self,
        dense: Part,
        pointed: Part,
        matched: Part,
        searched: Bool[np.ndarray, " q"],
        text: Places | None = None,
    ) -> Candidates:
        ids, distances, lengths = side_by_side([dense, pointed, matched])
        found = Candidates(
            ids,
            self.memory.values(ids),
            distances,
            lengths,
            (dense.ids.shape[1], pointed.ids.shape[1], matched.ids.shape[1]),
            searched,
            self.memory.log_weights(ids) if self.memory.has_weights else None,
        )
        return found if text is None else found.beside(*text)

    def _places(self, queries: Queries) -> Places | None:
        """Earlier places of the text itself, where the gate weighs them."""
        if not self.reads_text:
            return None
        start_token = self.memory.manifest.model.start_token
        return matching_places(queries.context, queries.ends, start_token)

    def follow(
        self, candidates: Candidates, tokens: Int[np.ndarray, " q"]
    ) -> Int[np.ndarray, "q p"]:
        """Pointers for the next prediction: successors of candidates whose value is the token."""
        columns = candidates.of("dense", "pointers")
        agreed = automaton.agreeing(
            candidates.ids[:, columns],
            candidates.distances[:, columns],
            candidates.values[:, columns],
            tokens,
        )
        return self.memory.successors(agreed)

    def weights(self, queries: Queries, candidates: Candidates) -> Weights:
        """What each candidate adds to the probability of its value, and what the model does."""
        shares = self.gate.shares(View(queries, candidates, self.memory))
        return candidate_weights(candidates, self.gate.components, shares)

    def _to_search(
        self,
        queries: Queries,
        matched: Part,
        text: Places | None,
        pointers: Int[np.ndarray, "q p"] | None = None,
    ) -> Bool[np.ndarray, " q"]:
        """Which queries get a dense search: the gate's choice, or those with few pointers left.

        Pointers are counted before members of their clusters are added; a gate does not see them.
        """
        count = len(queries.keys)
        if "dense" not in self.kinds:
            return np.zeros(count, dtype=bool)
        if self._searches_all:
            return np.ones(count, dtype=bool)
        if self._chooser is not None:
            if self._never_searches:  # then nothing need be looked at
                return np.zeros(count, dtype=bool)
            none = no_part(count)
            found = self._joined(none, none, matched, np.zeros(count, dtype=bool), text)
            before = View(queries, found, self.memory)
            return self._chooser.worth_searching(before, self.settings.skip)
        left = np.zeros(count) if pointers is None else (pointers >= 0).sum(axis=1)
        fewer: Bool[np.ndarray, " q"] = left < self.settings.min_knns
        return fewer

    def _dense_of(self, queries: Queries, searched: Bool[np.ndarray, " q"]) -> Part | None:
        """The dense candidates of the queries that are searched, None where none is."""
        if searched.all():
            return self._dense(queries)
        if not searched.any():
            return None
        return scattered(self._dense(queries.rows(searched)), searched)

    def _dense(self, queries: Queries) -> Part:
        settings = self.settings
        ordered = self._ordered or queries.own is not None  # then the farthest may be left out

        def search(k: int) -> Part:
            if settings.encoder_texts:
                found = self._among_near_texts(queries, k)
            else:
                found = self._search(
                    queries.keys, k, settings.distances, settings.rerank, ordered=ordered
                )
            return Part(found.ids, found.distances, self._lengths(queries, found.ids))

        return self._others(queries, search, settings.k)

    def _among_near_texts(self, queries: Queries, k: int) -> Neighbours:
        """The k nearest entries of documents whose encoder texts are like the queries' own."""
        if queries.sources is None:
            raise SettingError(
                "encoder_texts goes by what the encoder reads, and this call does not show it: "
                "give it as input_ids, or leave encoder_texts out"
            )
        tokens, rows = queries.sources
        ids = self.memory.encoder_texts.entries(tokens, self.settings.encoder_texts)[rows]
        return sort_nearest_first(Neighbours(ids, self._measured(queries, ids)), k)

    def _measured(self, queries: Queries, ids: Int[np.ndarray, "q c"]) -> Float[np.ndarray, "q c"]:
        """Distances of chosen entries, as the method measures them."""
        if self.settings.distances == "keys":
            return self.memory.key_distances(queries.keys, ids)
        return self.memory.index_distances(queries.keys, ids)

    def _pointed(self, queries: Queries, pointers: Int[np.ndarray, "q p"]) -> Part:
        def extend(most: int) -> Part:
            ids = automaton.extend(pointers, self.memory.clusters, most)
            return Part(ids, self._measured(queries, ids), self._lengths(queries, ids))

        return self._others(queries, extend, self.settings.max_knns)

    def _matched(self, queries: Queries) -> Part:
        def match(most: int) -> Part:
            found = self.memory.longest_matches(queries.context, queries.ends, most)
            if self.memory.manifest.keys is None:  # then match lengths alone weigh
                distances = np.where(found.ids < 0, np.float32(np.inf), np.float32(0))
            else:
                distances = self.memory.key_distances(queries.keys, found.ids)
            return Part(found.ids, distances, found.lengths)

        return self._others(queries, match, self.settings.suffix_k)

    @staticmethod
    def _others(queries: Queries, find: Callable[[int], Part], most: int) -> Part:
        """Up to `most` candidates a query, without the query's own entry (leave-one-out)."""
        if queries.own is None:
            return find(most)
        return without_own(find(most + 1), queries.own, most)

    def _lengths(self, queries: Queries, ids: Int[np.ndarray, "q c"]) -> Int[np.ndarray, "q c"]:
        """Match lengths if a component weighs by them, otherwise zeros."""
        if not self._measures_matches:
            return np.zeros(ids.shape, dtype=np.int16)
        return self.memory.match_lengths(ids, queries.context, queries.ends)
