"""The public knn-transformers code over a memory of ours: its side of the comparisons.

`--code` names a folder with it: `git clone https://github.com/neulab/knn-transformers`.
"""

import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from nearest import Memory

LAM, TEMPERATURE, K, NPROBE, SPEC = 0.8, 10.0, 1024, 32, "IVF4096,PQ64"


def wrapper_over(code: Path, memory: Memory, **retomaton: Any) -> Any:
    """Their kNN-LM over our files, or their RetoMaton where `min_knns` is given.

    The index is opened by its path, the values are our tokens as their array.
    """
    sys.path.insert(0, str(code))
    from knnlm import DIST, KEY_TYPE, KNNWrapper

    from retomaton import RetomatonWrapper

    segment = memory.segments[0]
    values = np.append(segment.tokens[1:], 0).astype(np.int64)[:, None]

    def setup_faiss(self: Any) -> tuple[Any, Any]:
        index = faiss.read_index(str(memory.path / segment.record.index.file.path))
        index.nprobe = self.probe
        if retomaton:
            index.make_direct_map()
        self.vals = torch.from_numpy(values)
        return index, index

    base = RetomatonWrapper if retomaton else KNNWrapper
    kind = type("OverOurFiles", (base,), {"setup_faiss": setup_faiss})
    return kind(
        dstore_size=segment.record.entries,
        dstore_dir=None,
        dimension=memory.keys_record.dim,
        knn_sim_func=DIST.l2,
        knn_keytype=KEY_TYPE.last_ffn_input,
        no_load_keys=True,
        knn_gpu=False,
        k=K,
        lmbda=LAM,
        knn_temp=TEMPERATURE,
        probe=NPROBE,
        **retomaton,
    )


def their_nll(model: Any, documents: list[np.ndarray]) -> float:
    """Summed nll, a window a forward pass, from the loss the model reports."""
    total = 0.0
    for document in documents:
        inputs = torch.from_numpy(document)[None]
        with torch.no_grad():
            loss = model(input_ids=inputs, labels=inputs).loss
        total += loss.item() * (len(document) - 1)
    return total
