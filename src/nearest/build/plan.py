"""Estimate what a build takes, from one pass over the corpus and a sample of the work."""

import hashlib
import math
import resource
import shutil
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import zstandard
from jaxtyping import Float

from nearest.build.costs import hashing, indexing, sorting, timed
from nearest.corpus.documents import Document
from nearest.corpus.incoming import Documents, incoming_documents
from nearest.corpus.long_text import LONG
from nearest.corpus.tokens import (
    TokenisedDocument,
    TokenRules,
    Tokens,
    size_of,
    token_dtype,
    tokenise,
)
from nearest.corpus.windows import windows
from nearest.encode.encoder import Encoder
from nearest.errors import CorpusError
from nearest.index.keys import KeyFormat, key_format
from nearest.store.documents import document_line
from nearest.store.manifest import Manifest
from nearest.store.new_segment import tokens_a_segment

_SAMPLE = 4 << 20  # characters that are tokenised
_BEGINNING = 4 * LONG  # characters of a long document, which is tokenised in pieces
_FORWARD_SECONDS = 8.0
# Room that passes take in the end, by what those of a sample do: each shape of batch leaves holes
# in the heap that others do not fit, in one run more than in another. It is kept while indexing.
_HOLES = 1.4


@dataclass(frozen=True)
class BuildPlan:
    """What a build will make and take.

    Attributes:
        documents: counted.
        tokens, entries: estimated by those of a sample.
        segments: parts of the memory.
        bytes_needed: on the disk.
        bytes_free: of the disk.
        memory_bytes: at most at once, beside the model; mapped files come on top where there is
            room.
        seconds: in all.
        stages: seconds of each stage.
    """

    documents: int
    tokens: int
    entries: int
    segments: int
    bytes_needed: int
    bytes_free: int
    memory_bytes: int
    seconds: float
    stages: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class SharedPlan:
    """A build that machines such as this one share.

    Attributes:
        machines: how many.
        seconds: from beginning to end.
        machine_hours: of all of them, idle ones included.
        cost: at the price of a machine's hour; None where none was given.
    """

    machines: int
    seconds: float
    machine_hours: float
    cost: float | None


def share_plan(plan: BuildPlan, machines: int, price: float | None = None) -> SharedPlan:
    """A plan for several machines: one reads the corpus, then each works on whole segments.

    One makes the first index, which the others' are filled like.
    """
    read, index = plan.stages["tokens"], plan.stages.get("index", 0.0)
    rounds = math.ceil(plan.segments / machines)
    index_rounds = 1 + math.ceil((plan.segments - 1) / machines)
    shared = (sum(plan.stages.values()) - read - index) * rounds + index * index_rounds
    seconds = read + shared / plan.segments
    hours = machines * seconds / 3600
    return SharedPlan(machines, round(seconds, 1), hours, None if price is None else price * hours)


