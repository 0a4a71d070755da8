"""kNN-LM, RetoMaton and suffix retrieval as they are described: lists, scans, nothing of ours.

A corpus is read straight from a memory's files; every search compares with every entry.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nearest import Memory
from oracle import keys_and_logits

MOST = 10**9
LONGEST_MATCH = 512


def random_place(entry: int) -> int:
    """Where an entry stands in the order by which too many equally long matches are sampled."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        entry = (entry ^ entry >> shift) * factor % 2**64
    return entry


class Corpus:
    """The text of a memory, the value of each entry, and its key and cluster where it has them."""

    def __init__(self, memory: Memory) -> None:
        manifest = json.loads((memory.path / "manifest.json").read_bytes())
        self.start_token: int = manifest["model"]["start_token"]
        self.tokens: list[int] = []
        self.value: dict[int, int] = {}
        self.cluster: dict[int, int] = {}
        keys = []
        for segment in manifest["segments"]:
            files = {name: memory.path / f["path"] for name, f in segment["files"].items()}
            first, tokens = len(self.tokens), np.load(files["tokens"]).tolist()
            for start, stop in pairwise(np.load(files["offsets"]).tolist()):
                self.value |= {first + i: tokens[i + 1] for i in range(start, stop - 1)}
            self.tokens += tokens
            if "cluster_of" in files:
                labels = enumerate(np.load(files["cluster_of"]).tolist(), first)
                self.cluster |= {i: cluster for i, cluster in labels if cluster >= 0}
            if "keys" in files:
                keys.append(np.load(files["keys"]).astype(np.float64))
        self.keys = np.concatenate(keys) if keys else None
        self.members: dict[int, list[int]] = {}
        for entry, cluster in self.cluster.items():
            self.members.setdefault(cluster, []).append(entry)
        self._sorted: list[int] = []

    def sorted_entries(self) -> list[int]:
        """By reversed left context."""
        if not self._sorted:
            backwards = {i: self.tokens[i::-1] if i else self.tokens[:1] for i in self.value}
            self._sorted = sorted(self.value, key=backwards.__getitem__)
        return self._sorted

    def distances(self, query: np.ndarray) -> np.ndarray:
        """Squared L2 to every position's key; all 0 without keys."""
        if self.keys is None:
            return np.zeros(len(self.tokens))
        return ((self.keys - query) ** 2).sum(1)

    def match_length(self, entry: int, context: list[int]) -> int:
        length = 0
        while length < min(LONGEST_MATCH, len(context), entry + 1):
            if self.tokens[entry - length] != context[len(context) - 1 - length]:
                break
            length += 1
            if context[len(context) - length] == self.start_token:
                break
        return length


@dataclass(frozen=True)
class Prediction:
    """Log-probabilities of the next token in nats, and what each candidate adds to its value's.

    Not `clear` where entries are about equally near, and which of them were chosen shows.
    """

    log_probs: np.ndarray
    weights: list[tuple[int, float]]
    searched: bool
    clear: bool


