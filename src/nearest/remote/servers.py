"""One service behind one or more addresses: time-outs, retries, and servers that come back.

A server that fails several times in a row is left alone for a while (a circuit breaker), and then
tried with one request. Requests only read, so that each may be sent again, to whichever server.
"""

import random
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from nearest.errors import FolderError, NearestError, RemoteError, SettingError

_TRY_ELSEWHERE = (429, 500, 502, 503, 504)
_LONGEST_WAIT = 5.0  # seconds, whatever a server asks for in Retry-After


@dataclass(frozen=True)
class Patience:
    """How long a client waits, and how often it tries.

    Attributes:
        connect: seconds for a connection.
        answer: seconds without a byte of the answer.
        tries: of a request, at all servers together.
        pause: seconds before it is sent again; doubled each time, and varied by half at random so
            that many clients do not come back at once.
        failures: in a row, after which a server is left alone.
        rest: seconds for which it is; doubled with every failure after that, up to a minute.
    """

    connect: float = 2.0
    answer: float = 30.0
    tries: int = 4
    pause: float = 0.05
    failures: int = 3
    rest: float = 0.5

    def __post_init__(self) -> None:
        if self.tries < 1 or self.failures < 1:
            raise SettingError("tries and failures must be at least 1")
        if min(self.connect, self.answer) <= 0 or min(self.pause, self.rest) < 0:
            raise SettingError("times must be positive")


@dataclass
class _Server:
    url: str
    failed: int = 0  # times in a row
    rests_until: float = field(default=0.0)  # of time.monotonic()


class Servers:
    """Sends requests to the first server that answers; any thread may."""

    def __init__(
        self,
        urls: str | Sequence[str],
        api_key: str | None = None,
        patience: Patience | None = None,
        rng: random.Random | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            urls: such as "http://127.0.0.1:8000"; several hold the same.
            api_key: of all of them.
            patience: how long to wait.
            rng: of the pauses' lengths.
            transport: brings requests where HTTP does not; it is closed with this.
        """
        named = [urls] if isinstance(urls, str) else list(urls)
        over_http = all(url.startswith(("http://", "https://")) for url in named)
        if not named or not (transport or over_http):
            raise SettingError("give the address of a server, such as http://127.0.0.1:8000")
        self._servers = [_Server(url.rstrip("/")) for url in named]
        self._patience = patience or Patience()
        self._rng = rng or random.Random()
        self._lock = threading.Lock()
        self._current = 0
        self._problem = ""  # what was the matter last
        self._mend = "try again in a moment"
        if transport is None:
            self._mend = f"start one with `nearest serve`, or {self._mend}"
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(self._patience.answer, connect=self._patience.connect),
            trust_env=False,  # no proxy stands between machines that share a memory
            transport=transport,
        )
        self._closing = weakref.finalize(self, self._client.close)

    def __repr__(self) -> str:
        return f"<Servers {', '.join(server.url for server in self._servers)}>"

    @property
    def address(self) -> str:
        """Of the first server, for messages."""
        return self._servers[0].url

    def close(self) -> None:
        """Close the connections; otherwise they are closed when nobody uses this any more."""
        self._closing()

    def wake(self, within: float = 1.0) -> None:
        """Let servers rest no longer than so many seconds from now: somebody waits for them."""
        soon = time.monotonic() + within
        with self._lock:
            for server in self._servers:
                server.rests_until = min(server.rests_until, soon)

    def get(self, path: str, params: Mapping[str, Any]) -> httpx.Response:
        """A page; see `post`."""
        return self._send("GET", path, params, None)

    def post(self, path: str, params: Mapping[str, Any], content: bytes) -> httpx.Response:
        """The answer to a request.

        Raises:
            RemoteError: no server answers.
            FolderError: the servers hold another snapshot than the one that was asked for.
            SettingError: the request itself was refused.
        """
        return self._send("POST", path, params, content)

    def _send(
        self, method: str, path: str, params: Mapping[str, Any], content: bytes | None
    ) -> httpx.Response:
        for number in range(self._patience.tries):
            server, wait = self._next()
            if server is None:
                break
            if number and wait:
                time.sleep(self._pause(number - 1))
            try:
                response = self._client.request(
                    method, server.url + path, params=dict(params), content=content
                )
            except httpx.HTTPError as error:
                self._failed(server, f"{type(error).__name__} {error}")
                continue
            if response.status_code not in _TRY_ELSEWHERE:
                self._answered(server)
                if response.is_success:
                    return response
                raise _refusal(server.url, response)
            said = f"{response.status_code} {_message(response)}"
            if response.status_code == 429:  # it is well, and busy
                self._problem = f"{server.url}: {said}"
                time.sleep(min(_LONGEST_WAIT, _retry_after(response)))
                self._turn()
            else:
                self._failed(server, said)
        raise RemoteError(f"no server answers ({self._problem}): {self._mend}")

    def _next(self) -> tuple[_Server | None, bool]:
        """The server to ask, None if all rest; and whether it has failed, so that one waits."""
        now = time.monotonic()
        with self._lock:
            for offset in range(len(self._servers)):
                number = (self._current + offset) % len(self._servers)
                server = self._servers[number]
                if server.rests_until <= now:
                    self._current = number
                    if server.failed >= self._patience.failures:
                        # One request tries it; the others go elsewhere meanwhile.
                        server.rests_until = now + self._patience.connect
                    return server, server.failed > 0
            return None, False

    def _turn(self) -> None:
        with self._lock:
            self._current = (self._current + 1) % len(self._servers)

    def _failed(self, server: _Server, problem: str) -> None:
        with self._lock:
            self._problem = f"{server.url}: {problem}".rstrip()
            server.failed += 1
            beyond = server.failed - self._patience.failures
            if beyond >= 0:
                rest = min(60.0, self._patience.rest * 2 ** min(beyond, 10))
                server.rests_until = time.monotonic() + rest * self._rng.uniform(0.5, 1.5)
        self._turn()

    def _answered(self, server: _Server) -> None:
        with self._lock:
            server.failed, server.rests_until = 0, 0.0

    def _pause(self, times: int) -> float:
        pause: float = self._patience.pause * 2**times * self._rng.uniform(0.5, 1.5)
        return pause


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase


def _refusal(url: str, response: httpx.Response) -> NearestError:
    kind = FolderError if response.status_code in (404, 409) else SettingError
    return kind(f"{url} answers {response.status_code}: {_message(response)}")


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", "1")))
    except ValueError:
        return 1.0
