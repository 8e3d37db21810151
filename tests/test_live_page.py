"""The live page in a real browser: it shows the server's figures, and nothing leaves this machine.

Skipped where there is no chromium (on Debian: apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlx.core as mx
import pytest
from serving import Running, serving, until

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    mx.reset_peak_memory()  # of tests before, in this process
    with serving("--cache", "10MB") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with chromedriver is installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_the_page_is_one_file_under_a_strict_policy(running: Running) -> None:
    for path in ("/", "/live"):
        status, headers, body = running.request("GET", path)
        assert status == 200
        assert headers["content-type"] == "text/html; charset=utf-8"
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert policy.count("'sha256-") == 2
        assert "access-control-allow-origin" not in headers
        page = body.decode()
        for outside in ("http://", "https://", "//cdn", "@import", "url(", " src="):
            assert outside not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_shows_the_figures(
    running: Running, browser: Any, width: int, scheme: str, tmp_path: Path
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    browser.get_log("performance")  # what it did before
    browser.get_log("browser")
    running.text("In the beginning", 2)
    browser.get(running.url)

    def text(selector: str) -> str:
        return browser.execute_script(
            "return document.querySelector(arguments[0]).innerText", selector
        )

    until(lambda: text("#model") == "demo")
    until(lambda: text("#tokens [data-now]")[0].isdigit())
    figures = running.figures()
    assert text("#layers [data-now]") == f"{100 * figures['experts']['hit_rate']:.1f}%"
    assert text("#memory [data-peak]").endswith("MB")
    assert "25.4% resident" in text("#layers [data-share]")
    bars = "return document.querySelectorAll('#layers rect').length"
    assert browser.execute_script(bars) == len(figures["experts"]["layers"])
    assert str(figures["traffic"]["requests"]["completed"]) in text("#figures").splitlines()
    browser.execute_script("document.querySelector('details').open = true")
    until(lambda: "model.layers.0.mlp.switch_mlp" in text("table"))

    # It fits the width, every picture says what it shows, and every text can be read.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    labels = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(e => e.getAttribute('aria-label'))"
    )
    assert len(labels) == 4
    assert all(labels)
    assert "no data yet" not in labels
    assert min(browser.execute_script(CONTRASTS)) >= 4.5

    # Nothing went wrong, and nothing was asked of anybody else.
    assert browser.get_log("browser") == []
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    assert {urlsplit(u).hostname for u in asked if u.startswith(("http", "ws"))} == {"127.0.0.1"}


def test_pausing_stops_asking(running: Running, browser: Any) -> None:
    browser.get(running.url)
    until(
        lambda: (
            browser.execute_script("return document.querySelector('#state').innerText") == "live"
        )
    )
    browser.execute_script("document.querySelector('#pause').click()")
    assert browser.execute_script("return document.querySelector('#state').innerText") == "paused"
    assert browser.execute_script("return document.querySelector('#pause').innerText") == "Go on"


def test_the_page_asks_for_the_key(
    running: Running, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.generator.cli_args, "api_key", "open sesame")
    browser.get(running.url)
    form = browser.find_element("id", "ask")
    until(form.is_displayed)
    assert browser.find_element("id", "model").text == "Streamed experts"
    browser.find_element("id", "key").send_keys("open sesame")
    browser.find_element("css selector", "#ask button").click()
    until(lambda: browser.find_element("id", "model").text == "demo")
    assert not form.is_displayed()


# The contrast of each text with what lies behind it, by WCAG's formula.
CONTRASTS = """
const channel = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const light = rgb => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map(channel);
  return .2126 * r + .7152 * g + .0722 * b; };
const behind = e => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(', 0)')) return c; }
  return 'rgb(255, 255, 255)'; };
return [...document.querySelectorAll('body *')]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    && e.getClientRects().length && !e.closest('script'))
  .map(e => { const a = light(getComputedStyle(e).color), b = light(behind(e));
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); });
"""
