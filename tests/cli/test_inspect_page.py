"""The page in a real browser: what is pointed at says what it is, toggles toggle, attention is drawn."""

import json
import os
import shutil

import pytest

from torchmask.cli.main import main

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("TORCHMASK_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Who <script>alert(1)</script>?"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Ada", "weight": 0.25}, {"type": "text", "text": " said so"}],
            },
        ]
    },
    {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Rome ... yes"}]},
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(data_config, tmp_path, browser, capsys):
    """Opens the page of ROWS at a width and a colour scheme, and fails on any message of the browser's console."""
    contexts, messages = [], []

    def opened(width=1280, scheme="light"):
        spans = [{"name": "filler", "regex": r"\.\.\.", "visible": False, "train": False}]
        config = data_config(ROWS, dataset={"spans": spans})
        assert main(["inspect", "--config", config, "--html", str(tmp_path / "page.html")]) == 0
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(f"file://{tmp_path / 'page.html'}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert messages == []


def token(page, text):
    return page.locator(".tokens > *", has_text=text).first


def test_pointing_at_a_token_shows_id_role_weight_position_and_rule(open_page, data_config, capsys):
    page = open_page()
    page.locator(".row b[style]").first.hover()
    said = page.locator("#info").inner_text()
    capsys.readouterr()
    assert main(["inspect", "--config", data_config(ROWS), "--json", "-n", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    at = document["weights"].index(0.25)
    assert f"id {document['tokens'][at]}" in said and f"position {at}" in said and f"slot {at}" in said
    assert "role assistant" in said and "trained, weight 0.25" in said and "decided by part" in said
    assert f"label {document['tokens'][at + 1]} " in said
    page.locator(".tokens > *").filter(has_text="<|im_start|>").nth(1).hover()  # the assistant's header
    said = page.locator("#info").inner_text()
    assert "not trained" in said and "decided by header" in said
    page.mouse.move(2, 2)
    assert page.locator("#info").inner_text() == ""


def test_a_tap_on_a_phone_does_the_same(open_page):
    page = open_page(width=390)
    token(page, "<|im_end|>").click()
    assert "id 2" in page.locator("#info").inner_text()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_can_be_read(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = "el => { const s = getComputedStyle(el); return [s.color, s.backgroundColor]; }"
    for chosen in ("b", "b.e"):
        text, behind = page.locator(f".row .tokens {chosen}").first.evaluate(colours)
        assert contrast(page, text, behind) > 4.5, (chosen, text, behind)
    text = page.locator(".row .tokens i").first.evaluate(colours)[0]
    card = page.locator(".row").first.evaluate(colours)[1]
    assert contrast(page, text, card) > 4.5


def contrast(page, one, other):
    """The contrast ratio of two CSS colours (WCAG 2)."""

    def luminance(colour):
        script = """colour => { const pen = document.createElement("canvas").getContext("2d");
            pen.fillStyle = getComputedStyle(document.querySelector(".row")).backgroundColor; pen.fillRect(0, 0, 1, 1);
            pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data]; }"""
        parts = [value / 255 for value in page.evaluate(script, colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_toggles_show_ids_and_hide_context_hidden_tokens_and_weights(open_page):
    page = open_page()
    context, hidden, light = (page.locator(f".row .tokens {chosen}").first for chosen in ("i", ".h", "b[style]"))
    page.get_by_label("ids").check()
    shown = token(page, "<|im_end|>").evaluate("el => getComputedStyle(el, '::after').content")
    assert shown == '"2"'
    assert hidden.is_visible()
    page.get_by_label("hidden tokens").uncheck()
    assert not hidden.is_visible()
    page.get_by_label("hidden tokens").check()
    assert hidden.is_visible()
    paint = "el => getComputedStyle(el).backgroundColor"
    before = light.evaluate(paint)
    page.get_by_label("weights").uncheck()
    assert light.evaluate(paint) != before
    page.get_by_label("trained only").check()
    assert not context.is_visible() and page.locator(".row .tokens b").first.is_visible()


def test_what_a_clicked_token_sees_is_its_own_document_before_it(open_page):
    page = open_page()
    page.get_by_label("what a clicked token sees").check()
    boxes = page.locator("[data-ids]")
    boxes.nth(1).locator("b").last.click()
    count = "el => [el.children.length, el.querySelectorAll('.unseen').length, el.querySelectorAll('.h.unseen').length]"
    length, unseen, _ = boxes.nth(0).evaluate(count)
    assert unseen == length
    _, unseen, hidden = boxes.nth(1).evaluate(count)
    num_hidden = boxes.nth(1).locator(".h").count()
    after_stop = 1  # the line break behind the stop token
    assert hidden == num_hidden > 0 and unseen == num_hidden + after_stop


def test_the_attention_picture_is_drawn_and_says_who_sees_whom(open_page):
    page = open_page()
    page.locator(".attention summary").first.click()
    for _ in range(500):  # asked from outside: the page's policy forbids a script that waits in it
        if page.evaluate("document.querySelector('canvas').width") > 300:
            break
        page.wait_for_timeout(10)
    drawn = page.locator("canvas").first.evaluate(
        """el => { const pen = el.getContext("2d"), n = el.width;
            const at = (x, y) => pen.getImageData(x * n, y * n, 1, 1).data[3];
            return [at(0.02, 0.3), at(0.3, 0.02), at(0.02, 0.98), at(0.72, 0.98)]; }"""
    )
    assert drawn == [255, 0, 0, 255]  # own document, later slot, other document, own document
    area = page.locator("canvas").first.bounding_box()
    page.locator("canvas").first.hover(position={"x": 0.02 * area["width"], "y": 0.98 * area["height"]})
    assert "does not see slot" in page.locator("output").first.inner_text()


def test_what_rows_say_never_becomes_markup(open_page):
    page = open_page()
    assert page.evaluate("document.scripts.length") == 1
    assert "<script>alert(1)</script>" in page.locator("[data-ids]").first.inner_text()
