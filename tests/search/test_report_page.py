"""report.html in a browser: nothing is fetched, nothing is complained of, and it fits a phone."""

import json
import shutil

import pytest
from report_run import records_of, summary_of, task_of, write_run

from prunevolve.search.results import rebuild_report

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


@pytest.fixture
def page(tmp_path):
    records = records_of(200)
    cell = {"text": "documentation", "dense": 25.0, "named": "pruner-zero"}
    cell |= {"named_perplexity": 35.0, "perplexity": 30.0, "relative_rise": 0.8}
    tasks = [task_of(name=f"models/smollm2-135m {rate}", by_text=[cell]) for rate in ("50%", "60%")]
    folder = write_run(tmp_path / "run", records, summary_of(records, tasks=tasks))
    rebuild_report(folder)
    folder.close()
    return (folder.path / "report.html").as_uri()


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The driver is named, for Selenium would look for one elsewhere.
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fetches_nothing_and_is_no_wider_than_the_screen(browser, page, width):
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == 390}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get_log("performance")
    browser.get(page)
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = [params["request"]["url"] for params in sent]
    assert [url for url in urls if not url.startswith("data:")] == [page]  # the chart is in it
    assert browser.get_log("browser") == []
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Commands break between their words, not inside an option.
    parts = (
        "return [...document.querySelectorAll('code span')].map(one => one.getClientRects().length)"
    )
    assert {*browser.execute_script(parts)} == {1}
    chart = browser.find_element("css selector", "picture > img")
    assert 340 < chart.rect["width"] <= width
    assert chart.rect["height"] > 240
    assert width == 390 or chart.rect["width"] > 900
    if width == 390:
        _check_tables(browser)


def _check_tables(browser):
    """Formulas are on a phone's screen, below their rows, and names stay when a table scrolls."""
    browser.execute_script("document.querySelectorAll('.wide').forEach(x => x.scrollLeft = 999)")
    rows = browser.find_elements("css selector", "tbody tr")
    formulas = 0
    for row in rows:
        name, *_, last = row.find_elements("css selector", "td")
        assert 0 <= name.rect["x"] < 30
        if last.get_attribute("class") == "long" and last.text:
            assert last.rect["x"] >= 0 and last.rect["x"] + last.rect["width"] <= 390
            assert last.rect["y"] >= name.rect["y"] + name.rect["height"] - 1
            formulas += 1
    assert formulas > 5
