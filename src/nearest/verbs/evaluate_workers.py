"""An evaluation by several processes: each reads some runs of documents, and sums are put together.

Runs are read apart from each other in one process, too (`Scorer.runs`), so that it does not matter
who reads which. What workers are told, the runs and what they make of them lie in a folder that
goes with the evaluation.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from nearest.build.files import Files, beside_others, by_workers
from nearest.build.worker import device_of, loadable_name
from nearest.build.workers import Spec, reached, threads_of
from nearest.corpus.text import Text
from nearest.corpus.tokens import Tokens
from nearest.encode.dtype import DtypeName
from nearest.encode.fingerprint import weights_hash
from nearest.encode.layers import LanguageModel
from nearest.errors import FolderError, ModelError, SettingError
from nearest.folder import disk_errors_explained
from nearest.memory import Memory
from nearest.models.scoring import ReadText, Scorer, encoder_for
from nearest.progress import Progress, no_progress
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.settings import Settings, from_json, to_json
from nearest.verbs.tally import Tally, read

_LOCAL = "local"


class EvaluationSpec(Spec, frozen=True, kw_only=True):
    """What a worker at an evaluation is told, beside the folder.

    Attributes:
        model, dtype, device: as in `load_model_and_tokenizer`.
        weights_are: the fingerprint of the model's weights; None where they cannot be read.
        memories: the folders of the memories, their snapshots' checksums, and `search_on` of each
            as in `Memory.open`.
        settings: of each method in each memory, as they are used; none where the model only reads.
        weights: of the memories, by method.
        passages: what stands before the text, by method; None: nothing.
        window, stride, batch_size: of the encoder.
        force: accept another model than the one that built a memory.
    """

    model: str
    dtype: str
    device: str
    weights_are: str | None
    memories: list[tuple[str, str, str]]
    settings: dict[str, list[dict[str, Any]]]
    weights: dict[str, list[float]]
    passages: dict[str, dict[str, Any] | None]
    window: int
    stride: int
    batch_size: int
    force: bool

    def work(self, folder: Path, token: str) -> None:
        """Read the runs of a folder that nobody else reads, until all are read.

        Raises:
            NearestError: model or memory are not what they were, or a file cannot be written.
        """
        from nearest.encode.loading import load_model_and_tokenizer

        torch.set_num_threads(self.threads)
        model, _ = load_model_and_tokenizer(self.model, cast(DtypeName, self.dtype), self.device)
        if self.weights_are is not None and weights_hash(model) != self.weights_are:
            raise ModelError(
                f"{self.model} as a worker loads it has other weights than the model that is to be "
                "evaluated: save that one (save_pretrained) where every worker finds it"
            )
        memories = [_memory(Path(path), *told) for path, *told in self.memories]
        windows = {name: getattr(self, name) for name in ("window", "stride", "batch_size")}
        encoder = encoder_for(model, memories, force=self.force, **windows)
        ensembles = {name: self._ensemble(name, memories) for name in self.passages}
        passages = {
            name: None if values is None else Settings(**from_json(values))
            for name, values in self.passages.items()
        }

        def make(number: int, place: Path) -> None:
            text, own = _read_run(folder / f"{number:06d}.text.npz")
            scorer = Scorer(text, encoder, own)
            tallies = read(scorer, memories, ensembles, passages)
            _save_tallies(place, tallies)

        count = len(list(folder.glob("*.text.npz")))
        with disk_errors_explained(folder):
            beside_others(self.watch(token))(_files(folder, count), make)

    def _ensemble(self, method: str, memories: Sequence[Memory]) -> Ensemble | None:
        if not (each := self.settings[method]):
            return None
        settings = [Settings(**from_json(values)) for values in each]
        return Ensemble.with_settings(memories, method, self.weights[method], settings)


def _memory(path: Path, checksum: str, search_on: str) -> Memory:
    memory = Memory.open(path, search_on)
    if memory.manifest.checksum != checksum:
        raise FolderError(
            f"{path} as a worker opens it is not the snapshot that is evaluated: it was changed "
            "meanwhile, or that machine has another one there; evaluate it again"
        )
    return memory


def shared_by_workers(
    model: LanguageModel,
    memories: Sequence[Memory],
    scorer: Scorer | ReadText,
    ensembles: Mapping[str, Ensemble | None],
    passages: Mapping[str, Settings | None],
    workers: int | None,
    ray: str | None,
    *,
    force: bool,
    progress: Progress,
) -> list[Tally]:
    """As `tally.read`, by so many workers, or on a cluster.

    Raises:
        SettingError: the text was read already, is one sequence, or a memory is no folder.
        NearestError: workers cannot load the model, or end.
    """
    if isinstance(scorer, ReadText) or scorer.text.stream:
        raise SettingError(
            "a text that was read already, or that is read as one sequence, cannot be shared by "
            "workers: leave workers and ray out"
        )
    if any(type(one) is not Memory or one.shard is not None for one in memories):
        raise SettingError(
            "workers open memories by their folders, and one of these is on servers: leave "
            "workers and ray out"
        )
    encoder = scorer.encoder
    used = {name: () if one is None else one.lookups for name, one in ensembles.items()}
    spec = EvaluationSpec(
        model=loadable_name(model),
        dtype=str(model.dtype).removeprefix("torch."),
        device=device_of(model, ray),
        weights_are=weights_hash(model),
        memories=[
            (str(one.path.resolve()), one.manifest.checksum, one.search_on) for one in memories
        ],
        settings={
            name: [to_json(asdict(lookup.settings)) for lookup in lookups]
            for name, lookups in used.items()
        },
        weights={name: [] if one is None else list(one.weights) for name, one in ensembles.items()},
        passages={
            name: None if one is None else to_json(asdict(one)) for name, one in passages.items()
        },
        window=encoder.window,
        stride=encoder.stride,
        batch_size=encoder.batch_size,
        force=force,
        threads=threads_of(workers, ray),
        gpus=int(model.device.type == "cuda"),
    )
    with reached(spec, ray), _scratch(memories, ray) as name:
        folder, runs = Path(name), scorer.runs
        with disk_errors_explained(folder):
            for number, run in enumerate(runs):
                _save_run(folder / f"{number:06d}.text.npz", scorer.only(run))
        ids = scorer.text.ids
        files = _files(folder, len(runs), partial(_told, ids, runs), progress)
        by_workers(folder, spec, workers, ray)(files, _nothing)
        made = [_read_tallies(path, len(ensembles)) for path in files.paths]
    return [Tally.joined(parts) for parts in zip(*made, strict=True)]


def _scratch(memories: Sequence[Memory], ray: str | None) -> AbstractContextManager[str]:
    """A folder that goes with the context, for a cluster where its nodes see the memory."""
    if ray in (None, _LOCAL):
        return tempfile.TemporaryDirectory(prefix="nearest-")
    beside = memories[0].path.resolve().parent if memories else Path.cwd()
    try:
        return tempfile.TemporaryDirectory(prefix=".nearest-", dir=beside)
    except OSError as error:
        raise FolderError(
            f"{beside} cannot be written to ({error.strerror}), where the nodes of a cluster put "
            "what they found: open a memory that lies where you may write, or leave ray out"
        ) from error


def _files(
    folder: Path,
    count: int,
    named: Callable[[int], str] = str,
    progress: Progress = no_progress,
) -> Files:
    return Files([folder / f"{n:06d}.npz" for n in range(count)], named, "evaluate", progress)


def _told(ids: Sequence[str], runs: Sequence[range], number: int) -> str:
    run = runs[number]
    first, last = repr(ids[run.start]), repr(ids[run.stop - 1])
    return f"document {first}" if len(run) == 1 else f"documents {first} to {last}"


def _nothing(_number: int, _place: Path) -> None:
    """Workers make the files."""


def _save_run(path: Path, scorer: Scorer) -> None:
    """The tokens of a run, and of its encoder texts, and the entries that are itself."""
    text, own = scorer.text, scorer.own
    arrays: dict[str, Any] = {
        "tokens": np.concatenate(text.documents),
        "lengths": _lengths(text.documents),
    }
    if text.encoder_tokens is not None:
        arrays["beside"] = np.concatenate(text.encoder_tokens)
        arrays["beside_lengths"] = _lengths(text.encoder_tokens)
    if own is not None:
        arrays["own"] = own
    np.savez(path, **arrays)


def _read_run(path: Path) -> tuple[Text, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        documents = _cut(arrays["tokens"], arrays["lengths"])
        ids = [str(number) for number in range(len(documents))]
        beside = None
        if "beside" in arrays:
            beside = _cut(arrays["beside"], arrays["beside_lengths"])
        own = arrays.get("own")
    return Text(documents, ids, None, None, encoder_tokens=beside), own


def _lengths(documents: Sequence[Tokens]) -> np.ndarray:
    return np.array([len(tokens) for tokens in documents])


def _cut(tokens: np.ndarray, lengths: np.ndarray) -> list[Tokens]:
    return np.split(tokens, np.cumsum(lengths)[:-1])


def _save_tallies(path: Path, tallies: Sequence[Tally]) -> None:
    arrays: dict[str, Any] = {
        f"{number}.{name}": array
        for number, tally in enumerate(tallies)
        for name, array in tally.to_arrays().items()
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _read_tallies(path: Path, count: int) -> list[Tally]:
    with np.load(path, allow_pickle=False) as arrays:
        found: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
        for key in arrays.files:
            number, _, name = key.partition(".")
            found[int(number)][name] = arrays[key]
    return [Tally.from_arrays(one) for one in found]
