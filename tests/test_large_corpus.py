"""Corpora larger than the memory a build may take: the kernel refuses more (RLIMIT_DATA)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.long

MEGABYTE = 1 << 20

# Everything is loaded, and everything compiled, before the limit is set.
_BUILD = """
import resource, sys
from pathlib import Path

import nearest.demo
from nearest import Memory, read_documents
from nearest.encode.loading import load_model_and_tokenizer

corpus, out, keys, allowed = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
folder = Path(nearest.demo.__file__).parent / "general-gpt2-7m"
model, tokenizer = load_model_and_tokenizer(str(folder))
Memory.build(model, tokenizer, ["a text that is read first"] , out / "first", keys=keys)
(line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmData")]
limit = 1024 * int(line.split()[1]) + allowed
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
memory = Memory.build(model, tokenizer, read_documents([corpus]), out / "second", keys=keys)
print(memory.documents, memory.tokens)
"""


def build(corpus: Path, keys: str, allowed: int) -> tuple[int, int]:
    """Documents and tokens of a memory that was built with so many bytes beside the model."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, corpus, corpus.parent, keys, str(allowed)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    documents, tokens = map(int, done.stdout.split())
    return documents, tokens


def lines(megabytes: int) -> "list[str]":
    """Sentences of words that occur as words do (Zipf), a megabyte each."""
    rng = np.random.default_rng(0)
    words = np.array(
        ["".join(rng.choice(list("etaoinshrdlu"), size=n)) for n in range(2, 12)] * 200
    )
    words = np.array([f"{word}{number % 97}" for number, word in enumerate(words)])
    ranks = rng.zipf(1.3, size=(megabytes, 150_000)) % len(words)
    return [" ".join(words[row].tolist())[:1_000_000] for row in ranks]


def test_two_hundred_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    texts = lines(20)
    with path.open("w") as file:
        for number in range(200_000):
            start = number // 20 * 97 % 999_000
            text = f"{number} {texts[number % 20][start : start + 1_000]}"
            file.write(f'{{"text": "{text}"}}\n')
    assert path.stat().st_size > 200 * 1_000_000
    documents, tokens = build(path, "none", 300 * MEGABYTE)
    assert documents == 200_000
    assert tokens > 3 * (1 << 24)  # so that there are several segments


def test_a_single_document_of_fifty_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines(50)))
    documents, tokens = build(path, "none", 450 * MEGABYTE)
    assert documents == 1
    assert tokens > 10_000_000


def test_keys_take_no_more_memory_than_their_batches(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    (text,) = lines(1)
    with path.open("w") as file:
        for start in range(0, 400_000, 1_000):  # enough tokens for an index
            file.write(f'{{"text": "{start} {text[start : start + 1_000]}"}}\n')
    documents, tokens = build(path, "int8", 550 * MEGABYTE)
    assert documents == 400
    assert tokens > 100_000
