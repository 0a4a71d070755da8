"""What a model computes in and on which device, and how its weights are quantised."""

import json
import re
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nearest.errors import SettingError, warn_caller

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_KINDS = ("cpu", "cuda", "mps", "xpu")
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


def chosen_device(name: str) -> torch.device:
    """A device by its name, such as "cpu" or "cuda:1"; "auto" is CUDA's, where there is one.

    Raises:
        SettingError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in _KINDS:
        raise SettingError(
            f"device {name!r} is unknown: choose auto, {', '.join(_KINDS)}, or one of several, "
            "such as cuda:1"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).strip().split("\n")[0]
        raise SettingError(
            f"device {name!r} cannot be used here ({reason}): choose auto, or cpu"
        ) from error
    return device


def fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions of its own for products of matrices in half precision.

    They are for bfloat16 (AVX-512 BF16, AMX; benchmarks/dtype.py): torch tells what it has found.
    """
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype == torch.bfloat16 and any(found.get(kind) for kind in ("avx512_bf16", "amx_bf16"))


def warn_of_slow_dtype(model: nn.Module, *, bf16: bool = False) -> None:
    """Say so where a model computes in half precision on a CPU that emulates it.

    transformers gives a model the dtype that it was saved in, which is meant for GPUs.

    Args:
        model: whose weights have the dtype that it computes in.
        bf16: it computes in bfloat16 whatever they have.
    """
    weight = next(model.parameters(), None)
    if weight is None or weight.device.type != "cpu" or quantisation(model) is not None:
        return
    dtype = torch.bfloat16 if bf16 else weight.dtype
    if dtype in (torch.bfloat16, torch.float16) and not fast_on_cpu(dtype):
        cure = (
            "leave bf16 out" if bf16 else "from_pretrained(…, dtype=torch.float32), or --dtype auto"
        )
        warn_caller(
            f"the model computes in {str(dtype).removeprefix('torch.')}, which this CPU has no "
            f"instructions for: float32 is several times as quick here ({cure})"
        )


def quantisation(model: nn.Module) -> str | None:
    """How weights are quantised, such as "bitsandbytes 4 bits"; None if they are not.

    The config says it of a model that was loaded so; of one that was quantised since, the classes
    that hold its weights do.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        found = config if isinstance(config, dict) else config.to_dict()
        method = str(found.get("quant_method")).rpartition(".")[2].lower()
        return f"{method} {_bits_of(found)} bits"
    kinds = set()
    weight: Any  # mypy holds that no parameter can be a wrapper subclass
    for weight in model.parameters():
        if not weight.is_floating_point() or is_traceable_wrapper_subclass(weight):
            kinds.add(type(weight).__name__)
    if not kinds:
        return None
    names = " ".join(sorted(kinds))
    return f"{names} {4 if _names_few_bits(names) else 8} bits"


def few_bits(quantised: str) -> bool:
    """Whether weights that are quantised so (`quantisation`) have fewer than 8 bits."""
    return quantised.endswith(" 4 bits")


def _bits_of(config: dict[str, Any]) -> int:
    """Bits of a weight, 8 or 4 (for fewer than 8), by a quantisation config."""
    if config.get("load_in_8bit"):
        return 8
    if config.get("load_in_4bit"):
        return 4
    if isinstance(config.get("bits"), int):
        return 8 if config["bits"] >= 8 else 4
    return 4 if _names_few_bits(json.dumps(config, default=str)) else 8


def _names_few_bits(description: str) -> bool:
    return re.search(r"int[1-6]\b|4bit|qbits|gguf|awq|fp4|nf4", description, re.I) is not None
