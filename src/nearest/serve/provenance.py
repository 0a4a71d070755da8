"""Which documents the tokens of an answer came from: sources, spans, citations, verbatim runs."""

from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Int

from nearest.index.neighbours import NO_ENTRY
from nearest.index.suffix import MAX_MATCH
from nearest.serve.library import Library, Retrieval
from nearest.serve.passes import Read, ReadPassage
from nearest.serve.vocabulary import Vocabulary
from nearest.serve.work import Told, finite

_SOURCES_A_TOKEN = 5
_SNIPPET = 12  # tokens at each side
_CITED = 0.3  # a token is cited when its memory weight is at least this
_VERBATIM = 8  # tokens in a row that are called a copy
_MATCHES = 64


def whole_lengths(
    ids: Int[np.ndarray, "tokens c"], lengths: Int[np.ndarray, "tokens c"]
) -> Int[np.ndarray, "tokens c"]:
    """Lengths of copies that end at each token, those too that are longer than what is compared.

    Args:
        ids: entries whose value the token is. lengths: of the copies that end there, at most
            MAX_MATCH + 1: a copy so long is one token longer where it goes on by one entry.
    """
    most, whole = MAX_MATCH + 1, lengths.copy()
    for n in np.flatnonzero((lengths[1:] == most).any(axis=1)) + 1:
        longest, before = lengths[n] == most, lengths[n - 1] == most
        goes_on = (ids[n][:, None] == ids[n - 1] + 1) & longest[:, None] & before
        whole[n] = np.maximum(whole[n], np.where(goes_on, whole[n - 1] + 1, 0).max(axis=1))
    return whole


