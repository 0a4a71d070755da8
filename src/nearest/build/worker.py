"""A worker at a build that another process has begun: `python -m nearest.build.worker`."""

import os
import sys
import threading
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
import torch

from nearest.build.match import matching_key_layer
from nearest.build.tasks import Unfinished, first_manifest, work
from nearest.build.workers import WorkerSpec, telling
from nearest.encode.dtype import DtypeName
from nearest.encode.encoder import Encoder
from nearest.errors import ModelError, NearestError
from nearest.store.claims import HEARTBEAT, Watch, owner_here
from nearest.store.journal import Journal
from nearest.store.manifest import Manifest


class _Begun(NamedTuple):
    """What `matching_key_layer` asks of a memory."""

    path: Path
    manifest: Manifest


def work_at(folder: Path, token: str, spec: WorkerSpec) -> None:
    """Do what is left of a build in a folder, beside other workers.

    Raises:
        NearestError: the model is not the one that the build was begun with, or something cannot
            be made or written.
    """
    torch.set_num_threads(spec.threads)
    journal = Journal.opened(folder)
    build = Unfinished(journal, _encoder(folder, journal, spec), spec.allow_mixed)
    heartbeat = min(HEARTBEAT, spec.stale / 4)
    work(build, Watch(owner_here(token), spec.stale, heartbeat))


def _encoder(folder: Path, journal: Journal, spec: WorkerSpec) -> Encoder | None:
    keys = journal.stage.keys
    if keys is None or spec.model is None:
        return None
    from nearest.encode.loading import load_model_and_tokenizer

    manifest = first_manifest(journal.stage.model, keys)
    model, _ = load_model_and_tokenizer(spec.model, cast(DtypeName, spec.dtype), spec.device)
    try:
        layer = matching_key_layer(_Begun(folder, manifest), model)
    except ModelError as error:
        raise ModelError(
            f"{spec.model} as a worker loads it is not the model that this build was begun with: "
            f"save that one (save_pretrained) where every worker finds it ({error})"
        ) from error
    return Encoder.of(model, layer, keys.window, keys.stride, journal.stage.batch_size)


def _end_with_parent() -> None:
    """End at once when standard input does: whoever started this process is gone."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def main() -> None:
    """Work until nothing is left; an error that a user can mend goes to standard output."""
    folder, token, spec = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work_at(Path(folder), token, msgspec.json.decode(spec, type=WorkerSpec))
    except NearestError as error:
        sys.stdout.buffer.write(telling(error))
        sys.stdout.buffer.flush()
        os._exit(2)
    os._exit(0)  # the thread that waits for standard input holds it


if __name__ == "__main__":
    main()
