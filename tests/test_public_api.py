"""Public names and signatures change on purpose only: fixtures/public_api.txt has them.

After a change that is meant, run `python tests/test_public_api.py` and say it in the changelog.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import nearest
import nearest.retro

STORED = Path(__file__).parent / "fixtures/public_api.txt"


def described(name: str, value: Any) -> list[str]:
    """A line for a function; for a class one for itself and for each public member of its own."""
    if not inspect.isclass(value):
        return [f"{name}{signature(value)}"]
    lines = [f"class {name}{signature(value)}"]
    foreign = {name for base in value.__mro__ if not ours(base) for name in vars(base)}
    for member in sorted(set(dir(value)) - foreign):
        if member.startswith("_"):
            continue
        found = inspect.getattr_static(value, member)
        is_method = callable(getattr(value, member, None)) and not inspect.isclass(found)
        lines.append(f"{name}.{member}{signature(getattr(value, member)) if is_method else ''}")
    return lines


def ours(base: type) -> bool:
    return base.__module__.startswith("nearest")


def signature(value: Any) -> str:
    """Names, kinds and defaults of parameters; annotations are mypy's to check."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return "(…)"
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return re.sub(r"<function (\S+) at 0x\w+>", r"\1", str(inspect.Signature(bare)))


def public_api() -> list[str]:
    return [
        line
        for module in (nearest, nearest.retro)
        for name in module.__all__
        for line in described(f"{module.__name__}.{name}", getattr(module, name))
    ]


def test_names_and_signatures_are_those_that_were_published() -> None:
    now, published = public_api(), STORED.read_text("utf-8").splitlines()
    gone = sorted(set(published) - set(now))
    new = sorted(set(now) - set(published))
    assert (gone, new) == ([], [])


def test_a_changed_default_and_a_lost_parameter_are_seen() -> None:
    def before(a: int, *, b: int = 1) -> None: ...

    def default(a: int, *, b: int = 2) -> None: ...

    def lost(a: int) -> None: ...

    lines = {described("f", function)[0] for function in (before, default, lost)}
    assert lines == {"f(a, *, b=1)", "f(a, *, b=2)", "f(a)"}


if __name__ == "__main__":
    STORED.write_text("\n".join(public_api()) + "\n", "utf-8")
