"""Every name that a benchmark imports from this project is there."""

import ast
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_names_that_a_benchmark_imports_are_there(script: Path) -> None:
    """Inside functions too. Scripts are only read: some need other projects, or a GPU, to run."""
    tree = ast.parse(script.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nearest":
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node not in tree.body and node.module.split(".")[0] != "nearest":
                continue  # another project's, from a folder that is put on the path first
            for alias in node.names:
                assert can_be_imported(node.module, alias.name), f"{node.module}.{alias.name}"


def can_be_imported(module: str, name: str) -> bool:
    """Whether a module of this project, or another benchmark, has a name; true of all others."""
    if module.split(".")[0] == "nearest":
        if hasattr(importlib.import_module(module), name):
            return True
        return importlib.util.find_spec(f"{module}.{name}") is not None
    beside = FOLDER / f"{module}.py"
    if not beside.exists():
        return True
    names: set[str] = set()
    for node in ast.parse(beside.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            every = [one for target in targets for one in ast.walk(target)]
            names |= {one.id for one in every if isinstance(one, ast.Name)}
    return name in names
