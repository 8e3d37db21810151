"""Which layers a run-ahead step speculates on."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_streamexperts._experts.speculative.policy import SpeculationPolicy


def test_it_speculates_on_layers_that_seldom_lack_an_expert() -> None:
    policy = SpeculationPolicy(40)
    assert not policy.choose(np.ones(40)).any()
    assert policy.choose(np.zeros(40)).all()
    lacking = np.zeros(40)
    lacking[[3, 17]] = 0.5
    assert set(np.flatnonzero(~policy.choose(lacking))) == {3, 17}


def test_its_choice_is_never_worse_than_any_other() -> None:
    """Against every subset: the expected time of waits and of wrong passes."""
    chance = np.random.default_rng(0)
    policy = SpeculationPolicy(8)
    for _ in range(50):
        lacking = chance.random(8) ** 4
        best = np.inf
        for bits in range(256):
            chosen = np.array([bits >> i & 1 for i in range(8)], bool)
            best = min(best, _expected(policy, lacking, chosen))
        assert _expected(policy, lacking, policy.choose(lacking)) == pytest.approx(best)


def _expected(policy: SpeculationPolicy, lacking: np.ndarray, chosen: np.ndarray) -> float:
    wrong = 1 - np.prod(1 - lacking[chosen])
    return float((~chosen).sum() * policy.wait_seconds + wrong * policy.wrong_pass_seconds(False))


def test_costs_are_learned_from_steps() -> None:
    policy = SpeculationPolicy(10)
    policy.record_step(0.011, waited=0.001, speculated=10, passes=1)
    policy.record_step(0.030, waited=0.0, speculated=0, passes=1)
    policy.record_step(9.0, waited=0.0, speculated=10, passes=2)  # says nothing about one pass
    assert policy.layer_seconds == pytest.approx(0.001)
    assert policy.wait_seconds == pytest.approx(0.002)
    for _ in range(20):
        policy.record_step(0.012, waited=0.002, speculated=9, passes=1)
    assert policy.layer_seconds == pytest.approx(0.001)  # one slow step is forgotten
    for _ in range(200):
        policy.record_layers([4], True, again=False)
        policy.record_layers([5], False, again=False)
    assert policy.lacking[4] == 1
    assert policy.lacking[5] < 1e-3