@dataclass(frozen=True)
class Oracle:
    """A method with its settings over a corpus.

    Where the text stands in the memory from the entry `own` on, each position's own entry is no
    candidate.
    """

    corpus: Corpus
    method: str
    lam: float
    temperature: float
    k: int = MOST
    min_knns: float = 1
    max_knns: int = 1024
    dedup: bool = False
    length_power: float = 0.0
    suffix_k: int = 256
    own: int | None = None

    def predict(
        self, keys: np.ndarray, lm_log_probs: np.ndarray, tokens: list[int], first: int = 0
    ) -> list[Prediction]:
        """Predictions at the positions from `first` on, where the state is empty."""
        current: list[tuple[int, float]] = []  # (entry, distance), nearest first
        unsure: set[int] = set()  # pointers that may be there or not
        found = []
        for position in range(first, len(keys)):
            context = tokens[: position + 1]
            left_out = None if self.own is None else self.own + position
            distances = self.corpus.distances(keys[position])
            noise = 1e-6 * (keys[position] ** 2).sum()
            searched = False
            if self.method == "suffix":
                candidates = self._longest_matches(context, left_out)
            else:
                pointers = self._successors(current)
                searched = self.method == "knn" or len(pointers) < self.min_knns
                entries = sorted(self.corpus.value.keys() - {left_out}, key=lambda i: distances[i])
                neighbours = entries[: self.k] if searched else []
                extended = self._extended([i for i, _ in pointers[: self.max_knns]], left_out)
                if self.dedup:
                    seen = set(neighbours)
                    extended = [i for i in extended if not (i in seen or seen.add(i))]
                candidates = neighbours + (extended if self.method == "retomaton" else [])
                if unsure:
                    unsure = {*entries[: self.k], *extended}
                elif searched:
                    unsure = equals([(i, distances[i]) for i in entries], self.k, noise)
                unsure |= equals(pointers, self.max_knns, noise)
            weights = self._weights(candidates, distances, context)
            mixed = self._mixed(weights, lm_log_probs[position])
            found.append(Prediction(mixed, weights, searched, not unsure))
            if position + 1 < len(tokens):
                came = tokens[position + 1]
                right = [(i, distances[i]) for i in candidates if self.corpus.value[i] == came]
                current = sorted(right, key=lambda one: one[1])
                unsure = {i + 1 for i in unsure if self.corpus.value[i] == came}
                unsure &= self.corpus.value.keys()
        return found

    def _successors(self, current: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """The entries after those that were right, but for those that ended their document."""
        return [(i + 1, d) for i, d in current if i + 1 in self.corpus.value]

    def _extended(self, pointers: list[int], left_out: int | None) -> list[int]:
        extended = list(pointers)
        if len(extended) < self.max_knns:
            own = Counter(self.corpus.cluster[i] for i in pointers if i in self.corpus.cluster)
            for cluster in sorted(own, key=lambda c: (-own[c], c)):
                extended += self.corpus.members[cluster]
        return [i for i in extended if i != left_out][: self.max_knns]

    def _longest_matches(self, context: list[int], left_out: int | None) -> list[int]:
        levels: dict[int, list[int]] = {}
        matches = self.suffix_k + (left_out is not None)
        for entry in self.corpus.sorted_entries():
            levels.setdefault(self.corpus.match_length(entry, context), []).append(entry)
        candidates: list[int] = []
        for length in sorted(levels, reverse=True):
            want = min(matches - len(candidates), len(levels[length]))
            if length and want:
                level = levels[length]
                first = sorted(level, key=random_place)[:want]
                candidates += [entry for entry in level if entry in first]
        return [i for i in candidates if i != left_out][: self.suffix_k]

    def _weights(
        self, candidates: list[int], distances: np.ndarray, context: list[int]
    ) -> list[tuple[int, float]]:
        if not candidates:
            return []
        scores = [-distances[i] / self.temperature for i in candidates]
        if self.length_power:
            matched = {i: self.corpus.match_length(i, context) for i in set(candidates)}
            scores = [
                score + self.length_power * math.log(1 + matched[i])
                for i, score in zip(candidates, scores, strict=True)
            ]
        best = max(scores)
        parts = [math.exp(score - best) for score in scores]
        total = sum(parts)
        return [(i, self.lam * p / total) for i, p in zip(candidates, parts, strict=True)]

    def _mixed(self, weights: list[tuple[int, float]], lm_log_probs: np.ndarray) -> np.ndarray:
        if not weights:
            return lm_log_probs
        probs = (1 - self.lam) * np.exp(lm_log_probs)
        for entry, weight in weights:
            probs[self.corpus.value[entry]] += weight
        with np.errstate(divide="ignore"):
            return np.log(probs)


def equals(ordered: list[tuple[int, float]], kept: int, noise: float) -> set[int]:
    """Entries about as near as the last one kept and the first one dropped, if they are several."""
    if len(ordered) <= kept or ordered[kept][1] - ordered[kept - 1][1] > noise:
        return set()
    near = {i for i, d in ordered if abs(d - ordered[kept][1]) <= 2 * noise}
    return near if len(near) > 1 else set()


def states_of(
    model: PreTrainedModel,
    tokens: list[int],
    layer: str = "last_ffn_input",
    source: Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and log-probabilities (float64) at every token of a sequence, in one plain pass."""
    keys, logits = keys_and_logits(model, torch.tensor(tokens), layer, source)
    return keys.double().numpy(), log_softmax(logits)


def log_softmax(logits: Tensor) -> np.ndarray:
    return torch.log_softmax(logits.double(), -1).numpy()
