"""The page in a real browser, from disk: what a reader does with it, and what hostile text cannot do."""

import re
import shutil
from dataclasses import replace

import pytest
from discovery.test_explorer import HOSTILE, exploration
from playwright.sync_api import Page, expect, sync_playwright

from dctlib.discovery.explorer import write_explorer
from dctlib.evaluation.judges import truncate

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get update && apt-get install -y chromium")

K, N = 40, len(HOSTILE)


@pytest.fixture(scope="module")
def run():
    return exploration(K, N, read=K - 1)


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    write_explorer(path, run)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A page on which anything in the console, any request but for the file, and any injected script is a failure."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    yield page
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.querySelectorAll('img, [onerror]').length") == 0
    assert problems == []
    assert [url for url in requests if not re.match(r"file:.*/explorer\.html(#|$)|data:", url)] == []
    page.close()


def column(page: Page, name: str) -> list[str]:
    names = page.locator("#vectors thead th").all_inner_texts()
    place = [text.strip() for text in names].index(name) + 1
    return page.locator(f"#vectors tbody td:nth-child({place})").all_inner_texts()


def numbers(page: Page, name: str) -> list[float]:
    return [float(text.replace("−", "-")) for text in column(page, name)]


def test_it_shows_the_run_and_opens_its_first_vector(page, run):
    expect(page).to_have_title(run.title)
    assert page.locator("h1").text_content() == run.title
    assert page.locator("header dd").all_text_contents() == list(run.facts.values())
    assert page.locator("#name").text_content() == f"Vector {run.table['vector'].iloc[0]}"
    assert page.locator("#vectors tbody tr").count() == 15
    assert page.locator("#vectors tbody tr.chosen a").inner_text() == str(run.table["vector"].iloc[0])
    assert page.locator("#map .point").count() == K + 2  # with the ring around the open one and the unsteered model


def test_it_sorts_by_key_and_by_click_the_interesting_end_first(page):
    for name, first, then in [("score", "descending", "ascending"), ("damage", "ascending", "descending")]:
        title = page.locator("#vectors th", has_text=name)
        title.locator(".dt-column-title").click()
        expect(title).to_have_attribute("aria-sort", first)
        shown = numbers(page, name)
        assert shown == sorted(shown, reverse=first == "descending")
        title.get_by_role("button", name=name).first.focus()
        page.keyboard.press("Enter")
        expect(title).to_have_attribute("aria-sort", then)


def test_it_filters_by_number_and_by_hostile_text(page, run):
    page.get_by_role("button", name="Filter score").click()
    page.locator(".dtcc-dropdown select").select_option("greater")
    page.get_by_role("dialog", name="Filter score").get_by_role("textbox").fill("0")
    expected = int((run.table["score"] > 0).sum())
    expect(page.locator(".dt-info")).to_have_text(f"{expected} vectors of {K}")
    assert min(numbers(page, "score")) > 0
    page.get_by_role("dialog", name="Filter score").get_by_role("textbox").fill("")
    page.keyboard.press("Escape")
    page.get_by_label("Search", exact=True).fill("&<img")
    expected = len(run.completions)  # all of them say it to some request
    expect(page.locator(".dt-info")).to_have_text(f"{expected} vectors of {K}")
    page.get_by_label("Search", exact=True).fill(f'"vector {run.table["vector"].iloc[4]} &<img"')
    expect(page.locator(".dt-info")).to_have_text(f"1 vectors of {K}")
    assert column(page, "vector") == [str(run.table["vector"].iloc[4])]


def test_a_vector_opens_by_click_by_key_by_map_and_by_address(page, run):
    order = run.table["vector"].tolist()
    page.locator("#vectors tbody tr").nth(3).locator("td").nth(1).click()
    expect(page.locator("#name")).to_have_text(f"Vector {order[3]}")
    assert page.url.endswith(f"#v={order[3]}")
    page.locator("#vectors tbody tr.chosen a").focus()
    for _ in range(14):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text(f"Vector {order[16]}")
    assert page.evaluate("document.activeElement.textContent") == str(order[16])
    assert page.locator("#vectors tbody tr.chosen a").get_attribute("aria-current") == "true"
    expect(page.locator(".dt-paging-button.current")).to_have_text("2")
    page.locator("#map .point").nth(7).click(force=True)
    expect(page.locator("#name")).to_have_text(f"Vector {order[7]}")
    expect(page.locator("#vectors tbody tr.chosen a")).to_have_text(str(order[7]))
    near = page.locator("#similar-v a").first
    name = f"Vector {near.text_content()}"
    near.click()
    expect(page.locator("#name")).to_have_text(name)
    page.evaluate(f"location.hash = 'v={order[-1]}'")
    expect(page.locator("#name")).to_have_text(f"Vector {order[-1]}")
    expect(page.locator("#note")).to_contain_text("not read on all requests")
    page.reload()
    expect(page.locator("#name")).to_have_text(f"Vector {order[-1]}")
    page.evaluate("location.hash = 'v=9999'")
    expect(page.locator("#name")).to_have_text(f"Vector {order[-1]}")


