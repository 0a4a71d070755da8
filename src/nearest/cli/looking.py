"""Commands that look into a memory without a method: its documents, and passages near to a text."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from nearest.cli.app import open_with_model, out, quiet_libraries
from nearest.cli.options import AsJson, Force, MemoryPath, Opening, Where, conditions
from nearest.errors import SettingError


def documents(memory: MemoryPath, where: Where = None, as_json: AsJson = False) -> None:
    """List the documents that a memory holds: ids, tokens, titles."""
    from nearest.build.remove import fits
    from nearest.memory import Memory

    opened, wanted = Memory.open(memory), conditions(where)
    for number in range(opened.documents):
        one = opened.document(number)
        if not fits(one.metadata, wanted):
            continue
        tokens = len(opened.document_tokens(number)) - 1  # the start token is no document's
        if as_json:
            typer.echo(json.dumps({"id": one.id, "tokens": tokens, "metadata": dict(one.metadata)}))
            continue
        title = one.metadata.get("title", "")
        out.print(
            f"{escape(one.id)}  {tokens:,} tokens  {escape(str(title))}".rstrip(), soft_wrap=True
        )


def search(
    memory: MemoryPath,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is looked up.")],
    *,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many passages.")] = 10,
    force: Force = False,
    opening: Opening,
    as_json: AsJson = False,
) -> None:
    """Show the passages at whose "next token" the model's state is nearest to that after TEXT."""
    if not text.strip():
        raise SettingError("there is no text to look up: give one")
    quiet_libraries()
    opened, model, tokenizer = open_with_model(memory, opening)
    for one in opened.search_text(model, tokenizer, text, k, force=force):
        if as_json:
            told = {"id": one.document.id, "position": one.position, "distance": one.distance}
            typer.echo(
                json.dumps(told | {"before": one.before, "next": one.next, "after": one.after})
            )
        else:
            passage = " ".join(str(one).split())
            out.print(f"{one.distance:10.2f}  {escape(passage)}", soft_wrap=True)
