"""MLX's limits for the process, recorded over a stream's life, as a Mac would see them set.

There is no Metal here: what sets a limit is replaced by a stand-in that remembers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx_lm
import pytest
from conftest import QUIET
from test_platform import MACS

from mlx_streamexperts import ExpertStream, demo_model, load, stream
from mlx_streamexperts._memory import process_memory

RECOMMENDED = int(MACS["M4 16 GB"]["max_recommended_working_set_size"])
KINDS = ("set_wired_limit", "set_cache_limit", "set_memory_limit")


class Limits:
    """MLX's limits: their values, and every call that set one."""

    def __init__(self) -> None:
        self.now = {"set_wired_limit": 0, "set_cache_limit": 1 << 40, "set_memory_limit": 1 << 41}
        self.calls: list[tuple[str, int]] = []

    def setter(self, kind: str) -> Callable[[int], int]:
        def set_limit(nbytes: int) -> int:
            assert kind != "set_wired_limit" or nbytes <= RECOMMENDED  # MLX raises above it
            before, self.now[kind] = self.now[kind], nbytes
            self.calls.append((kind, nbytes))
            return before

        return set_limit

    def taken(self) -> list[tuple[str, int]]:
        """The calls since this was asked."""
        calls, self.calls = self.calls, []
        return calls

    @property
    def wired(self) -> int:
        return self.now["set_wired_limit"]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Limits]:
    """A Mac with 16 GB."""
    made = Limits()
    for kind in KINDS:
        monkeypatch.setattr(mx, kind, made.setter(kind))
    monkeypatch.setattr(mx, "device_info", lambda: MACS["M4 16 GB"])
    monkeypatch.setattr(process_memory, "on_metal", lambda: True)
    for name in ("_limits", "_wired", "_unfinished", "_before"):  # whatever other tests left open
        monkeypatch.setattr(process_memory, name, {})
    yield made


def generate(model: object, tokenizer: object) -> None:
    assert mlx_lm.generate(model, tokenizer, "The", max_tokens=3)


def test_a_streams_life(limits: Limits) -> None:
    model, tokenizer = load(str(demo_model()), cache="10MB", config=QUIET)
    plan = stream(model).plan
    total = plan.trunk + plan.cache + plan.kv + plan.work
    assert limits.now == {
        "set_wired_limit": total,
        "set_cache_limit": plan.work,  # inside the budget: all of it may be kept for reuse
        "set_memory_limit": plan.mlx_bound + plan.others - (plan.work + plan.spare) // 2,
    }
    limits.taken()
    generate(model, tokenizer)
    generate(model, tokenizer)  # after a pause: nothing was unwired in between
    wired = [value for kind, value in limits.taken() if kind == "set_wired_limit"]
    assert wired == [RECOMMENDED, total, RECOMMENDED, total]  # mlx-lm's, and what it restores
    stream(model).resize("12MB")
    assert limits.wired > total
    held = limits.wired
    generate(model, tokenizer)
    assert limits.wired == held
    stream(model).close()
    stream(model).close()
    assert limits.now["set_wired_limit"] == 0
    assert limits.now["set_cache_limit"] == 1 << 40
    assert limits.now["set_memory_limit"] == 1 << 41


def test_the_largest_of_the_open_streams_counts(limits: Limits) -> None:
    small, _ = load(str(demo_model()), cache="10MB", config=QUIET)
    held = limits.wired
    large, _ = load(str(demo_model()), cache="30MB", config=QUIET)
    assert limits.wired > held
    stream(large).close()
    assert limits.wired == held
    stream(small).close()
    assert limits.wired == 0


def test_a_larger_limit_that_is_set_already_is_left(limits: Limits) -> None:
    """As mlx-lm's server sets it before it loads."""
    limits.now["set_wired_limit"] = RECOMMENDED
    model, tokenizer = load(str(demo_model()), cache="10MB", config=QUIET)
    assert limits.wired == RECOMMENDED
    generate(model, tokenizer)
    stream(model).close()
    assert limits.wired == RECOMMENDED


def test_no_more_is_wired_than_metal_recommends(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_memory, "working_set_bytes", lambda: 1_000_000)
    model, _ = load(str(demo_model()), cache="10MB", config=QUIET)
    assert limits.wired == 1_000_000
    stream(model).close()


def test_it_can_be_switched_off(limits: Limits) -> None:
    model, _ = load(str(demo_model()), cache="10MB", config=QUIET)
    expert_stream = stream(model)
    process_memory.release_limits(expert_stream)
    limits.taken()
    process_memory.hold_limits(expert_stream, expert_stream.plan, wired=False)
    assert {kind for kind, _ in limits.taken()} == {"set_cache_limit", "set_memory_limit"}
    expert_stream.close()
    assert limits.wired == 0


def test_a_load_that_fails_leaves_no_limit(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(ExpertStream, "_open", fail)
    with pytest.raises(RuntimeError, match="no"):
        load(str(demo_model()), cache="10MB", config=QUIET)
    assert (limits.wired, limits.now["set_cache_limit"]) == (0, 1 << 40)


def test_elsewhere_nothing_is_wired(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "on_metal", lambda: False)
    model, _ = load(str(demo_model()), cache="10MB", config=QUIET)
    plan = stream(model).plan
    assert {kind for kind, _ in limits.taken()} == {"set_cache_limit", "set_memory_limit"}
    assert limits.now["set_cache_limit"] == max(16 << 20, plan.work // 16)
    stream(model).close()
