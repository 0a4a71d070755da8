"""From what a user names (memories, corpora, models) to databases, tokenizers and embedders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from nearest.corpus.decoding import EncodingErrors
from nearest.corpus.reading import read_documents
from nearest.encode.loading import load_tokenizer
from nearest.errors import ModelError, SettingError
from nearest.memory import Memory
from nearest.retro.data.database import ChunkDatabase, Decode
from nearest.retro.data.embedders import Embedder, Pooling
from nearest.retro.data.stages import Ends, chunk_documents, chunk_memory, is_memory


def chunk_sources(
    sources: Sequence[str | Path],
    path: Path | str | None = None,
    *,
    tokenizer: str | None = None,
    size: int = 64,
    start: bool = False,
    end: bool = True,
    encoding_errors: EncodingErrors = "strict",
) -> ChunkDatabase:
    """Cut a memory's documents into chunks, or make a memory of a corpus for that.

    Args:
        sources: one memory's folder; or files, folders and datasets, as in `read_documents`.
        path: the folder of the new memory; None with a memory, which holds its chunks itself.
        tokenizer: its name; needed for a corpus.
        size: tokens of a chunk.
        start: begin each document with the tokenizer's BOS or [CLS].
        end: end each document with its EOS or [SEP], where it has one.
        encoding_errors: what to do with text that is not UTF-8.

    Raises:
        NearestError: a source, the tokenizer or the folder cannot be used.
    """
    if len(sources) == 1 and is_memory(sources[0]):
        memory = Memory.open(sources[0])
        if path is not None and Path(path).resolve() != memory.path.resolve():
            raise SettingError(
                f"{sources[0]} is a memory, which holds its chunks itself: leave --out out"
            )
        loaded = load_tokenizer(_named(tokenizer or memory.manifest.model.name))
        return chunk_memory(memory, size, _ends(loaded, start, end))
    if path is None:
        raise SettingError("a corpus becomes a memory of its own: give --out MEMORY")
    if tokenizer is None:
        raise SettingError(
            f"{sources[0]} is no memory, so that no tokenizer is known: give --tokenizer NAME"
        )
    loaded = load_tokenizer(tokenizer)
    documents = read_documents(sources, encoding_errors=encoding_errors)
    return chunk_documents(documents, loaded, path, size, _ends(loaded, start, end))


def _named(name: str) -> str:
    if not name:
        raise SettingError("no tokenizer is known: give --tokenizer NAME")
    return name


def tokenizer_of(database: ChunkDatabase, named: str | None = None) -> Any:
    """The tokenizer of a database's chunks: the one named, or that of its model."""
    return load_tokenizer(_named(named or database.memory.manifest.model.name))


def decoder(tokenizer: Any) -> Decode:
    """Token ids → text without special tokens."""
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def embedder_of(database: ChunkDatabase, *, device: str = "auto", batch_size: int = 64) -> Embedder:
    """The embedder that made a database's vectors, loaded again.

    Raises:
        ModelError: it was a function, is not there any more, or has other weights now.
    """
    identity = database.embedder
    if not identity.has_model:
        raise ModelError(
            f"the vectors of {database.path} were made by the function {identity.name!r}, which no "
            "name leads to: give the embedder in Python"
        )
    options: dict[str, Any] = {
        "prefix": identity.prefix,
        "normalise": identity.normalised,
        "device": device,
        "batch_size": batch_size,
    }
    if identity.pooling:
        made = Embedder.bert(identity.name, cast(Pooling, identity.pooling), **options)
    else:
        made = Embedder.sentence_transformers(identity.name, **options)
    made.identity.check_same(identity, str(database.path))
    return made


def query_database(
    queries: str | Path,
    beside: ChunkDatabase,
    folder: Path,
    *,
    dense: bool = True,
    tokenizer: str | None = None,
    device: str = "auto",
) -> ChunkDatabase:
    """A database of queries; a corpus is cut and embedded as the searched one was."""
    if is_memory(queries):
        return ChunkDatabase.open(queries)
    loaded = tokenizer_of(beside, tokenizer)
    ends = Ends(beside.cut.start, beside.cut.end)
    made = chunk_documents(read_documents([queries]), loaded, folder, beside.cut.size, ends)
    if dense:
        embedder = embedder_of(beside, device=device)
        made.embed(embedder, decoder(loaded), dtype=beside.cut.dtype)
    return made


def start_of(tokenizer: Any) -> int:
    """The token that documents begin with where they have one (SettingError without such)."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if first is None:
        raise SettingError("the tokenizer has no BOS or [CLS] token to begin documents with")
    return int(first)


def _ends(tokenizer: Any, start: bool, end: bool) -> Ends:
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return Ends(start_of(tokenizer) if start else None, last if end else None)
