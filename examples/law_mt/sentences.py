"""A file with a sentence a line as one document a sentence (JSONL): python sentences.py train.en"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Write the sentences of a file; blank lines are left out."""
    if len(sys.argv) != 2:
        raise SystemExit("name one file: python sentences.py train.en")
    path = Path(sys.argv[1])
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if text := line.strip():
                print(json.dumps({"id": f"{path.stem}-{number}", "text": text}, ensure_ascii=False))


if __name__ == "__main__":
    main()
