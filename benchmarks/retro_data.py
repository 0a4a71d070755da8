"""RETRO's data beside the public code: chunks, exact neighbours, and the time of each stage.

    python benchmarks/retro_data.py --corpus train.jsonl[,more.jsonl] [--norlund path/to/retro]
        [--lucidrains path/to/RETRO-pytorch] [--chunks 100000] [--dim 384]

Both public codes need models from the hub. Here a tokenizer of the corpus's own words stands for
theirs, with the special tokens of each, and random projections of the words of a chunk for their
embedders: the same on both sides. Their autofaiss, which needs an old NumPy, is replaced by a flat
index, so that both search exactly.
"""

import collections
import importlib
import json
import resource
import sys
import tempfile
import time
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import faiss
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common import arguments, machine, report, timed
from nearest.corpus.documents import Document
from nearest.retro.data import norlund, retro_pytorch
from nearest.retro.data.chunks import owners
from nearest.retro.data.database import ChunkDatabase
from nearest.retro.data.embedders import Embedder
from nearest.retro.data.stages import Ends, TableOptions, chunk_documents, make_table

T = TypeVar("T")
M, K = 64, 4
WORDS = 28_000


def tokenizer_of(texts: list[str], special: dict[str, str], template: str) -> Any:
    """Word by word, the most frequent; special tokens first, as 0, 1, 2 …"""
    counts = collections.Counter(word for text in texts for word in text.split())
    words = [word for word, _ in counts.most_common(WORDS)]
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(token, vocabulary[token]) for token in special.values() if token in template]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def embedder(dim: int) -> Embedder:
    """A text's vector is the mean of a random one for each word: quick, and alike for both."""
    table = np.random.default_rng(0).normal(size=(WORDS + 8, dim)).astype(np.float32)

    def encode(texts: list[str]) -> np.ndarray:
        return np.stack([table[[int(i) for i in text.split()] or [0]].mean(0) for text in texts])

    return Embedder.of(encode, "random words", dim, normalise=True)


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def their_tokenize_and_chunk(code: Path, corpus: Path, folder: Path, tokenizer: Any) -> None:
    sys.path.insert(0, str(code / "src" / "data"))
    public = importlib.import_module("tokenize_and_chunk")
    public.get_tokenizer = lambda: tokenizer
    with corpus.open() as lines:
        public.main(
            Namespace(
                input=lines,
                max_chunks=1_000_000,
                chunk_size=M,
                verbose=False,
                chunks_out=folder / "c.npy",
                seq2chunk_index_out=folder / "s.npy",
                chunk2seq_index_out=folder / "d.npy",
            )
        )


def their_neighbours(code: Path, folder: Path, own: ChunkDatabase) -> np.ndarray:
    public = importlib.import_module("retrieve_neighbours")
    vectors = np.asarray(own.embeddings)
    np.save(folder / "e.npy", vectors)
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors.astype(np.float32))
    faiss.write_index(index, str(folder / "x.index"))
    (folder / "index.spec.json").write_text(json.dumps([{"embeddings": "e.npy"}]))
    public.main(
        Namespace(
            index=folder / "x.index",
            use_gpus=False,
            shard_index=False,
            query_embeddings=[folder / "e.npy"],
            query_chunk2seq=[folder / "d.npy"],
            neighbours_output=[folder / "n.npy"],
            index_spec=folder / "index.spec.json",
            num_neighbours=K,
            retrieval_margin=4,
        )
    )
    return np.load(folder / "n.npy")


def compared(own: ChunkDatabase, ours: np.ndarray, theirs: np.ndarray) -> dict[str, int]:
    """Rows that are equal, and why the others differ."""
    vectors = np.asarray(own.embeddings, np.float64)
    found = {"rows": len(ours), "equal": 0, "equally_far": 0, "theirs_short": 0, "other": 0}
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        kept = other[other >= 0]  # theirs may have a gap in the middle

        def far(ids: np.ndarray, row: int = row) -> np.ndarray:
            return np.sort(((vectors[ids] - vectors[row]) ** 2).sum(1))

        if np.array_equal(one, other):
            found["equal"] += 1
        elif np.allclose(far(kept), far(one)[: len(kept)], atol=1e-5):
            found["equally_far" if len(kept) == len(one[one >= 0]) else "theirs_short"] += 1
        else:
            found["other"] += 1
    return found


def beside_norlund(code: Path, corpus: Path, texts: list[str], dim: int) -> dict[str, Any]:
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = tokenizer_of(texts, special, "$A </s>")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        their_tokenize_and_chunk(code, corpus, folder, tokenizer)
        files = {
            "chunks": folder / "c.npy",
            "seq2chunk": folder / "s.npy",
            "chunk2seq": folder / "d.npy",
        }
        theirs = norlund.read_shard(files, folder)
        own = prepared(folder / "db", texts, tokenizer, Ends(None, 1), dim)
        table = make_table(own, None, None, TableOptions(neighbours=K))
        assert table is not None
        return {
            "chunks": len(theirs),
            "chunks_equal": theirs.digest == own.chunks.digest,
            "neighbours": compared(own, table.ids, their_neighbours(code, folder, own)),
        }


