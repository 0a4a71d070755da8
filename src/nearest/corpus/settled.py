"""Documents with unique ids and without empty ones, from whatever a reader gives."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from nearest.corpus.documents import Document
from nearest.corpus.report import CorpusReport, CorpusWarning
from nearest.corpus.unique import SeenIds
from nearest.errors import CorpusError, warn_caller

_EMPTY = "empty"


def settled(
    documents: Iterable[Document],
    report: CorpusReport,
    again: Callable[[], Iterable[Document]] = tuple,
) -> Iterator[Document]:
    """Leave empty documents out, number repeated ids that the library made, and count it all.

    At the end a CorpusWarning says what was not taken as it stands.

    Args:
        documents: as they are read.
        report: told of every document.
        again: reads them once more, to find the place of the first of two; nothing where they
            cannot be.

    Raises:
        CorpusError: an id that was given with its document is repeated.
    """
    seen, numbers = SeenIds(), dict[str, int]()
    for index, document in enumerate(documents):
        if not document.text or document.text.isspace():
            report.skip(_EMPTY, document.origin)
            continue
        repeated = not seen.add(document.id)
        if repeated and not document.made_id:
            _refuse_repeated(document, index, again)
        elif repeated:
            number = numbers.get(document.id, 1)
            while not seen.add(made := f"{document.id}#{(number := number + 1)}"):
                pass
            numbers[document.id] = number
            document = replace(document, id=made)
            report.numbered_ids += 1
        report.documents += 1
        yield document
    if report.notable:
        warn_caller(str(report), CorpusWarning)


def _refuse_repeated(
    document: Document, index: int, again: Callable[[], Iterable[Document]]
) -> None:
    """Refuse a document whose id was seen, unless only the hashes of two ids are equal."""
    first = "an earlier place"
    for number, other in enumerate(again()):
        if number == index:
            return
        if other.id == document.id:
            first = other.origin
            break
    raise CorpusError(
        f"document id {document.id!r} stands twice, in {first} and in {document.origin}: ids must "
        "be unique; change one, remove one, or name another field as id (--id-field)"
    )
