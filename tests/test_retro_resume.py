# ruff: noqa: F811 - fixtures of another file
"""A run that goes on: with what it must share, what may change, and who may write it."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nearest.errors import FolderError, ModelError, SettingError
from nearest.folder import writer_lock
from nearest.retro import RetroDataset, retrofit
from nearest.retro.opening import open_retro
from nearest.retro.passages import Passages
from nearest.retro.runs import MODEL, checkpoints, read_curve, step_of
from nearest.retro.training import TrainingSettings, train
from nearest.retro.training.trainer import arguments_of
from retro_models import CHUNK, stir
from retro_training import QUIET, dataset, fresh_model, in_processes
from test_retro_retrofit import make_base
from test_retro_train import Recorded, frozen, own_seeds, read  # noqa: F401 - fixtures

STEPS = TrainingSettings(max_steps=2, batch_size=2, save_every=1, keep=9)
LONGER = replace(STEPS, max_steps=4)


def with_table(read: Passages, ids: Any) -> Passages:
    data = read.dataset
    table = replace(data.table, ids=ids)
    return Passages(RetroDataset(data.chunks, data.database, table), read.window)


def test_other_neighbours_are_another_run(read: Passages, tmp_path: Path) -> None:
    train(fresh_model(), read, tmp_path / "run", STEPS)
    reversed_ids = read.dataset.table.ids[:, ::-1].copy()
    with pytest.raises(SettingError, match=r"data\.table was \w+, is \w+"):
        train(fresh_model(), with_table(read, reversed_ids), tmp_path / "run", LONGER)
    same = with_table(read, read.dataset.table.ids.copy())
    assert train(fresh_model(), same, tmp_path / "run", LONGER).resumed == 2


def test_other_documents_are_another_run(tmp_path: Path) -> None:
    data = dataset(tmp_path / "db", [[5, 6, 7, 8, 9]] * 4)

    def of(*documents: int) -> Passages:
        some = RetroDataset(data.chunks, data.database, data.table, subset=documents)
        return Passages(some, 8)

    train(fresh_model(), of(0, 1), tmp_path / "run", STEPS)
    with pytest.raises(SettingError, match=r"data\.read was \w+, is \w+"):
        train(fresh_model(), of(2, 3), tmp_path / "run", LONGER)


def test_a_run_goes_on_with_a_newer_transformers(
    read: Passages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(fresh_model(), read, tmp_path / "run", STEPS)
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    assert train(fresh_model(), read, tmp_path / "run", LONGER).resumed == 2


def test_more_than_one_gpu_is_asked_for_by_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert arguments_of(STEPS, tmp_path, torch.device("cuda")).n_gpu == 1
    with pytest.raises(SettingError, match="not on cuda:1: choose another by CUDA_VISIBLE_DEVIC"):
        arguments_of(STEPS, tmp_path, torch.device("cuda:1"))


def test_a_constant_rate_rises_first(read: Passages, tmp_path: Path) -> None:
    settings = replace(LONGER, warmup=2, learning_rate=1.0, clip=0.1)
    train(fresh_model(), read, tmp_path / "run", settings)
    assert [line["learning_rate"] for line in read_curve(tmp_path / "run")] == [0, 0.5, 1, 1]


def test_checkpoints_may_be_made_more_often(read: Passages, tmp_path: Path) -> None:
    train(fresh_model(), read, tmp_path / "run", replace(STEPS, save_every=2))
    train(fresh_model(), read, tmp_path / "run", LONGER)
    assert [step_of(made) for made in checkpoints(tmp_path / "run")] == [2, 3, 4]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_no_shorter_than_it_is(read: Passages, tmp_path: Path, finished: bool) -> None:
    train(fresh_model(), read, tmp_path / "run", STEPS)
    if not finished:
        (tmp_path / "run" / MODEL).rename(tmp_path / "aside")
    with pytest.raises(SettingError, match="has made 2 steps already, more than max_steps 1"):
        train(fresh_model(), read, tmp_path / "run", replace(STEPS, max_steps=1))


def test_places_that_cannot_be_a_run_are_named(read: Passages, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/run"):
        with pytest.raises(FolderError, match=r"cannot be made .*: give --out a folder"):
            train(fresh_model(), read, tmp_path / place, STEPS)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_leaves_the_checkpoints_before(
    read: Passages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    writer = Recorded()
    monkeypatch.setattr("nearest.retro.training.run.open_tensorboard", lambda *_: writer)
    save = torch.save

    def full(thing: Any, path: Any, *rest: Any) -> None:
        if "checkpoint-2" in str(path):
            raise error
        save(thing, path, *rest)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FolderError, match=r"cannot write to .*run"):
        train(fresh_model(), read, tmp_path / "run", STEPS, tensorboard=True)
    assert writer.closed
    assert [step_of(made) for made in checkpoints(tmp_path / "run")] == [1]
    monkeypatch.undo()
    assert train(fresh_model(), read, tmp_path / "run", STEPS).resumed == 1


def test_one_process_writes_a_run_at_a_time(read: Passages, tmp_path: Path) -> None:
    train(fresh_model(), read, tmp_path / "run", STEPS)
    half_written = tmp_path / "run/partial/checkpoint-3"
    half_written.mkdir(parents=True)
    with (
        writer_lock(tmp_path / "run"),
        pytest.raises(FolderError, match="is being written by another process"),
    ):
        train(fresh_model(), read, tmp_path / "run", LONGER)
    assert half_written.exists()
    train(fresh_model(), read, tmp_path / "run", LONGER)
    assert not half_written.exists()


@pytest.mark.slow
def test_hosts_that_see_other_files_do_not_go_on(read: Passages, tmp_path: Path) -> None:
    settings = replace(STEPS, batch_size=1)

    def work(rank: int) -> None:
        train(fresh_model(), read, tmp_path / f"host{rank}", settings)

    def again(rank: int) -> None:
        with pytest.raises(FolderError, match=r"after \[2, 0\] steps: put --out where all hosts"):
            train(fresh_model(), read, tmp_path / f"host{rank}", replace(settings, max_steps=4))

    for step in (work, again):
        for process in in_processes(step, 2):
            process.join(60)
            assert process.exitcode == 0


def stopped_at(step: int) -> Any:
    def stop(report: Any) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    return stop


def test_a_kill_before_the_first_checkpoint_leaves_one_curve(
    read: Passages, tmp_path: Path
) -> None:
    settings = replace(LONGER, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(
            fresh_model(), read, tmp_path / "run", settings, validation=read, report=stopped_at(1)
        )
    train(fresh_model(), read, tmp_path / "run", settings, validation=read)
    assert [line["step"] for line in read_curve(tmp_path / "run")] == [0, 1, 2, 3, 4]


def spoilt(model: torch.nn.Module, step: int) -> Any:
    """A step's report, which comes before its checkpoint, that makes the weights useless."""

    def spoil(report: Any) -> None:
        if report.step == step:
            with torch.no_grad():
                model.get_parameter("lm_head.weight")[3, 0] = torch.nan

    return spoil