def beside_lucidrains(code: Path, texts: list[str], dim: int) -> dict[str, Any]:
    stub = types.ModuleType("autofaiss")
    vars(stub)["build_index"] = None
    sys.modules["autofaiss"] = stub
    package = types.ModuleType("retro_pytorch")  # whose __init__ imports the model too
    vars(package)["__path__"] = [str(code / "retro_pytorch")]
    sys.modules["retro_pytorch"] = package
    public = importlib.import_module("retro_pytorch.retrieval")
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    tokenizer = tokenizer_of(texts, special, "[CLS] $A [SEP]")

    class StandIn:
        @staticmethod
        def batch_encode_plus(texts: list[str], **options: Any) -> Any:
            return tokenizer(texts, **options)

    public.TOKENIZER = StandIn()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        for number, text in enumerate(texts):
            (folder / "texts" / f"{number:08d}.txt").write_text(text)
        paths = {
            "chunks": folder / "c.dat",
            "sequences": folder / "s.dat",
            "doc_ids": folder / "d.dat",
        }
        stats = public.text_folder_to_chunks_(
            folder=folder / "texts",
            chunks_memmap_path=paths["chunks"],
            seqs_memmap_path=paths["sequences"],
            doc_ids_memmap_path=paths["doc_ids"],
            max_chunks=200_000,
        )
        theirs = retro_pytorch.read_files(**paths, stats=stats).chunks
        own = prepared(folder / "db", texts, tokenizer, Ends(2, 3), dim)
        vectors = np.asarray(own.embeddings, np.float32)
        index = faiss.IndexFlatL2(vectors.shape[1])
        index.add(vectors)
        public.chunks_to_index_and_embed = lambda **_: (index, vectors)
        knn, _ = public.chunks_to_precalculated_knn_(
            num_nearest_neighbors=K,
            num_chunks=stats["chunks"],
            chunk_size=M,
            chunk_memmap_path=paths["chunks"],
            doc_ids_memmap_path=paths["doc_ids"],
            force_reprocess=True,
        )
        ids = np.fromfile(knn, np.int32).reshape(-1, K).astype(np.int64)
        table = make_table(own, None, None, TableOptions(neighbours=K))
        assert table is not None
        return {
            "chunks": stats["chunks"],
            "chunks_equal": theirs.digest == own.chunks.digest,
            "neighbours": compared(own, table.ids, ids),
        }


def prepared(path: Path, texts: list[str], tokenizer: Any, ends: Ends, dim: int) -> ChunkDatabase:
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    made = chunk_documents(documents, tokenizer, path, M, ends)
    made.embed(embedder(dim), words)
    made.build_index("exact")
    return made


def stages(texts: list[str], dim: int, most: int) -> dict[str, Any]:
    """Seconds of each stage, for about so many chunks; the embedder is a stand-in, not counted."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = tokenizer_of(texts, special, "$A </s>")
    seconds: dict[str, float] = {}
    computed: dict[str, float] = {}
    documents, chunks = [], 0
    for number, text in enumerate(texts):
        if chunks < most:
            documents.append(Document(str(number), text))
            chunks += -(-(len(text.split()) + 1) // M)

    def stage(name: str, run: Callable[[], T]) -> T:
        before = time.process_time()
        seconds[name], found = timed(run)
        computed[name] = time.process_time() - before
        return found

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "m"
        made = stage(
            "chunks", lambda: chunk_documents(documents, tokenizer, folder, M, Ends(None, 1))
        )
        stage("embed (stand-in)", lambda: made.embed(embedder(dim), words))
        index = stage("index", made.build_index)
        table = stage("neighbours", lambda: make_table(made))
        assert table is not None
        count = len(made.chunks)
        owner = owners(made.chunks)[0][made.chunks.document_of(np.arange(count))]
        same = (table.ids >= 0) & (owner[table.ids] == owner[:, None])
        return {
            "chunks": count,
            "seconds": seconds,
            "cpu_seconds": computed,
            "seconds_per_1000_chunks": {n: s / count * 1000 for n, s in seconds.items()},
            "recall": index.record.recall,
            "index": index.record.spec,
            "nprobe": index.record.nprobe,
            "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "neighbours_of_the_same_document": int(same.sum()),
            "counts": table.record["counts"],
        }


def main() -> None:
    options = arguments(
        __doc__,
        corpus="train.jsonl",
        norlund=Path(),
        lucidrains=Path(),
        chunks=100_000,
        dim=384,
        documents=0,
    )
    torch.manual_seed(0)
    files = [Path(name) for name in options.corpus.split(",")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    lines = lines[: options.documents or None]
    texts = [json.loads(line)["text"] for line in lines]
    record: dict[str, Any] = {"benchmark": "retro_data"}
    if options.norlund != Path():
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            record["norlund"] = beside_norlund(options.norlund, Path(file.name), texts, options.dim)
    if options.lucidrains != Path():
        record["retro-pytorch"] = beside_lucidrains(options.lucidrains, texts, options.dim)
    if options.chunks:
        record["stages"] = stages(texts, options.dim, options.chunks)
    report(**record, **machine())


if __name__ == "__main__":
    main()
