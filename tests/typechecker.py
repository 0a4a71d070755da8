"""What checks the package's annotations at every call, in runs with CHECK_ALL=1."""

import ast
import functools
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

from beartype import BeartypeConf, beartype

# An int may stand where a float is asked for, as PEP 484 has it.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_inner: dict[tuple[str, str, tuple[str, ...]], Any] = {}


def check(function: Any) -> Any:
    """The function with its calls checked.

    A function inside another is defined anew at each call of that one; its checks, which take
    as long to compile as hundreds of calls, are made once.
    """
    if isinstance(function, FunctionType):
        _skip_names_of_type_checkers(function)
        _skip_choices(function)
    if "<locals>" not in function.__qualname__:
        return _checked(function)
    key = function.__module__, function.__qualname__, function.__code__.co_varnames
    if key not in _inner:
        _inner[key] = _checked(function)
    return _inner[key]


def _skip_choices(function: FunctionType) -> None:
    """Leave choices to the package, whose own refusals of others tests are about."""
    for name, hint in function.__annotations__.items():
        if "Literal[" in str(hint):
            function.__annotations__[name] = Any


def _skip_names_of_type_checkers(function: FunctionType) -> None:
    """Leave annotations with names that are imported for type checkers alone to mypy."""
    unknown = _imported_for_type_checkers(str(sys.modules[function.__module__].__file__))
    if unknown:
        for name, hint in function.__annotations__.items():
            # A type variable does not show its constraints.
            said = f"{hint} {getattr(hint, '__constraints__', '')}"
            for variable in getattr(hint, "__parameters__", ()):
                said += str(variable.__constraints__)
            if any(word in said for word in unknown):
                function.__annotations__[name] = Any


@functools.cache
def _imported_for_type_checkers(file: str) -> frozenset[str]:
    """Names that a module imports under `if TYPE_CHECKING:`."""
    if not Path(file).is_file():
        return frozenset()
    return frozenset(
        alias.asname or alias.name
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for alias in statement.names
    )
