"""The Code of the District of Columbia as a corpus, from the council's public XML:

    git clone --depth 1 https://github.com/DCCouncil/law-xml
    python examples/law_corpus.py law-xml --out CORPUS

writes train.jsonl, valid.jsonl and test.jsonl, a section a document; and train-2m.jsonl: documents
of train in a random order, the first to reach two million tokens of the small model here.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from transformers import AutoTokenizer

LIBRARY = "{https://code.dccouncil.us/schemas/dc-library}"
LEFT_OUT = {"annotation", "annotations", "include", "prefix", "reason"}
SHORTEST = 200  # characters: what is shorter says little but that it was repealed
MODEL = Path(__file__).parents[1] / "src/nearest/demo/general-gpt2-7m"


def words_of(element: ElementTree.Element) -> str:
    """All text within, with one space between words."""
    return " ".join("".join(element.itertext()).split())


def lines_of(elements: Iterable[ElementTree.Element]) -> Iterator[str]:
    """A line a paragraph: number, heading and first text; what follows has lines of its own."""
    line: list[str] = []
    closed = False
    for element in elements:
        name = element.tag.removeprefix(LIBRARY)
        if name in LEFT_OUT:
            continue
        if name in ("num", "heading", "text") and not closed:
            line.append(words_of(element))
            closed = name == "text"
            continue
        if line:
            yield " ".join(line)
        line, closed = [], True
        yield from lines_of(element) if name == "para" else [words_of(element)]
    if line:
        yield " ".join(line)


def section_of(path: Path) -> dict[str, str] | None:
    """A section of the code; None for tables of contents."""
    root = ElementTree.parse(path).getroot()
    number = root.find(LIBRARY + "num")
    if root.tag != LIBRARY + "section" or number is None:
        return None
    heading = root.find(LIBRARY + "heading")
    title = "" if heading is None else words_of(heading)
    rest = [element for element in root if element is not number and element is not heading]
    lines = [f"§ {words_of(number)}. {title}", *filter(None, lines_of(rest))]
    return {"id": f"dc-{words_of(number)}", "title": title, "text": "\n".join(lines)}


def split_of(name: str) -> str:
    """By a hash of its id: 1.5 % each for valid, test and a reserve that is not written."""
    share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000
    return ("valid", "test", "reserve", "train")[min(share // 15, 3)]


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """As JSON Lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Read the clone, and write all four files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone", type=Path, help="Of DCCouncil/law-xml.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="In train-2m.jsonl.")
    options = parser.parse_args()
    code = options.clone / "us/dc/council/code/titles"
    if not code.is_dir():
        parser.error(f"{code} is no folder: give a clone of github.com/DCCouncil/law-xml")
    options.out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "valid": [], "test": [], "reserve": []}
    for path in sorted(code.rglob("*.xml")):
        row = section_of(path)
        if row is not None and len(row["text"]) >= SHORTEST:
            splits[split_of(row["id"])].append(row)
    for name in ("train", "valid", "test"):
        rows = splits[name]
        write(options.out / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows):,} documents")

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shuffled, some, tokens = splits["train"], [], 0
    random.Random(0).shuffle(shuffled)
    for row in shuffled:
        if tokens >= options.tokens:
            break
        some.append(row)
        tokens += 1 + len(tokenizer(row["text"], verbose=False)["input_ids"])  # 1: the start token
    write(options.out / "train-2m.jsonl", some)
    print(f"train-2m: {len(some):,} documents, {tokens:,} tokens")


if __name__ == "__main__":
    main()
