"""Options of the commands that read texts with a RETRO model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nearest.cli.app import err
from nearest.cli.options import Device, Dtype, with_commas
from nearest.cli.retro.options import More

if TYPE_CHECKING:
    from nearest.retro.opening import NeighbouredText

ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A RETRO or RETROfit model, or the run it is in.")
]
Readings = Annotated[
    str,
    typer.Option(
        help="on, off, base (of a RETROfit), shuffled, no-continuation, k=1 … or k for all; the "
        "first is what the others are compared to."
    ),
]
TextTables = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Table of a text's neighbours (nearest retro neighbours --table); repeat or commas.  "
        "\\[default: the database's own]",
    ),
]
Subset = Annotated[
    Path | None, typer.Option(help="File of the documents to read, a number a line.")
]


@dataclass(frozen=True)
class OpeningRetro:
    """How a model is loaded."""

    base: Annotated[
        str | None, typer.Option(help="What a RETROfit was made of, if not where it was.")
    ] = None
    dtype: Dtype = "float32"
    device: Device = "auto"
    force: Annotated[
        bool, typer.Option("--force", help="Accept a base whose weights have changed.")
    ] = False

    def load(self, path: Path) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        from nearest.retro.opening import open_retro

        return open_retro(
            path, base=self.base, dtype=self.dtype, device=self.device, force=self.force
        )


@dataclass(frozen=True)
class Windows:
    """What of a text and of its neighbours is read, and how."""

    neighbours: Annotated[int, typer.Option(help="Neighbours read of each chunk.")] = 2
    continuations: Annotated[
        int, typer.Option(help="Chunks read after each neighbour, never past its document's end.")
    ] = 1
    window: Annotated[int, typer.Option(help="Tokens read at once.")] = 512
    stride: Annotated[
        int | None, typer.Option(help="New tokens a window.  \\[default: half the window]")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a forward pass.")] = 8

    def options(self) -> dict[str, Any]:
        """As `evaluate_retro` and `analyse` take them."""
        named = dict(vars(self))
        named["continuation"] = named.pop("continuations")
        return named


def opened_texts(
    database: Path, more: More, tables: list[str] | None, queries: str | None = None
) -> "list[NeighbouredText]":
    """The texts of these tables, or of the database's own."""
    named = [Path(part) for name in tables or () for part in with_commas(name)]
    if not named:
        return [opened_text(database, more, None, queries)]
    return [opened_text(database, more, table, queries) for table in named]


def opened_text(
    database: Path, more: More, table: Path | None, queries: str | None = None
) -> "NeighbouredText":
    """The text of a table, or of the database's own."""
    from nearest.retro.opening import open_text

    databases = [str(database), *(part for name in more or () for part in with_commas(name))]
    return open_text(databases, table, queries)


def dataset_of_text(text: "NeighbouredText", subset: Path | None, **options: Any) -> Any:
    """A text's documents, or those of a file of numbers."""
    from nearest.retro.data.dataset import read_subset

    numbers = None if subset is None else read_subset(subset, text.own.chunks.documents)
    return text.dataset(subset=numbers, **options)


def check_tokenizers(tokenizer: Any, text: "NeighbouredText") -> None:
    """Refuse a text of another vocabulary; say where that cannot be known.

    Args:
        tokenizer: the model's; None where it was saved without one.
        text: to be read.
    """
    from nearest.errors import ModelError, SettingError
    from nearest.retro.data.opening import tokenizer_of
    from nearest.retro.opening import check_vocabulary

    if tokenizer is None:
        err.print(
            "[yellow]note:[/] the model was saved without its tokenizer: that the text was cut "
            "with the same one cannot be checked",
            soft_wrap=True,
        )
        return
    for database in {id(d): d for d in (text.own, *text.searched.databases)}.values():
        try:
            tokenizer_of(database)
        except (ModelError, SettingError):
            err.print(
                f"[yellow]note:[/] the tokenizer of {database.path} is not there: that it is the "
                "model's cannot be checked",
                soft_wrap=True,
            )
            continue
        check_vocabulary(tokenizer, database)


def decoder_of(tokenizer: Any, text: "NeighbouredText") -> Any:
    """Token ids → text, by the model's tokenizer or the text's own; None where neither is there."""
    from nearest.errors import ModelError, SettingError
    from nearest.retro.data.opening import decoder, tokenizer_of

    try:
        return decoder(tokenizer or tokenizer_of(text.own))
    except (ModelError, SettingError):
        return None
