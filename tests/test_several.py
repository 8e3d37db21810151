"""Several streamed models in one process: one memory promise, and nobody disturbs another."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import pytest
from conftest import QUIET, load_streamed
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama

from mlx_streamexperts import (
    BudgetError,
    StreamConfig,
    demo_model,
    generate,
    load,
    patch,
    plan,
    stream,
)
from mlx_streamexperts._loading import drafts
from mlx_streamexperts._loading.drafts import Draft
from mlx_streamexperts._memory import process_memory

DEMO = str(demo_model())
ROOM = replace(QUIET, context_tokens=256, prefill_tokens=64)
PROMPT = "The system call read " * 12
MB = 10**6


def reply(model: nn.Module, tokenizer: object) -> str:
    return mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=6, prefill_step_size=64)


def test_the_second_model_gets_what_the_first_one_left() -> None:
    """And both together stay within the promise while they take turns."""
    stock, tokenizer = mlx_lm.load(DEMO)
    expected = reply(stock, tokenizer)
    del stock
    others, active = process_memory.held_bytes(), mx.get_active_memory()
    memory = others + 75 * MB
    first, _ = load(DEMO, memory=memory, config=replace(ROOM, reserve=35 * MB))
    second, _ = load(DEMO, memory=memory, config=ROOM)
    plans = stream(first).plan, stream(second).plan
    assert process_memory.held_bytes() - others <= 75 * MB
    assert plans[0].trunk + plans[0].cache + plans[0].kv + plans[0].work <= 40 * MB
    assert min(p.cache for p in plans) > 0
    mx.reset_peak_memory()
    for _ in range(2):
        assert reply(first, tokenizer) == expected
        assert reply(second, tokenizer) == expected
    assert mx.get_peak_memory() - active <= 75 * MB
    assert all(stream(m).stats().cache.misses > 0 for m in (first, second))


def test_without_a_reserve_the_error_says_what_to_do(checkpoint: Callable[..., Path]) -> None:
    first, _ = load(DEMO, memory=process_memory.held_bytes() + 40 * MB, config=ROOM)
    with pytest.raises(BudgetError, match=r"other streamed models.*reserve") as e:
        load(DEMO, memory=40 * MB, config=ROOM)
    assert e.value.needed_bytes > 40 * MB
    assert plan(DEMO, 40 * MB, config=ROOM).cache > 0  # says what a model takes by itself
    second, _ = load(DEMO, memory=e.value.needed_bytes, config=ROOM)
    held = process_memory.held_bytes()
    stream(second).close()  # its trunk stays until the model goes
    assert (
        held - stream(second).plan.cache
        > process_memory.held_bytes()
        > held - stream(second).plan.minimum
    )
    del second
    assert process_memory.held_bytes() <= held - stream(first).plan.trunk
    before = process_memory.held_bytes()
    stream(first).resize(3 * MB)
    assert process_memory.held_bytes() < before


def test_resizing_keeps_the_promise() -> None:
    """With the other model's share, and up to the last byte."""
    memory = process_memory.held_bytes() + 75 * MB
    one, _ = load(DEMO, memory=memory, config=replace(ROOM, reserve=35 * MB))
    other, _ = load(DEMO, memory=memory, config=ROOM)
    first, second = stream(one), stream(other)
    whole = second.plan.cache
    second.resize(whole)
    with pytest.raises(BudgetError, match="break the promise") as e:
        second.resize("39MB")
    assert e.value.needed_bytes > memory
    assert sum(x.cache.slots * x.expert_bytes for x in second.layers) == whole
    first.resize(3 * MB)  # makes room
    second.resize(whole + 5 * MB)
    with pytest.raises(BudgetError):
        first.resize(first.plan.cache + 10 * MB)
    assert process_memory.held_bytes() <= memory


def test_a_model_that_nobody_can_reach_holds_nothing() -> None:
    before = process_memory.held_bytes()
    model, _ = load(DEMO, cache="10MB", config=ROOM)
    model.itself = [model]  # only the garbage collector finds out
    gc.disable()
    try:
        assert process_memory.held_bytes() > before
        del model
        assert process_memory.held_bytes() == before
    finally:
        gc.enable()


def test_a_patch_gives_its_reserve_to_its_later_models() -> None:
    """Such as a draft model with experts: both stream, within the promise."""
    others = process_memory.held_bytes()
    config = replace(ROOM, memory=others + 75 * MB, reserve=35 * MB)
    with patch(config=config) as patched:
        models = [mlx_lm.load(DEMO)[0] for _ in range(2)]
        assert len(patched.streams) == 2
        assert process_memory.held_bytes() - others <= 75 * MB
        with pytest.raises(BudgetError):
            mlx_lm.load(DEMO)
        models.clear()
        replacement, _ = mlx_lm.load(DEMO)  # the first of its patch again: leaves the reserve
        assert stream(replacement).plan.cache == patched.streams[0].plan.cache


