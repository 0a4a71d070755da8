"""What `Memory` is given, made ready for the functions of `build/`; imports no model library."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nearest.errors import SettingError


def options_of(kind: type[Any], given: Any, fields: Mapping[str, Any]) -> Any:
    """A dataclass of options: those given, with some fields replaced.

    Raises:
        SettingError: there is no such field.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(fields) - set(names)):
        raise SettingError(f"there is no option {unknown[0]!r}: choose among {', '.join(names)}")
    return kind(**fields) if given is None else dataclasses.replace(given, **fields)


def bare(model: Any) -> Any:
    """The Hugging Face model inside its wrappers; None for none."""
    from nearest.encode.identity import bare_model

    return None if model is None else bare_model(model)
