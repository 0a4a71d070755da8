"""Look a text up in a memory, for people: passages of documents instead of entries."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nearest.build.match import matching_key_layer
from nearest.corpus.documents import Document
from nearest.encode.forward import encode_keys
from nearest.encode.identity import max_positions
from nearest.encode.layers import LanguageModel
from nearest.errors import SettingError

if TYPE_CHECKING:
    from nearest.memory import Memory

_CONTEXT_TOKENS = 24


@dataclass(frozen=True)
class Passage:
    """A place of the corpus, with the text around it.

    Attributes:
        document: that it stands in.
        position: of the entry in the document, in tokens.
        distance: of its key to the text's state, in the memory's metric; smaller is nearer.
        before: text that ends where the entry does.
        next: the token after it, which the entry votes for.
        after: text that follows.
    """

    document: Document
    position: int
    distance: float
    before: str
    next: str
    after: str

    def __str__(self) -> str:
        return f"{self.document.id}: …{self.before}[{self.next}]{self.after}…"


def search_text(
    memory: "Memory", model: LanguageModel, tokenizer: Any, text: str, k: int, *, force: bool
) -> list[Passage]:
    """As `Memory.search_text`, of a model that nothing wraps."""
    if memory.manifest.model.reads_sources:
        raise SettingError(
            "an encoder–decoder's states hang on what its encoder reads, and a text alone has "
            "none: use a memory of a causal model"
        )
    _ = memory.keys_record  # refuses a memory without keys
    layer = matching_key_layer(memory, model, tokenizer, force=force)
    start = memory.manifest.model.start_token
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    room = (max_positions(model) or len(ids) + 1) - 1
    inputs = np.array([[start, *ids[-room:]]], dtype=np.int64)
    last = np.zeros(inputs.shape, dtype=bool)
    last[0, -1] = True
    queries = encode_keys(model, layer, inputs, last).numpy()
    found = memory.search(queries, k)
    return [
        _passage(memory, tokenizer, entry, distance)
        for entry, distance in zip(found.ids[0].tolist(), found.distances[0].tolist(), strict=True)
        if entry >= 0
    ]


def _passage(memory: "Memory", tokenizer: Any, entry: int, distance: float) -> Passage:
    place = memory.place(entry)
    tokens = memory.document_tokens(place.document).tolist()
    value = place.position + 1
    first = max(1, value - _CONTEXT_TOKENS)
    ends = value, value + 1, value + 1 + _CONTEXT_TOKENS
    before, until, whole = (str(tokenizer.decode(tokens[first:end])) for end in ends)
    return Passage(
        memory.document(place.document),
        place.position,
        distance,
        before,
        until[len(before) :],
        whole[len(until) :],
    )
