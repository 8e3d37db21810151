"""Prices of lossy settings: the arithmetic, the choice among them, and the command."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_streamexperts import StreamConfig, StreamError, demo_model, load, quality, stream
from mlx_streamexperts._analysis.quality import (
    Difference,
    Price,
    Speed,
    best_within,
    default_settings,
    difference,
    empty_cache,
    frontier,
    recommendation,
    windows,
)


def price(setting: str, change: float, rate: float, nbytes: float = 1e6) -> Price:
    near = Difference(0.0, 1.0, 10 * (1 + change), change, 0.001)
    speed = Speed(100, rate, nbytes)
    return Price(setting, near, near, speed, speed, None, 0.1, 0.02)


def test_differences_are_those_of_the_definitions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    rows = np.log([p, p, q]).astype(np.float32)
    others = np.log([p, q, q]).astype(np.float32)
    same = difference([rows], [rows], [[0, 1]])
    assert (same.kl_nats, same.same_first, same.perplexity_change) == (0.0, 1.0, 0.0)
    assert same.perplexity == pytest.approx(math.sqrt(2 * 4))
    found = difference([rows], [others], [[0, 0, 2]])
    assert found.kl_nats == pytest.approx((p * np.log(p / q)).sum() / 3)
    assert found.same_first == pytest.approx(2 / 3)
    assert found.perplexity_change == pytest.approx(2 ** (1 / 3) - 1)
    nats = np.array([0, math.log(2), 0])
    error = (1 + found.perplexity_change) * nats.std() / math.sqrt(3)
    assert found.change_error == pytest.approx(error)


def test_windows_are_spread_over_the_text() -> None:
    assert windows(range(10), 4, 100) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [w[0] for w in windows(range(1000), 10, 30)] == [0, 330, 660]
    with pytest.raises(StreamError, match="fewer than a window"):
        windows(range(3), 4, 100)


def test_the_fastest_setting_within_the_budget_is_recommended() -> None:
    exact = price("exact", 0.0, 10)
    slow, good, dear = price("1", 0.002, 9), price("2", 0.004, 15, 5e5), price("3", 0.03, 20)
    beaten = price("top=7", 0.01, 14)
    found = [exact, slow, good, dear, beaten]
    assert frontier(found) == [exact, good, dear]
    assert best_within(found, 0.01) is good
    assert best_within(found, 0.05) is dear
    assert recommendation(found, 0.01) == (
        "Level 2 costs 0.4% perplexity (± 0.1%) on this text, reads 50% less and decodes 1.50 "
        "times as fast: use --lossy 2."
    )
    assert "Stay exact" in recommendation([exact, slow, dear], 0.01)
    assert "1" in default_settings(8, prefer=False)
    assert not any("prefer" in s for s in default_settings(8, prefer=False))
    assert "top=0" not in default_settings(1, prefer=True)


def test_the_command_measures_draws_and_recommends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], not_compiled: None
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("And God said unto Moses, Go unto the people of Israel, and speak. " * 3)
    arguments = ["--text", str(text), "--window", "24", "--prompt-tokens", "8", "--tokens", "24"]
    files = ["--json", str(tmp_path / "prices.json"), "--plot", str(tmp_path / "frontier.svg")]
    tried = ["--try", "skip=0.15", "--task-items", "1", "--budget", "0.5"]
    assert quality.main([*arguments, *files, *tried]) == 0
    out, err = capsys.readouterr()
    assert "lossy:" not in err
    assert re.search("Measuring: 100%.*2/2.*skip=0.15", err)
    exact, lossy = json.loads((tmp_path / "prices.json").read_text())
    assert exact["setting"] == "exact"
    assert (exact["decoded"]["kl_nats"], exact["mass_left_out"]) == (0, 0)
    assert lossy["decoded"]["kl_nats"] > 0
    assert 0 < lossy["mass_left_out"] < lossy["share_left_out"]
    assert lossy["decoding"]["bytes_per_token"] < exact["decoding"]["bytes_per_token"]
    assert lossy["decoding"]["tokens"] == 16
    assert "| skip=0.15 |" in out
    assert "--lossy" in out.splitlines()[-1] or "Stay exact" in out.splitlines()[-1]
    assert (tmp_path / "frontier.svg").read_text().startswith("<?xml")


def test_every_text_begins_with_an_empty_cache() -> None:
    model, tokenizer = load(str(demo_model()), cache="10MB", config=StreamConfig(progress=False))
    with stream(model) as s:
        mx.eval(model(mx.array([tokenizer.encode("In the beginning")])))
        slots = [x.cache.slots for x in s.layers]
        assert any(x.cache.resident for x in s.layers)
        empty_cache(s)
        assert not any(x.cache.resident for x in s.layers)
        assert [x.cache.slots for x in s.layers] == slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lossy", "1"], "--try"),
        (["--try", "5"], "lossy='5'"),
        (["--cache", "1GB", "--try", "1"], "all experts are resident"),
        (["--window", "8"], "cannot begin with a prompt"),
        (["--text", "missing.txt"], "cannot be read"),
    ],
)
def test_what_cannot_be_priced_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main([*arguments, "--no-progress"]) == 1
    assert message in capsys.readouterr().err


def test_prices_are_plain_numbers() -> None:
    found = replace(price("1", 0.1, 2.0), task_score=0.5).as_dict()
    assert json.loads(json.dumps(found)) == found
