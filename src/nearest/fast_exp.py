"""exp of float32 as plain arithmetic, which compilers turn into vector instructions."""

from typing import Any, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_LEAST = np.float32(-87)  # below, the result would be no normal float32: 0
_PER_LN_2 = np.float32(1.4426950408889634)
_LN_2_HIGH = np.float32(0.693359375)  # short enough for exact products with whole numbers
_LN_2_LOW = np.float32(-2.12194440e-4)
_HALF, _ONE = np.float32(0.5), np.float32(1)
_C3, _C4, _C5, _C6 = (np.float32(1 / n) for n in (6, 24, 120, 720))


def _bits_as_float32(_context: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


_as_float32: Any = intrinsic(_bits_as_float32)


# fmt: off
@no_type_check  # numba compiles the bare function
@numba.njit(nogil=True, inline="always")
def fast_exp(x: Any) -> Any:
    """exp(x) for float32 x ≤ 0, to about 2e-7: 2^n · exp(r) with |r| ≤ ln 2 / 2; 0 for −∞."""
    bounded = max(x, _LEAST)
    n = np.int32(bounded * _PER_LN_2 - _HALF)  # nearest, for what is not positive
    whole = np.float32(n)
    r = (bounded - whole * _LN_2_HIGH) - whole * _LN_2_LOW
    series = _ONE + r * (_ONE + r * (_HALF + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    result = series * _as_float32((n + np.int32(127)) << np.int32(23))
    return result if x >= _LEAST else np.float32(0)
# fmt: on
