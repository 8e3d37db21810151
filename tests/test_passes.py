"""Passes longer than planned run in chunks; the expert cache gives up slots for unplanned ones."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, all_experts, load_streamed
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import (
    BudgetError,
    ExpertStream,
    StreamConfig,
    demo_model,
    load,
    plan,
    stream,
)
from mlx_streamexperts._loading.discover import SWITCHES
from mlx_streamexperts._memory import budget, passes
from mlx_streamexperts._memory.budget import Plan, check_device
from mlx_streamexperts._memory.model_graph import measure
from mlx_streamexperts._memory.passes import Passes, context, is_quantized
from mlx_streamexperts._osinfo import DeviceLimit, apple_limit

TOKENS = families.token_stream(families.VOCAB, 300, seed=5).tolist()
MB = 10**6


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """Of each pass that runs: sequences, tokens, and tokens before it."""
    seen: list[tuple[int, int, int]] = []
    original = Passes._run_one

    def one(self: Passes, one: Any, past: int, *rest: Any) -> Any:
        seen.append((one.sequences, one.tokens, past))
        return original(self, one, past, *rest)

    monkeypatch.setattr(Passes, "_run_one", one)
    yield seen


def short_passes(folder: Path, tokens: int) -> tuple[nn.Module, ExpertStream]:
    """A streamed model, a third of its experts resident, that takes `tokens` at a time."""
    config = replace(QUIET, prefill_tokens=tokens)
    model = load_streamed(folder, 1 << 40, config)
    expert_stream = stream(model)
    expert_stream.resize(all_experts(expert_stream) // 3)
    return model, expert_stream


def test_a_long_prompt_runs_in_planned_chunks(
    checkpoint: Callable[..., Path], parts: list[tuple[int, int, int]]
) -> None:
    model, expert_stream = short_passes(checkpoint("qwen3_moe"), tokens=64)
    cache = make_prompt_cache(model)
    logits = model(mx.array([TOKENS[:150]]), cache=cache)
    assert parts == [(1, 64, 0), (1, 64, 64), (1, 22, 128)]  # sequences, tokens, tokens before
    assert logits.shape == (1, 150, families.VOCAB)
    assert context(cache) == 150
    expert_stream.close()


FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "llama4", "jamba", "kimi_k25")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_call_has_the_bits_of_stock_with_those_steps(
    family: str, checkpoint: Callable[..., Path], parts: list[tuple[int, int, int]]
) -> None:
    folder = checkpoint(family)
    stock, _ = mlx_lm.utils.load_model(folder)
    model, expert_stream = short_passes(folder, 64)
    tokens, caches = mx.array([TOKENS[:150]]), make_prompt_cache(model)
    logits = model(tokens, cache=caches)
    assert [(n, past) for _, n, past in parts] == [(64, 0), (64, 64), (22, 128)]
    expected, stocks = [], make_prompt_cache(stock)
    for begin in (0, 64, 128):
        expected.append(stock(tokens[:, begin : begin + 64], cache=stocks))
        mx.eval([c.state for c in stocks])
    assert np.array_equal(np.array(mx.concatenate(expected, axis=1)), np.array(logits))
    after = mx.array([[7]])
    assert mx.array_equal(stock(after, cache=stocks), model(after, cache=caches))
    expert_stream.close()


def test_every_caller_of_mlx_lm(
    checkpoint: Callable[..., Path], parts: list[tuple[int, int, int]]
) -> None:
    """None of them says how long a pass may be: their own step is 2,048."""
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model, expert_stream = short_passes(folder, 48)

    def run(m: nn.Module) -> list[int]:
        prompt = mx.array(TOKENS[:130])
        return [t for t, _ in generate_step(prompt, m, max_tokens=8, prefill_step_size=48)]

    def default(m: nn.Module) -> list[int]:
        return [t for t, _ in generate_step(mx.array(TOKENS[:130]), m, max_tokens=8)]

    assert default(model) == run(stock)
    assert max(n for _, n, _ in parts) == 48

    def together(m: nn.Module, step: int) -> list[list[int]]:
        batch = BatchGenerator(m, max_tokens=4, prefill_step_size=step)
        uids = batch.insert([TOKENS[:n] for n in (100, 3, 61)])
        replies: dict[int, list[int]] = {u: [] for u in uids}
        while responses := batch.next():
            if not any(responses):
                break
            for r in responses[1]:
                replies[r.uid].append(r.token)
        return [replies[u] for u in uids]

    parts.clear()
    got = together(model, 2048)
    assert max(b * n for b, n, _ in parts if n > 1) <= 48
    assert got == together(stock, 16)
    expert_stream.close()


def test_the_caches_of_a_divided_pass_are_examined_once(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expert_stream = short_passes(checkpoint("qwen3_moe"), 64)
    calls: list[str] = []

    def counted(original: Callable[..., Any], *args: Any) -> Any:
        calls.append(original.__name__)
        return original(*args)

    for original in (passes.is_quantized, passes.allocated):
        monkeypatch.setattr(passes, original.__name__, partial(counted, original))
    caches = make_prompt_cache(model)
    model(mx.array([TOKENS[:150]]), cache=caches)
    assert calls == ["is_quantized"] + ["allocated"] * 4  # the whole, and each of three chunks
    calls.clear()
    model(mx.array([TOKENS[:1]]), cache=caches)
    assert calls == ["is_quantized", "allocated"]
    expert_stream.close()


def test_a_pass_with_a_mask_of_its_own_is_not_divided(
    checkpoint: Callable[..., Path], parts: list[tuple[int, int, int]]
) -> None:
    model, expert_stream = short_passes(checkpoint("qwen3_moe"), 16)
    model(mx.array([TOKENS[:60]]))  # without caches: its tokens see each other in this pass alone
    assert [n for _, n, _ in parts] == [60]
    expert_stream.close()


def test_a_longer_context_than_planned_is_taken_from_the_expert_cache(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = StreamConfig(progress=False, context_tokens=64, prefill_tokens=64)
    stock, _ = mlx_lm.load(str(demo_model()))
    model, _ = load(str(demo_model()), memory="45MB", config=config)
    expert_stream = stream(model)
    before, base = expert_stream.plan, mx.get_active_memory()
    prompt = mx.array((TOKENS * 2)[:400])
    mx.reset_peak_memory()
    with caplog.at_level(logging.WARNING):
        got = [t for t, _ in generate_step(prompt, model, max_tokens=3)]
    assert "the expert cache gives" in caplog.text
    after = expert_stream.plan
    assert sum(after.slots) < sum(before.slots)
    assert after.cache == sum(x.cache.slots * x.expert_bytes for x in expert_stream.layers)
    assert mx.get_peak_memory() - base + before.trunk + before.cache <= before.bound
    counted = expert_stream.stats()
    free = after.bound + base - before.trunk - before.cache - mx.get_active_memory()
    expert_stream.make_room(free + 1_000_000, "This", "ask")
    assert expert_stream.plan.cache < after.cache
    assert expert_stream.stats().cache == counted.cache  # and goes on from there
    assert expert_stream.stats().read.bytes >= counted.read.bytes > 0
    expert_stream.resize(before.cache)  # the context is gone: the cache may have it back
    assert expert_stream.plan.slots == before.slots
    expert_stream.close()
    assert got == [t for t, _ in generate_step(prompt, stock, max_tokens=3, prefill_step_size=64)]


def test_a_context_for_which_nothing_is_left_is_refused() -> None:
    config = StreamConfig(progress=False, context_tokens=64, prefill_tokens=64)
    model, _ = load(str(demo_model()), memory="25MB", config=config)
    caches = make_prompt_cache(model)
    with pytest.raises(BudgetError, match="tokens of context does not fit") as caught:
        model(mx.array([(TOKENS * 9)[:2500]]), cache=caches)
    assert caught.value.needed_bytes > stream(model).plan.bound
    assert context(caches) == 0  # refused before anything was done
    assert model(mx.array([[1, 2, 3]]), cache=make_prompt_cache(model)).shape == (1, 3, 12288)
    stream(model).close()


def test_after_a_resize_the_plan_tells_the_truth(checkpoint: Callable[..., Path]) -> None:
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40)
    expert_stream = stream(model)
    expert_stream.resize(all_experts(expert_stream) // 2)
    plan = expert_stream.plan
    assert plan.cache == sum(x.cache.slots * x.expert_bytes for x in expert_stream.layers)
    assert plan.slots == tuple(x.cache.slots for x in expert_stream.layers)
    assert plan.resident_share == pytest.approx(plan.cache / plan.experts)
    expert_stream.close()


def test_a_second_model_with_a_larger_budget_leaves_the_first_usable() -> None:
    config = StreamConfig(progress=False, context_tokens=64)
    first, _ = load(str(demo_model()), memory="45MB", config=config)
    second, _ = load(str(demo_model()), memory="150MB", config=config)
    for model in (first, second):
        assert model(mx.array([[1, 2, 3]]), cache=make_prompt_cache(model)).shape == (1, 3, 12288)
        stream(model).close()


def test_the_least_budget_is_enough_for_what_it_is_for() -> None:
    for tokens in (3, 64):
        config = StreamConfig(progress=False, context_tokens=tokens)
        least = plan(str(demo_model()), memory="1GB", config=config).minimum
        model, _ = load(str(demo_model()), memory=least, config=config)
        slots = stream(model).plan.slots
        prompt = mx.array(TOKENS[: tokens - 2])
        assert len(list(generate_step(prompt, model, max_tokens=2))) == 2
        assert stream(model).plan.slots == slots
        stream(model).close()
        del model


def test_caches_that_are_none_are_no_caches(
    checkpoint: Callable[..., Path], parts: list[tuple[int, int, int]]
) -> None:
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model, expert_stream = short_passes(folder, 16)
    tokens, nothing = mx.array([TOKENS[:40]]), [None] * len(stock.layers)
    assert mx.array_equal(model(tokens, cache=nothing), stock(tokens, cache=nothing))
    assert [n for _, n, _ in parts] == [40]
    expert_stream.close()


def test_models_are_planned_in_several_threads_at_once(checkpoint: Callable[..., Path]) -> None:
    """MLX's own operations are what they were, in each of them."""
    originals = [getattr(mx, name) for name in ("contiguous", "to_fp8", "from_fp8")]
    folder = checkpoint("kimi_linear")
    model, _ = mlx_lm.utils.load_model(folder, lazy=True)
    switches = [(m, 1) for m in model.modules() if isinstance(m, SWITCHES)]

    def plan_it() -> None:
        measure(model, switches, {})
        mx.clear_streams()

    threads = [threading.Thread(target=plan_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [getattr(mx, name) for name in ("contiguous", "to_fp8", "from_fp8")] == originals
    assert mx.contiguous(mx.array([-1.0])).item() == -1.0


def test_what_caches_say() -> None:
    model, _ = mlx_lm.load(str(demo_model()))
    caches = make_prompt_cache(model)
    assert (context(None), context(caches), is_quantized(caches)) == (0, 0, False)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=caches))
    assert context(caches) == 3
    assert is_quantized([caches[0].to_quantized(32, 8)])


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(str(demo_model()), memory="1GB")


