"""The pages of the documentation, in blocks, and a folder in which their examples run.

A fence names its language: `sh` is run by a shell, `python` by this process, `text` and `json` are
read. A comment before a fence says what else there is to say: `<!-- not run: why -->`,
`<!-- fresh folder -->` where a page begins anew, `<!-- served until the page ends -->`. A page with
`<!-- slow to run -->` is run by `make test-slow`. Of one with `<!-- not run on this page: why -->`
nothing is run; its commands and their options are checked still.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from conftest import make_documents, make_tokenizer
from pairs import make_pair_model, make_pair_tokenizer
from serving import CHAT_TEMPLATE, roomy_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"(?:<!-- (?P<note>[^\n]*?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    note: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and not self.note.startswith("not run")

    @property
    def serves(self) -> bool:
        return self.note == "served until the page ends"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    written = page.read_text("utf-8")
    of_page = re.search(r"<!-- (not run on this page: .*) -->", written)
    return [
        Block(
            page,
            written.count("\n", 0, found.start("text")) + 1,
            found["language"],
            of_page[1] if of_page else found["note"] or "",
            re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
        )
        for found in _FENCE.finditer(written)
    ]


def is_slow(page: Path) -> bool:
    """Whether its blocks take long: it says so, or it starts a server in a process of its own."""
    return "<!-- slow to run -->" in page.read_text("utf-8") or any(b.serves for b in blocks(page))


def make_world(folder: Path) -> None:
    """Tiny models under the names that the pages use, and the files that they speak of."""
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "openai-community/gpt2"):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        roomy_model().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_pair_model().save_pretrained(folder / "google-t5/t5-small")
    make_pair_tokenizer().save_pretrained(folder / "google-t5/t5-small")
    make_tokenizer().save_pretrained(folder / "t5-base")
    texts = [document.text for document in make_documents(16, 30)]
    (folder / "my-documents").mkdir()
    for number, text in enumerate(texts[:10]):
        (folder / f"my-documents/{number}.txt").write_text(text)
    (folder / "held-out.txt").write_text(texts[10])
    (folder / "test.txt").write_text(texts[11])
    for name, part in (("valid", texts[12:14]), ("test", texts[14:])):
        rows = [json.dumps({"id": f"{name}-{i}", "text": text}) for i, text in enumerate(part)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    pairs = [{"source": f"translate English to German: {n}", "text": f"{n} auf"} for n in range(9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
