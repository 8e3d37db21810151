"""The live page in a real browser: it shows the server's figures, and nothing leaves this machine.

Skipped where there is no chromium (on Debian: apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlx.core as mx
import pytest
from conftest import until
from serving import Running, serving

from mlx_streamexperts.server._replies import Piece, Reply

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
@pytest.mark.parametrize("width", [1280, 390])
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
    # Pressed while it asks: the answer that comes then says nothing of the state.
    browser.execute_async_script(
        """
        const done = arguments[0], real = window.fetch;
        window.fetch = (...asked) => {
          window.fetch = real;
          document.querySelector('#pause').click();
          return real(...asked);
        };
        poll().then(done);
        """
    )
    assert browser.execute_script("return document.querySelector('#state').innerText") == "paused"
    assert browser.execute_script("return document.querySelector('#pause').innerText") == "Go on"


class Page:
    """The chat in a browser, used by the keyboard alone."""

    def __init__(self, browser: Any, url: str, tokens: int) -> None:
        self.browser = browser
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(url)
        most = browser.find_element("id", "most")
        most.clear()
        most.send_keys(str(tokens))

    def say(self, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.browser.find_element("id", "text")
        box.send_keys(text.replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL), Keys.ENTER)

    def press(self, button: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.browser.find_element("id", button).send_keys(Keys.ENTER)

    def idle(self) -> bool:
        return bool(self.browser.find_element("id", "send").is_enabled())

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.browser.execute_script(script, selector))


def test_a_conversation(running: Running, browser: Any) -> None:
    def answer(*texts: str) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        body = {"messages": messages, "max_tokens": 6}
        status, found = running.post(body, "/v1/chat/completions")
        assert status == 200
        return found["choices"][0]["message"]["content"]

    page = Page(browser, running.url, 6)
    page.say("In the\nbeginning")
    until(lambda: page.idle() and len(page.texts("#log article")) == 2)
    expected = answer("In the\nbeginning")
    (reply,) = page.texts("#log .reply > div")
    assert reply.split() == expected.split()
    (note,) = page.texts("#log .reply > .note")
    assert re.fullmatch(
        r"Cut at its longest; first token after \S+ s; \S+ tok/s, 6 tokens, hit rate \S+%, .* read",
        note,
    )
    page.press("again")  # the same question once more
    until(lambda: page.idle() and page.texts("#log .reply > .note") != [""])
    assert page.texts("#log .user > div") == ["In the\nbeginning"]
    assert page.texts("#log .reply > div") == [reply]
    page.say("Go on")
    until(lambda: page.idle() and len(page.texts("#log article")) == 4)
    second = answer("In the\nbeginning", expected, "Go on")
    assert page.texts("#log .reply > div")[1].split() == second.split()
    page.press("fresh")
    assert not page.texts("#log article")
    assert browser.get_log("browser") == []


def test_stopping_a_reply(running: Running, browser: Any) -> None:
    cancelled = running.figures()["traffic"]["requests"]["cancelled"]
    page = Page(browser, running.url, 3000)
    page.say("In the beginning")
    until(lambda: page.texts("#log .reply > div") not in ([], [""]))
    page.press("stop")
    until(page.idle)
    assert page.texts("#log .reply > .note")[0].startswith("Stopped; first token after ")
    until(lambda: running.figures()["traffic"]["requests"]["cancelled"] == cancelled + 1)
    assert running.figures()["traffic"]["active"] == 0


def test_what_is_refused_is_said_and_not_lost(running: Running, browser: Any) -> None:
    """What is shown is what the model was told, also after a question that got no reply."""
    page = Page(browser, running.url, 6)
    box = browser.find_element("id", "text")
    browser.execute_script(
        "const own = fetch; window.breaks = false; window.sent = [];"
        "window.fetch = (url, o) => { if (o && o.body) sent.push(JSON.parse(o.body).messages);"
        "return own(url, breaks && o && o.body ?"
        "{ ...o, body: o.body.replace('messages', 'massages') } : o) }"
    )

    def replied(count: int) -> bool:
        return page.idle() and len(page.texts("#log .reply")) == count

    def asked() -> list[str]:
        """The questions of the last request."""
        sent = browser.execute_script("return sent[sent.length - 1]")
        return [m["content"] for m in sent if m["role"] == "user"]

    page.say("In the\nbeginning")
    until(lambda: replied(1))
    browser.execute_script("breaks = true")
    page.say("Go on")
    until(lambda: replied(2))
    (note,) = page.texts("#log .wrong > .note")
    assert "massages" in note or "messages" in note
    assert box.get_property("value") == "Go on"
    browser.execute_script("breaks = false")
    page.press("again")
    until(lambda: replied(2) and not page.texts("#log .wrong"))
    assert asked() == page.texts("#log .user > div") == ["In the\nbeginning", "Go on"]
    assert box.get_property("value") == ""
    browser.execute_script("breaks = true")
    page.say("And then")
    until(lambda: replied(3))
    browser.execute_script("breaks = false")
    page.say("?")  # behind what came back
    until(lambda: replied(3) and not page.texts("#log .wrong"))
    assert asked() == page.texts("#log .user > div")
    assert asked()[2:] == ["And then?"]
    browser.get_log("browser")  # Chromium itself notes the status 400


def test_a_reply_that_breaks_off_does_not_look_whole(
    running: Running, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Reply.pieces

    def pieces(self: Reply, responses: Any) -> Iterator[Piece]:
        for i, piece in enumerate(original(self, responses)):
            if i == 3:
                raise ConnectionError
            yield piece

    monkeypatch.setattr(Reply, "pieces", pieces)
    page = Page(browser, running.url, 6)
    page.say("In the\nbeginning")
    until(lambda: page.idle() and page.texts("#log .reply > div") not in ([], [""]))
    assert page.texts("#log .wrong > .note")[0].startswith("The connection was lost; first token")
    lines = "return document.querySelector('#log .user > div').innerText"
    assert browser.execute_script(lines) == "In the\nbeginning"


def test_replies_become_elements_and_never_html(running: Running, browser: Any) -> None:
    page = Page(browser, running.url, 1)
    shown = page.browser.execute_script(
        "const e = document.createElement('div'); markdown(arguments[0], e); return e.innerHTML",
        "# A `b`\n**x** *y* [z](https://a.b/) [w](javascript:alert(1))\n<img src=x>\n- 1\n- 2\n\n"
        "1. p\n> q\n```html\n<script>\n# no\n```\n``\n```x``` y\n\n2) r\n3) s\n"
        "| a | `b` |\n|:--|---|\n| c \\| d | **e** |\n\nf | g",
    )
    assert shown == (
        "<h4>A <code>b</code></h4><p><strong>x</strong> <em>y</em> "
        '<a href="https://a.b/" rel="noopener noreferrer" target="_blank">z</a> '
        "[w](javascript:alert(1))\n&lt;img src=x&gt;</p><ul><li>1</li><li>2</li></ul>"
        "<ol><li>p</li></ol><blockquote>q</blockquote>"
        "<pre><code>&lt;script&gt;\n# no</code></pre><p>``\n<code>x</code> y</p>"
        '<ol start="2"><li>r</li><li>s</li></ol>'
        '<div class="table"><table><tr><th>a</th><th><code>b</code></th></tr>'
        "<tr><td>c | d</td><td><strong>e</strong></td></tr></table></div><p>f | g</p>"
    )


def test_a_sentence_says_what_limits_speed(running: Running, browser: Any) -> None:
    page = Page(browser, running.url, 1)
    until(lambda: page.texts("#limit") == ["No request is under way."])
    sample = (
        "(i) => ({ at: i, traffic: { active: 1 }, experts: { given_back: 2e6, read:"
        "{ wait_seconds: share * i, bytes: 5e9 * i } } })"
    )
    script = (
        "paused = true; const share = arguments[0]; samples.length = 0;"
        f"samples.push(...[0, 1, 2, 3].map({sample})); drawLimit(samples[3]);"
        "return document.querySelector('#limit').textContent"
    )
    given = " Other programs have 2.00 MB of the expert cache."
    assert browser.execute_script(script, 0.7) == (
        "The drive limits speed: waiting for it 70% of the time, 5.00 GB/s of 5.00 GB/s seen at "
        f"most.{given}"
    )
    assert browser.execute_script(script, 0.05) == (
        "Computing limits speed: waiting for the drive only 5% of the time, 5.00 GB/s of 5.00 GB/s "
        f"seen at most.{given}"
    )


def test_the_page_asks_for_the_key(
    running: Running, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.generator.cli_args, "api_key", "sésame")
    browser.get(running.url)
    form = browser.find_element("id", "ask")
    until(form.is_displayed)
    assert browser.find_element("id", "model").text == "Streamed experts"
    browser.find_element("id", "key").send_keys("sésame")
    browser.find_element("css selector", "#ask button").click()
    until(lambda: browser.find_element("id", "model").text == "demo")
    assert not form.is_displayed()
    page = Page(browser, running.url, 2)
    page.say("In the")
    until(lambda: page.idle() and "2 tokens" in "".join(page.texts("#log .reply > .note")))


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
