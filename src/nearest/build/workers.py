"""Several processes at one build: kept alive until all is done, whoever starts them.

A worker takes tasks by itself (`build/tasks.py`); what starts one is a function.
"""

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import msgspec

from nearest.build.tasks import Unfinished
from nearest.errors import CorpusError, FolderError, ModelError, NearestError, SettingError
from nearest.folder import open_array
from nearest.store.claims import STALE, Position, held_by, position, suspected
from nearest.store.documents import FRAME_DTYPE, DocumentReader
from nearest.store.journal import Task

_TRIES = 2
_WAIT = 0.2  # seconds between looks at what is done
_LEAVE = 5.0  # seconds in which workers see that all is done; one that hangs does not matter then
_COMMAND = (sys.executable, "-m", "nearest.build.worker")
_KINDS = {kind.__name__: kind for kind in (CorpusError, FolderError, ModelError, SettingError)}


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker is told, beside the folder.

    Attributes:
        model: folder or name on the hub; None where no keys are made.
        dtype, device: as in `load_model_and_tokenizer`.
        threads: of each operation.
        allow_mixed: whether keys of unlike machines are accepted.
        stale: seconds after which a claim that nobody touches is taken over.
    """

    model: str | None
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    allow_mixed: bool = False
    stale: float = STALE


class WorkerEndedError(Exception):
    """A worker that ended unasked: killed, or by an error that nobody can mend."""


Start = Callable[[str], "Future[None]"]  # a worker of this token


def drive(build: Unfinished, start: Start, workers: int) -> None:
    """Keep so many workers at a build until its tasks are done.

    A worker that ends unasked is replaced. What it worked on is tried again, once: where another
    ends at the same place, the build ends with the document that stands there.

    Raises:
        NearestError: a worker's, or of a document that ends its process.
    """
    tokens, deaths = (f"w{n}x{os.urandom(4).hex()}" for n in itertools.count()), Counter[object]()
    running: dict[Future[None], str] = {}
    build.journal.save()  # workers read it
    while build.left():
        while len(running) < workers:
            token = next(tokens)
            running[start(token)] = token
        ended, _ = wait(running, timeout=_WAIT, return_when=FIRST_COMPLETED)
        for future in ended:
            _bury(build, running.pop(future), future.exception(), deaths)
        _report(build)
    wait(running, timeout=_LEAVE)


def _bury(
    build: Unfinished, token: str, error: BaseException | None, deaths: Counter[object]
) -> None:
    """Free what a worker held that has ended, and say where it did, the second time."""
    if error is None:
        return
    if isinstance(error, NearestError):
        raise error
    for task in build.left():
        path = build.journal.path(task)
        if not (held_by(path) or "").endswith(f"-{token}"):
            continue
        found = position(path) if task.path == "keys" else None
        suspected(path)
        deaths[task, found and found[0]] += 1
        if deaths[task, found and found[0]] == _TRIES:
            raise NearestError(
                f"the process that reads {_named(build, task, found)} ends each time ({error}): "
                "leave that out, or give it more memory; what else is done is kept, and the same "
                "build goes on from there"
            ) from error
        return
    deaths[None] += 1
    if deaths[None] > _TRIES:
        raise NearestError(f"workers end before they have begun: {error}") from error


def _named(build: Unfinished, task: Task, found: Position | None) -> str:
    """What a worker was at, as a message names it."""
    corpus = build.corpora[task.segment].record
    if found is None or corpus is None:
        return f"segment {task.segment} ({task.path})"
    frames = open_array(build.folder / corpus.files["frames"].path, FRAME_DTYPE, (corpus.frames, 2))
    _, first, last = found
    with (build.folder / corpus.files["documents"].path).open("rb") as file:
        documents = DocumentReader(file, frames, corpus.documents)
        ids = [repr(documents[number].id) for number in sorted({first, last})]
    return f"document {ids[0]}" if first == last else f"documents {ids[0]} to {ids[1]}"


def _report(build: Unfinished) -> None:
    """Say how far all workers are."""
    done = build.journal.done
    for path, stage in (("keys", "keys"), ("suffix", "suffix array"), ("index", "index")):
        tasks = [task for task in build.tasks if task.path == path]
        sizes = [build.corpora[task.segment].entries for task in tasks]
        if not all(map(done, tasks)):
            made = sum(
                size if done(task) else (position(build.journal.path(task)) or (0,))[0]
                for task, size in zip(tasks, sizes, strict=True)
            )
            build.progress(stage, made, sum(sizes))
            return


@contextmanager
def local_workers(
    folder: Path, spec: WorkerSpec, workers: int, command: Sequence[str] = _COMMAND
) -> Iterator[Start]:
    """Start workers as processes of this machine, which end with this one, or with the context."""
    alive: set[subprocess.Popen[bytes]] = set()
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads)}

    def run(token: str) -> None:
        # Its standard input ends when this process does, however that happens.
        with subprocess.Popen(
            [*command, str(folder), token, msgspec.json.encode(spec).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        ) as process:
            alive.add(process)
            said = b"" if process.stdout is None else process.stdout.read()
            code = process.wait()
            alive.discard(process)
        if code:
            raise told(said) or WorkerEndedError(_ending(code))

    pool = ThreadPoolExecutor(workers)
    try:
        yield lambda token: pool.submit(run, token)
    finally:
        for process in list(alive):
            process.kill()
        pool.shutdown(cancel_futures=True)


def telling(error: NearestError) -> bytes:
    """An error as a worker says it, in the last line of its standard output."""
    return b"\n" + msgspec.json.encode((type(error).__name__, str(error)))


def told(said: bytes) -> NearestError | None:
    """The error that a worker has said; None where it said none."""
    try:
        kind, message = msgspec.json.decode(said.rpartition(b"\n")[2], type=tuple[str, str])
    except msgspec.DecodeError:
        return None
    return _KINDS.get(kind, NearestError)(message)


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