def test_a_budget_that_the_device_cannot_hold_is_refused(planned: Plan) -> None:
    limit = DeviceLimit(500 * MB, "the device has no more", "sudo sysctl x=1")
    with pytest.raises(BudgetError, match=r"500 MB: the device has no more\. .*sudo sysctl x=1"):
        check_device(planned, limit)
    check_device(planned, limit, oversubscribe=True)
    check_device(planned, replace(limit, nbytes=planned.bound))
    with pytest.raises(BudgetError, match=r"sudo sysctl iogpu\.wired_limit_mb=\d+"):
        check_device(
            replace(planned, bound=100 * 1000 * MB), apple_limit(128 << 30, 100 * 1000 * MB)
        )


def test_a_load_beyond_the_machine_is_refused_before_anything_is_read() -> None:
    with pytest.raises(BudgetError, match=r"10 TB is more than the device can hold.*--force"):
        load(str(demo_model()), memory="10TB", config=QUIET)
    model, _ = load(str(demo_model()), memory="10TB", config=replace(QUIET, oversubscribe=True))
    stream(model).close()


def test_on_metal_a_pass_is_bounded_by_its_keys(
    planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = replace(planned, prefill_tokens=4096, work=1 << 50)
    assert large.next_pass(4096, past=100_000) == 4096
    monkeypatch.setattr(budget, "on_metal", lambda: True)
    tokens = large.next_pass(4096, past=100_000)
    assert 1000 < tokens < (1 << 27) // 100_000
    assert large.next_pass(4096, past=1000) == 4096
