"""The status page: its policy and text, and in headless Chromium where that and Selenium are installed."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import html5lib
import pytest
from tests.serve.running import Served, served

from halfbyte.serve.router import RouterOptions
from halfbyte.serve.status_page import page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def test_the_page_is_valid_and_names_no_other_place() -> None:
    html, policy = page()
    parser = html5lib.HTMLParser()
    parser.parse(html)
    assert parser.errors == []
    assert not re.search(r"https?://|//[a-z]|@import|url\(", html)
    assert policy.count("'sha256-") == 2 and "default-src 'none'" in policy


def test_everything_to_type_into_has_a_label() -> None:
    html, _ = page()
    for field in re.findall(r"<(?:textarea|input|select) id=\"(\w+)\"", html):
        assert re.search(rf"<label[^>]*>[^<]+<(?:textarea|input|select) id=\"{field}\"", html), field


@pytest.fixture(scope="module")
def router() -> Iterator[Served]:
    with served("w4", "w16") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, url: str, width: int = 1200, dark: bool = False) -> None:
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"{url}/")
    until(browser, "document.documentElement.dataset.ready === 'yes'")


def until(browser: Any, condition: str) -> None:
    end = time.monotonic() + 20
    while not browser.execute_script(f"return {condition}"):
        assert time.monotonic() < end, (condition, browser.get_log("browser"))
        time.sleep(0.1)


def text(browser: Any, selector: str) -> str:
    return browser.execute_script(f"return document.querySelector('{selector}').textContent")


def test_the_numbers_are_those_of_the_router(browser: Any, router: Served) -> None:
    router.post(messages=[{"role": "user", "content": "fix my code"}])
    show(browser, router.url)
    assert not browser.execute_script("return document.querySelector('#key').checkVisibility()")
    assert "coding" in text(browser, "#decisions") and "w16" in text(browser, "#models")
    assert browser.get_log("browser") == []


def test_a_chat_by_keyboard_shows_the_answer_and_its_precision(browser: Any, router: Served) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    show(browser, router.url)
    browser.execute_script("document.querySelector('#message').focus()")
    chain = ActionChains(browser).send_keys("fix my code")
    chain.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    until(browser, "document.querySelector('.answer .by')?.textContent.includes('w16 by rule coding')")
    assert text(browser, ".answer").startswith("0 1 2 ")
    assert browser.get_log("browser") == []


def test_a_phone_needs_no_sideways_scrolling_and_dark_is_dark(browser: Any, router: Served, tmp_path: Path) -> None:
    show(browser, router.url, 390, dark=True)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(13, 17, 23)"


def test_a_server_with_a_key_asks_for_it(browser: Any) -> None:
    with served("w4", options=RouterOptions(api_key="secret")) as running:
        show(browser, running.url)
        assert "asks for an API key" in text(browser, "#problem")
        assert browser.execute_script("return document.querySelector('#key').checkVisibility()")
        browser.execute_script("document.querySelector('#key').value = 'secret'")
        until(browser, "document.querySelector('#models').textContent.includes('w4')")
