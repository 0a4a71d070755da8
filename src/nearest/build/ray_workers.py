"""Workers as tasks of a Ray cluster: they see the folder on a file system that all nodes share.

Ray starts them and says when one has ended; the journal says what is done. Nothing but what a
worker is told goes through its object store.
"""

import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from nearest.build.workers import Spec, Start, WorkerEndedError, meant
from nearest.errors import SettingError, require

LOCAL = "local"  # a cluster of this machine alone, which ends with the work
_STORE = 80_000_000  # bytes, about the least that Ray takes
_ANSWER = 10.0  # seconds in which a cluster answers; Ray itself would try for minutes


@contextmanager
def ray_workers(
    folder: Path, spec: Spec, address: str
) -> Iterator[tuple[Start, int, Callable[[], str | None]]]:
    """How workers are started on a cluster, how many it has room for, and what they wait for.

    What runs when the context ends, is ended; the cluster stays.

    Args:
        folder: where they work; every node must see it under this path.
        spec: what workers are told; each takes as many CPUs as it has threads.
        address: as for `connected`.

    Raises:
        SettingError: there is no such cluster, or none of its nodes has room for a worker.
    """
    with connected(address, spec):
        ray: Any = importlib.import_module("ray")
        options: dict[str, Any] = {
            "num_cpus": spec.threads,
            "num_gpus": spec.gpus,
            "max_retries": 0,
        }
        task, started, place = ray.remote(**options)(_work), [], folder.resolve()

        def start(token: str) -> "Future[None]":
            done: Future[None] = Future()

            def ended(future: "Future[None]") -> None:
                error = future.exception()
                done.set_result(None) if error is None else done.set_exception(_meant(error))

            started.append(task.remote(spec, place, token))
            started[-1].future().add_done_callback(ended)
            return done

        try:
            # later it is these workers that hold what is taken
            before = _taken(ray, spec)
            yield start, _room(ray.nodes(), spec), lambda: before and _taken(ray, spec)
        finally:
            for worker in started:
                with suppress(Exception):  # of a cluster that is gone, whose error is to be told
                    ray.cancel(worker, force=True)


@contextmanager
def connected(address: str, spec: Spec) -> Iterator[None]:
    """Belong to a cluster with room for a worker, unless this process belongs to one already.

    Args:
        address: "auto" for the cluster that this machine belongs to, or its address; "local" for a
            cluster of this machine alone.
        spec: what a worker is told.

    Raises:
        SettingError: there is no such cluster, or none of its nodes has room for a worker.
    """
    ray = _imported(address)
    if ray.is_initialized():
        joined(address, spec)
        yield
        return
    with redirect_stdout(sys.stderr):  # where Ray prints what becomes of its nodes
        joined(address, spec)
        try:
            yield
        finally:
            ray.shutdown()


def joined(address: str, spec: Spec) -> int:
    """Belong to a cluster until this process ends; how many workers it has room for.

    Arguments and errors are those of `connected`.
    """
    ray = _imported(address)
    if ray.is_initialized():
        return _room(ray.nodes(), spec)
    with redirect_stdout(sys.stderr):
        _join(ray, address)
        try:
            return _room(ray.nodes(), spec)
        except SettingError:
            ray.shutdown()
            raise


def _imported(address: str) -> Any:
    require("ray", "ray")
    # Read when ray is imported; the second keeps a cluster of this machine on the loopback.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return importlib.import_module("ray")


def _work(spec: Spec, folder: Path, token: str) -> None:
    spec.work(folder, token)


def _join(ray: Any, address: str) -> None:
    own: dict[str, Any] = {
        "object_store_memory": _STORE,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        host, _, port = address.rpartition(":")
        if host and "/" not in address:
            socket.create_connection((host, int(port)), _ANSWER).close()
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address == LOCAL else {}),
        )
    except Exception as error:  # Ray's own kinds; a plain one where it does not start
        reason = str(error).strip().partition("\n")[0]
        raise SettingError(
            f"no Ray cluster answers at {address!r} ({reason}): start one (`ray start --head`) "
            "or join one on this machine, or use --ray local for this machine alone"
        ) from error


def _needs(spec: Spec) -> dict[str, int]:
    """What a worker takes, by Ray's names."""
    return {"CPU": spec.threads, **({"GPU": spec.gpus} if spec.gpus else {})}


def _room(nodes: list[dict[str, Any]], spec: Spec) -> int:
    """How many workers so large the nodes that are alive have room for."""
    needs, alive = _needs(spec), [node["Resources"] for node in nodes if node["Alive"]]
    room = sum(min(int(one.get(kind, 0)) // needs[kind] for kind in needs) for one in alive)
    if room:
        return room
    if spec.gpus and not any(one.get("GPU", 0) >= spec.gpus for one in alive):
        raise SettingError(
            "no node of this cluster has a GPU, which a worker takes: stay on the CPU (--device "
            "cpu, --search-on cpu), or give the cluster nodes with GPUs"
        )
    told = " and ".join(f"{count} {kind}" for kind, count in needs.items())
    raise SettingError(
        f"no node of this cluster has {told}, which a worker takes: give workers fewer threads "
        "(OMP_NUM_THREADS), or the cluster larger nodes"
    )


def _taken(ray: Any, spec: Spec) -> str | None:
    """What keeps workers from beginning: others hold what they take. None where they do not."""
    free, whole = ray.available_resources(), ray.cluster_resources()
    for kind, count in _needs(spec).items():
        if (left := int(free.get(kind, 0))) < count:
            return (
                f"no worker has begun: of the {int(whole.get(kind, 0))} {kind}s of the Ray cluster "
                f"{left} are free, and a worker takes {count}. They wait for others to end; actors "
                "that hold a memory end with the process that opened it"
            )
    return None


def _meant(error: BaseException) -> BaseException:
    """The error that a worker ended with, or that it ended unasked."""
    cause = getattr(error, "cause", None)  # of an error that was raised in a task
    if cause is not None:
        return meant(cause)
    return WorkerEndedError(str(error).strip().partition("\n")[0])
