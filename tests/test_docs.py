"""What the pages show is true: blocks run, commands exist, links lead somewhere."""

import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from inspect import ismodule
from pathlib import Path

import httpx
import pytest
import torch
import typer

import nearest
import nearest.retro
from doc_pages import PAGES, ROOT, Block, blocks, is_slow, make_world
from nearest.cli import app
from nearest.retrieval.gates import network
from nearest.verbs.self_tune import self_tune
from serving import free_port
from shell import shell

LANGUAGES = {"sh", "python", "console", "text", "json"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    make_world(folder)
    return folder


def that_run() -> list[object]:
    """Pages with blocks that run."""
    return [
        pytest.param(page, marks=[pytest.mark.slow] if is_slow(page) else [], id=name_of(page))
        for page in PAGES
        if any(block.runs for block in blocks(page))
    ]


@contextmanager
def served(command: str, folder: Path, port: int) -> Iterator[None]:
    """A server that a block starts, in a process of its own, until its page ends."""
    assert "nearest serve" in command
    arguments = [sys.executable, "-m", *shlex.split(command, comments=True)]
    with subprocess.Popen(arguments, cwd=folder) as process:
        try:
            for _ in range(1200):
                assert process.poll() is None, f"{command} ended"
                with suppress(httpx.ConnectError):
                    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
                    break
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


@pytest.mark.parametrize("page", that_run())
def test_the_blocks_of_a_page_run(
    page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearest.verbs.self_tune.self_tune", self_tune)  # as builds of readers do,
    monkeypatch.setattr(network, "STEPS", 20)  # but briefly
    tools, folders, names, port = tmp_path / "tools", 0, {}, str(free_port())
    tools.mkdir()
    with ExitStack() as servers:
        for block in (block for block in blocks(page) if block.runs):
            if folders == 0 or block.note == "fresh folder":
                folders += 1
                folder = tmp_path / f"folder-{folders}"
                shutil.copytree(world, folder)
                monkeypatch.chdir(folder)
            text = block.text.replace("8000", port)
            if block.serves:
                servers.enter_context(served(text, folder, int(port)))
            elif block.language == "python":
                code = compile("\n" * (block.line - 1) + text, str(page), "exec")
                with torch.random.fork_rng():
                    exec(code, names)
            else:
                with shell(folder, tools) as running:
                    running.run(text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fence_names_a_language_that_is_known(page: Path) -> None:
    strange = [(b.line, b.language) for b in blocks(page) if b.language not in LANGUAGES]
    assert not strange


def options_of(command: typer.core.TyperGroup, path: tuple[str, ...]) -> set[str] | None:
    """The options of the command with this name; None where there is none."""
    for word in path:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return None
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def commands_in(page: Path) -> Iterator[list[str]]:
    """The command lines of `nearest` in a page: those of blocks, and those within a sentence."""
    for block in blocks(page):
        joined = re.sub(r"\\\n\s*", " ", block.text)
        for line in re.findall(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(nearest .*)$", joined, re.MULTILINE):
            yield words(line.split("  #")[0])
    for line in re.findall(r"`(nearest [a-z][^`\n]*)`", page.read_text("utf-8")):
        yield words(line)


def words(line: str) -> list[str]:
    try:
        return shlex.split(line.replace("\\|", "|"))
    except ValueError:  # an apostrophe of prose
        return line.split()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    root = typer.main.get_command(app)
    wrong = []
    for line in commands_in(page):
        path = tuple(line[1:3]) if line[1:2] == ["retro"] else tuple(line[1:2])
        known = options_of(root, path)
        if known is None:
            wrong.append(" ".join(line))
            continue
        given = [word.split("=")[0] for word in line if re.fullmatch(r"--[a-z].*", word)]
        wrong += [f"{' '.join(path)} {option}" for option in given if option not in known]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_and_options_of_scripts_that_a_page_names_exist(page: Path) -> None:
    joined = re.sub(r"\\\n\s*", " ", page.read_text("utf-8"))
    for line in re.findall(r"python ((?:benchmarks|examples|tests)/.*)$", joined, re.MULTILINE):
        script, *given = line.rstrip("`|. ").split()
        path = ROOT / script
        assert path.exists(), line
        source = path.read_text() if path.is_file() else ""
        source += (ROOT / "benchmarks/common.py").read_text()
        for option in (word.split("=")[0] for word in given if word.startswith("--")):
            assert f'"{option}"' in source or option[2:].replace("-", "_") in source, line


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_of_pages_outside_the_site_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8"))
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_a_block_is_found_with_its_line_and_its_note(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- not run: why -->\n```sh\nb\n```\n\n```python\nc = 1\n```\n")
    first, second = blocks(page)
    assert first == Block(page, 5, "sh", "not run: why", "b\n")
    assert (first.runs, second.runs, second.line) == (False, True, 9)


def test_the_reference_has_every_public_name() -> None:
    pages = (ROOT / "docs/reference").glob("*.md")
    named = {n for page in pages for n in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)}
    described = set()
    for found in map(pkgutil.resolve_name, named):
        described |= {id(found), *(map(id, vars(found).values()) if ismodule(found) else ())}
    public = [(package, name) for package in (nearest, nearest.retro) for name in package.__all__]
    assert [name for package, name in public if id(getattr(package, name)) not in described] == []
