"""`make torture`: what docs/reliability.md reports, one JSON object a part.

`python tests/torture kills` runs one part alone; `--quick` a hundredth of each.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from damage import damage
from faults_everywhere import faults
from fuzz import fuzz
from growth import growth
from kills import commands, kills
from readers import readers

PARTS = {
    "kills": kills,
    "commands": commands,
    "faults": faults,
    "damage": damage,
    "fuzz": fuzz,
    "readers": readers,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    for name in given.parts:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            figures = PARTS[name](Path(folder), 0.01 if given.quick else 1.0)
        seconds = round(time.perf_counter() - started)
        print(json.dumps({"part": name, **figures, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
