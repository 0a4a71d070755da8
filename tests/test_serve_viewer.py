"""The viewer in Chromium: every control, by mouse and by keyboard, and axe's rules."""

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright
from transformers import PreTrainedTokenizerFast

from conftest import make_documents
from nearest import Memory
from serving import CHAT_TEMPLATE, Running, roomy_model, serving
from test_present_text import RANDOM, tuned
from test_serve_beside import chunked, make_fitted, search

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WRITE_KEY = "a-key-to-write"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


@pytest.fixture(scope="module")
def server(
    build_memory: Callable[..., Memory], tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Running]:
    model = roomy_model()
    memory = build_memory(model, make_documents(12, 30))
    with serving(
        model, tiny_tokenizer, [memory], chat_template=CHAT_TEMPLATE, write_key=WRITE_KEY
    ) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Page]:
    errors: list[str] = []
    context = browser.new_context(
        viewport={"width": 1280, "height": 900},
        http_credentials={"username": "me", "password": WRITE_KEY, "send": "always"},
        accept_downloads=True,
    )
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    outside: list[str] = []
    opened.on("request", lambda r: r.url.startswith(server.url) or outside.append(r.url))
    opened.goto(server.url)
    expect(opened.locator("#serving")).to_contain_text("test (12 documents, version")
    yield opened
    context.close()
    assert not errors
    assert not [url for url in outside if not url.startswith(("data:", "blob:"))]


def ran(page: Page, prompt: str = "the court shall", mode: str = "prompt") -> None:
    """Run a prompt and wait for the whole answer."""
    page.click(f'[data-mode="{mode}"]')
    page.fill("#input", prompt)
    page.click("#run")
    complete(page)


def complete(page: Page) -> None:
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    expect(page.locator("#problem")).to_be_hidden()


def test_a_token_shows_what_the_memory_did(page: Page) -> None:
    ran(page)
    tokens = page.locator(".t")
    assert tokens.count() == 60
    tokens.nth(4).click()
    card = page.locator("#token-card")
    expect(card).to_contain_text("odel alone")
    expect(card).to_contain_text("decided by memory")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(5)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Home")
    expect(tokens.nth(0)).to_have_attribute("aria-selected", "true")
    widths = {t.evaluate("e => getComputedStyle(e).borderBottomWidth") for t in tokens.all()}
    assert len(widths) > 1  # a cue beside colour


def test_documents_and_tokens_are_linked_both_ways(page: Page) -> None:
    ran(page)
    first = page.locator("#documents .list > li").first
    first.locator(".name").click()
    assert page.locator(".t.of").count() > 0
    page.locator(".t.of").first.click()
    assert page.locator('#documents .name[aria-pressed="true"]').count() == 1
    assert page.locator("#documents .name[aria-current]").count() > 0
    first.get_by_text("Open").click()
    expect(page.locator("#document")).to_be_visible()
    expect(page.locator("#document-about")).to_contain_text("doc-")
    page.keyboard.press("Escape")
    expect(page.locator("#document")).to_be_hidden()
    page.locator("#token-card .list .name").first.click()
    expect(page.locator("#document-text mark")).to_be_visible()
    page.click("#document-close")


def test_without_a_document_runs_again_and_compares(page: Page) -> None:
    ran(page)
    name = page.locator("#documents .list > li .name").first.inner_text()
    page.locator("#documents .list > li").first.get_by_text("Without it").click()
    complete(page)
    expect(page.locator("#without")).to_contain_text(name)
    assert page.locator(".answer").count() == 2
    names = page.locator("#documents .list > li .name").all_inner_texts()
    assert name not in names
    page.locator("#without button").click()
    complete(page)
    expect(page.locator("#without")).to_be_hidden()


def test_settings_act_at_once(page: Page) -> None:
    ran(page)
    page.click("#more summary")
    page.locator("#lam").fill("0")
    expect(page.locator("#lam-shown")).to_have_text("0")
    expect(page.locator(".answer h2").first).to_contain_text("no memory was used")
    complete(page)
    page.locator("#tokens").fill("10")
    expect(page.locator(".t")).to_have_count(10)
    complete(page)
    page.select_option("#method", "suffix")
    expect(page.locator(".answer h2").first).to_contain_text("suffix")
    complete(page)
    page.check("#compare")
    expect(page.locator(".answer")).to_have_count(2)
    complete(page)


def test_a_text_is_read_under_model_and_memory(page: Page) -> None:
    ran(page, "the court shall the law", mode="text")
    assert page.locator(".t").count() == len("the court shall the law")
    expect(page.locator(".answer h2")).to_contain_text("perplexity")
    expect(page.locator("#story")).to_contain_text("likelier with it")
    expect(page.locator("#legend-text")).to_be_visible()
    expect(page.locator("#compare-field")).to_be_hidden()


