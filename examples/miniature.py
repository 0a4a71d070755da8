"""Run a recipe on a small model and a small text, to see that all of its commands are right.

    python examples/miniature.py wikitext103 --work WORK

Texts are the language reference that Python carries (pydoc), in the form of the recipe's raw data;
the model is the one that ships with the project. Figures of a miniature say nothing of the papers'.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

FOLDER = Path(__file__).parent
MODEL = FOLDER.parent / "src/nearest/demo/general-gpt2-7m"
SPLITS = {"train": 16, "validation": 3, "test": 3}


def texts() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name and text of the topics of each split: short ones, in a fixed order."""
    chosen = sorted(name for name, text in topics.items() if 800 < len(text) < 2500)
    for split, count in SPLITS.items():
        yield split, [(name, topics[name]) for name in chosen[:count]]
        chosen = chosen[count:]


def wikitext103(work: Path) -> dict[str, str]:
    """Rows of paragraphs with headings, in Parquet as on the hub."""
    import pyarrow as pa
    from pyarrow import parquet

    raw = work / "raw"
    raw.mkdir(exist_ok=True)
    for split, documents in texts():
        rows: list[str] = []
        for name, text in documents:
            rows += ["", f" = {name} = \n", "", *(f" {line}\n" for line in text.split("\n"))]
        parquet.write_table(pa.table({"text": rows}), raw / f"{split}-00000-of-00001.parquet")
    small = {"WINDOW": "256", "STRIDE": "128", "CLUSTERS": "200", "SAMPLE": "8000", "K": "64"}
    return {"RAW": str(raw), "TEMPERATURE": "10", **small}


def published_datastore(work: Path) -> dict[str, str]:
    """The files of knn-transformers, made of the keys and values of `wikitext103`'s memory."""
    import faiss
    from scipy.sparse import csr_matrix

    from nearest import Memory

    memory = Memory.open(work / "out/train.memory")
    of_memory = memory.valued_entries()
    keys, values = memory.keys.rows(of_memory), memory.values(of_memory)
    count, dim = keys.shape
    entries = np.arange(count)  # of the stream that a datastore is
    store = work / "store"
    store.mkdir(exist_ok=True)
    keys.astype(np.float16).tofile(store / f"dstore_gpt2_{count}_{dim}_keys.npy")
    values.astype(np.int64).tofile(store / f"dstore_gpt2_{count}_{dim}_vals.npy")
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dim), dim, 16, 32, 8)
    index.train(keys.astype(np.float32))
    index.add_with_ids(keys.astype(np.float32), entries)
    faiss.write_index(index, str(store / f"index_gpt2_{count}_{dim}.indexed"))
    labels = entries % 200
    members = csr_matrix((np.ones(count, dtype=np.int64), (labels, entries)))
    (store / f"members_gpt2_{count}_{dim}_8000_200.pkl").write_bytes(pickle.dumps(members))
    return {"STORE": str(store), "K": "64", "TEMPERATURE": "10"}


def law_mt(work: Path) -> dict[str, str]:
    """A sentence a line."""
    raw = work / "raw"
    raw.mkdir(exist_ok=True)
    for split, documents in texts():
        name = "dev" if split == "validation" else split
        lines = [line for _, text in documents for line in text.replace("\n", " ").split(". ")]
        (raw / f"{name}.en").write_text("\n".join(lines) + "\n", encoding="utf-8")
    small = {"EPOCHS": "0.05", "BATCH": "2", "BLOCK": "64", "CLUSTERS": "200", "K": "64"}
    return {"RAW": str(raw), "TEMPERATURE": "10", **small}


def massive_open_text(work: Path) -> dict[str, str]:
    """JSON Lines with a text a document; vectors of a small random BERT, and a small RETRO."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    for split, documents in texts():
        name = "valid" if split == "validation" else split
        lines = [json.dumps({"text": text}) for _, text in documents]
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    embedder = work / "bert"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.cls_token = tokenizer.sep_token = tokenizer.eos_token
    tokenizer.save_pretrained(embedder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes)).save_pretrained(
        embedder
    )
    layers = "decoder_layers=2 cca_layers=[1] encoder_layers=1 encoder_cross_layers=[0]"
    dims = "decoder_dim=32 decoder_heads=2 encoder_dim=32 encoder_heads=2"
    small = {"STEPS": "4", "EVERY": "2", "ACCUMULATE": "1", "MAX_LEN": "256"}
    return {
        **{name.upper(): str(work / f"{name}.jsonl") for name in ("train", "valid", "test")},
        "TOKENIZER": str(MODEL),
        "EMBEDDER": f"bert:{embedder}",
        "SIZES": " ".join(f"--set {one}" for one in f"{layers} {dims}".split()),
        **small,
    }


def train_base(work: Path) -> dict[str, str]:
    """Documents in three files."""
    for split, documents in texts():
        name = "valid" if split == "validation" else split
        lines = [json.dumps({"id": name, "text": text}) for name, text in documents]
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    training = "--max-steps 4 --batch-size 2 --block 64"
    return {"CORPUS": str(work), "DOCUMENTS": "20", "HELD_OUT": "6", "TRAINING": training}


# Each script, and what makes its raw data and says its variables.
RECIPES: dict[str, list[tuple[str, Callable[[Path], dict[str, str]]]]] = {
    "wikitext103": [("recipe.sh", wikitext103), ("import.sh", published_datastore)],
    "law_mt": [("recipe.sh", law_mt)],
    "massive_open_text": [("recipe.sh", massive_open_text)],
    "train_base": [("recipe.sh", train_base)],
}


def run(name: str, work: Path) -> None:
    """Make the raw data of a recipe, and run its scripts with this Python's `nearest`."""
    work.mkdir(parents=True, exist_ok=True)
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for script, prepare in RECIPES[name]:
        variables = {"MODEL": str(MODEL), "OUT": str(work / "out"), **prepare(work)}
        environment = {**os.environ, "PATH": tools, "PYTHON": sys.executable, **variables}
        subprocess.run(["bash", "-x", FOLDER / name / script], env=environment, check=True)


def main() -> None:
    """Run one miniature."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--work", type=Path, required=True)
    settings = parser.parse_args()
    run(settings.recipe, settings.work)


if __name__ == "__main__":
    main()
