"""Search on a GPU: an exact scan by torch, or inverted lists by FAISS.

A scan of a million keys of 256 dims takes a millisecond (benchmarks/gpu.py).
"""

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.index.exact import FLOAT32, MORE, SPARE, lengths_of, settled
from nearest.index.faiss_module import load_faiss
from nearest.index.keys import Keys
from nearest.index.neighbours import Neighbours

if TYPE_CHECKING:
    import torch

SearchOn = Literal["cpu", "gpu"]
MOST_IN_LISTS = 2048  # largest k of FAISS on a GPU
_SCORES = 1 << 28  # float32 held at once: a gigabyte
_READ = 65_536  # rows
# What torch may do to the factors of a matrix product: nothing, or cut them to TF32 or bfloat16.
_ROUNDOFF = {"highest": FLOAT32, "high": 2.0**-10, "medium": 2.0**-7}


def checked_search_on(name: str) -> SearchOn:
    """The place to search on, by its name.

    Raises:
        SettingError: there is no such place, or no GPU.
    """
    if name not in get_args(SearchOn):
        raise SettingError(f"searching on {name!r} is unknown: choose cpu or gpu")
    if name == "cpu":
        return "cpu"
    gpu_device()
    return "gpu"


def gpu_device() -> "torch.device":
    """The GPU that torch computes on (SettingError if there is none)."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise SettingError(
        "torch finds no GPU to search on: check the driver and that torch was built for it, or "
        "search on the CPU"
    )


class GpuScan:
    """`ExactIndex` on a GPU, where keys take 4 bytes a dimension."""

    exact = True

    def __init__(
        self, keys: Keys, ids: Int[np.ndarray, " m"], device: "torch.device | None" = None
    ) -> None:
        """Copy the keys of `ids` to the GPU.

        Raises:
            SettingError: there is no GPU, or not enough memory in it.
        """
        import torch

        device = device or gpu_device()
        self._keys = keys
        self.entries = self.most = len(ids)
        self._longest = 0.0
        try:
            self._rows = torch.empty(len(ids), keys.dim, device=device)
            self._ids = torch.from_numpy(ids).to(device)
            for start in range(0, len(ids), _READ):
                rows = keys.rows(ids[start : start + _READ])
                self._rows[start : start + _READ] = torch.from_numpy(rows)
                self._longest = max(self._longest, float(lengths_of(rows).max()))
            self._squares = self._rows.square().sum(1) if keys.metric == "l2" else None
        except torch.OutOfMemoryError as error:
            raise SettingError(
                f"{len(ids):,} keys of {keys.dim} dims ({4 * len(ids) * keys.dim:,} bytes) do not "
                "fit in the GPU's memory: search on the CPU"
            ) from error

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        return self._search(np.ascontiguousarray(queries, np.float32), k, SPARE)

    def _search(self, queries: Float[np.ndarray, "q dim"], k: int, spare: int) -> Neighbours:
        import torch

        return settled(
            self._scan(queries, min(k + spare, self.entries)),
            self._keys,
            queries,
            k,
            self.entries,
            lambda rows: self._search(queries[rows], k, MORE * spare),
            self._longest,
            _ROUNDOFF[torch.get_float32_matmul_precision()],
        )

    def _scan(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """By matrix products, in the precision that torch is set to; ties in any order."""
        import torch

        found = Neighbours(
            np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        )
        at_once = max(1, _SCORES // max(1, self.entries))
        for start in range(0, len(queries), at_once):
            some = slice(start, start + at_once)
            asked = torch.from_numpy(queries[some]).to(self._rows.device)
            distances = -(asked @ self._rows.T)
            if self._squares is not None:
                distances.mul_(2).add_(self._squares)
            nearest, rows = distances.topk(k, dim=1, largest=False)
            if self._squares is not None:
                nearest = (nearest + asked.square().sum(1, keepdim=True)).clamp(min=0)
            found.ids[some] = self._ids[rows].cpu().numpy()
            found.distances[some] = nearest.cpu().numpy()
        return found

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        return self._keys.distances(queries, ids)


def has_form_in_lists(index: Any) -> bool:
    """Whether FAISS finds a GPU and can search this index on it: only lists of whole vectors.

    On GPUs FAISS lacks 4-bit codes, limits 8-bit product codes, and aborts the process when lists
    of scalar codes are searched for a thousand neighbours (1.15.1 on an H100).
    """
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        return has_form_in_lists(index.index)
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return False
    return isinstance(index, faiss.IndexIVFFlat)


def lists_on_gpu(index: Any) -> Any:
    """Copy a FAISS index to all GPUs, with its search parameters and with float16 vectors.

    Raises:
        SettingError: it does not fit in their memory.
    """
    faiss = load_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].split(": ")[-1]
        raise SettingError(
            f"this index cannot be searched on a GPU ({reason}): build the default one, whose keys "
            "are scanned there (`nearest index --index auto`), or search on the CPU"
        ) from error
