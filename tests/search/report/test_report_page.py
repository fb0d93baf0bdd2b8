"""report.html in a browser: nothing is fetched, nothing is complained of, and it fits a phone."""

import base64
import json
import re
import shutil
import zlib

import pytest
from report_run import records_of, summary_of, write_run

from prunevolve.search.results import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER),
        reason="no chromium and chromedriver here: apt-get install chromium chromium-driver",
    ),
]

FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    "disable-dev-shm-usage",
)
PHONE, DESKTOP = 390, 1200


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    records = records_of(200)
    path = tmp_path_factory.mktemp("report") / "run"
    folder = write_run(path, records, summary_of(records))
    write_report(folder)
    folder.close()
    return (folder.path / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The driver is named, for Selenium would look for one elsewhere.
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


def show(browser, page, width):
    """Load the page in a screen of this width; return what it asked for."""
    browser.get_log("performance")
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page)
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent]


def test_page_asks_for_nothing_but_itself_and_leaves_nothing_in_the_console(browser, page):
    browser.get_log("browser")
    assert show(browser, page, DESKTOP) == [page]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_page_is_no_wider_than_the_screen_and_wide_parts_scroll_by_keyboard(browser, page, width):
    show(browser, page, width)
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    parts = browser.find_elements("css selector", ".wide")
    wide = [p for p in parts if p.get_property("scrollWidth") > p.get_property("clientWidth")]
    assert wide or width == DESKTOP
    for part in wide:
        assert part.get_attribute("tabindex") == "0"
        assert part.get_attribute("aria-label")


def test_charts_are_drawn_and_legible_on_a_phone(browser, page):
    show(browser, page, PHONE)
    charts = browser.find_elements("css selector", "figure > svg")
    assert len(charts) == 4
    for chart in charts:
        assert chart.rect["width"] > 300
        assert chart.rect["height"] > 60
    text_heights = browser.execute_script(
        "return [...document.querySelectorAll('figure > svg text')].map(text => {"
        "  const place = text.getScreenCTM();"
        "  return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(place.a, place.b)"
        "})"
    )
    assert min(text_heights) > 9


def test_formula_tree_and_text_of_the_best_are_drawn(browser, page):
    show(browser, page, DESKTOP)
    (formula, *_) = browser.find_elements("css selector", "math")
    power = formula.find_element("css selector", "msup")
    base, exponent = power.find_elements("css selector", "mi, mn")
    assert exponent.rect["y"] < base.rect["y"]
    assert exponent.rect["height"] < base.rect["height"]
    # Each operator stands centred above its operands.
    mul, w, add, *_ = (node.rect for node in browser.find_elements("css selector", ".tree span"))
    assert mul["y"] + mul["height"] < w["y"]
    assert w["x"] < mul["x"] < add["x"]
    browser.find_element("css selector", "main code.copy").click()
    assert browser.execute_script("return getSelection().toString()") == "mul(W, add(G, sqr(W)))"


def colour_of(browser, selector, key):
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    numbers = re.findall(r"[\d.]+", browser.execute_script(script, selector, key))
    return [float(number) for number in numbers[:3]]


@pytest.fixture
def media(browser):
    """What sets the medium and the colour scheme of a page, until the end of the test."""

    def emulate(medium, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        settings = {"media": medium, "features": features}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", settings)

    yield emulate
    emulate("", "")


@pytest.mark.parametrize(
    ("medium", "scheme", "dark"),
    [("screen", "light", False), ("screen", "dark", True), ("print", "dark", False)],
)
def test_page_follows_the_colour_scheme_but_for_paper(browser, page, media, medium, scheme, dark):
    media(medium, scheme)
    show(browser, page, DESKTOP)
    assert (max(colour_of(browser, "body", "backgroundColor")) < 60) == dark
    for selector, key in (("figure > svg text", "fill"), ("math", "color"), (".tree", "color")):
        assert (min(colour_of(browser, selector, key)) > 180) == dark


def test_print_has_no_tree_or_table_that_is_cut(browser, page, media):
    media("print", "light")
    paper = 700  # CSS pixels between the margins of A4
    show(browser, page, paper)
    cut = browser.execute_script(
        "return [...document.querySelectorAll('.wide')].filter("
        "  one => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1"
        ").map(one => one.getAttribute('aria-label'))"
    )
    assert cut == []


def test_print_has_no_empty_page(browser, page):
    show(browser, page, DESKTOP)
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    content = base64.b64decode(pdf)
    pages = re.findall(rb"/Type /Page\b.*?/Contents (\d+) 0 R", content, re.DOTALL)
    assert 3 <= len(pages) <= 16
    for number in pages:
        stream = re.search(rb"\n%s 0 obj.*?stream\r?\n(.*?)endstream" % number, content, re.DOTALL)
        drawn = zlib.decompress(stream[1])
        assert drawn.count(b"\n") > 50  # an empty one has a dozen lines
