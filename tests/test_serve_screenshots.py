"""Pictures of the viewer with a real model, for docs/viewer.md and for eyes.

NEAREST_SCREENSHOTS=docs/viewer pytest -m slow tests/test_serve_screenshots.py
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from nearest import Document, Memory
from nearest.demo.run import MODEL
from nearest.encode.loading import load_model_and_tokenizer
from serving import Running, serving
from test_serve_viewer import ARGUMENTS, CHROMIUM, complete

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

TOPICS = (
    *("for", "while", "if", "try", "with", "global", "nonlocal", "break", "continue", "pass"),
    *("return", "yield", "raise", "import", "assert", "del", "lambda", "bltin-null-object"),
)
PROMPT = 'The "global" statement'
LICENCE = "PSF-2.0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model, tokenizer = load_model_and_tokenizer(str(MODEL))
    documents = [
        Document(name, prose(topics[name]), {"title": f"{name} statement", "licence": LICENCE})
        for name in TOPICS
        if name in topics
    ]
    path = tmp_path_factory.mktemp("viewer") / "python.memory"
    memory = Memory.build(model, tokenizer, documents, path)
    with serving(
        model, tokenizer, [memory], model_name="general-gpt2-7m", write_key="only-for-tests"
    ) as running:
        yield running


def prose(topic: str) -> str:
    """A topic's paragraphs, without headings, grammar and examples."""
    paragraphs = [
        " ".join(part.split()) for part in topic.split("\n\n") if not part.startswith(" ")
    ]
    return "\n".join(part for part in paragraphs if len(part) > 60 and "***" not in part)


def opened(browser: Any, server: Running, width: int = 1280, scheme: str = "light") -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": 860 if width > 600 else 1400},
        color_scheme=scheme,
        device_scale_factor=2 if width < 600 else 1,
        http_credentials={"username": "me", "password": "only-for-tests", "send": "always"},
    )
    page: Page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(server.url)
    expect(page.locator("#serving")).to_contain_text("python")
    expect(page.locator("#examples button").first).to_be_visible()
    return page


def asked(page: Page, mode: str = "prompt", text: str = PROMPT) -> None:
    page.click(f'[data-mode="{mode}"]')
    page.fill("#input", text)
    page.click("#run")
    complete(page)


def small(path: Path) -> None:
    """With 128 colours a picture of such a page has a fourth of the bytes, and looks the same."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(128)
    few.save(path, optimize=True)


def test_pictures(server: Running, tmp_path: Path) -> None:
    folder = Path(os.environ.get("NEAREST_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    taken: list[Path] = []

    def take(page: Page, name: str) -> None:
        taken.append(folder / f"{name}.png")
        page.mouse.move(0, 0)
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=taken[-1])
        small(taken[-1])

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = opened(browser, server)
        take(page, "start")
        asked(page)
        take(page, "answer")
        page.locator("#documents").scroll_into_view_if_needed()
        page.locator("#documents .list > li .name").first.click()
        take(page, "used")
        page.locator("#token-card .list .name").first.click()
        expect(page.locator("#document-text mark")).to_be_visible()
        page.wait_for_timeout(300)  # until it has scrolled to the place
        take(page, "document")
        page.click("#document-close")
        page.locator("#documents .list > li").first.get_by_text("Without it").click()
        complete(page)
        take(page, "without")
        page.locator("#without button").first.click()
        complete(page)
        asked(page)
        page.check("#compare")
        page.wait_for_timeout(400)  # changes are waited for, a moment
        complete(page)
        take(page, "compare")
        page.uncheck("#compare")
        page.wait_for_timeout(400)
        complete(page)
        asked(
            page,
            "text",
            "The continue statement begins the next iteration of the nearest enclosing loop.",
        )
        take(page, "text")
        asked(page)
        page.click("#more summary")
        page.select_option("#method", "in-context")
        page.click("#more summary")
        page.wait_for_timeout(400)
        complete(page)
        page.evaluate("document.querySelector('#reads details').open = true")
        page.evaluate("document.getElementById('reads').scrollIntoView()")
        take(page, "read")
        page.click("#view-library")
        expect(page.locator("#library-list > li").first).to_be_visible()
        take(page, "documents")
        for name, width, scheme in (("dark", 1280, "dark"), ("narrow", 320, "light")):
            page = opened(browser, server, width, scheme)
            asked(page)
            page.evaluate("window.scrollTo(0, 0)")
            take(page, name)
            if width < 600:
                page.screenshot(path=tmp_path / "narrow-whole.png", full_page=True)
        page.goto(server.url)
        page.reload()
        expect(page.locator("#serving")).to_contain_text("python")
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        sys.stderr.write(f"first contentful paint after {paint:.0f} ms\n")
        browser.close()
    sizes = [path.stat().st_size for path in taken]
    assert min(sizes) > 5_000
    assert len(set(sizes)) == len(sizes)  # each shows something else
