"""benchmarks/soak.py and load.py for seconds: mixed requests at a tight budget leave nothing."""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import leftovers, until, until_memory_is
from serving import Running, serving

from mlx_streamexperts.server._generation import Client
from mlx_streamexperts.server._http import FORMS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import load
import soak
from load import Said
from soak_verdict import growth, verdict

LENGTHS = (3, 8)


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, str]]:
    some = soak.prompts(long=2)[5::6]
    assert len(max(some, key=len)) > 300 > len(min(some, key=len))
    return soak.stock_replies([q for p in some for q in (p, p + "\n")], LENGTHS)


def served() -> Any:
    return serving("--memory", "46MB", "--chat-template", soak.TEMPLATE, *soak.LIMITS)


def ask_for_everything(running: Running, expected: dict[str, dict[str, str]]) -> soak.Tally:
    """Two clients that ask at random, beside one request of each kind."""
    load = soak.Load(running.url, expected, think=0.1)
    load.start(2)
    for kind in soak.KINDS:
        load.ask(kind, random.Random(kind))
    load.stop()
    return load.take()


def test_mixed_requests_are_exact_within_the_promise_and_leave_nothing_behind(
    expected: dict[str, dict[str, str]],
) -> None:
    gc.collect()
    mx.clear_cache()
    base = mx.get_active_memory()
    with served() as running:
        load = soak.Load(running.url, expected, think=0)
        load.ask("stream", random.Random(0))  # opens shards, starts threads
        before = idle()
        mx.reset_peak_memory()
        seen = ask_for_everything(running, expected)
        assert seen.errors == [] and seen.wrong == []
        assert seen.compared > 5 and set(seen.kinds) == set(soak.KINDS)
        assert not idle() - before
        figures = running.figures()
        promised = figures["memory"]["budget"]
        assert mx.get_peak_memory() - base <= promised == 46_000_000
        assert figures["experts"]["cache"]["evictions"] > 0  # the budget was tight
        until(lambda: not running.generator.admission.running)  # replies are sent before
        until(lambda: all(c.ended for c in running.generator._replies.values()))
    until_memory_is(base + 1e5)


def idle() -> Counter[str]:
    """What is left once no connection is."""
    until(lambda: not any("process_request_thread" in t.name for t in threading.enumerate()))
    return leftovers()


def test_clients_notice_a_wrong_text_and_a_wrong_status(
    expected: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the soak would prove nothing."""
    lies = {p: {n: t + "!" for n, t in texts.items()} for p, texts in expected.items()}
    with served() as running:
        load = soak.Load(running.url, lies, think=0)
        for kind in ("stream", "whole", "chat", "chat stream", "alone"):
            load.ask(kind, random.Random(1))
        seen = load.take()
        assert len(seen.wrong) == seen.compared == 5 and not seen.errors
        monkeypatch.setattr(Client, "generate", lambda *args: 1 / 0)
        load.ask("whole", random.Random(1))
        assert load.take().errors


def test_clients_of_every_api_get_what_they_get_alone() -> None:
    options = ["--memory", "56MB", "--context-tokens", "2048", *load.LIMITS[2:]]
    some = load.cases(count=1, long=0, lengths=(3,))
    asked = some[:5]
    assert {c.path for c in asked} == {*FORMS} - {"/chat/completions", "/v1/messages/count_tokens"}
    gc.collect()
    mx.clear_cache()
    base = mx.get_active_memory()
    with serving(*options, "--chat-template", load.TEMPLATE) as running:
        mixed = load.Mixed(running.url, asked, slow=0.5)
        assert all(said.text and said.ending for said in mixed.alone)
        before = idle()
        mx.reset_peak_memory()
        mixed.start(4)
        for kind in load.KINDS:
            mixed.ask(kind, random.Random(kind))
        mixed.stop()
        seen = mixed.take()
        assert seen.errors == [] and seen.wrong == []
        assert seen.compared > 8 and set(seen.kinds) == set(load.KINDS)
        assert not idle() - before
        assert mx.get_peak_memory() - base <= running.figures()["memory"]["budget"] == 56_000_000
        mixed.alone = [Said("", (), "") for _ in mixed.alone]
        mixed.ask("stream", random.Random(0))
        assert len(mixed.take().wrong) == 1  # else the above would prove nothing


def row(**changes: Any) -> dict[str, Any]:
    return {
        "resident": 150e6, "beside": 26e6, "active": 15e6, "compared": 20, "wrong": 0,
        "requests": 30, "errors": 0, "first_token_s": 0.4, "tokens_per_s": 30.0,
        "cpu_ms_per_token": 50.0, "yardstick_ms": 20.0, **changes,
    }  # fmt: skip


def record(rows: list[dict[str, Any]], **end: Any) -> dict[str, Any]:
    held = {"peak": 30e6, "budget": 46e6, "descriptors": 6, "threads": 19}
    return {
        "rows": rows, "start": held, "end": {**held, **end}, "exit_status": 0, "tracebacks": 0,
    }  # fmt: skip


def test_the_verdict() -> None:
    noise = random.Random(1)
    flat = [row(resident=150e6 + noise.gauss(0, 2e6)) for _ in range(60)]
    assert verdict(record(flat))["kept"]
    swells = [row(resident=150e6 + n * 1e5) for n in range(60)]
    assert growth(swells, "resident")["bytes_per_hour"] == pytest.approx(6e6)
    leaks = [row(beside=26e6 + n * 1e4) for n in range(60)]
    assert growth(leaks, "beside")["bytes_per_hour"] == pytest.approx(6e5)
    untold = [row(beside=None) for _ in range(60)]  # no glibc
    assert verdict(record(untold))["kept"]
    slower = [row(cpu_ms_per_token=50 + n / 5) for n in range(60)]
    busier = [row(tokens_per_s=30 - n / 5, yardstick_ms=20 + n / 5) for n in range(60)]
    assert verdict(record(busier))["kept"]
    for broken in (
        record(leaks), record(swells), record(slower), record([*flat, row(wrong=1)]),
        record([*flat, row(errors=1)]), record(flat, peak=47e6), record(flat, descriptors=7),
        {**record(flat), "exit_status": 1}, {**record(flat), "tracebacks": 1},
    ):  # fmt: skip
        assert not verdict(broken)["kept"]
        assert sum(w.startswith("BROKEN") for w in verdict(broken)["words"]) == 1
