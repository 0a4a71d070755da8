"""What checks the package's annotations of arrays at every call, in runs with CHECK_ALL=1."""

from types import FunctionType
from typing import Any

from beartype import BeartypeConf, beartype

# An int may stand where a float is asked for, as PEP 484 has it.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_inner: dict[tuple[str, str, tuple[str, ...]], Any] = {}


def check(function: Any) -> Any:
    """The function with the arrays of its calls checked, shapes included.

    All other types are mypy's: tests give wrong ones on purpose, to see them refused. A function
    inside another is defined anew at each call of that one; its checks, which take as long to
    compile as hundreds of calls, are made once.
    """
    if isinstance(function, FunctionType):
        for name, hint in function.__annotations__.items():
            said = f"{hint} {getattr(hint, '__constraints__', '')}"
            if "jaxtyping" not in said or "Document" in said:  # documents: as users have them
                function.__annotations__[name] = Any
    if "<locals>" not in function.__qualname__:
        return _checked(function)
    key = function.__module__, function.__qualname__, function.__code__.co_varnames
    if key not in _inner:
        _inner[key] = _checked(function)
    return _inner[key]
