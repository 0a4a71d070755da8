"""WikiText as it is distributed, a row or line a paragraph, as one document an article (JSONL).

    python examples/wikitext103/articles.py train-*.parquet > train.jsonl

An article begins at a heading of the first level (" = Title = "). Files are Parquet or plain text.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_TITLE = re.compile(r" = ([^=].*[^=]|[^=]) = \n?")


def lines_of(path: Path) -> Iterator[str]:
    """The rows of a Parquet file's column "text", or the lines of a text file."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column("text").to_pylist()
    else:
        with path.open(encoding="utf-8") as file:
            yield from file


def articles(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Documents: their number, title and text, the heading included."""
    text: list[str] = []
    title, number = "", 0
    for line in lines:
        if (heading := _TITLE.fullmatch(line)) is not None:
            if text:
                yield {"id": f"article-{number}", "title": title, "text": "".join(text)}
                number += 1
            title, text = heading[1], []
        if text or line.strip():  # nothing before the first heading but blank lines
            text.append(line)
    if text:
        yield {"id": f"article-{number}", "title": title, "text": "".join(text)}


def main() -> None:
    """Write the articles of all files named, in their order."""
    paths = [Path(name) for name in sys.argv[1:]]
    if not paths:
        raise SystemExit("name the files of a split: python articles.py train-*.parquet")
    for article in articles(line for path in paths for line in lines_of(path)):
        print(json.dumps(article, ensure_ascii=False))


if __name__ == "__main__":
    main()
