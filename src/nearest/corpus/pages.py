"""Documents of files that are more than text: HTML pages, PDF and Word files, each one document."""

import re
from collections.abc import Iterator
from typing import Any

from nearest.corpus.documents import Document, UnfitFileError
from nearest.corpus.text_files import CorpusFile, text_document
from nearest.errors import CorpusError, NearestError, require

_UNSEEN = "head, script, style, noscript, template"
_BLOCKS = (
    "address, article, aside, blockquote, br, caption, dd, div, dl, dt, fieldset, figcaption, "
    "figure, footer, form, h1, h2, h3, h4, h5, h6, header, hr, li, main, nav, ol, p, pre, section, "
    "table, tr, ul"
)
_CELLS = "td, th"
_DECLARED = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_DECLARED_WITHIN = 4096
_OWN_PAGE = re.compile(r"<meta name=\"generator\" content=\"nearest")


def read_html(file: CorpusFile) -> Iterator[Document]:
    """The text of an HTML page, a line for each block, without scripts and styles.

    Its encoding is that of a byte-order mark, or what the page declares, or the corpus's own.

    Raises:
        UnfitFileError: it is a report that this library wrote.
        CorpusError: it cannot be read.
    """
    from selectolax.lexbor import LexborHTMLParser

    markup = file.text(_declared)
    if _OWN_PAGE.search(markup, 0, _DECLARED_WITHIN):
        raise UnfitFileError(
            f"{file.origin} is a report of nearest's own, and no corpus", "of our own"
        )
    page = LexborHTMLParser(markup)
    title = page.css_first("title")
    metadata = {} if title is None or not title.text().strip() else {"title": title.text().strip()}
    for node in page.css(_UNSEEN):
        node.decompose()
    for node in page.css(_BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    for node in page.css(_CELLS):
        node.insert_after(" ")
    text = "" if page.body is None else page.body.text()
    lines = (" ".join(line.split()) for line in text.splitlines())
    return text_document(file, "\n".join(line for line in lines if line), **metadata)


def _declared(head: bytes) -> str | None:
    """The encoding that a page declares in its beginning, if Python knows it."""
    found = _DECLARED.search(head, 0, _DECLARED_WITHIN)
    if found is None:
        return None
    name = found[1].decode("ascii").lower()
    # Browsers read these as what they mean on the web.
    name = {"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252"}.get(name, name)
    try:
        "".encode(name)
    except LookupError:
        return None
    return None if name.startswith(("utf-16", "utf-32")) else name  # it was read as ASCII


def read_pdf(file: CorpusFile) -> Iterator[Document]:
    """The text of a PDF file, page by page; a scan without text is an empty document."""
    _needs("pypdf", file)
    import pypdf

    try:
        with file.path.open("rb") as opened:
            reader = pypdf.PdfReader(opened)
            if reader.is_encrypted and not reader.decrypt(""):
                raise UnfitFileError(
                    f"{file.origin} is encrypted: save it without a password", "encrypted"
                )
            text = "\n\n".join(page.extract_text().strip() for page in reader.pages)
            title = reader.metadata.title if reader.metadata else None
    except CorpusError:
        raise
    except Exception as error:  # of a library that reads damaged files: many kinds
        raise _damaged(file, error) from error
    return text_document(file, text.strip(), **_titled(title))


def read_docx(file: CorpusFile) -> Iterator[Document]:
    """The text of a Word file: its paragraphs and the rows of its tables, in order."""
    _needs("docx", file, "python-docx")
    import docx
    from docx.table import Table

    try:
        document = docx.Document(str(file.path))
        lines = []
        for block in document.iter_inner_content():
            if isinstance(block, Table):
                lines += ["\t".join(cell.text for cell in row.cells) for row in block.rows]
            else:
                lines.append(block.text)
        title = document.core_properties.title
    except Exception as error:  # of zip files and of XML: many kinds
        raise _damaged(file, error) from error
    return text_document(file, "\n".join(lines).strip(), **_titled(title))


def _titled(title: Any) -> dict[str, str]:
    return {"title": title.strip()} if isinstance(title, str) and title.strip() else {}


def _needs(module: str, file: CorpusFile, package: str | None = None) -> None:
    try:
        require(module, "files", package)
    except NearestError as error:
        suffix = file.path.suffix.lower()
        raise UnfitFileError(
            f"{file.origin} cannot be read: {error}",
            f"{suffix} for want of {package or module} (pip install 'nearest[files]')",
        ) from error


def _damaged(file: CorpusFile, error: Exception) -> CorpusError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return CorpusError(
        f"{file.origin} is damaged, or not what its suffix says ({reason}): save it again, or "
        "leave it out (--exclude)"
    )
