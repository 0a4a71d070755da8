"""Workers at a build as forks of the test process, which start at once and can be hurt."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from nearest.build.workers import Spec, Start, WorkerEndedError, telling, told
from nearest.encode import loading
from nearest.errors import NearestError


class Forks:
    """Takes the place of `local_workers`.

    Attributes:
        pids: of all workers that were started, in order.
    """

    def __init__(
        self,
        model: tuple[Any, Any],
        first: Callable[[], Any] = lambda: None,
        stale: float = 120.0,
    ) -> None:
        """`first` is called in each worker before it begins; `stale` is its patience."""
        self.pids: list[int] = []
        self._model, self._first, self._stale = model, first, stale

    @contextmanager
    def __call__(self, folder: Path, spec: Spec, workers: int) -> Iterator[Start]:
        spec = msgspec.structs.replace(spec, stale=self._stale)
        with ThreadPoolExecutor(workers + 4) as pool:
            try:
                yield lambda token: self._start(pool, folder, token, spec)
            finally:
                for pid in self.pids:
                    kill(pid)

    def _start(
        self, pool: ThreadPoolExecutor, folder: Path, token: str, spec: Spec
    ) -> "Future[None]":
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            code = 1
            try:
                loading.load_model_and_tokenizer = lambda *_: self._model  # type: ignore[assignment]
                self._first()
                spec.work(folder, token)
                code = 0
            except NearestError as error:
                os.write(write, telling(error))
            except BaseException:  # what a process ends with
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        self.pids.append(pid)
        return pool.submit(_ended, pid, read)


def _ended(pid: int, read: int) -> None:
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise told(said) or WorkerEndedError(f"status {status}")


def kill(pid: int) -> None:
    """Kill a worker, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def later(seconds: float, action: Callable[[], Any]) -> threading.Timer:
    """Do something in so many seconds, in a thread that has begun."""
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer
