"""A document's chunks with their neighbours, and what was struck out, for people to look at."""

import html
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nearest.errors import SettingError
from nearest.retro.data.chunks import Chunks
from nearest.retro.data.database import ChunkDatabase, Decode
from nearest.retro.data.filters import KEPT, REASONS, Judge
from nearest.retro.data.stages import Databases, TableOptions, check_table
from nearest.retro.data.table import NeighbourTable

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{white-space:pre-wrap;margin:.2rem 0}.chunk{border-top:2px solid #888;padding:.5rem 0}"
    ".neighbour{margin-left:2rem}.struck{margin-left:2rem;color:#777}"
)


@dataclass(frozen=True)
class Shown:
    """A neighbour, or a candidate that was struck out.

    Attributes:
        document: its document's id.
        position: of its first token.
        distance: to the query chunk.
        text: the chunk's.
        continuation: the text of the chunk after it; "" at the document's end.
        reason: why it was struck out; "" for a neighbour.
    """

    document: str
    position: int
    distance: float
    text: str
    continuation: str
    reason: str = ""


@dataclass(frozen=True)
class ShownChunk:
    """A query chunk, its neighbours, nearest first, and the candidates struck out before them."""

    number: int
    text: str
    neighbours: list[Shown]
    struck: list[Shown]


def document_number(chunks: Chunks, name: str) -> int:
    """A document by its id, or else by its number (SettingError where there is none)."""
    names = [chunks.name(number) for number in range(chunks.documents)]
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < chunks.documents:
        return int(name)
    raise SettingError(
        f"there is no document {name!r}: give an id, or a number below {chunks.documents}"
    )


def shown_chunks(
    document: int,
    own: ChunkDatabase,
    searched: Databases,
    table: NeighbourTable,
    options: TableOptions,
    decode: Decode,
    neighbours: int = 2,
) -> Iterator[ShownChunk]:
    """Each chunk of a document as the table has it; candidates are searched for again."""
    check_table(table, searched, own)
    judge = Judge(own.chunks, searched.chunks, options.filters)
    stored = table.first(neighbours)
    for number in own.chunks.of_document(document):
        ids = np.array([number])
        vectors = None if options.method == "bm25" else own.vectors_of(ids)
        search = searched.search(options.method, own.chunks.rows(ids), vectors)
        found = search(np.array([0]), neighbours + 16)
        reasons = judge(ids, found.ids)[0]
        kept = [
            _shown(int(i), float(far), searched.chunks, decode)
            for i, far in zip(stored[number], table.distances[number], strict=False)
            if i >= 0
        ]
        last = table.distances[number][len(kept) - 1] if len(kept) == neighbours else np.inf
        struck = [
            _shown(int(i), float(far), searched.chunks, decode, REASONS[reason - 1])
            for i, far, reason in zip(found.ids[0], found.distances[0], reasons, strict=True)
            if i >= 0 and reason != KEPT and far <= last
        ]
        text = _text(own.chunks.rows(ids)[0], decode)
        yield ShownChunk(number, text, kept, struck)


def _shown(chunk: int, distance: float, chunks: Chunks, decode: Decode, reason: str = "") -> Shown:
    ids = np.array([chunk])
    document = int(chunks.document_of(ids)[0])
    tokens = chunks.rows(ids, continuation=1)[0]
    return Shown(
        chunks.name(document),
        (chunk - int(chunks.first[document])) * chunks.size,
        distance,
        _text(tokens[: chunks.size], decode),
        _text(tokens[chunks.size :], decode),
        reason,
    )


def _text(tokens: np.ndarray, decode: Decode) -> str:
    return decode(tokens[tokens >= 0].tolist())


def as_html(title: str, chunks: Iterator[ShownChunk]) -> str:
    """A page of its own, without scripts or anything from elsewhere."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    for chunk in chunks:
        parts.append(f"<div class=chunk><b>chunk {chunk.number}</b>")
        parts.append(f"<pre>{html.escape(chunk.text)}</pre>")
        for kind, listed in (("neighbour", chunk.neighbours), ("struck", chunk.struck)):
            for shown in listed:
                why = f" · struck out: {shown.reason}" if shown.reason else ""
                where = f"{shown.document} at {shown.position} · {shown.distance:.3f}{why}"
                parts.append(f"<div class={kind}><i>{html.escape(where)}</i>")
                text, continuation = html.escape(shown.text), html.escape(shown.continuation)
                parts.append(f"<pre>{text}<b> → </b>{continuation}</pre></div>")
        parts.append("</div>")
    return "\n".join([*parts, "</html>\n"])
