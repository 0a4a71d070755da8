"""Exceptions whose message says what is wrong, why, and how to mend it."""

import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGE = f"{Path(__file__).parent}{os.sep}"


class NearestError(Exception):
    """Base of everything a user can mend; the command line prints it and exits with code 2."""


class CorpusError(NearestError):
    """A document, file or folder that cannot be read as it stands."""


class FolderError(NearestError):
    """A memory folder that is missing, damaged, locked, of a newer format, or cannot be written."""


class NotStoredError(FolderError):
    """A result that could not be written into the memory it is for; `tuned` holds it."""

    def __init__(self, message: str, tuned: Any) -> None:
        super().__init__(message)
        self.tuned = tuned


class ModelError(NearestError):
    """A model or tokenizer that does not fit the memory or lacks what is asked of it."""


class SettingError(NearestError):
    """A value outside the range in which it means something."""


class RemoteError(NearestError):
    """A service that cannot be reached now, or does not speak the same protocol."""


class SettingsWarning(UserWarning):
    """Settings in use that nobody tuned, or that were tuned before the memory changed."""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of what the package was asked for, at the line of the caller that asked for it.

    A fixed `stacklevel` would point into the package: generators and callbacks lie between.
    """
    frame, caller = sys._getframe(1), sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            caller = frame.f_back
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        caller.f_code.co_filename,
        caller.f_lineno,
        caller.f_globals.get("__name__"),
        caller.f_globals.setdefault("__warningregistry__", {}),
    )


def require(module: str, extra: str, package: str | None = None) -> None:
    """Fail where an optional dependency is used, with the cure, unless it is installed."""
    if find_spec(module) is None:
        raise NearestError(
            f"{package or module} is needed here but not installed: it comes with the "
            f"extra [{extra}] of nearest (in a clone: pip install '.[{extra}]')"
        )
