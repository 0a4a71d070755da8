"""What a model computes in."""

from typing import Literal

import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chosen_dtype(name: DtypeName, saved: torch.dtype, device: str) -> torch.dtype:
    """What is asked for; "auto" is the dtype of the saved weights where it is computed fast.

    Elsewhere half precision becomes float32: on most CPUs it is slower, and results are steadier.

    Args:
        name: what was asked for.
        saved: the dtype of the weights.
        device: its type, such as "cpu" or "cuda".
    """
    if name != "auto":
        return _NAMED[name]
    halved = saved in (torch.bfloat16, torch.float16)
    return torch.float32 if halved and device == "cpu" and not fast_on_cpu(saved) else saved


def fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions of its own for products of matrices in half precision.

    They are for bfloat16 (AVX-512 BF16, AMX; benchmarks/dtype.py): torch tells what it has found.
    """
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype == torch.bfloat16 and any(found.get(kind) for kind in ("avx512_bf16", "amx_bf16"))
