"""Indexes searched on a GPU: the same FAISS index, copied there, behind the same class."""

from typing import Any, Literal, get_args

from nearest.errors import SettingError
from nearest.index.faiss_module import load_faiss

SearchOn = Literal["cpu", "gpu"]
MOST_ON_GPU = 2048  # neighbours that FAISS finds there at once


def checked_search_on(name: str) -> SearchOn:
    """A place to search on, by its name.

    Raises:
        SettingError: there is no such place, no GPU, or FAISS was not built for it.
    """
    if name not in get_args(SearchOn):
        raise SettingError(f"searching on {name!r} is unknown: choose cpu or gpu")
    if name == "cpu":
        return "cpu"
    faiss = load_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise SettingError(
            "this FAISS was built without GPUs: install the other one in its place (pip uninstall "
            "faiss-cpu, then pip install 'nearest[gpu]'), or search on the CPU"
        )
    if not faiss.get_num_gpus():
        raise SettingError("FAISS finds no GPU here: check the driver, or search on the CPU")
    return "gpu"


def has_gpu_form(index: Any) -> bool:
    """Whether FAISS searches this kind of index on GPUs: no graphs, no codes of 4 bits."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        return has_gpu_form(index.index)
    if isinstance(index, faiss.IndexIVFPQ):
        return bool(index.pq.nbits == 8)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer)


def on_gpu(index: Any) -> Any:
    """A copy of a FAISS index on the GPUs there are; how it is searched stays as it is set.

    Raises:
        SettingError: there is no GPU, it has no room, or this kind of index has no form for it.
    """
    checked_search_on("gpu")
    faiss = load_faiss()
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].split(": ")[-1]
        raise SettingError(
            f"this index cannot be searched on a GPU ({reason}): build another one "
            "(`nearest index --spec IVF1024,SQ8`), or search on the CPU"
        ) from error