def test_what_was_read_beside_the_text_is_shown(
    browser: Any, build_memory: Callable[..., Memory], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Neighbours under each chunk, opened with the token that they acted on, and the slider."""
    model = roomy_model()
    memory = chunked(build_memory(model, make_documents(12, 30)))
    with serving(make_fitted(model), tiny_tokenizer, [memory], retro=search()) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        page.set_default_timeout(60_000)
        page.goto(server.url)
        expect(page.locator("#method")).to_have_value("retro")
        ran(page)
        reads = page.locator("#reads details")
        assert reads.count() > 3
        page.locator(".tokens").first.focus()  # of a random model some tokens have no text
        page.keyboard.press("Home")
        expect(page.locator("#reads details[open]")).to_have_count(1)
        opened = page.locator("#reads details[open]")
        assert opened.locator(".list > li").count() == 2
        expect(opened).to_contain_text("distance")
        assert (
            page.locator("#reads mark").count() == page.locator("#reads mark", has_text=" ").count()
        )
        opened.locator(".name").first.click()
        expect(page.locator("#document-text mark")).to_be_visible()
        page.click("#document-close")
        page.locator("#documents .list > li .name").first.click()
        assert page.locator(".t.of").count() > 0
        page.evaluate("document.getElementById('more').open = true")
        page.locator("#neighbours").fill("4")
        expect(page.locator("#reads details").last.locator("li")).to_have_count(4)
        complete(page)
        found = Axe().run(page).response["violations"]
        assert not found, [(one["id"], one["nodes"][0]["html"]) for one in found]
        page.close()


def test_what_earlier_places_of_the_text_gave_is_shown(
    browser: Any, build_memory: Callable[..., Memory], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of a token, beside what memory and model gave, and of the whole answer."""
    model = roomy_model()
    memory = tuned(model, build_memory(model, make_documents(20, 16)))
    with serving(model, tiny_tokenizer, [memory]) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(server.url)
        page.click("#more summary")
        page.select_option("#method", "hybrid")
        ran(page, " ".join([RANDOM[0][:20]] * 3))
        expect(page.locator(".answer h2").first).to_contain_text("this text")
        page.locator('.t[title*="this text"]').first.click()
        shares = page.locator("#token-card .facts dd").all_inner_texts()[2:]
        names = page.locator("#token-card .facts dt").all_inner_texts()[2:]
        assert names == ["decided by memory", "decided by this text", "decided by the model"]
        told = [float(share.removesuffix(" %").replace("<1", "0.5")) for share in shares]
        assert sum(told) == pytest.approx(100, abs=1.5)  # rounded, each by itself
        page.close()


def test_a_stranger_has_something_to_begin_with(page: Page) -> None:
    example = page.locator("#examples button").first
    words = example.inner_text()
    example.click()
    complete(page)
    expect(page.locator(".prompt")).to_have_text(words)
    expect(page.locator("#examples")).to_be_hidden()
    expect(page.locator("#story")).to_contain_text("The memory decided")
    expect(page.locator("#token-card")).to_contain_text("odel alone")  # a token is chosen already


def test_chat_goes_on(page: Page) -> None:
    ran(page, "the mayor", mode="chat")
    page.fill("#input", "and the law")
    page.click("#run")
    complete(page)
    assert page.locator(".answer.said").count() == 3
    page.click("#new-chat")
    assert page.locator(".answer").count() == 0


def test_export_and_link(page: Page, server: Running) -> None:
    ran(page)
    text = "".join(page.locator(".t").all_text_contents())
    with page.expect_download() as download:
        page.click("#save-json")
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["answers"][0]["text"] == text
    assert saved["answers"][0]["memories"][0]["name"] == "test"
    with page.expect_download() as download:
        page.click("#save-html")
    html = Path(download.value.path()).read_text()
    assert "<script" not in html
    assert 'class="t' in html
    page.click("#link")
    link = page.url
    other = page.context.new_page()
    other.set_default_timeout(60_000)
    other.goto(link)
    expect(other.locator(".t")).to_have_count(60)
    complete(other)
    assert "".join(other.locator(".t").all_text_contents()) == text
    kept = link.split("#")[1].replace("-", "+").replace("_", "/")
    state = json.loads(base64.b64decode(kept + "=" * (-len(kept) % 4)))
    state["versions"]["test"] = 99
    moved = base64.b64encode(json.dumps(state).encode()).decode()
    third = page.context.new_page()
    third.goto(f"{server.url}/#{moved}")
    expect(third.locator("#outdated")).to_contain_text("another version of test")


def test_a_passages_number_outlines_it(page: Page) -> None:
    """By a click and by Enter; those who cannot see it are told what it is."""
    ran(page)
    number = page.locator(".cite").first
    number.click()
    assert page.locator(".t.of").count() >= 3
    number.click()
    assert page.locator(".t.of").count() == 0
    end = page.locator(".t:has(.cite)").first
    assert "end of a passage of document" in (end.get_attribute("aria-label") or "")
    expect(end).to_have_attribute("aria-selected", "true")
    page.locator(".tokens").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".t.of").count() >= 3


