"""Shards that actors of a Ray cluster hold, in place of `nearest serve --shard` on each machine.

An actor answers with the very application that serves shards; Ray brings requests and answers,
where HTTP does elsewhere.
"""

import asyncio
import importlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch

from nearest.build.ray_workers import joined
from nearest.build.workers import Spec
from nearest.errors import NearestError, SettingError, require
from nearest.index.gpu import checked_search_on
from nearest.memory import Memory
from nearest.remote.calls import warm_up
from nearest.remote.servers import Patience, Servers
from nearest.remote.sharded import ShardedMemory
from nearest.serve.app import ServeOptions, create_shard_app
from nearest.serve.errors import of_error
from nearest.serve.service import in_thread
from nearest.serve.shelf import Shelf
from nearest.store.manifest import read_manifest
from nearest.store.opening import open_snapshot
from nearest.store.shard import Shard

_SCHEME = "ray://"
_ANYWHERE = "http://localhost"  # which a server without a key accepts

Answer = tuple[int, list[tuple[str, str]], bytes]  # status, headers, content


def on_ray(
    path: Path,
    address: str | Sequence[str],
    *,
    search_on: str = "cpu",
    actors: int | None = None,
    patience: Patience | None = None,
    wait: float = 30.0,
    partial: bool = False,
) -> ShardedMemory:
    """Open a memory whose segments actors hold; they end with it.

    This process belongs to the cluster from then on, until it ends.

    Args:
        path: the folder, which all nodes see under this path.
        address: "ray://auto" for the cluster that this machine belongs to, "ray://HOST:PORT", or
            "ray://local" for one of this machine alone.
        search_on: "cpu", or "gpu": each actor takes one.
        actors: how many, each with the CPUs that this process has threads; as many as the cluster
            has room for, one a segment at most, when not given.
        patience, wait, partial: as in `ShardedMemory`.

    Raises:
        FolderError: it is no memory.
        SettingError: there is no such cluster, or it has no room for so many actors.
        RemoteError: a shard does not answer.
    """
    if not isinstance(address, str) or not address.startswith(_SCHEME):
        raise SettingError("give a list of addresses, one of each shard, or ray://ADDRESS")
    require("fastapi", "serve")
    require("prometheus_client", "serve")
    place = path.resolve()
    spec = Spec(threads=torch.get_num_threads(), gpus=int(search_on == "gpu"))
    segments = len(read_manifest(place).segments)
    room = joined(address.removeprefix(_SCHEME), spec)
    count = min(room, max(1, segments)) if actors is None else actors
    if not 1 <= count <= room:
        raise SettingError(
            f"{count} actors are asked for, and the cluster has room for 1 to {room}, with "
            f"{spec.threads} CPUs{' and a GPU' * spec.gpus} each: ask for as many, or for fewer "
            "threads (OMP_NUM_THREADS)"
        )
    ray: Any = importlib.import_module("ray")
    start = ray.remote(
        num_cpus=spec.threads,
        num_gpus=spec.gpus,
        max_restarts=-1,
        max_task_retries=0,
        scheduling_strategy="SPREAD",
    )(ShardActor)
    servers = [
        Servers(
            address,
            patience=patience,
            transport=_ToActor(start.remote(str(place), f"{number}/{count}", search_on)),
        )
        for number in range(1, count + 1)
    ]
    opened = ShardedMemory(servers, patience=patience, wait=wait, partial=partial)
    opened.path = Path(address) / place.relative_to("/")  # as commands take it
    return opened


class ShardActor:
    """What an actor runs: it opens its shard when it is first asked."""

    def __init__(self, path: str, shard: str, search_on: str) -> None:
        self._path, self._shard, self._search_on = Path(path), Shard.parse(shard), search_on
        self._app: httpx.ASGITransport | None = None
        self._opening = asyncio.Lock()

    async def respond(self, method: str, target: str, content: bytes) -> Answer:
        """Answer a request as a server does."""
        try:
            async with self._opening:
                if self._app is None:
                    self._app = await in_thread(self._opened)
        except NearestError as error:
            told = of_error(error).response()
            return told.status_code, told.headers.items(), bytes(told.body)
        request = httpx.Request(method, _ANYWHERE + target, content=content)
        answer = await self._app.handle_async_request(request)
        return answer.status_code, answer.headers.multi_items(), await answer.aread()

    def _opened(self) -> httpx.ASGITransport:
        place = checked_search_on(self._search_on)
        memory = Memory(open_snapshot(self._path, None, self._shard), place)
        warm_up(memory)
        return httpx.ASGITransport(create_shard_app(Shelf([memory]), ServeOptions()))


class _ToActor(httpx.BaseTransport):
    """Brings the requests of one client to an actor, which ends when the client is closed.

    Ray would start a cluster for a process that has left its own, and is asked nothing then.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._ray: Any = importlib.import_module("ray")

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The actor's answer (httpx.TransportError where there is none)."""
        if not self._ray.is_initialized():
            raise httpx.ConnectError("this process has left the cluster")
        target, seconds = request.url.raw_path.decode(), request.extensions["timeout"]["read"]
        try:
            asked = self._actor.respond.remote(request.method, target, request.read())
            status, headers, content = self._ray.get(asked, timeout=seconds)
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().partition("\n")[0]
            raise httpx.ConnectError(f"{type(error).__name__}: {reason}") from error
        return httpx.Response(status, headers=headers, content=content)

    def close(self) -> None:
        """End the actor."""
        if self._ray.is_initialized():
            with suppress(Exception):  # of a cluster that is gone
                self._ray.kill(self._actor)
