"""The report in a real browser: it loads without errors and without a network, filters, and opens samples."""

import shutil

import pytest

from tests.small_workspace import HOSTILE, write_judgement, write_workspace
from workflows.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 90_000  # milliseconds, for machines that do much else

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: apt-get install chromium (or put one named chromium on the PATH)"
)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no driver: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    space = write_workspace(tmp_path_factory.mktemp("report"))
    write_judgement(space)
    return "file://" + space.path(write_report(space))


class Visit:
    """An opened page, what it complained of and what it asked for."""

    def __init__(self, browser, address, width=1200, scheme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors, self.requests = [], []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.errors.append(m.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address, timeout=PATIENCE)

    def scroll_through(self):
        """Past every chart and picture, so that all of them are drawn."""
        for chart in self.page.locator(".plot").all():
            chart.scroll_into_view_if_needed()
            self.page.wait_for_function(
                "node => node.classList.contains('drawn')", arg=chart.element_handle()
            )
        count = self.page.locator(".plot").count()
        self.page.wait_for_function(f"performance.getEntriesByName('chart').length >= {count}")

    def ids(self):
        return self.page.locator("#sample-table tbody th").all_inner_texts()


@pytest.fixture
def visit(browser, address):
    opened = []

    def open_page(**options):
        opened.append(Visit(browser, address, **options))
        return opened[-1]

    yield open_page
    for each in opened:
        each.context.close()


def test_the_page_loads_whole_without_errors_and_without_a_network(visit):
    here = visit()
    here.scroll_through()
    assert here.errors == []
    assert {url.split(":")[0] for url in here.requests} == {"file"}
    assert len(here.requests) == 1
    assert here.page.evaluate("window.owned") is None
    assert here.page.locator("[data-chart=types]").evaluate("node => node.childElementCount") > 0
    assert HOSTILE in here.page.text_content("#defects .type >> nth=0")


def test_filters_search_and_sorting_agree_with_the_rows(visit):
    page = (here := visit()).page
    page.click("#view-table")
    assert len(here.ids()) == 16
    page.select_option("#filters label:has-text('generator') select", "scar")
    assert page.inner_text("#sample-count") == "1–4 of 4"
    page.select_option("#filters label:has-text('round') select", "1")
    assert here.ids() == ["001-00000-00002", "001-00000-00003"]
    page.click("#filters [type=reset]")
    page.fill("#filters input", "001-00000-0000 noise")
    assert here.ids() == ["001-00000-00006"]
    page.fill("#filters input", "nothing is called so")
    assert "No sample fits" in page.inner_text("#sample-count")
    page.click("#filters [type=reset]")
    page.click("[data-sort=generator]")
    page.click("[data-sort=generator]")
    assert page.get_attribute("th:has([data-sort=generator])", "aria-sort") == "descending"
    cells = page.locator("#sample-table tbody tr td:nth-child(4)").all_inner_texts()
    assert cells == sorted(cells, reverse=True)
    page.click("#filters [type=reset]")
    assert here.ids() == sorted(here.ids()) and page.locator("[aria-sort]").count() == 0
    assert not page.is_checked("#filters label:has-text('descending') input")
    page.click("#view-pictures")
    page.select_option("#filters label:has-text('sort by') select", "sample_id")
    page.check("#filters label:has-text('descending') input")
    shown = page.locator("#sample-grid .tile .faint").all_inner_texts()
    assert shown == sorted(shown, reverse=True) and len(shown) > 8
    page.click("#view-table")
    page.click("#rejections button:has-text('show') >> nth=0")
    assert here.ids() == ["000-00000-00007"]
    assert here.errors == []


def test_a_sample_opens_by_keyboard_with_its_normal_and_its_replay_command(visit):
    page = (here := visit()).page
    page.locator("#sample-grid .tile[aria-label*=scar]").first.focus()
    page.keyboard.press("Enter")
    title = page.inner_text("#viewer-title")
    assert page.inner_text("#replay").startswith("flawsmith replay /")
    assert page.inner_text("#replay").endswith(f"/ws {title}")
    sizes = page.locator("#viewer .pair img").evaluate_all(
        "images => Promise.all(images.map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert len(sizes) == 2 and min(sizes) > 100
    outline = page.locator("#viewer .mask").first
    assert outline.is_visible()
    page.keyboard.press("m")
    assert not outline.is_visible() and not page.is_checked("#viewer-masks")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-title") != title
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    page.click("#view-table")
    page.click("#sample-table button:has-text('000-00000-00007')")
    assert "Only accepted samples are stored" in page.inner_text("#viewer")
    assert here.errors == []


def test_heat_maps_are_chosen_and_opened(visit):
    page = (here := visit()).page
    page.select_option("#menus-worst label:has-text('kind') select", "gain")
    assert page.inner_text("#worst-count") == "1 pictures"
    page.select_option("#menus-worst label:has-text('kind') select", "all")
    page.locator("#worst-grid .tile").last.click()
    assert page.inner_text("#viewer-title").startswith("false alarm")
    width = page.locator("#viewer img").evaluate("i => i.decode().then(() => i.naturalWidth)")
    assert width > 300
    assert here.errors == []


def test_a_phone_scrolls_down_only(visit):
    here = visit(width=360)
    here.scroll_through()
    assert here.page.evaluate("document.documentElement.scrollWidth") <= 360
    here.page.locator("#sample-grid .tile").first.click()
    assert here.page.locator("#viewer").evaluate("node => node.scrollWidth <= node.clientWidth")


def test_dark_follows_the_system_until_it_is_chosen(visit):
    page = visit(scheme="dark").page
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.click("#theme")
    assert page.inner_text("#theme") == "Theme: light"
    assert page.evaluate(paper) == "rgb(255, 255, 255)" != dark
    page.click("#theme")
    assert page.evaluate(paper) == dark


def test_everything_that_acts_has_a_name(visit):
    here = visit()
    here.page.locator("#sample-grid .tile").first.click()
    nameless = here.page.evaluate("""() => [...document.querySelectorAll(
        "button, select, input, a, img, dialog, [role=region], [role=img], [role=group], [role=search]"
    )].filter(node => !(
        node.getAttribute("aria-label") || node.getAttribute("alt") || node.textContent.trim()
        || node.labels?.[0]?.textContent.trim()
        || document.getElementById(node.getAttribute("aria-labelledby"))?.textContent.trim()
    )).map(node => node.outerHTML.slice(0, 120))""")
    assert nameless == []
    names = here.page.evaluate(
        "() => [...document.querySelectorAll('.strip')].map("
        "strip => [...strip.querySelectorAll('button')].map(node => node.getAttribute('aria-label')))"
    )
    assert max(map(len, names)) > 1 and all(len(set(own)) == len(own) for own in names)
