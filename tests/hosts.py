"""Hosts of tests: network namespaces with addresses of their own, whose links go down and up.

They need root and iproute2, and share this machine's disk as hosts share a file system.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need root and iproute2",
)


class Host:
    """A network namespace: its name, its address, and the link that joins it to the others."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def link(self, state: str) -> None:
        """Up or down."""
        ip("link", "set", self.name, state)

    def command(self, *words: str | Path) -> list[str]:
        """A command that runs there."""
        return ["ip", "netns", "exec", self.name, *map(str, words)]


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces cannot be made here: ip {' '.join(words)}: {done.stderr}")


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts on a bridge with this one, which has the first address of their network."""
    mark = f"h{os.getpid()}"
    network = f"10.77.{os.getpid() % 250}"
    with ExitStack() as stack:

        def made(*words: str, undo: tuple[str, ...]) -> None:
            ip(*words)
            stack.callback(subprocess.run, ["ip", *undo], check=False, capture_output=True)

        made("link", "add", f"{mark}b", "type", "bridge", undo=("link", "del", f"{mark}b"))
        ip("addr", "add", f"{network}.1/24", "dev", f"{mark}b")
        ip("link", "set", f"{mark}b", "up")
        found = []
        for n in (11, 12):
            host = Host(f"{mark}n{n}", f"{network}.{n}")
            made("netns", "add", host.name, undo=("netns", "del", host.name))
            peer = ("peer", "name", "eth0", "netns", host.name)
            made("link", "add", host.name, "type", "veth", *peer, undo=("link", "del", host.name))
            ip("link", "set", host.name, "master", f"{mark}b", "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            found.append(host)
        yield found


@contextmanager
def running(*commands: list[str]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "eth0"  # by which hosts speak to each other in training
    started = [
        subprocess.Popen(one, env=environment, stdout=subprocess.DEVNULL) for one in commands
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def within(seconds: float, met: Callable[[], Any]) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
