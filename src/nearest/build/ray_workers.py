"""Workers as tasks of a Ray cluster: they see the folder on a file system that all nodes share.

Ray starts them and says when one has ended; the journal says what is done. Nothing but their names
goes through its object store.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nearest.build.workers import Start, WorkerEndedError, WorkerSpec, telling, told
from nearest.errors import NearestError, SettingError, require

LOCAL = "local"  # a cluster of this machine alone, which ends with the build


@contextmanager
def ray_workers(address: str, folder: Path, spec: WorkerSpec, gpus: float = 0) -> Iterator[Start]:
    """Start workers on a cluster.

    Args:
        address: "auto" for the cluster that this machine belongs to, "local" for one of this
            machine alone, or the address of another.
        folder: where the build is; all nodes must see it under this path.
        spec: what workers are told.
        gpus: of each worker.

    Raises:
        SettingError: there is no such cluster.
    """
    require("ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    import ray

    begun = not ray.is_initialized()
    if begun:
        try:
            ray.init(
                address=address,
                include_dashboard=False if address == LOCAL else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SettingError(
                f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}): start one "
                "(ray start --head), or give --ray local"
            ) from error
    options: dict[str, Any] = {"num_cpus": spec.threads, "num_gpus": gpus, "max_retries": 0}
    remote = ray.remote(**options)(_work)
    place = str(folder.resolve())

    def start(token: str) -> "Future[None]":
        done: Future[None] = Future()

        def ended(future: "Future[str | None]") -> None:
            error: BaseException | None = future.exception()
            if error is None:
                said = future.result()
                error = None if said is None else told(said.encode())
            else:
                error = WorkerEndedError(str(error).splitlines()[0])
            done.set_exception(error) if error is not None else done.set_result(None)

        remote.remote(place, token, spec).future().add_done_callback(ended)
        return done

    try:
        yield start
    finally:
        if begun:
            ray.shutdown()


def _work(folder: str, token: str, spec: WorkerSpec) -> str | None:
    """Work in a process of the cluster; an error that a user can mend comes back as text."""
    from nearest.build.worker import work_at

    try:
        work_at(Path(folder), token, spec)
    except NearestError as error:
        return telling(error).decode()
    return None
