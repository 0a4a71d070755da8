"""Workers as tasks of a Ray cluster: they see the folder on a file system that all nodes share.

Ray starts them and says when one has ended; the journal says what is done. Nothing but what a
worker is told goes through its object store.
"""

import importlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
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
def ray_workers(folder: Path, spec: Spec, address: str) -> Iterator[tuple[Start, int]]:
    """How workers are started on a cluster, and how many it has room for.

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
            yield start, _room(ray.nodes(), spec)
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


def _room(nodes: list[dict[str, Any]], spec: Spec) -> int:
    """How many workers so large the nodes that are alive have room for."""
    needs = {"CPU": spec.threads, **({"GPU": spec.gpus} if spec.gpus else {})}
    room = sum(
        min(int(node["Resources"].get(kind, 0)) // count for kind, count in needs.items())
        for node in nodes
        if node["Alive"]
    )
    if not room:
        told = " and ".join(f"{count} {kind}" for kind, count in needs.items())
        raise SettingError(
            f"no node of this cluster has {told}, which a worker takes: give workers fewer threads "
            "(OMP_NUM_THREADS), or the cluster larger nodes"
        )
    return room


def _meant(error: BaseException) -> BaseException:
    """The error that a worker ended with, or that it ended unasked."""
    cause = getattr(error, "cause", None)  # of an error that was raised in a task
    if cause is not None:
        return meant(cause)
    return WorkerEndedError(str(error).strip().partition("\n")[0])
