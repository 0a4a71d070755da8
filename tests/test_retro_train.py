"""Training: the loss of one joined batch, exact resume, whole checkpoints, early ends."""

import gc
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nearest.errors import FolderError, ModelError, SettingError
from nearest.retro import RetroForCausalLM, retrofit
from nearest.retro.loss import IGNORED
from nearest.retro.passages import Course, Passages, next_labels
from nearest.retro.runs import PARTIAL, checkpoints, publish, read_curve
from nearest.retro.training import OPTIMIZERS, TrainingSettings, train
from nearest.retro.training import reports as reports_module
from nearest.retro.training.trainer import RetroTrainer, optimizer_of
from retro_models import CHUNK, VARIANTS, stir
from retro_training import QUIET, dataset, fresh_model, in_processes, passages
from test_retro_retrofit import make_base

DROPOUT = dict.fromkeys(QUIET, 0.2)
OF_THE_FITTED = {"attention_dropout": 0.2, "residual_dropout": 0.2}
SHORT = TrainingSettings(max_steps=6, batch_size=2, save_every=2, schedule="cosine", warmup=2)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Passages:
    return passages(tmp_path_factory.mktemp("data") / "db")


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """A Trainer collects garbage when it starts: not, each time, all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def own_seeds() -> Iterator[None]:
    """A Trainer sets the seed of all: tests after these are to have their own."""
    with torch.random.fork_rng():
        yield


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train_loss"] for line in read_curve(run) if "train_loss" in line}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def joined_loss(model: RetroForCausalLM, course: Course, items: range) -> Tensor:
    """Each passage read alone and without padding; all its tokens' losses, over their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for place in items:
        item = course[place]
        ids = item["neighbour_ids"][None, : model.retro_config.chunks(len(item["input_ids"]))]
        logits = model(item["input_ids"][None], neighbour_ids=ids).logits[0]
        labels = next_labels(item["labels"][None])[0]
        seen = labels != IGNORED
        total = total - logits.log_softmax(-1)[seen].gather(1, labels[seen][:, None]).sum()
        count += int(seen.sum())
    return total / count


@pytest.mark.parametrize(
    ("name", "shift"), [*((name, True) for name in sorted(VARIANTS)), ("norlund", False)]
)
def test_the_loss_is_that_of_the_joined_batch(name: str, shift: bool, tmp_path: Path) -> None:
    """Passages of 2 to 16 tokens, of long documents too, padded, in four batches of a step."""
    data = dataset(tmp_path / "db")
    read = Passages(data, 16, 8)
    settings = TrainingSettings(max_steps=1, batch_size=2, accumulate=4, seed=5, clip=0)
    model, plain = fresh_model(name, shift_labels=shift), fresh_model(name)
    expected = joined_loss(plain, Course(read, 5, 8), range(8))
    expected.backward()
    result = train(model, read, tmp_path / "run", settings)
    assert result.train_loss == pytest.approx(expected.item(), abs=1e-12)
    optimizer = optimizer_of(plain, OPTIMIZERS["norlund"])
    optimizer.step()
    after = weights(plain)
    for weight, value in weights(model).items():
        torch.testing.assert_close(value, after[weight], rtol=0, atol=1e-9)


def test_plain_trainers_count_the_scored_tokens_too(tmp_path: Path) -> None:
    """transformers counts labels[1:]; unshifted labels, −100 where nothing is scored, are right."""
    read = Passages(dataset(tmp_path / "db"), 16, 8)
    settings = TrainingSettings(max_steps=1, batch_size=4)
    trainer = RetroTrainer(
        fresh_model(), Course(read, 0, 4), _collate(), settings, tmp_path / "run"
    )
    batch = next(iter(trainer.get_train_dataloader()))
    ours = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    theirs = super(RetroTrainer, trainer)._get_num_items_in_batch([batch], torch.device("cpu"))
    assert int(ours) == int(theirs) == int((batch["labels"][:, 1:] != IGNORED).sum()) > 0


