"""Choices between ways to do the same thing, by measured times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlx_streamexperts._experts.autotune import AutoTuner, StepTimer


def test_the_fastest_choice_wins() -> None:
    tuner = AutoTuner(("slow", "fast"), first="slow")
    seconds = {"slow": 2.0, "fast": 1.0}
    assert tuner.choice == "slow"
    for _ in range(100):  # it tries both in turns
        tuner.record(seconds[tuner.choice])
    assert tuner.choice == "fast"
    assert not tuner.trying


def test_a_step_timer_times_selected_steps_only() -> None:
    """A step is from one layer's indices to the next layer's."""
    times: list[float] = []
    timer = StepTimer(AutoTuner(("only",), "only"))
    timer.tuner.record = times.append  # type: ignore[method-assign]
    timer.lap(1.0)
    timer.time_step(1.0)  # something is missing: this step tells how good the choice is
    timer.lap(1.5)
    timer.lap(9.0)
    assert times == [0.5]


def steps(tuner: AutoTuner[bool], count: int, seconds: Callable[[bool], float]) -> list[bool]:
    chosen = []
    for _ in range(count):
        chosen.append(tuner.choice)
        tuner.record(seconds(tuner.choice))
    return chosen


@pytest.mark.parametrize("gain", [0.8, 1.25])
def test_it_keeps_the_faster_choice_and_tries_again(gain: float) -> None:
    tuner = AutoTuner((True, False), False)
    rng = np.random.default_rng(0)
    steps(tuner, 100, lambda on: (gain if on else 1.0) * rng.uniform(0.95, 1.05))
    assert not tuner.trying
    assert tuner.choice == (gain < 1)
    chosen = steps(tuner, 2000, lambda on: (gain if on else 1.0) * rng.uniform(0.95, 1.05))
    assert 0 < chosen.count(gain > 1) < 300, "tried too seldom or too often"
    # The good choice turns bad, which the next try notices.
    steps(tuner, 5000, lambda on: (1 / gain if on else 1.0) * rng.uniform(0.95, 1.05))
    if not tuner.trying:
        assert tuner.choice == (gain > 1)
