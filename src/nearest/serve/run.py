"""Run the application with uvicorn, with structured logs and an orderly end."""

import json
import logging
import socket
import time
import warnings
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from nearest.errors import SettingError
from nearest.serve.app import ServeOptions, create_app, create_shard_app
from nearest.serve.guards import LOOPBACK
from nearest.serve.service import Service
from nearest.serve.shelf import Shelf


class JsonLines(logging.Formatter):
    """One JSON object a line; requests are logged without their text."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _Announced(uvicorn.Server):
    """Calls `opened` when its port is open."""

    def __init__(self, config: uvicorn.Config, opened: Callable[[], None]) -> None:
        self._opened = opened
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port."""
        await super().startup(sockets)
        if self.started:
            self._opened()


def _nothing() -> None:
    pass


class Server(_Announced):
    """Ends what is under way within the grace period before the connections are closed."""

    def __init__(
        self,
        service: Service,
        options: ServeOptions,
        host: str,
        port: int,
        opened: Callable[[], None] = _nothing,
    ) -> None:
        self._service = service
        self._grace = options.grace
        super().__init__(_config(create_app(service, options), options, host, port), opened)

    @property
    def failed(self) -> bool:
        """Whether it has not begun, or ended without being told to."""
        return not self.started or self._service.engine.failed

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: when told to, and when nothing can be answered any more."""
        return await super().on_tick(counter) or self._service.engine.failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop taking work, let running answers end, then close."""
        self._service.engine.stop_soon(self._grace)
        await super().shutdown(sockets)


def shard_server(
    shelf: Shelf,
    options: ServeOptions,
    host: str,
    port: int,
    opened: Callable[[], None] = _nothing,
) -> uvicorn.Server:
    """A server of look-ups alone, ready to run."""
    return _Announced(_config(create_shard_app(shelf, options), options, host, port), opened)


def _config(app: FastAPI, options: ServeOptions, host: str, port: int) -> uvicorn.Config:
    check_exposure(host, options.api_key, options.write_key)
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(options.grace) + 5),
        h11_max_incomplete_event_size=1 << 16,
    )


def check_exposure(host: str, api_key: str | None, write_key: str | None = None) -> None:
    """Refuse to serve other machines without a key, and keys that can be guessed (SettingError)."""
    if api_key is None and host not in LOOPBACK:
        raise SettingError(
            f"serving on {host} without an API key would let anyone on the network use the model "
            "and read the memories: give --api-key (or NEAREST_API_KEY), or serve on 127.0.0.1"
        )
    if write_key is not None and write_key == api_key:
        raise SettingError(
            "the write key is the API key, so that everybody who may read may write: give another"
        )
    for name, key in (("API key", api_key), ("write key", write_key)):
        if key is not None and len(key) < 8:
            raise SettingError(f"the {name} is shorter than 8 characters: give a longer one")


def log_to(stream: Any) -> None:
    """Send the server's logs to a stream, as JSON lines; each warning once."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name in ("nearest", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if name == "nearest" else logging.WARNING)
    told: set[str] = set()  # by every version of a memory, and by every request that looks it up

    def log(message: Warning | str, *_: Any) -> None:
        if (text := str(message)) not in told:
            told.add(text)
            logging.getLogger(__name__).warning(text)

    warnings.showwarning = log  # type: ignore[assignment]
