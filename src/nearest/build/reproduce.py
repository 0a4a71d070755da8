"""Whether a memory's tokens and keys are those that its model makes of its documents."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from nearest.build.match import matching_key_layer, rules_of
from nearest.corpus.documents import Document
from nearest.corpus.tokens import TokenisedDocument, Tokens, tokenise
from nearest.encode.encoder import Encoder
from nearest.encode.layers import LanguageModel
from nearest.store.parts.keys import open_projection, stored_format
from nearest.store.segment import Segment
from nearest.store.snapshot import Snapshot

_DOCUMENTS = 8  # of each segment
_SEED = 0
# Batches of other shapes round otherwise, and a product code may tip to a centroid as near.
_DIFFERENCE = 0.02  # of a key's length
_SHARE = 0.95  # of keys


def reproduction_problems(
    memory: Snapshot, model: LanguageModel, tokenizer: Any, documents: int = _DOCUMENTS
) -> list[str]:
    """What differs when a sample of documents is read again, one sentence each.

    Raises:
        ModelError: the model is not the one that built the memory.
    """
    layer = matching_key_layer(memory, model, tokenizer)
    keys, problems = memory.manifest.keys, []
    rng, rules = np.random.default_rng(_SEED), rules_of(memory.manifest, model)
    for segment in memory.segments:
        count = min(documents, len(segment.numbers))
        sample = np.sort(rng.choice(segment.numbers, size=count, replace=False)).tolist()
        where = f"segment {segment.record.name}: "
        stored = (_stored_document(segment, number) for number in sample)
        for number, again in zip(sample, tokenise(stored, tokenizer, rules), strict=True):
            if part := _differing(segment, number, again):
                problems.append(
                    f"{where}the {part} of a document gives other tokens than are stored"
                )
                break
        if keys is not None:
            encoder = Encoder.of(model, layer, keys.window, keys.stride)
            near = np.concatenate([np.ones(0, bool), *_near(memory, segment, encoder, sample)])
            if len(near) and near.mean() < _SHARE:
                windows = f"{keys.window} tokens, {keys.stride} new"
                perhaps = f": imported, they were perhaps read in other windows than {windows}"
                problems.append(
                    f"{where}{1 - near.mean():.0%} of {len(near):,} keys differ from what the "
                    f"model makes{'' if keys.dtype else perhaps}"
                )
    return problems


def _stored_document(segment: Segment, number: int) -> Document:
    """A document as it was tokenised; early memories kept the encoder text as metadata."""
    document = segment.documents[number]
    if segment.sources is None or document.encoder_text is not None:
        return document
    return replace(document, encoder_text=document.metadata.get("source"))


def _differing(segment: Segment, number: int, again: TokenisedDocument) -> str | None:
    """Which part of a document has other tokens now."""
    if not np.array_equal(again.tokens, segment.tokens_of(number)):
        return "text"
    source = segment.source_of(number)
    same = (
        source is None
        or again.encoder_tokens is None
        or np.array_equal(again.encoder_tokens, source)
    )
    return None if same else "source"


def _near(
    memory: Snapshot, segment: Segment, encoder: Encoder, sample: list[int]
) -> Iterator[np.ndarray]:
    """Whether each key of a sample of documents is as the model makes it now."""
    keys = memory.keys_record
    form, projection = stored_format(memory.path, keys), open_projection(memory.path, keys)
    own = np.zeros(segment.record.tokens, dtype=bool)
    own[segment.searched] = True  # others share the key of one that they were merged into
    texts: list[Tokens] = [segment.tokens_of(number) for number in sample]
    read = segment.sources
    sources = None if read is None else [read[number] for number in sample]
    for batch, made in encoder.keys(texts, sources):
        entries = segment.offsets[np.array(sample)[batch.documents]] + batch.positions
        rows: Float[np.ndarray, "n dim"] = made.numpy()[own[entries]]
        if not len(rows):
            continue
        rows = rows if projection is None else projection.apply(rows)
        again = form.open(form.encode(rows), keys.metric).rows(np.arange(len(rows)))
        stored = segment.keys.rows(entries[own[entries]])
        gap = np.linalg.norm(again - stored, axis=1)
        yield gap <= _DIFFERENCE * np.linalg.norm(stored, axis=1)