def test_a_link_restores_memories_and_comparison(
    browser: Any,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = roomy_model()
    first = build_memory(model, make_documents(12, 30))
    many = make_documents(205, 8, seed=4)
    second = Memory.build(model, tiny_tokenizer, many, tmp_path / "other.memory")
    with serving(model, tiny_tokenizer, [first, second]) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(server.url)
        page.click("#more summary")
        page.locator("#memories input").nth(1).uncheck()
        page.check("#compare")
        ran(page)
        link = page.evaluate("location.href")
        assert page.locator(".answer").count() == 2
        page.locator("#memories input").first.click()  # the last one: it stays
        assert page.locator("#memories input").first.is_checked()
        other = browser.new_page()
        other.goto(link)
        complete(other)
        expect(other.locator(".answer")).to_have_count(2)
        boxes = other.locator("#memories input")
        assert [box.is_checked() for box in boxes.all()] == [True, False]
        # The list of documents: of each memory, and page by page.
        page.click("#view-library")
        expect(page.locator("#library-list > li")).to_have_count(12)
        page.select_option("#library-memory", "other")
        expect(page.locator("#library-count")).to_contain_text("1–100 of 205")
        expect(page.locator("#earlier")).to_be_disabled()
        page.click("#later")
        expect(page.locator("#library-count")).to_contain_text("101–200 of 205")
        page.click("#later")
        expect(page.locator("#library-list > li")).to_have_count(5)
        expect(page.locator("#later")).to_be_disabled()
        page.click("#earlier")
        expect(page.locator("#library-count")).to_contain_text("101–200 of 205")
    page.click("#earlier")
    expect(page.locator("#library-problem")).to_contain_text("cannot be reached")


def test_stopping_keeps_what_came_and_a_chat_goes_on(page: Page) -> None:
    page.click("#more summary")
    page.locator("#tokens").fill("300")
    page.click('[data-mode="chat"]')
    page.fill("#input", "the mayor")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".answer .t").first).to_be_attached()
    page.click("#stop")
    expect(page.locator("#stop")).to_be_hidden()
    assert page.locator(".answer .t").count() < 300
    page.locator("#tokens").fill("10")
    complete(page)
    expect(page.locator(".answer .t")).to_have_count(10)
    with page.expect_request("**/v1/chat/completions"):  # what is asked anew comes a moment later
        page.locator("#temperature").fill("1.5")
    expect(page.locator("#temperature-shown")).to_have_text("1.5")
    complete(page)
    ran_turns = page.locator(".answer.said")
    expect(ran_turns).to_have_count(1)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#input", "and the law")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("cannot be reached")
    expect(page.locator("#input")).to_have_value("and the law")
    page.unroute("**/v1/chat/completions")
    page.click("#run")
    complete(page)
    expect(ran_turns).to_have_count(3)


def test_keyboard_and_citation(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#output")).to_be_focused()
    expect(page.locator("#problem")).to_be_hidden()  # it is no link to an answer
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#view-library")
    page.locator("#library-list .name").first.click()
    page.click("#document-cite")
    assert page.evaluate("navigator.clipboard.readText()") == (
        f"{page.locator('#document-title').inner_text()} (doc-0), test, version "
        f"{page.locator('#document-about dd').first.inner_text().rpartition(' ')[2]}"
    )


def test_documents_are_added_and_removed(page: Page) -> None:
    page.click("#view-library")
    expect(page.locator("#library-list > li")).to_have_count(12)
    page.fill("#add-id", "new-one")
    page.fill("#add-text", "a person of the council")
    page.fill("#add-title", "The council")
    page.fill("#add-url", "https://example.org/council")
    page.fill("#add-licence", "CC0")
    page.get_by_text("Add document").click()
    expect(page.locator("#library-list > li")).to_have_count(13, timeout=60_000)
    row = page.locator("#library-list > li").last
    row.get_by_text("The council").click()
    for told in ("https://example.org/council", "CC0"):
        expect(page.locator("#document-about")).to_contain_text(told)
    page.click("#document-close")
    row.get_by_text("Remove").click()
    row.get_by_text("Really remove?").click()
    expect(page.locator("#library-list > li")).to_have_count(12, timeout=60_000)


def test_a_refusal_is_shown(page: Page) -> None:
    page.click('[data-mode="text"]')
    page.fill("#input", "x" * 2000)
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("at most 512 tokens")


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (320, "light"), (320, "dark")]
)
def test_accessible_at_every_width(browser: Any, server: Running, width: int, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(server.url)
    expect(page.locator("#serving")).to_contain_text("test")

    def check(what: str) -> None:
        found = Axe().run(page).response["violations"]
        assert not found, (what, [(one["id"], one["nodes"][0]["html"]) for one in found])
        assert page.evaluate("document.documentElement.scrollWidth") <= width, what

    page.check("#compare")
    ran(page)
    page.locator(".t").nth(3).click()
    page.click("#more summary")
    check("compare")
    page.locator("#documents .list > li").first.get_by_text("Open").click()
    check("dialog")
    page.click("#document-close")
    ran(page, "the mayor", mode="chat")
    check("chat")
    ran(page, "the court shall the law", mode="text")
    check("text")
    page.click("#view-library")
    expect(page.locator("#library-list > li").first).to_be_visible()
    check("documents")
    context.close()