def test_text_is_folded_until_asked_for(page, run):
    spoken = page.locator("#said td")
    assert spoken.count() == 0
    expect(page.locator("#note")).to_have_text(f"{N} completions are folded; the text may be harmful.")
    snippet = page.locator("#vectors tbody td .says").first
    assert "blur" in snippet.evaluate("each => getComputedStyle(each).filter")
    page.get_by_label("Show completions").press(" ")
    assert snippet.evaluate("each => getComputedStyle(each).filter") == "none"
    steered = next(iter(run.completions.values()))
    said = [text for pair in zip(run.unsteered, steered, strict=True) for text in pair]
    wanted = [truncate(text, run.shown_characters).replace("\ud800", "�") for text in said]
    assert [text.replace("\ud800", "�") for text in spoken.all_text_contents()] == wanted
    page.get_by_label("Show completions").uncheck()
    assert spoken.count() == 0


def test_code_to_use_a_vector_is_copied(page, run):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for label, wanted in zip(
        ["Copy as Python", "Copy the export command"], next(iter(run.snippets.values())), strict=True
    ):
        page.get_by_role("button", name=label).click()
        expect(page.locator("#copied")).to_have_text("Copied.")
        assert page.evaluate("navigator.clipboard.readText()") == wanted
    page.locator("#vectors tbody tr").nth(1).locator("td").nth(1).click()
    expect(page.get_by_role("button", name="Copy as Python")).to_be_hidden()
    expect(page.locator("#unshared")).to_be_visible()
    expect(page.locator("#copied")).to_have_text("")


def test_code_is_selected_where_the_clipboard_is_closed(page, run):
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('closed')); }")
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.locator("#copied")).to_contain_text("Ctrl+C")
    assert page.evaluate("getSelection().toString()").strip() == next(iter(run.snippets.values()))[0]


def test_a_page_that_names_no_folder_says_nothing_of_use(page, tmp_path):
    write_explorer(tmp_path / "explorer.html", exploration(1, 1, snippets={}))
    page.goto((tmp_path / "explorer.html").as_uri())
    expect(page.locator("#name")).to_be_visible()
    expect(page.locator("#use")).to_be_hidden()


def test_injected_script_would_be_stopped_by_the_policy(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 1'}))")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.pwned = 1\">')")
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_either_scheme(page, run, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 375, "height": 812})
    page.get_by_label("Show completions").check()
    page.locator("#vectors tbody tr").nth(2).locator("td").nth(1).click()
    expect(page.locator("#name")).to_have_text(f"Vector {run.table['vector'].tolist()[2]}")
    expect(page.locator("#name")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (brightness < 60) == (scheme == "dark")


def test_every_control_has_a_name_and_focus_is_seen(page):
    page.get_by_role("button", name="Filter score").click()
    page.locator(".dtcc-dropdown select").focus()
    nameless = """() => [...document.querySelectorAll('button, input, select, a[href]')].filter((each) =>
        !(each.labels?.length || each.ariaLabel || each.textContent.trim() && each.tagName !== 'SELECT'))"""
    assert page.evaluate(f"({nameless})().map((each) => each.outerHTML)") == []
    page.keyboard.press("Escape")
    page.locator("#vectors tbody a").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_text_that_need_not_be_folded_is_shown(page, tmp_path):
    write_explorer(tmp_path / "explorer.html", exploration(1, 1, hide=False))
    page.goto((tmp_path / "explorer.html").as_uri())
    expect(page.locator("#said td")).to_have_count(2)


def test_512_vectors_stay_light(browser, tmp_path):
    run = exploration(512, 8, hide=False)
    write_explorer(tmp_path / "explorer.html", replace(run, title="512 vectors"))
    page = browser.new_page()
    page.goto((tmp_path / "explorer.html").as_uri())
    order = run.table["vector"].tolist()
    for place in (0, 200, 511):
        page.evaluate(f"location.hash = 'v={order[place]}'")
        expect(page.locator("#said td").nth(1)).to_have_text(run.completions[order[place]][0])
        expect(page.locator("#vectors tbody tr.chosen a")).to_have_text(str(order[place]))
        assert page.locator("#vectors tbody tr").count() <= 15
        assert page.evaluate("document.querySelectorAll('*').length") < 2000
    page.close()
