"""Documents of files that are more than text: HTML pages, PDF and Word files, each one document."""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

from nearest.corpus.documents import Document, UnfitFileError
from nearest.corpus.text_files import CorpusFile, text_document
from nearest.errors import NearestError, require

_UNSEEN = "head, script, style, noscript, svg, template"
_BLOCKS = (
    "address, article, aside, blockquote, br, caption, dd, div, dl, dt, fieldset, figcaption, "
    "figure, footer, form, h1, h2, h3, h4, h5, h6, header, hr, li, main, nav, ol, option, p, pre, "
    "section, select, table, textarea, tr, ul"
)
_CELLS = "td, th"
_DECLARED = re.compile(
    rb"<meta[^>]+charset\s*=\s*[\"']?([\w.:-]+)|<\?xml[^>]+encoding\s*=\s*[\"']([\w.:-]+)",
    re.IGNORECASE,
)
_DECLARED_WITHIN = 4096
# Spaces of code, while others are joined.
_KEEP = str.maketrans(" \t", "\ue000\ue001")
_GIVE_BACK = str.maketrans("\ue000\ue001", " \t")
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
    title = page.css_first("head > title")
    metadata = {} if title is None or not title.text().strip() else {"title": title.text().strip()}
    for node in page.css(_UNSEEN):  # the title is among them
        node.decompose()
    for node in page.css(_BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    for node in page.css(_CELLS):
        node.insert_after(" ")
    for node in page.css("pre"):
        node.replace_with(node.text().translate(_KEEP))
    text = "" if page.body is None else page.body.text()
    joined = (" ".join(line.split()) for line in text.splitlines())
    lines = (line.translate(_GIVE_BACK).rstrip() for line in joined)
    return text_document(file, "\n".join(line for line in lines if line), **metadata)


def _declared(head: bytes) -> str | None:
    """The encoding that a page declares in its beginning, if Python knows it."""
    found = _DECLARED.search(head, 0, _DECLARED_WITHIN)
    if found is None:
        return None
    name = (found[1] or found[2]).decode("ascii").lower()
    # Browsers read these as what they mean on the web.
    name = {"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252"}.get(name, name)
    try:
        "".encode(name)
    except LookupError:
        return None
    return None if name.startswith(("utf-16", "utf-32")) else name  # it was read as ASCII


def read_notebook(file: CorpusFile) -> Iterator[Document]:
    """The text and the code of a Jupyter notebook, cell by cell, without what the code printed."""
    try:
        cells = json.loads(file.text())["cells"]
        sources = ["".join(cell["source"]).strip() for cell in cells]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error
    return text_document(file, "\n\n".join(source for source in sources if source))


def read_pdf(file: CorpusFile) -> Iterator[Document]:
    """The text of a PDF file, page by page; a scan without text is an empty document."""
    _needs("pypdf", file)
    import pypdf
    from pypdf.errors import DependencyError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what matters is raised
    try:
        with file.path.open("rb") as opened:
            reader = pypdf.PdfReader(opened)
            if reader.is_encrypted and not reader.decrypt(""):
                raise UnfitFileError(
                    f"{file.origin} is encrypted: save it without a password", "encrypted"
                )
            text = "\n\n".join(page.extract_text().strip() for page in reader.pages)
            title = reader.metadata.title if reader.metadata else None
    except UnfitFileError:
        raise
    except DependencyError as error:  # an encryption that needs a library
        raise UnfitFileError(
            f"{file.origin} is encrypted ({error}): install that, or save the file without "
            "encryption",
            "encrypted",
        ) from error
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
            f"{suffix} for want of {package or module} (the extra [files])",
        ) from error


def _damaged(file: CorpusFile, error: Exception) -> UnfitFileError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UnfitFileError(
        f"{file.origin} is damaged, or not what its suffix says ({reason}): save it again, or "
        "leave it out (--exclude)",
        "damaged",
    )