class Provenance:
    """Collects the tokens of one answer; not for several threads."""

    def __init__(
        self, retrieval: Retrieval, library: Library, vocabulary: Vocabulary, base_url: str
    ) -> None:
        self._retrieval = retrieval
        self._library = library
        self._vocabulary = vocabulary
        self._base_url = base_url.rstrip("/")
        self._predicted = 0  # tokens, with those of the prompt that are told
        self._told: list[Told] = []
        self._weights: list[float] = []
        self._strongest: list[tuple[int, int] | None] = []  # memory and document
        self._shares: dict[tuple[int, int], list[float]] = {}  # of each token that it spoke for
        self._reads: dict[Read, int] = {}  # with the number that tokens name it by
        self._reads_told = 0
        self._ends: list[int] = []  # where each token's text ends, in characters

    def token(self, told: Told) -> dict[str, Any]:
        """A token as answers tell it, with its sources."""
        self._predicted += told.log_prob is not None
        total = sum(one.weight for one in told.spoke)
        weight = 0.0
        if told.log_prob is not None and told.spoke:
            weight = min(1.0, total / max(float(np.exp(told.log_prob)), 1e-300))
        of_text = 0.0
        if told.log_prob is not None and told.of_text:
            of_text = min(1.0 - weight, told.of_text / max(float(np.exp(told.log_prob)), 1e-300))
        of_passages = (1 - weight - of_text) * _gained(told)
        places = self._places(told)
        first = [(one.memory, one.entry) for one in told.spoke[:_SOURCES_A_TOKEN]]
        snippets = self._snippets(first, places)
        by_document: dict[tuple[int, int], float] = {}
        for one, (document, _) in zip(told.spoke, places, strict=True):
            which = one.memory, document
            by_document[which] = by_document.get(which, 0.0) + weight * one.weight / total
        if told.read is not None and of_passages:
            for passage in told.read.passages:
                which = passage.memory, passage.document
                share = of_passages / len(told.read.passages)
                by_document[which] = by_document.get(which, 0.0) + share
        for which, share in by_document.items():
            self._shares.setdefault(which, []).append(share)
        strongest = max(by_document, key=lambda which: by_document[which], default=None)
        if not told.prompt:
            self._told.append(told)
            self._weights.append(weight + of_passages)
            self._strongest.append(strongest)
            self._ends.append((self._ends[-1] if self._ends else 0) + len(told.text))
        return {
            "id": told.token,
            "token": self._vocabulary.token_text(told.token),
            "text": told.text,
            "prompt": told.prompt,
            "logprob": finite(told.log_prob),
            "base_logprob": finite(told.base_log_prob),
            "memory_weight": weight,
            "text_weight": of_text,
            "passage_weight": of_passages,
            "read": self._number(told.read),
            "alternatives": self._alternatives(told.top),
            "base_alternatives": self._alternatives(told.base_top),
            "sources": [
                {
                    **self._document(one.memory, document),
                    "position": position,
                    "weight": one.weight / total,
                    "kind": one.kind,
                    "match_length": one.length,
                    "distance": one.distance,
                    **snippet,
                }
                for one, (document, position), snippet in zip(
                    told.spoke, places, snippets, strict=False
                )
            ],
        }

    def reads(self) -> list[dict[str, Any]]:
        """What the model read beside the text, as far as it was not told before."""
        new = list(self._reads)[self._reads_told :]
        self._reads_told = len(self._reads)
        return [
            {
                "query": self._vocabulary.decode(one.query),
                "passages": [self._passage(passage) for passage in one.passages],
            }
            for one in new
        ]

    def summary(self) -> dict[str, Any]:
        """The whole answer's documents, spans and verbatim runs, and what was looked up."""
        count = max(1, self._predicted)
        documents = [
            {
                **self._document(*which),
                "weight": sum(shares) / count,
                "tokens": len(shares),
            }
            for which, shares in sorted(self._shares.items(), key=lambda item: -sum(item[1]))
        ]
        return {
            **self._retrieval.described(),
            "documents": documents,
            "spans": self.spans(),
            "verbatim": self._verbatim(),
        }

    def spans(self) -> list[dict[str, Any]]:
        """Runs of tokens that one document decided most, by characters of the answer."""
        spans: list[dict[str, Any]] = []
        open_at: int | None = None
        for n in range(len(self._told) + 1):
            which = self._cited(n)
            if open_at is not None and which != self._cited(open_at):
                spans.append(self._span(open_at, n))
                open_at = None
            if which is not None and open_at is None:
                open_at = n
        return [span for span in spans if span["end"] > span["start"]]

    def citations(self) -> list[dict[str, Any]]:
        """The spans as OpenAI's `url_citation` annotations."""
        return [
            {
                "type": "url_citation",
                "url_citation": {
                    "start_index": span["start"],
                    "end_index": span["end"],
                    "title": span["title"],
                    "url": span["url"],
                },
            }
            for span in self.spans()
        ]

    def _number(self, read: Read | None) -> int | None:
        if read is None or not read.passages:
            return None
        return self._reads.setdefault(read, len(self._reads))

    def _passage(self, passage: ReadPassage) -> dict[str, Any]:
        decode = self._vocabulary.decode
        text, whole = decode(passage.tokens), decode(passage.tokens + passage.after)
        return {
            **self._document(passage.memory, passage.document),
            "position": passage.position,
            "length": len(passage.tokens) + len(passage.after),
            "distance": passage.distance,
            "text": text,
            "after": whole[len(text) :],
        }

    def _cited(self, n: int) -> tuple[int, int] | None:
        if n >= len(self._told) or self._weights[n] < _CITED:
            return None
        return self._strongest[n]

    def _span(self, first: int, last: int) -> dict[str, Any]:
        which = self._strongest[first]
        assert which is not None
        weights = self._weights[first:last]
        return {
            "start": self._ends[first - 1] if first else 0,
            "end": self._ends[last - 1],
            "first_token": first,
            "tokens": last - first,
            "weight": sum(weights) / len(weights),
            **self._document(*which),
        }

    def _verbatim(self) -> list[dict[str, Any]]:
        """Runs of generated tokens that stand in a memory exactly so, the longest first found."""
        if not self._told or not self._retrieval.memories:
            return []
        tokens = np.array([told.token for told in self._told], np.int64)
        runs: list[dict[str, Any]] = []
        for number, memory in enumerate(self._retrieval.memories):
            found = memory.longest_matches(tokens, np.arange(len(tokens) - 1), _MATCHES)
            right = memory.values(found.ids) == tokens[1:, None]
            lengths = np.where(right & (found.ids >= 0), found.lengths.astype(np.int64) + 1, 0)
            if not lengths.size:
                continue
            lengths = whole_lengths(found.ids, lengths)
            best = lengths.argmax(axis=1)
            length = np.append(lengths[np.arange(len(best)), best], 0)
            for n in np.flatnonzero((length[:-1] >= _VERBATIM) & (length[1:] <= length[:-1])):
                last, size = int(n) + 1, int(length[n])
                entry = found.ids[n, best[n]]
                documents, positions = memory.places(np.array([entry]))
                first = last - size + 1
                runs.append(
                    {
                        "start": self._ends[first - 1] if first else 0,
                        "end": self._ends[last],
                        "first_token": first,
                        "tokens": size,
                        "position": int(positions[0]) + 1 - size + 1,
                        **self._document(number, int(documents[0])),
                    }
                )
        return sorted(runs, key=lambda run: (run["first_token"], -run["tokens"]))

    def _places(self, told: Told) -> list[tuple[int, int]]:
        """The document and the position of each entry that spoke."""
        places: list[tuple[int, int]] = [(0, 0)] * len(told.spoke)
        for number, memory in enumerate(self._retrieval.memories):
            own = [n for n, one in enumerate(told.spoke) if one.memory == number]
            if own:
                entries = np.array([told.spoke[n].entry for n in own], np.int64)
                documents, positions = memory.places(entries)
                pairs = zip(documents.tolist(), positions.tolist(), strict=True)
                for n, place in zip(own, pairs, strict=True):
                    places[n] = place
        return places

    def _document(self, memory: int, number: int) -> dict[str, Any]:
        name = self._retrieval.names[memory]
        document = self._library.heading(self._retrieval.memories[memory], number)
        return {
            "memory": name,
            "document": document.id,
            "title": document.title,
            "licence": document.licence,
            "url": document.url
            or f"{self._base_url}/v1/nearest/documents/{quote(name, safe='')}"
            f"?id={quote(document.id, safe='')}",
        }

    def _snippets(
        self, entries: list[tuple[int, int]], places: list[tuple[int, int]]
    ) -> list[dict[str, str]]:
        """The stored text around entries: left context, the token it gave, and what follows.

        Args:
            entries: of memories, by number; places: the document and position of each.
        """
        around = np.arange(-_SNIPPET, _SNIPPET + 1)
        snippets: list[dict[str, str]] = [{}] * len(entries)
        for number, memory in enumerate(self._retrieval.memories):
            own = [n for n, (of_memory, _) in enumerate(entries) if of_memory == number]
            if not own:
                continue
            # A token is the value of the entry before it; a document's first is no text.
            before = np.array([entries[n][1] for n in own], np.int64)[:, None] + around
            documents, at = np.array([places[n] for n in own], np.int64).T[..., None]
            tokens = np.clip(before + 1, 0, memory.positions - 1)
            found, positions = (one.reshape(tokens.shape) for one in memory.places(tokens.ravel()))
            inside = (found == documents) & (positions == at + 1 + around) & (positions > 0)
            values = memory.values(np.where(inside, before, NO_ENTRY))
            for n, row, some in zip(own, values, inside, strict=True):
                snippets[n] = self._snippet(row[some].tolist(), int(some[:_SNIPPET].sum()))
        return snippets

    def _snippet(self, tokens: list[int], value: int) -> dict[str, str]:
        decode = self._vocabulary.decode
        before, upto, whole = decode(tokens[:value]), decode(tokens[: value + 1]), decode(tokens)
        return {"before": before, "value": upto[len(before) :], "after": whole[len(upto) :]}

    def _alternatives(self, likeliest: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [
            {"id": token, "token": self._vocabulary.token_text(token), "logprob": finite(log_prob)}
            for token, log_prob in likeliest
        ]


def _gained(told: Told) -> float:
    """The share of a token's probability that it has by what was read beside the text."""
    if told.read is None or told.base_log_prob is None or told.read_log_prob is None:
        return 0.0
    return max(0.0, -float(np.expm1(told.base_log_prob - told.read_log_prob)))
