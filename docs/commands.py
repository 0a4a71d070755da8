"""What mkdocs asks while it builds the site: the page of commands is written from the commands."""

from typing import Any

import typer
from typer.cli import get_docs_for_click

from nearest.cli import app

PAGE = "reference/commands.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page as it is written, and below it the help of every command."""
    if page.file.src_uri != PAGE:
        return markdown
    command = typer.main.get_command(app)
    written = get_docs_for_click(obj=command, ctx=typer.Context(command), name="nearest")
    commands = written.partition("\n## ")  # the page has a title and an introduction of its own
    told = commands[2].replace("][", "]\\[")  # no reference to a link, but two parts of a name
    return f"{markdown}\n\n{commands[1].strip()} {told}"