def _collate() -> Any:
    from nearest.retro.data.dataset import Collate

    return Collate(0, CHUNK)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_the_unbroken_one(read: Passages, tmp_path: Path, workers: int) -> None:
    settings = replace(SHORT, neighbour_dropout=0.3, shuffle_neighbours=True, workers=workers)
    seen: dict[str, list[list[int]]] = {}

    def run(name: str, stop: int | None = None) -> RetroForCausalLM:
        model = fresh_model(**DROPOUT)
        batches = seen.setdefault(name, [])
        compute = RetroTrainer.compute_loss

        def noted(self: RetroTrainer, model: Any, inputs: Any, **named: Any) -> Tensor:
            if stop is not None and self.state.global_step == stop:
                raise KeyboardInterrupt
            batches.append(inputs["documents"].tolist())
            return compute(self, model, inputs, **named)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(RetroTrainer, "compute_loss", noted)
            train(model, read, tmp_path / name, settings, validation=read)
        return model

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("broken", stop=5)  # the checkpoint is of step 4
    again = run("broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    without_speed = [
        [{**line, "tokens_per_second": None} for line in read_curve(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert without_speed[0] == without_speed[1]
    assert seen["broken"] == seen["whole"][:5] + seen["whole"][4:]
    for weight, value in weights(whole).items():
        assert torch.equal(weights(again)[weight], value)


@pytest.mark.slow
def test_a_finished_run_stays_and_a_constant_one_can_go_on(
    read: Passages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SHORT, schedule="constant")
    train(fresh_model(), read, tmp_path / "run", settings)
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    given = fresh_model(seed=9)
    result = train(given, read, tmp_path / "run", settings)
    assert (result.resumed, result.train_loss) == (6, losses(tmp_path / "run")[6])
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before
    stored = RetroForCausalLM.from_pretrained(tmp_path / "run/model")
    assert torch.equal(given.lm_head.weight, stored.lm_head.weight)
    longer = train(fresh_model(), read, tmp_path / "run", replace(settings, max_steps=8))
    assert longer.resumed == 6
    whole = train(fresh_model(), read, tmp_path / "whole", replace(settings, max_steps=8))
    assert longer.train_loss == whole.train_loss
    train(fresh_model(), read, tmp_path / "falling", SHORT)
    with pytest.raises(SettingError, match=r"settings\.max_steps was 6, is 7"):
        train(fresh_model(), read, tmp_path / "falling", replace(SHORT, max_steps=7))


def test_a_run_of_before_a_setting_came_goes_on_where_it_has_its_default(
    read: Passages, tmp_path: Path
) -> None:
    train(fresh_model(), read, tmp_path, replace(SHORT, schedule="constant", max_steps=2))
    path = tmp_path / "settings.json"
    record = json.loads(path.read_text())
    assert record["model"]["config"].pop("encoder") == "own"
    path.write_text(json.dumps(record))
    train(fresh_model(), read, tmp_path, replace(SHORT, schedule="constant", max_steps=4))
    assert len(losses(tmp_path)) == 4
    del record["model"]["config"]["decoder_dim"]  # which has not its default
    path.write_text(json.dumps(record))
    with pytest.raises(SettingError, match=r"model\.config\.decoder_dim was None"):
        train(fresh_model(), read, tmp_path, replace(SHORT, schedule="constant", max_steps=4))


def test_a_resume_with_other_settings_names_all_differences(read: Passages, tmp_path: Path) -> None:
    train(fresh_model(), read, tmp_path / "run", replace(SHORT, max_steps=2))
    changed = replace(SHORT, max_steps=2, batch_size=3, learning_rate=0.5)
    with pytest.raises(SettingError) as error:
        train(fresh_model(decoder_ffn_dim=44), read, tmp_path / "run", changed)
    for said in (
        "model.config.decoder_ffn_dim was 40, is 44",
        "settings.learning_rate was None, is 0.5",
        "settings.passages_a_step was 2, is 3",
    ):
        assert said in str(error.value)
    # as many passages a step in another way are the same run
    same = replace(SHORT, max_steps=2, batch_size=1, accumulate=2)
    assert train(fresh_model(), read, tmp_path / "run", same).resumed == 2


def test_a_folder_of_something_else_is_left_alone(read: Passages, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FolderError, match="exists and is no training run"):
        train(fresh_model(), read, tmp_path, SHORT)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_old_checkpoints_are_dropped(read: Passages, tmp_path: Path) -> None:
    train(fresh_model(), read, tmp_path / "run", replace(SHORT, max_steps=7, keep=2))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-6", "checkpoint-7"]
    assert not (tmp_path / "run" / PARTIAL).exists()


@pytest.mark.parametrize("missing", ["model", "checkpoint-6"])
def test_a_kill_while_publishing_leaves_whole_folders(
    read: Passages, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every folder that has its name is whole: what is written stands in another."""
    expected = train(fresh_model(), read, tmp_path / "whole", SHORT)

    def killed(run: Path, name: str, keep: int | None = None) -> None:
        if name == missing:
            raise KeyboardInterrupt
        publish(run, name, keep)

    monkeypatch.setattr("nearest.retro.training.trainer.publish", killed)
    with pytest.raises(KeyboardInterrupt):
        train(fresh_model(), read, tmp_path / "run", SHORT)
    assert (tmp_path / "run" / PARTIAL / missing).exists()
    assert not (tmp_path / "run" / missing).exists()
    monkeypatch.undo()
    result = train(fresh_model(), read, tmp_path / "run", SHORT)
    assert result.train_loss == expected.train_loss
    assert (tmp_path / "run/model/config.json").exists()


def killed_at_random(read: Passages, run: Path, times: int, processes: int) -> None:
    """Start it, kill it after up to the time of a whole run, as often as that; then let it end."""
    settings = replace(SHORT, max_steps=12)
    moments = random.Random(run.name)

    def work(_: int) -> None:
        train(fresh_model(**DROPOUT), read, run, replace(settings, batch_size=2 // processes))

    for _ in range(times):
        started = in_processes(work, processes)
        time.sleep(moments.uniform(0.3, 2.5))
        os.kill(started[-1].pid or 0, signal.SIGKILL)
        started[-1].join()
        for other in started[:-1]:  # which waits for the other, or finds it gone
            other.kill()
            other.join()
    for process in in_processes(work, processes):
        process.join()
        assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("times", "processes"), [(3, 1)])
def test_killed_at_any_moment_it_resumes_to_the_same_loss(
    read: Passages, tmp_path: Path, times: int, processes: int
) -> None:
    train(fresh_model(**DROPOUT), read, tmp_path / "whole", replace(SHORT, max_steps=12))
    killed_at_random(read, tmp_path / "killed", times, processes)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = (tmp_path / name / "model/model.safetensors" for name in ("killed", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.long
def test_killed_twenty_times(read: Passages, tmp_path: Path) -> None:
    test_killed_at_any_moment_it_resumes_to_the_same_loss(read, tmp_path, 20, 1)


@pytest.mark.long
def test_one_of_two_processes_killed_twenty_times(read: Passages, tmp_path: Path) -> None:
    def work(_: int) -> None:
        train(
            fresh_model(**DROPOUT),
            read,
            tmp_path / "whole",
            replace(SHORT, max_steps=12, batch_size=1),
        )

    for process in in_processes(work, 2):
        process.join()
        assert process.exitcode == 0
    killed_at_random(read, tmp_path / "killed", 20, 2)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(read: Passages, tmp_path: Path) -> None:
    one = replace(SHORT, batch_size=2, accumulate=2, max_steps=4, validate_every=2)
    train(fresh_model(), read, tmp_path / "one", one, validation=read)

    def work(_: int) -> None:
        two = replace(one, accumulate=1)
        train(fresh_model(), read, tmp_path / "two", two, validation=read)

    for process in in_processes(work, 2):
        process.join()
        assert process.exitcode == 0
    alone, both = read_curve(tmp_path / "one"), read_curve(tmp_path / "two")
    assert len(alone) == len(both) == 5
    for mine, theirs in zip(alone, both, strict=True):
        assert mine["step"] == theirs["step"]
        for name in ("train_loss", "val_loss", "tokens"):
            assert mine.get(name) == pytest.approx(theirs.get(name), abs=1e-9)


def test_a_loss_that_is_no_number_stops_the_run(read: Passages, tmp_path: Path) -> None:
    model = fresh_model()

    def spoil(_: Any) -> None:
        if len(read_curve(tmp_path / "run")) == 3:
            with torch.no_grad():
                model.lm_head.weight[3, 0] = torch.nan

    with pytest.raises(ModelError) as error:
        train(model, read, tmp_path / "run", replace(SHORT, seed=2), report=spoil)
    course = Course(read, 2, 12)
    names = ", ".join(read.name(course.document(place)) for place in (6, 7))
    assert f"the loss became nan in step 4, which read the documents {names}; " in str(error.value)
    assert f"the last good checkpoint is {tmp_path / 'run/checkpoint-2'}: " in str(error.value)


def test_an_endless_gradient_spoils_no_weight(read: Passages, tmp_path: Path) -> None:
    model = fresh_model()
    model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = weights(model)
    with pytest.raises(ModelError, match=r"the gradient became (nan|inf) in step 1, which read"):
        train(model, read, tmp_path / "run", SHORT)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validate_every": 7}, "validate_every 7 is beyond the run's 6 steps"),
        ({"optimizer": "sgd"}, "optimizer 'sgd' is unknown: choose norlund or retro-pytorch"),
        ({"schedule": "step"}, "schedule 'step' is unknown: choose constant, linear, cosine"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be 0 or more and finite, got nan"),
        ({"warmup": 7}, "warmup 7 exceeds the run's 6 steps"),
        ({"neighbour_dropout": -1}, "neighbour_dropout must lie in"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        replace(SHORT, **settings)


def test_models_of_other_data_are_refused(read: Passages, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="chunks of 8 tokens, the corpus has chunks of 4"):
        train(fresh_model(chunk_size=8), read, tmp_path / "run", SHORT)
    with pytest.raises(SettingError, match=r"the corpus has the token \d+, but the model's voc"):
        train(fresh_model(vocab_size=20), read, tmp_path / "run", SHORT)
    with pytest.raises(SettingError, match=r"passages of 128 tokens exceed the model's 64 pos"):
        train(retrofit(make_base("gpt2"), [1], chunk_size=CHUNK), _long(read), tmp_path, SHORT)
    with pytest.raises(SettingError, match="validate_every is given, but no validation text"):
        train(fresh_model(), read, tmp_path / "run", replace(SHORT, validate_every=2))


def _long(read: Passages) -> Passages:
    return Passages(read.dataset, 128)


def test_optimisers_are_those_of_the_public_code() -> None:
    model = fresh_model("retro-pytorch")
    first, second = (optimizer_of(model, OPTIMIZERS[name]) for name in ("norlund", "retro-pytorch"))
    assert {group["lr"] for group in first.param_groups} == {1e-4}
    assert {group["weight_decay"] for group in first.param_groups} == {0.1}
    matrices, vectors = second.param_groups
    assert (matrices["lr"], matrices["weight_decay"], vectors["weight_decay"]) == (3e-4, 0.1, 0)
    assert all(weight.ndim >= 2 for weight in matrices["params"])
    assert all(weight.ndim < 2 for weight in vectors["params"])
    count = len(matrices["params"]) + len(vectors["params"])
    assert count == len(list(model.parameters()))
    assert (OPTIMIZERS["norlund"].clip, OPTIMIZERS["retro-pytorch"].clip) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_rate_rises_and_falls(read: Passages, tmp_path: Path, name: Any) -> None:
    settings = replace(SHORT, schedule=name, learning_rate=1.0, warmup=2, clip=0.1)
    train(fresh_model(), read, tmp_path / "run", settings)
    rates = [line["learning_rate"] for line in read_curve(tmp_path / "run")]
    assert rates[:3] == [0, 0.5, 1]
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))


def test_bf16_and_checkpointing_train(
    read: Passages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(fresh_model().float(), read, tmp_path / "plain", SHORT)
    settings = replace(SHORT, checkpointing=True)
    kept = train(fresh_model().float(), read, tmp_path / "kept", settings)
    assert kept.train_loss == pytest.approx(plain.train_loss, abs=1e-5)
    model = fresh_model().float()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.warns(UserWarning, match="leave bf16 out"):
        rounded = train(model, read, tmp_path / "bf16", replace(SHORT, bf16=True))
    assert model.dtype == torch.float32
    assert rounded.train_loss == pytest.approx(plain.train_loss, abs=0.05)
    assert rounded.train_loss != plain.train_loss


def test_a_retrofit_trains_and_resumes_its_new_weights_alone(
    read: Passages, tmp_path: Path
) -> None:
    def model() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            made = retrofit(make_base("gpt2"), [1, 4], chunk_size=CHUNK, **OF_THE_FITTED)
        stir(made.adapter)
        return made

    long_enough = Passages(read.dataset, 16, least=CHUNK + 1)
    settings = replace(SHORT, learning_rate=1e-2, schedule="constant")
    whole, base = model(), make_base("gpt2")
    train(whole, long_enough, tmp_path / "whole", settings)
    train(model(), long_enough, tmp_path / "run", replace(settings, max_steps=3, save_every=3))
    again = model()
    train(again, long_enough, tmp_path / "run", replace(settings, save_every=3))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight)
    for name, weight in base.state_dict().items():
        assert torch.equal(whole.base.state_dict()[name], weight)
    other = retrofit(make_base("llama"), [1, 4], chunk_size=CHUNK, **OF_THE_FITTED)
    with pytest.raises(SettingError, match=r"model\.base was .*, is "):
        train(other, long_enough, tmp_path / "run", settings)
    names = {p.name for p in (tmp_path / "run/model").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


class Recorded:
    """Stands for TensorBoard's writer."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}
        self.closed = False

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.setdefault(tag, {})[global_step] = scalar_value

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_the_tags_of_the_public_code(
    read: Passages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Recorded()
    monkeypatch.setattr("nearest.retro.training.run.open_tensorboard", lambda *_: writer)
    settings = replace(SHORT, validate_every=3)
    train(fresh_model(), read, tmp_path / "run", settings, validation=read, tensorboard=True)
    assert writer.closed
    assert writer.scalars["train_loss"] == losses(tmp_path / "run")
    lines = {line["step"]: line.get("val_loss") for line in read_curve(tmp_path / "run")}
    assert writer.scalars["val_loss"] == {3: lines[3], 6: lines[6]}
    assert lines[0] > lines[6]
    assert lines[1] is None


def test_tensorboard_writes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = reports_module.open_tensorboard(tmp_path, 0)
    writer.add_scalar("train_loss", 2.5, 1)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 2.5)]


def test_each_step_is_told_with_speed_and_time_left(read: Passages, tmp_path: Path) -> None:
    told: list[Any] = []
    train(fresh_model(), read, tmp_path / "run", SHORT, report=told.append)
    assert [line.step for line in told] == [1, 2, 3, 4, 5, 6]
    assert [line.loss for line in told] == list(losses(tmp_path / "run").values())
    course = Course(read, 0, 12)
    scored = [int((course[i]["labels"][1:] != IGNORED).sum()) for i in range(12)]
    assert [line.tokens for line in told] == [scored[i] + scored[i + 1] for i in range(0, 12, 2)]
    assert all(line.tokens_a_second > 0 for line in told)
    assert told[-1].seconds_left == 0 < told[0].seconds_left


def test_weights_of_another_model_are_refused(read: Passages, tmp_path: Path) -> None:
    from nearest.retro.training.weights import load_weights

    train(fresh_model(), read, tmp_path / "run", SHORT)
    with pytest.raises(FolderError, match="does not hold"):
        load_weights(fresh_model(decoder_layers=4), tmp_path / "run/checkpoint-6")
    with pytest.raises(FolderError, match="does not hold"):
        load_weights(fresh_model(decoder_ffn_dim=44), tmp_path / "run/checkpoint-6")
    with pytest.raises(FolderError, match="does not hold"):
        load_weights(fresh_model("retro-pytorch"), tmp_path / "run/checkpoint-6")


def test_the_curve_survives_a_cut_line(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "tr')
    assert read_curve(tmp_path) == [{"step": 1}]