def test_a_draft_model_with_experts_shares_the_promise(capsys: pytest.CaptureFixture[str]) -> None:
    gc.collect()
    others, active = process_memory.held_bytes(), mx.get_active_memory()
    text = []
    mx.reset_peak_memory()
    for draft in ([], ["--draft-model", DEMO]):
        arguments = ["--memory", str(others + 100 * MB), "--context-tokens", "256"]
        arguments += ["--prefill-tokens", "64", "--no-progress", "-m", "12", "-p", PROMPT, *draft]
        assert generate.main(arguments) == 0
        text.append(capsys.readouterr().out)
    assert mx.get_peak_memory() - active <= 100 * MB
    replies = [t.split("=" * 10)[1] for t in text]
    assert replies[0] == replies[1]
    assert "were drafted and accepted" not in text[0]
    assert "9 of 12 tokens were drafted and accepted" in text[1]
    assert "Experts (second model): " in text[1]


@pytest.mark.parametrize("divided", [True, False])
def test_a_draft_models_prompt_stays_within_the_promise(
    divided: bool,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    not_compiled: None,
) -> None:
    """mlx-lm runs it in steps of 512 tokens, for which this draft model takes 50 MB."""
    config = {
        "model_type": "llama", "vocab_size": families.VOCAB, "hidden_size": 16,
        "num_hidden_layers": 2, "intermediate_size": 8192, "num_attention_heads": 1,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    families.write(tmp_path, config, llama.Model(llama.ModelArgs.from_dict(config)), shards=1)
    prompt = mx.array(families.token_stream(families.VOCAB, 500, seed=1))
    folder = checkpoint("qwen3_moe")
    alone = generate_step(prompt, mlx_lm.utils.load_model(folder)[0], max_tokens=4)
    expected = [token for token, _ in alone]
    if not divided:
        monkeypatch.setattr(drafts._DraftPasses, "step", lambda _, whole: whole())
    room = Draft.read("it", tmp_path).leave_room(replace(ROOM, context_tokens=512))
    gc.collect()
    others, active = process_memory.held_bytes(), mx.get_active_memory()
    memory = others + plan(str(folder), "1GB", config=room).minimum
    with patch(config=replace(room, memory=memory)):
        model, draft = (mlx_lm.utils.load_model(f)[0] for f in (folder, tmp_path))
    mx.reset_peak_memory()
    drafted = speculative_generate_step(prompt, model, draft, max_tokens=4)
    assert [token for token, *_ in drafted] == expected
    assert (mx.get_peak_memory() - active <= memory) == divided


def test_freed_buffers_stay_limited_until_the_last_stream_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_memory, "_limits", {})  # whatever other tests left open
    free = mx.set_cache_limit(1 << 40)
    try:
        models = [load(DEMO, cache="10MB", config=ROOM)[0] for _ in range(2)]
        for model in models:  # in the order of opening, which a stack would get wrong
            limit = mx.set_cache_limit(1 << 30)
            assert limit < 1 << 28
            mx.set_cache_limit(limit)
            stream(model).close()
        assert mx.set_cache_limit(free) == 1 << 40
    finally:
        mx.set_cache_limit(free)


def test_two_models_in_two_threads(checkpoint: Callable[..., Path]) -> None:
    """Each thread loads and runs its own."""
    folders = checkpoint("qwen3_moe"), checkpoint("deepseek_v3")
    tokens = mx.array([[3, 1, 4, 1, 5]])
    expected = []
    for folder in folders:
        expected.append(mlx_lm.utils.load_model(folder)[0](tokens).tolist())
    got: dict[int, list] = {}

    def work(which: int) -> None:
        model = load_streamed(folders[which], 400_000)
        with stream(model):
            for _ in range(5):
                got[which] = model(tokens).tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [got[0], got[1]] == expected


def test_the_default_budget_counts_what_the_process_has_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the system has available no longer contains what our models took of it."""
    from mlx_streamexperts import _osinfo as platform
    from mlx_streamexperts._memory import budget as planner

    available = 400 * MB
    monkeypatch.setattr(platform, "available_memory_bytes", lambda: available)
    monkeypatch.setattr(platform.mx, "default_device", lambda: mx.cpu)
    assert platform.device_memory_bytes() == available
    assert platform.device_memory_bytes(held=100 * MB) == 500 * MB
    monkeypatch.setattr(planner, "device_memory_bytes", platform.device_memory_bytes)
    alone = plan(DEMO, config=StreamConfig(progress=False))
    assert alone.memory == int(0.85 * available)
