"""The page in headless Chromium; skipped where that or Selenium is not installed."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get("about:blank")
    yield driver
    driver.quit()


def show(browser: Any, page: Path, size: tuple[int, int] = DESKTOP, dark: bool = False) -> None:
    """Open the page and wait for its charts."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    end = time.monotonic() + 60
    while browser.execute_script("return document.documentElement.dataset.charts") != "drawn":
        assert time.monotonic() < end, browser.get_log("browser")
        time.sleep(0.1)


def script(browser: Any, code: str) -> Any:
    return browser.execute_script(f"return {code}")


def column(browser: Any, index: int) -> list[str]:
    return script(browser, f"[...document.querySelectorAll('table:not(.plain) tbody tr:not([hidden])')]"
                           f".map(row => row.cells[{index}].dataset.order)")  # fmt: skip


def colour(browser: Any, selector: str, kind: str) -> str:
    return script(browser, f"getComputedStyle(document.querySelector('{selector}')).{kind}")


@pytest.mark.slow
def test_no_console_message_and_no_request_but_the_file(browser: Any, real_page: Path) -> None:
    show(browser, real_page)
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert browser.get_log("browser") == []
    assert urls == {real_page.as_uri()}


def test_every_chart_is_drawn_with_marks(browser: Any, real_page: Path) -> None:
    show(browser, real_page)
    marks = script(browser, "[...document.querySelectorAll('.chart')].map(chart => "
                            "chart.querySelectorAll('svg [role=graphics-symbol]').length)")  # fmt: skip
    assert len(marks) == 8 and min(marks) >= 2, marks


def test_a_checkpoint_that_is_chosen_changes_every_chart_that_has_it(browser: Any, real_page: Path) -> None:
    show(browser, real_page)
    state = "[...document.querySelectorAll('#s1-errors svg, #s1-scales svg')].map(svg => svg.innerHTML)"
    before = script(browser, state)
    menu = browser.find_element("css selector", "select[data-chart='s1-errors']")
    menu.send_keys("mxfp8")
    time.sleep(0.5)
    after = script(browser, state)
    assert script(browser, "document.querySelector('select[data-chart=s1-scales]').value") == "mxfp8"
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_the_menu_of_tables_holds_those_of_the_checkpoint_and_the_map_is_never_empty(
    browser: Any, real_page: Path
) -> None:
    show(browser, real_page)
    menu = browser.find_element("css selector", "select[data-chart='s1-tables'][data-parameter='checkpoint_shown']")
    offered = set()
    for name in ("mixfp4", "if4", "iq4_nl"):
        change = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change', {bubbles: true}))"
        browser.execute_script(change, menu, name)
        time.sleep(0.5)
        tables = "[...document.querySelector('[data-chart=s1-tables][data-parameter=table_shown]').options]"
        offered.add(tuple(script(browser, f"{tables}.map(option => option.value)")))
        cells = script(browser, "document.querySelectorAll('#s1-tables .mark-rect path').length")
        assert menu.get_property("value") == name and cells > 10
    assert len(offered) > 1


def test_a_click_sorts_as_numbers_and_another_turns_it(browser: Any, real_page: Path) -> None:
    show(browser, real_page)
    header = browser.find_elements("css selector", "table:not(.plain) thead th")[2]
    header.find_element("tag name", "button").click()
    sizes = [int(size) for size in column(browser, 2)]
    assert sizes == sorted(sizes) and header.get_attribute("aria-sort") == "ascending"
    header.find_element("tag name", "button").click()
    assert [int(size) for size in column(browser, 2)] == sorted(sizes, reverse=True)
    assert header.get_attribute("aria-sort") == "descending"


def test_sorting_works_by_keyboard_and_unknown_values_come_last(browser: Any, real_page: Path) -> None:
    show(browser, real_page)
    labels = script(browser, "[...document.querySelectorAll('table:not(.plain) thead th')].map(th => th.textContent)")
    at = labels.index("KL mean")
    button = browser.find_elements("css selector", "table:not(.plain) thead button")[at]
    button.send_keys(webdriver.Keys.ENTER)
    values = column(browser, at)
    assert values[-1] == "" and [float(v) for v in values[:-1]] == sorted(float(v) for v in values[:-1])
    button.send_keys(webdriver.Keys.SPACE)
    assert column(browser, at)[-1] == ""


def test_the_filter_hides_other_checkpoints_and_says_how_many_are_left(browser: Any, real_page: Path) -> None:
    show(browser, real_page)
    browser.find_element("css selector", ".filter input").send_keys("nvfp4")
    names = column(browser, 0)
    assert names and all("nvfp4" in name for name in names)
    assert script(browser, "document.querySelector('.status').textContent") == f"{len(names)} of 22 checkpoints"


def test_a_mark_shows_the_rows_it_is_about(browser: Any, real_page: Path) -> None:
    show(browser, real_page)
    browser.find_element("css selector", "tr[data-name='mixfp4'] .mark").click()
    shown = script(browser, "[...document.querySelectorAll('tr.same')].map(row => row.dataset.name)")
    assert "mixfp4" in shown and len(shown) > 1
    assert "not distinguishable" in script(browser, "document.querySelector('.status').textContent")


def test_the_theme_follows_the_system_and_the_button(browser: Any, real_page: Path) -> None:
    show(browser, real_page, dark=True)
    dark = colour(browser, "body", "backgroundColor"), colour(browser, ".chart svg text", "fill")
    show(browser, real_page)
    light = colour(browser, "body", "backgroundColor"), colour(browser, ".chart svg text", "fill")
    assert dark[0] != light[0] and dark[1] != light[1]
    button = browser.find_element("id", "theme")
    button.click(), button.click()
    assert (colour(browser, "body", "backgroundColor"), colour(browser, ".chart svg text", "fill")) == dark
    button.click()  # auto again, for the pages after this one


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (768, 1024)])
def test_the_page_never_scrolls_sideways(browser: Any, real_page: Path, size: tuple[int, int]) -> None:
    show(browser, real_page, size)
    assert script(browser, "document.documentElement.scrollWidth") <= size[0]


@pytest.mark.slow
def test_it_prints(browser: Any, real_page: Path) -> None:
    show(browser, real_page)
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert pdf.startswith(b"%PDF-") and pdf.count(b"/Type /Page\n") >= 3
