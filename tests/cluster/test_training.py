# ruff: noqa: F811 - fixtures of another file
"""A training that several hosts share."""

import sys
from pathlib import Path

import pytest

from hosts import Host, hosts, needs_hosts, running  # noqa: F401 - a fixture
from nearest.retro.runs import read_curve
from retro_training import QUIET
from test_cli_retro import bert, prepared  # noqa: F401 - fixtures
from test_cli_retro_train import CHANGES

pytestmark = [pytest.mark.long, needs_hosts]


def test_training_on_two_hosts(prepared: Path, hosts: list[Host], tmp_path: Path) -> None:
    """The losses of one process with as many passages a step."""
    train = ["-m", "nearest", "retro", "train", str(prepared), *CHANGES, "--log-every", "1"]
    train += [word for name in QUIET for word in ("--set", f"{name}=0.0")]
    train += ["--max-steps", "6", "--lr", "0.01", "--device", "cpu"]
    one, two = tmp_path / "one", tmp_path / "two"
    shared = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    shared += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29400"]
    own = [*train, "--out", str(two), "--batch-size", "2"]
    calls = [[sys.executable, *train, "--out", str(one), "--batch-size", "4"]]
    for host in hosts:
        # Their names are this machine's, so that torchrun cannot tell which has the endpoint.
        place = ["--rdzv-conf", f"is_host={int(host is hosts[0])}", "--local-addr", host.address]
        calls += [host.command(sys.executable, *shared, *place, *own)]
    with running(calls[0]) as started:
        assert started[0].wait() == 0
    with running(*calls[1:]) as started:
        assert [process.wait() for process in started] == [0, 0]
    curves = [[row["train_loss"] for row in read_curve(out)] for out in (one, two)]
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
