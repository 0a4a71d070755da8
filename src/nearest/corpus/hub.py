"""Documents of a dataset on the Hugging Face hub, streamed: only where the user writes hf://."""

from collections.abc import Iterator
from typing import Any

from nearest.corpus.documents import Document, Fields
from nearest.corpus.tables import row_document
from nearest.errors import CorpusError, require

SCHEME = "hf://"


def read_hub(given: str, fields: Fields) -> Iterator[Document]:
    """The documents of `hf://owner/name[/config][:split]`, a row each, as in Parquet files.

    Raises:
        CorpusError: it cannot be reached or read, holds several splits of which none was named, or
            a row is no document.
        NearestError: `datasets` is not installed.
    """
    require("datasets", "data")
    place, _, split = given.removeprefix(SCHEME).partition(":")
    parts = place.split("/")
    if not all(parts) or len(parts) > 3:
        raise CorpusError(f"{given} names no dataset: write hf://owner/name, or …:split after it")
    name, config = "/".join(parts[:2]), (parts[2] if len(parts) == 3 else None)
    for number, row in enumerate(_rows(given, name, config, split or None), 1):
        yield row_document(row, place, f"{given}:{number}", fields)


def _rows(given: str, name: str, config: str | None, split: str | None) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split, streaming=True)
        if isinstance(found, dict):  # by split
            if len(found) > 1:
                raise CorpusError(
                    f"{given} holds the splits {', '.join(found)}: name one of them, "
                    f"such as {given}:{next(iter(found))}"
                )
            found = next(iter(found.values()))
        for row in found:
            yield dict(row)
    except CorpusError:
        raise
    except Exception as error:  # of the library, of its readers, of the network: many kinds
        reason = str(error).strip().partition("\n")[0]
        raise CorpusError(
            f"{given} cannot be read ({reason}): check its name, the split and the network"
        ) from error
