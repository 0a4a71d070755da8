"""What stands before every route: the key, the host, bodies as JSON, and clients that stop reading.

Pure ASGI: nothing here holds an answer back or reads a body.
"""

import asyncio
import base64
import binascii
import hmac
import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nearest.serve.errors import ApiError
from nearest.serve.metrics import Metrics

log = logging.getLogger("nearest.serve.access")
errors = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = ("/health",)
_PAGE = ("/", "/page/{name}")  # whose address people pass on, with whatever others add to it


class KeyGuard:
    """Ask for the API key on every route but `/health`.

    The key comes as a bearer token, or as the password of HTTP's basic authentication, for which
    browsers have a dialogue. Without a key only requests that name a loopback host are answered, so
    that no web page can reach the server under a name of its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        write_key: str | None = None,
        hosts: Sequence[str] = LOOPBACK,
    ) -> None:
        self._app = app
        self._key = None if key is None else key.encode()
        self._write_key = None if write_key is None else write_key.encode()
        self._hosts = tuple(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed."""
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            headers = Headers(scope=scope)
            reads = scope["method"] in ("GET", "HEAD")
            writes = not reads and scope["path"].startswith("/v1/nearest/")
            refusal = self._refusal(headers, writes=writes)
            if refusal is None and not reads:
                refusal = _not_from_page(headers)
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, *, writes: bool) -> ApiError | None:
        """Why a request is not allowed; the write key opens everything."""
        given = _given_key(headers.get("authorization", ""))
        may_write = self._write_key is not None and hmac.compare_digest(given, self._write_key)
        if self._key is None and not may_write:
            host = headers.get("host", "")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.strip("[]") not in self._hosts:
                return ApiError(
                    403,
                    f"the host {name!r} is not this server's: call it by a loopback address, or "
                    "start it with --api-key to serve other hosts",
                )
        may_read = self._key is None or hmac.compare_digest(given, self._key)
        if may_write or (may_read and not (writes and self._write_key is not None)):
            return None
        which = "write key" if writes and self._write_key is not None else "API key"
        return ApiError(
            401,
            f"the {which} is missing or wrong: send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Basic realm="nearest", charset="UTF-8"'},
        )


def _given_key(authorization: str) -> bytes:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")  # as headers are read
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _not_from_page(headers: Headers) -> ApiError | None:
    """Refuse what a foreign web page can make a browser send without asking."""
    if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
        return ApiError(403, "requests from other sites' pages are refused")
    return None


async def known_parameters(request: Request) -> None:
    """Refuse a parameter in the address that its route does not have (ApiError)."""
    route = request.scope["route"]
    if route.path in _PAGE:
        return
    known = {one.alias for one in route.dependant.query_params}
    if unknown := [name for name in request.query_params if name not in known]:
        raise ApiError(
            400,
            f"the parameter {unknown[0]!r} in the address is not supported: leave it out",
            param=unknown[0],
            code="unsupported_parameter",
        )


class BodyLimit:
    """Refuse bodies that are too large with 413, and those that come too slowly with 408."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what fits."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced, read = Headers(scope=scope).get("content-length", ""), 0
        message = f"the body is larger than this server's limit of {self._most:,} bytes"
        if announced.isdecimal() and int(announced) > self._most:
            await ApiError(413, message).response()(scope, receive, send)
            return

        until, whole = asyncio.get_running_loop().time() + self._seconds, False

        async def receive_within() -> Message:
            nonlocal read, whole
            try:
                async with asyncio.timeout_at(None if whole else until):
                    part = await receive()
            except TimeoutError as error:
                raise HTTPException(
                    408,
                    f"the body did not come within {self._seconds:g} s: send it again",
                    {"Connection": "close"},
                ) from error
            whole = not part.get("more_body", False)
            read += len(part.get("body", b""))
            if read > self._most:
                raise HTTPException(413, message)
            return part

        await self._app(scope, receive_within, send)


class SlowClients:
    """Close the connection of a client that does not take its answer for too long."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with a limit to each piece's sending."""

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                log.warning(
                    "a client stopped reading for %g s: its connection is closed", self._seconds
                )
                raise

        await self._app(scope, receive, send_in_time if scope["type"] == "http" else send)


class AccessLog:
    """One line a request, with its route, status and time, and none of its text."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and note how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, untouched = time.perf_counter(), 500, True

        async def noting(message: Message) -> None:
            nonlocal status, untouched
            untouched = False
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if not untouched:  # the connection is closed: half an answer must not seem whole
                raise
            errors.error("a request failed", exc_info=error)
            failed = ApiError(500, "the server failed at this request; its log says why")
            await failed.response()(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")  # never what a client made up
            self._metrics.answers.labels(route, str(status)).inc()
            log.info(
                "request",
                extra={
                    "fields": {
                        "method": scope["method"],
                        "route": route,
                        "status": status,
                        "ms": round(1000 * (time.perf_counter() - started), 1),
                    }
                },
            )
