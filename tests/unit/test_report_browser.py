"""The report as a browser shows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import event, eventful, failure, leave, status
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from hpcft.report.page import draw
from hpcft.report.story import Story, tell
from hpcft.telemetry.rundir import RunDirectory

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver of Debian"
    ),
]
NASTY = "</script><img src=x onerror=alert(1)>\"'&"

Show = Callable[[Story], None]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,1000")
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def show(browser: webdriver.Chrome, tmp_path: Path) -> Iterator[Show]:
    """Opens the page of a story. Nothing of it may be complained of, nor fetched."""
    page = tmp_path / "page.html"

    def opened(story: Story) -> None:
        page.write_text(draw(story), encoding="utf-8")
        browser.get(page.as_uri())

    yield opened
    assert browser.get_log("browser") == []
    fetched = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert [name for name in browser.execute_script(fetched) if name != "data:,"] == []


def all_of(browser: webdriver.Chrome, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def tip(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "tip").text


def point_at(browser: webdriver.Chrome, element: WebElement) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser, duration=0).move_to_element(element).perform()


def test_what_has_happened_is_there(browser: webdriver.Chrome, show: Show, tmp_path: Path) -> None:
    story = tell(eventful(tmp_path / "run", {"loss": 1.0, "lr": 0.1}), status(step=200))
    show(story)
    rows = [mark for row in story.timeline.rows for mark in row.marks]
    for kind in ("failure", "adoption", "slow", "relaunch", "restore", "checkpoint", "end"):
        wanted = sum(mark.kind == kind for mark in [*rows, *story.timeline.run])
        assert len(all_of(browser, f"#timeline .picture [data-mark='{kind}']")) == wanted > 0
    for doing in ("starting", "training", "recovery", "relaunch", "ending"):
        assert all_of(browser, f"#timeline .picture [data-bar='{doing}']")
    # All that is drawn has a size, and is inside of its picture.
    for bar in all_of(browser, "#timeline .picture [data-bar]"):
        assert bar.rect["width"] > 0
    assert len(all_of(browser, "#goodput tbody tr")) == sum(
        seconds > 0 for seconds in story.goodput.parts.values()
    )
    assert browser.find_element(By.ID, "words").text == " ".join(story.words)
    assert {e.get_attribute("data-straggler") for e in all_of(browser, "#stragglers tbody tr")} == {
        "1"
    }
    assert len(all_of(browser, "#pace .box")) == 3
    assert len(all_of(browser, "#pace .box.slow")) == 1
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_what_is_pointed_at_is_told(browser: webdriver.Chrome, show: Show, tmp_path: Path) -> None:
    show(tell(eventful(tmp_path / "run", {"loss": 1.0}), status()))
    assert tip(browser) == ""
    adoption = all_of(browser, "#timeline .picture [data-mark='adoption']")[0]
    point_at(browser, adoption)
    assert tip(browser) == "step 50: process 3 on n3 took over"
    assert adoption.get_attribute("aria-label") == tip(browser)
    point_at(browser, all_of(browser, "#pace .box")[1])
    assert tip(browser).startswith("rank 1 (process 1, 2:1 on n1)")
    point_at(browser, all_of(browser, "#goodput .stack rect")[0])
    assert tip(browser).startswith("steps that count: ")
    point_at(browser, browser.find_element(By.CSS_SELECTOR, "figure.curve svg"))
    assert tip(browser).startswith("step ")
    assert "loss 0.0" in tip(browser)
    point_at(browser, browser.find_element(By.TAG_NAME, "h1"))
    assert tip(browser) == ""


def test_a_metric_is_chosen(browser: webdriver.Chrome, show: Show, tmp_path: Path) -> None:
    show(tell(eventful(tmp_path / "run", {"loss": 1.0, "lr": 0.1, NASTY: 2.0}), status()))

    def shown() -> list[str | None]:
        curves = all_of(browser, "figure.curve")
        return [curve.get_attribute("data-name") for curve in curves if curve.is_displayed()]

    choice = Select(browser.find_element(By.ID, "metric"))
    assert [option.text for option in choice.options] == ["loss", NASTY, "lr"]
    assert shown() == ["loss"]
    choice.select_by_visible_text("lr")
    assert shown() == ["lr"]
    choice.select_by_visible_text(NASTY)
    assert shown() == [NASTY]
    # The lost steps, and what counts.
    assert all_of(browser, "figure.curve path.lost")
    assert all_of(browser, "figure.curve path.kept")


def test_light_and_dark(browser: webdriver.Chrome, show: Show, tmp_path: Path) -> None:
    story = tell(eventful(tmp_path / "run", {"loss": 1.0}), status())

    def brightness(selector: str, what: str) -> float:
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        colour: Any = browser.execute_script(script, selector, what)
        return sum(map(float, colour[4:-1].split(","))) / (3 * 255)

    seen = {}
    for scheme in ("light", "dark"):
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        show(story)
        seen[scheme] = (
            brightness("body", "backgroundColor"),
            brightness("section", "backgroundColor"),
            brightness("body", "color"),
            brightness("#timeline text.label", "fill"),
        )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert min(seen["light"][:2]) > 0.9
    assert max(seen["light"][2:]) < 0.2
    assert max(seen["dark"][:2]) < 0.2
    assert min(seen["dark"][2:]) > 0.85


def test_a_failed_run_shows_its_traceback(
    browser: webdriver.Chrome, show: Show, tmp_path: Path
) -> None:
    path = leave(
        tmp_path / "run", [failure(3, 0, 1, 1, 1, NASTY), event("failed", 3.1, 0, reason=NASTY)]
    )
    text = f"Traceback (most recent call last):\n  File x\nValueError: {NASTY}"
    RunDirectory(path).log_file(1).write_text(text + "\n")
    show(tell(path, status(state="failed", reason=NASTY)))
    assert browser.find_element(By.CSS_SELECTOR, "#traceback pre").text == text
    assert NASTY in browser.find_element(By.ID, "words").text
    assert all_of(browser, "img") == []


def test_it_prints_and_fits_a_telephone(
    browser: webdriver.Chrome, show: Show, tmp_path: Path
) -> None:
    show(tell(eventful(tmp_path / "run", {"loss": 1.0, "lr": 0.1}), status()))
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 10_000
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.find_element(By.ID, "metric").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # Wide pictures and tables scroll by themselves, and not the page with them.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_run_of_which_nothing_is_known(
    browser: webdriver.Chrome, show: Show, tmp_path: Path
) -> None:
    show(tell(leave(tmp_path / "run", []), status(state="starting", ended=False, begun=None)))
    assert "no rank has come" in browser.find_element(By.ID, "words").text
    assert all_of(browser, "[data-mark]") == []