class _Sample:
    """Every n-th document of a stream, with n doubled whenever there are too many characters."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.lengths = array("q")
        self._every = 1
        self._characters = 0

    def see(self, document: Document) -> None:
        """Count a document, and keep it or not; of a long one its beginning."""
        if len(self.lengths) % self._every == 0:
            kept = replace(document, text=document.text[:_BEGINNING])
            self.documents.append(kept)
            self._characters += size_of(kept)
            while self._characters > _SAMPLE and len(self.documents) > 1:
                self.documents = self.documents[::2]
                self._every *= 2
                self._characters = sum(map(size_of, self.documents))
        self.lengths.append(len(document.text))


def plan_build(
    path: Path,
    documents: Documents,
    tokenizer: Any,
    rules: TokenRules,
    manifest: Manifest,
    encoder: Encoder | None,
    identifying: float,
    recall: float,
) -> BuildPlan:
    """Read a corpus once, try every stage on a sample, and write nothing.

    `manifest` describes the memory that is to be, and took `identifying` seconds to make; its index
    is to be tuned to `recall`.

    Raises:
        CorpusError: the corpus cannot be used.
    """
    keys = manifest.keys
    sample, started, before = _Sample(), time.perf_counter(), _held()
    for document in incoming_documents(documents, rules, path):
        sample.see(document)
    reading = time.perf_counter() - started
    if not sample.lengths:
        raise CorpusError("the corpus holds no documents: give it at least one")
    made: list[TokenisedDocument] = []
    tokenising = timed(lambda: made.extend(tokenise(sample.documents, tokenizer, rules)))
    tokens = [item.tokens for item in made]
    sources = [item.encoder_tokens for item in made if item.encoder_tokens is not None]
    stored, compressing = _compressed(sample.documents)
    text = _held() - before  # the documents of the sample stand for what else is held
    characters = sum(len(document.text) for document in sample.documents)
    share = sum(sample.lengths) / max(characters, 1)
    counts = np.frombuffer(sample.lengths, np.int64) * (
        (sum(map(len, tokens)) - len(tokens)) / max(characters, 1)
    )
    total = int(counts.sum()) + len(counts)
    entries = int(counts.sum())
    if not entries:
        raise CorpusError("the corpus holds no token that follows another: give it longer text")
    limit = tokens_a_segment(manifest)
    segments = max(1, math.ceil(total / limit))
    largest = min(total, limit + int(counts.max()))
    dtype, every = token_dtype(rules.vocab_size), np.concatenate(tokens)
    size = total * (dtype.itemsize + 4) + len(counts) * 16 + int(stored * share)
    if rules.encoder_vocab_size is not None:
        bytes_read = sum(map(len, sources)) * token_dtype(rules.encoder_vocab_size).itemsize
        size += int((bytes_read / len(sources) + 8) * len(counts))
    stages = {
        "tokens": identifying + reading + (tokenising + compressing) * share,
        "suffix array": sorting(every.astype(dtype), largest) * total / largest,
    }
    longest, most = max(sample.lengths), int(counts.max())  # characters, tokens
    memory = [
        max(longest + 8 * most, 3 * longest + 4 * most),  # being tokenised, being written
        largest * (11 if dtype.itemsize == 2 else 16),
    ]
    if encoder is not None and keys is not None:
        form = key_format(keys.format)
        dim = encoder.layer.dim
        with _most_held(before + text) as passes:
            stages["keys"] = _encoding(encoder, form, tokens, sources) * _inputs(counts, encoder)
        row = sum(
            dtype.itemsize * int(np.prod(shape)) for dtype, shape in form.layout(dim).values()
        )
        size += row * total
        index = indexing(largest, dim, keys.index, recall)
        stages["index"] = index.seconds * total / largest
        size += int(index.bytes_needed * total / largest)
        memory.append(int(_HOLES * passes[0]) + index.memory_bytes + 8 * largest)
    stages["checksums"] = hashing() * size
    return BuildPlan(
        documents=len(counts),
        tokens=total,
        entries=entries,
        segments=segments,
        bytes_needed=size,
        bytes_free=shutil.disk_usage(_existing(path)).free,
        memory_bytes=text + max(memory),
        seconds=round(sum(stages.values()), 1),
        stages={name: round(seconds, 1) for name, seconds in stages.items()},
    )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())


def _held() -> int:
    """Bytes of RAM that the process holds, without mapped files."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):  # no Linux: the most there has been
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def _most_held(beyond: int) -> Iterator[list[int]]:
    """Peak RAM above `beyond` bytes while the context is open."""
    most, done = [0], Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _held() - beyond)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _compressed(documents: list[Document]) -> tuple[int, float]:
    """Compressed size of documents in bytes, and seconds to compress them."""
    started = time.perf_counter()
    lines = b"".join(map(document_line, documents))
    hashlib.sha256(lines)
    compressor = zstandard.ZstdCompressor()
    pieces = (lines[at : at + (1 << 18)] for at in range(0, len(lines), 1 << 18))
    size = sum(len(compressor.compress(piece)) for piece in pieces)
    return size, time.perf_counter() - started


def _inputs(counts: Float[np.ndarray, " documents"], encoder: Encoder) -> float:
    """Tokens that the model reads; overlaps of windows count each time."""
    window, stride = encoder.window, encoder.stride
    further = np.ceil(np.maximum(counts - window, 0) / stride)
    return float((counts + further * (window - stride)).sum())


def _encoding(
    encoder: Encoder, form: KeyFormat, documents: list[Tokens], sources: list[Tokens]
) -> float:
    """Seconds per input token, with padding, encoder passes and key encoding."""
    lengths = [len(tokens) for tokens in documents]
    real = sum(w.length for n in lengths for w in windows(n, encoder.window, encoder.stride))
    batches = list(encoder.batches(documents, sources or None))
    padded = sum(batch.inputs.size for batch in batches)
    order = np.random.default_rng(0).permutation(len(batches))
    encoder.encode(batches[order[0]])  # the first pass is slow
    spent, read = 0.0, 0
    for number in order.tolist():
        batch = batches[number]
        spent += timed(lambda: form.encode(encoder.encode(batch).numpy()))  # noqa: B023
        read += batch.inputs.size
        if spent > _FORWARD_SECONDS:
            break
    return spent / read * padded / real
