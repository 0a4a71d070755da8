"""What versions of a memory that are in use at once take of the RAM.

    python benchmarks/versions.py --memory law.memory

Documents are removed one after another from a copy; every version is searched, and stays in use, as
a server's are by requests under way. Anonymous memory is counted: files that are mapped are shared.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from nearest import Memory

VERSIONS = 8


def anonymous_mb() -> float:
    """Of this process, in megabytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system does not tell anonymous memory")


def use(memory: Memory) -> None:
    """Read what look-ups need."""
    memory.search(np.zeros((1, memory.keys_record.dim), np.float32), 8)
    memory.longest_matches(np.array([memory.manifest.model.start_token]), np.zeros(1, int), 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", required=True, help="a folder with keys; it is copied")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy.memory"
        shutil.copytree(options.memory, folder)
        memory = Memory.open(folder)
        names = [memory.document(number).id for number in range(VERSIONS + 1)]
        use(memory)
        memory = memory.remove(names[:1])
        use(memory)
        in_use, before = [memory], anonymous_mb()
        for name in names[1:]:
            in_use.append(in_use[-1].remove([name]))
            use(in_use[-1])
        each = (anonymous_mb() - before) / VERSIONS
        told = {"entries": memory.entries, "one_mb": before, "each_more_mb": each}
        print(json.dumps({name: round(value, 2) for name, value in told.items()}))


if __name__ == "__main__":
    main()
