"""A worker at a build that another process has begun."""

from pathlib import Path
from typing import NamedTuple, cast

import torch

from nearest.build.match import matching_key_layer
from nearest.build.tasks import Unfinished, first_manifest, work
from nearest.build.workers import Spec
from nearest.encode.dtype import DtypeName
from nearest.encode.encoder import Encoder
from nearest.encode.identity import model_name
from nearest.encode.layers import LanguageModel
from nearest.errors import ModelError
from nearest.store.journal import Journal
from nearest.store.manifest import Manifest


class _Begun(NamedTuple):
    """What `matching_key_layer` asks of a memory."""

    path: Path
    manifest: Manifest


class WorkerSpec(Spec, frozen=True, kw_only=True):
    """What a worker at a build is told, beside the folder.

    Attributes:
        model: folder or name on the hub; None where no keys are made.
        dtype, device: as in `load_model_and_tokenizer`.
        allow_mixed: whether keys of unlike machines are accepted.
    """

    model: str | None
    dtype: str = "auto"
    device: str = "auto"
    allow_mixed: bool = False

    def work(self, folder: Path, token: str) -> None:
        """Do what is left of a build in a folder, beside other workers.

        Raises:
            NearestError: the model is not the one that the build was begun with, or something
                cannot be made or written.
        """
        torch.set_num_threads(self.threads)
        journal = Journal.opened(folder)
        build = Unfinished(journal, _encoder(folder, journal, self), self.allow_mixed)
        work(build, self.watch(token))


def loadable_name(model: LanguageModel) -> str:
    """The name by which workers load a model (ModelError where it has none)."""
    if not (name := model_name(model)):
        raise ModelError(
            "workers load the model by its name, and this one is in RAM alone: save it "
            "(save_pretrained) and load it from there"
        )
    return name


def device_of(model: LanguageModel, ray: str | None) -> str:
    """Where workers load a model; those of a cluster see the one GPU that they are given."""
    return str(model.device) if ray is None else str(model.device.type)


def _encoder(folder: Path, journal: Journal, spec: WorkerSpec) -> Encoder | None:
    keys = journal.stage.keys
    if keys is None or spec.model is None:
        return None
    from nearest.encode.loading import load_model_and_tokenizer

    manifest = first_manifest(journal.stage.model, keys)
    model, _ = load_model_and_tokenizer(spec.model, cast(DtypeName, spec.dtype), spec.device)
    try:
        layer = matching_key_layer(_Begun(folder, manifest), model)
    except ModelError as error:
        raise ModelError(
            f"{spec.model} as a worker loads it is not the model that this build was begun with: "
            f"save that one (save_pretrained) where every worker finds it ({error})"
        ) from error
    return Encoder.of(model, layer, keys.window, keys.stride, journal.stage.batch_size)
