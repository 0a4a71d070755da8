"""From what a user names (memories, corpora, models) to databases, tokenizers and embedders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from nearest.corpus.decoding import EncodingErrors
from nearest.corpus.reading import read_documents
from nearest.errors import FolderError, ModelError, SettingError
from nearest.memory import Memory
from nearest.retro.data.database import ChunkDatabase, Decode
from nearest.retro.data.embedders import Embedder, embedder_named
from nearest.retro.data.stages import Ends, chunk_documents, chunk_memory


def chunk_sources(
    sources: Sequence[str | Path],
    path: Path | str,
    *,
    tokenizer: str | None = None,
    size: int = 64,
    start: bool = False,
    end: bool = True,
    encoding_errors: EncodingErrors = "strict",
) -> ChunkDatabase:
    """Cut a memory's documents, or those of a corpus, into chunks.

    Args:
        sources: one memory's folder; or files, folders and datasets, as in `read_documents`.
        path: the database's folder.
        tokenizer: its name; needed without a memory, whose own it is else.
        size: tokens of a chunk.
        start: begin each document with the tokenizer's BOS or [CLS].
        end: end each document with its EOS or [SEP], where it has one.
        encoding_errors: what to do with text that is not UTF-8.

    Raises:
        NearestError: a source, the tokenizer or the folder cannot be used.
    """
    if len(sources) == 1 and is_memory(sources[0]):
        memory = Memory.open(sources[0])
        loaded = load_tokenizer(tokenizer or memory.manifest.model.name)
        return chunk_memory(memory, path, size, _ends(loaded, start, end))
    if tokenizer is None:
        raise SettingError(
            f"{sources[0]} is no memory, so that no tokenizer is known: give --tokenizer NAME"
        )
    loaded = load_tokenizer(tokenizer)
    documents = read_documents(sources, encoding_errors=encoding_errors)
    ends = _ends(loaded, start, end)
    return chunk_documents(
        documents, loaded, path, size, ends, vocab_size=len(loaded), name=tokenizer
    )


def is_memory(path: str | Path) -> bool:
    """Whether a folder holds a memory."""
    return (Path(path) / "manifest.json").exists()


def open_database(path: str | Path) -> ChunkDatabase:
    """Open a database, or that of a memory: the folder beside it that ends in `.retro`.

    Raises:
        FolderError: there is none, or its memory has changed since.
    """
    folder = Path(path)
    if is_memory(folder):
        folder = folder.with_name(folder.name + ".retro")
        if not folder.exists():
            raise FolderError(
                f"{path} has no chunks yet: run `nearest retro prepare {path} --out {folder}`"
            )
    database = ChunkDatabase.open(folder)
    check_current(database)
    return database


def check_current(database: ChunkDatabase) -> None:
    """Refuse a database whose memory has changed since; one that is not there says nothing."""
    memory = database.record.get("memory")
    if memory is None or not is_memory(memory["path"]):
        return
    version = Memory.open(memory["path"]).manifest.version
    if version != memory["version"]:
        raise FolderError(
            f"{database.path} was made of version {memory['version']} of {memory['path']}, which "
            f"is now at {version}: prepare a database anew"
        )


def load_tokenizer(name: str | None) -> Any:
    """A tokenizer by folder or hub name (ModelError where there is none)."""
    if not name:
        raise SettingError("no tokenizer is known: give --tokenizer NAME")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no tokenizer can be loaded from {name!r} ({str(error).strip().splitlines()[0]}): "
            "give a folder, or a name on the hub"
        ) from error


def tokenizer_of(database: ChunkDatabase, named: str | None = None) -> Any:
    """The tokenizer of a database's chunks: the one named, kept in it, or its memory's."""
    name = named or database.record.get("tokenizer")
    memory = database.record.get("memory")
    if not name and memory is not None and is_memory(memory["path"]):
        name = Memory.open(memory["path"]).manifest.model.name
    return load_tokenizer(name)


def decoder(tokenizer: Any) -> Decode:
    """Token ids → text without special tokens."""
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def embedder_of(database: ChunkDatabase, *, device: str = "auto", batch_size: int = 64) -> Embedder:
    """The embedder that made a database's vectors, loaded again.

    Raises:
        ModelError: it was a function, is not there any more, or has other weights now.
    """
    identity = database.embedder
    spec = {"mean": "bert:", "cls": "bert-cls:"}.get(identity.pooling, "") + identity.name
    made = embedder_named(spec, prefix=identity.prefix, device=device, batch_size=batch_size)
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
    """A database of queries; a corpus or memory is cut and embedded as the searched one was."""
    if (Path(queries) / "chunks.json").exists():
        return open_database(queries)
    loaded = tokenizer_of(beside, tokenizer)
    ends = Ends(beside.record["start"], beside.record["end"])
    size = beside.chunks.size
    if is_memory(queries):
        made = chunk_memory(Memory.open(queries), folder, size, ends)
    else:
        name = tokenizer or beside.record.get("tokenizer") or ""
        documents = read_documents([queries])
        made = chunk_documents(
            documents, loaded, folder, size, ends, vocab_size=len(loaded), name=name
        )
    if dense:
        dtype = str(beside.embeddings.dtype)
        made.embed(embedder_of(beside, device=device), decoder(loaded), dtype=dtype)
    return made


def _ends(tokenizer: Any, start: bool, end: bool) -> Ends:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if start and first is None:
        raise SettingError("the tokenizer has no BOS or [CLS] token to begin documents with")
    return Ends(first if start else None, last if end else None)