def test_a_checkpoint_with_spoilt_weights_is_not_called_good(
    read: Passages, tmp_path: Path
) -> None:
    model = fresh_model()
    with pytest.raises(ModelError, match=r"the last good checkpoint is .*checkpoint-2: begin anew"):
        train(model, read, tmp_path / "run", LONGER, report=spoilt(model, 3))


def test_a_validation_that_is_no_number_ends_the_run(read: Passages, tmp_path: Path) -> None:
    model = fresh_model()
    settings = replace(STEPS, max_steps=1)
    step = torch.optim.AdamW.step

    def spoiling(self: Any, *given: Any, **named: Any) -> Any:
        done = step(self, *given, **named)
        with torch.no_grad():
            model.lm_head.weight[3, 0] = torch.nan
        return done

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", spoiling)
        with pytest.raises(ModelError, match="the validation loss became nan after step 1"):
            train(model, read, tmp_path / "run", settings, validation=read)
    assert not (tmp_path / "run" / MODEL).exists()
    assert not checkpoints(tmp_path / "run")


def test_a_run_that_goes_on_is_read_where_it_stands(read: Passages, tmp_path: Path) -> None:
    """Its model of fewer steps would be taken for its newest."""
    train(fresh_model().float(), read, tmp_path / "run", STEPS)
    model = fresh_model().float()
    with pytest.raises(KeyboardInterrupt):
        train(model, read, tmp_path / "run", LONGER, report=stopped_at(4))
    opened, _ = open_retro(tmp_path / "run", device="cpu")
    there, _ = open_retro(tmp_path / "run/checkpoint-3", device="cpu")
    assert torch.equal(
        opened.get_parameter("lm_head.weight"), there.get_parameter("lm_head.weight")
    )
    train(fresh_model().float(), read, tmp_path / "run", LONGER)
    assert (tmp_path / "run" / MODEL).exists()


def test_checkpointing_computes_the_base_twice() -> None:
    """Nearly all activations are the base's: those after the first new layer are to go."""
    base = make_base("gpt2")
    model = retrofit(base, [1], chunk_size=CHUNK, encoder="own", **QUIET)
    stir(model.adapter)
    calls: list[int] = []
    base.get_submodule("transformer.h.3.attn").register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.arange(2, 2 + 2 * CHUNK)[None]
    neighbours = torch.arange(2, 2 + CHUNK).expand(1, 2, 1, -1)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, neighbour_ids=neighbours).logits.logsumexp(-1).sum().backward()
        return {
            name: weight.grad.clone()
            for name, weight in model.adapter.named_parameters()
            if weight.grad is not None
        }

    model.train()
    plain = gradients()
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    again = gradients()
    assert len(calls) == 3
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
    forwards = [block for block in base.get_submodule("transformer.h") if "forward" in vars(block)]
    assert not forwards
