"""Tiny corpora with neighbours, and models to train on them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from nearest.retro import NeighbourTable, RetroDataset, RetroForCausalLM
from nearest.retro.data.stages import TableOptions
from nearest.retro.passages import Passages
from retro_data import database, documents
from retro_models import VARIANTS, tiny_config

QUIET = {f"{kind}_dropout": 0.0 for kind in ("attention", "residual", "feed_forward")}


def dataset(path: Path, texts: list[list[int]] | None = None, **options: Any) -> RetroDataset:
    """Documents that are their own database, with two neighbours of each chunk."""
    made = database(path, documents(8) if texts is None else texts)
    table = NeighbourTable.build(made, None, path / "neighbours", options=TableOptions(4))
    return RetroDataset(made.chunks, made.chunks, table, **options)


def passages(path: Path, window: int = 16, **options: Any) -> Passages:
    return Passages(dataset(path), window, **options)


def fresh_model(name: str = "norlund", seed: int = 0, **settings: Any) -> RetroForCausalLM:
    """In float64, so that sums in another order stay equal to 1e-12."""
    preset, changes = VARIANTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RetroForCausalLM(tiny_config(preset, **{**QUIET, **changes, **settings}))
    return model.double()


def in_processes(work: Callable[[int], None], count: int = 1) -> list[BaseProcess]:
    """Start forked processes, which have torch loaded already, as `torchrun` would start them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def run(rank: int) -> None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
        own = {"RANK": rank, "LOCAL_RANK": rank}
        if count > 1:
            os.environ.update({name: str(value) for name, value in {**shared, **own}.items()})
        work(rank)
        if count > 1:
            torch.distributed.destroy_process_group()

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for process in started:
        process.start()
    return started
