"""Checks the package's annotations while tests run: in each, the first calls of every function.

To check a call takes longer than most calls do, and a later one looks like the first. With
CHECK_ALL set in the environment, as `.ci/run` has it, every call is checked.
"""

import functools
import math
import os
from collections import Counter
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

ENOUGH = math.inf if os.environ.get("CHECK_ALL") else 20
calls: Counter[CodeType] = Counter()  # of each function, in this test

# An int may stand where a float is asked for, as PEP 484 has it.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_inner: dict[tuple[str, str, tuple[str, ...]], Any] = {}
_jaxtyped = jaxtyping.jaxtyped


def check(function: Any) -> Any:
    """A function that takes and returns the same, and checks what.

    One inside another function is defined anew at each call of that, and to make its checks takes
    as long as hundreds of them: they are made once.
    """
    if "<locals>" not in function.__qualname__:
        return _checked(function)
    key = function.__module__, function.__qualname__, function.__code__.co_varnames
    if key not in _inner:
        _inner[key] = _checked(function)
    return _inner[key]


def _sparing(**options: Any) -> Any:
    """`jaxtyped`, of a function's first calls in each test."""
    decorate = _jaxtyped(**options)

    def decorated(made: Any) -> Any:
        if not isinstance(made, FunctionType):  # a class: its fields
            return decorate(made)
        code = made.__code__
        if "<locals>" in made.__qualname__ and calls[code] >= ENOUGH:
            return made
        checking = functools.cache(lambda: decorate(made))  # of many no call ever comes

        @functools.wraps(made)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[code] += 1
            return (checking() if calls[code] <= ENOUGH else made)(*args, **kwargs)

        return call

    return decorated


jaxtyping.jaxtyped = _sparing  # which the hook asks for by name wherever a function is defined
