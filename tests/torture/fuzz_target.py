"""One of the readers of what strangers wrote, under atheris: `fuzz_target.py NAME SEEDS -runs=…`.

Any error but ours ends the process, as does whatever hangs or grows; what is refused is fine.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import atheris
import numpy as np

import_module("nearest.index.product")  # before: what is compiled cannot be instrumented
with atheris.instrument_imports(include=["nearest"]):
    from nearest.corpus.text_files import parse_line
    from nearest.errors import NearestError
    from nearest.folder import open_array
    from nearest.store.manifest import decode_manifest


def _read_array(data: bytes, folder: Path) -> None:
    path = folder / "array.npy"
    path.write_bytes(data)
    open_array(path, np.dtype(np.float16), (3, 4))


TARGETS: dict[str, Callable[[bytes, Path], Any]] = {
    "manifests": lambda data, folder: decode_manifest(folder, data),
    "lines": lambda data, _: parse_line(data.decode(errors="replace"), "name", "origin"),
    "headers": _read_array,
}


def main() -> None:
    target = TARGETS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:

        def once(data: bytes) -> None:
            with suppress(NearestError):
                target(data, Path(folder))

        atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
