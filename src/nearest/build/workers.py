"""Several processes at one piece of work: kept alive until all is done, whoever starts them.

A worker takes tasks by itself (`store/claims.py`); what starts one is a function. What is worked at
is a `Work`: the tasks of a build, or files that are to be made (`build/files.py`).
"""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch

import nearest
from nearest.errors import (
    CorpusError,
    FolderError,
    ModelError,
    NearestError,
    SettingError,
    warn_caller,
)
from nearest.store.claims import (
    HEARTBEAT,
    STALE,
    Watch,
    held_by,
    owner_here,
    position,
    suspected,
)

_TRIES = 2
_WAIT = 0.2  # seconds between looks at what is done
_SILENCE = 10.0  # seconds without a task begun, after which is said what workers wait for
_LEAVE = 5.0  # seconds in which workers see that all is done; one that hangs does not matter then
_PACKAGES = str(Path(nearest.__file__).parents[1])
# Modules are looked for neither in the current folder nor before where they are looked for here.
_RUN = f"import sys; sys.path.append({_PACKAGES!r}); from nearest.build.process import main; main()"
_COMMAND = (sys.executable, "-P", "-c", _RUN)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told: plain values, and what it does with them.

    Attributes:
        threads: of each operation, and CPUs that it takes on a cluster.
        gpus: that it takes on a cluster.
        stale: seconds after which a claim that nobody touches is taken over.
    """

    threads: int = 1
    gpus: int = 0
    stale: float = STALE

    def work(self, folder: Path, token: str) -> None:
        """Do what is left in a folder, beside other workers.

        Raises:
            NearestError: something cannot be read, made or written.
        """
        raise NotImplementedError

    def watch(self, token: str) -> Watch:
        """What takes claims for a worker."""
        return Watch(owner_here(token), self.stale, min(HEARTBEAT, self.stale / 4))


class WorkerEndedError(Exception):
    """A worker that ended unasked: killed, or out of memory."""


class WorkerFailedError(WorkerEndedError):
    """A worker that ended by an error of the program, whose kind and first line it says."""


_SAID: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        CorpusError,
        FolderError,
        ModelError,
        SettingError,
        WorkerEndedError,
        WorkerFailedError,
    )
}


def meant(error: BaseException) -> Exception:
    """An error that a worker met, as it is told to who has started it."""
    if isinstance(error, NearestError):
        return error
    kind = WorkerEndedError if isinstance(error, MemoryError) else WorkerFailedError
    first = str(error).strip().partition("\n")[0]
    return kind(f"{type(error).__name__}: {first}".removesuffix(": "))


def ends_each_time(what: str, error: BaseException) -> str:
    """What to say of something at which workers end."""
    if isinstance(error, WorkerFailedError):
        return f"the process that reads {what} fails each time ({error})"
    return (
        f"the process that reads {what} ends each time ({error}): leave that out, or give it more "
        "memory"
    )


Start = Callable[[str], "Future[None]"]  # a worker of this token


def _for_nothing() -> None:
    """What workers of this machine wait for."""


class Crew(NamedTuple):
    """How workers are started, how many there are to be, and what those wait for that do not begin.

    `waiting` says it in a sentence; None where nothing keeps them.
    """

    start: Start
    size: int
    waiting: Callable[[], str | None] = _for_nothing


class Work(Protocol):
    """What workers share."""

    def left(self) -> Sequence[Any]:
        """Tasks that are not finished."""
        ...

    def path(self, task: Any) -> Path:
        """What a task is claimed by."""
        ...

    def hopeless(self, task: Any, error: BaseException) -> NearestError:
        """What to say of a task at which a process ends each time."""
        ...

    def report(self) -> None:
        """Say how far all workers are."""
        ...


def threads_of(workers: int | None, ray: str | None) -> int:
    """Threads of each worker: this process's, shared by those of this machine."""
    threads = torch.get_num_threads()
    return threads if ray is not None or workers is None else max(1, threads // workers)


def reached(spec: Spec, ray: str | None) -> AbstractContextManager[None]:
    """Belong to a Ray cluster that has room for such workers, where one is named.

    It is entered before anything is written, so that a wrong address costs nothing.

    Args:
        spec: what each worker is told.
        ray: "auto" for the cluster that this machine belongs to, its address, or "local" for one of
            this machine alone; None: none.

    Raises:
        SettingError: there is no such cluster, or none of its nodes has room for a worker.
    """
    if ray is None:
        return nullcontext()
    from nearest.build.ray_workers import connected

    return connected(ray, spec)


@contextmanager
def crew_of(
    folder: Path, spec: Spec, workers: int | None, ray: str | None
) -> Iterator[Crew | None]:
    """So many workers, on a Ray cluster where one is named; None where neither is asked for.

    None is started yet. When the context ends, so do they.

    Args:
        folder: where they work.
        spec: what each is told.
        workers: how many; as many as the cluster has room for when not given.
        ray: as for `reached`, and it raises as that does.
    """
    if ray is not None:
        from nearest.build.ray_workers import ray_workers

        with ray_workers(folder, spec, ray) as (start, room, waiting):
            yield Crew(start, workers or room, waiting)
    elif workers is not None:
        with local_workers(folder, spec, workers) as start:
            yield Crew(start, workers)
    else:
        yield None


def drive(work: Work, crew: Crew) -> None:
    """Keep workers at something until its tasks are done.

    A worker that ends unasked is replaced. What it worked on is tried again, once: where another
    ends at the same place, that is an error that names the place. Where none begins, a warning says
    what they wait for.

    Raises:
        NearestError: a worker's, or of a task that ends its process.
    """
    tokens, deaths = (f"w{n}x{os.urandom(4).hex()}" for n in itertools.count()), Counter[object]()
    running: dict[Future[None], str] = {}
    count, idle, since = 0, 0, 0.0  # tasks left; workers that found nothing to do since then
    looked: float | None = time.monotonic()  # last, for whether any has begun; None: it was said
    while left := work.left():
        if len(left) != count:
            count, idle, since = len(left), 0, time.monotonic()
            deaths[None] = 0
        elif idle > 2 * crew.size and time.monotonic() - since > STALE:
            raise NearestError(
                f"workers end well, and yet {count} tasks are not done: they do not see the files "
                "that this process sees; give all of them the same folder, and run again"
            )
        while len(running) < crew.size:
            token = next(tokens)
            running[crew.start(token)] = token
        ended, _ = wait(running, timeout=_WAIT, return_when=FIRST_COMPLETED)
        for future in ended:
            token, error = running.pop(future), future.exception()
            if error is None:
                idle += 1
            else:
                _bury(work, token, running.values(), error, deaths)
        work.report()
        if looked is not None and time.monotonic() - looked > _SILENCE:
            looked = None if _waits(work, crew) else time.monotonic()
    work.report()
    wait(running, timeout=_LEAVE)


def _waits(work: Work, crew: Crew) -> bool:
    """Warn where no task is begun and something keeps workers from it; returns whether it did."""
    left = work.left()
    if not left or any(held_by(work.path(task)) for task in left):
        return False
    if (why := crew.waiting()) is None:
        return False
    warn_caller(why)
    return True


def _bury(
    work: Work,
    token: str,
    others: Iterable[str],
    error: BaseException,
    deaths: Counter[object],
) -> None:
    """Free what a worker held that has ended, and say where it did, the second time."""
    if isinstance(error, NearestError):
        raise error
    owners = {task: held_by(work.path(task)) or "" for task in work.left()}
    for task, owner in owners.items():
        if not owner.endswith(f"-{token}"):
            continue
        path = work.path(task)
        found = position(path)  # of tasks that say where they are
        suspected(path, owner)
        deaths[task, found and found[0]] += 1
        if deaths[task, found and found[0]] == _TRIES:
            raise work.hopeless(task, error) from error
        return
    deaths[None] += 1
    working = {owner.rpartition("-")[2] for owner in owners.values()}
    if deaths[None] > _TRIES and working.isdisjoint(others):
        raise NearestError(f"workers end before they have begun: {error}") from error


@contextmanager
def local_workers(
    folder: Path, spec: Spec, workers: int, command: Sequence[str] = _COMMAND
) -> Iterator[Start]:
    """Start workers as processes of this machine, which end with this one, or with the context."""
    name = f"{type(spec).__module__}:{type(spec).__name__}"
    alive, over = set[subprocess.Popen[bytes]](), threading.Event()
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads)}

    def run(token: str) -> None:
        # Its standard input ends when this process does, however that happens.
        with subprocess.Popen(
            [*command, name, str(folder), token, msgspec.json.encode(spec).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        ) as process:
            alive.add(process)
            if over.is_set():
                process.kill()
            said = b"" if process.stdout is None else process.stdout.read()
            code = process.wait()
            alive.discard(process)
        if code:
            raise told(said) or WorkerEndedError(_ending(code))

    pool = ThreadPoolExecutor(workers)
    try:
        yield lambda token: pool.submit(run, token)
    finally:
        over.set()
        for process in list(alive):
            process.kill()
        pool.shutdown(cancel_futures=True)


def telling(error: BaseException) -> bytes:
    """An error as a worker says it, in the last line of its standard output."""
    said = meant(error)
    return b"\n" + msgspec.json.encode((type(said).__name__, str(said)))


def told(said: bytes) -> Exception | None:
    """The error that a worker has said; None where it said none."""
    try:
        kind, message = msgspec.json.decode(said.rpartition(b"\n")[2], type=tuple[str, str])
    except msgspec.DecodeError:
        return None
    return _SAID.get(kind, NearestError)(message)


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
