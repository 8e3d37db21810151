"""Prompts in the server's memory: what they share is there once, and comes back bit by bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import QUIET, load_streamed, until_memory_is
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from serving import letters, serving

from mlx_streamexperts._prefixes.shared import SharedPrompts
from mlx_streamexperts.server._kv_admission import BoundedPromptCache, KVAdmission

TOKENS = families.token_stream(families.VOCAB, 1500, seed=3).tolist()


def small_model(checkpoint: Callable[..., Path], family: str) -> nn.Module:
    return load_streamed(checkpoint(family), 1 << 40, replace(QUIET, prefill_tokens=512))


def run(model: nn.Module, tokens: list[int], caches: list[Any]) -> np.ndarray:
    logits = model(mx.array([tokens]), cache=caches)
    mx.eval(logits, [c.state for c in caches])
    return np.array(logits[:, -1].astype(mx.float32))


def computed(model: nn.Module, tokens: list[int]) -> list[Any]:
    """Caches of a prompt."""
    caches: list[Any] = make_prompt_cache(model)
    run(model, tokens, caches)
    return caches


def test_ten_conversations_take_one_system_prompt_and_ten_tails(
    checkpoint: Callable[..., Path], not_compiled: None
) -> None:
    """The reference computes the system prompt anew, and ends a pass where the server ends one."""
    model = small_model(checkpoint, "qwen3_moe")
    system, tail = TOKENS[:1000], 40
    prompts = BoundedPromptCache(KVAdmission())
    expected = {}
    gc.collect()
    before = mx.get_active_memory()
    for i in range(10):
        told = [*system, (TOKENS[1000] + i) % 128, *TOKENS[1001 : 1000 + tail]]
        caches, rest = prompts.fetch_nearest_cache("model", told)
        if not i:
            assert caches is None
            caches, rest = make_prompt_cache(model), told[1000:]
            run(model, system, caches)
            prompts.insert_cache("model", system, list(caches), cache_type="system")
        assert len(rest) == tail
        run(model, rest, caches)
        prompts.insert_cache("model", told, list(caches))
        if i % 4 == 0:
            whole = make_prompt_cache(model)
            for part in (system, told[1000:]):
                run(model, part, whole)
            expected[i] = told, run(model, [5], whole)
            token_bytes = sum(
                c.keys[..., :1, :].nbytes + c.values[..., :1, :].nbytes for c in whole
            )
            del whole
        del caches
    gc.collect()
    held = mx.get_active_memory() - before
    bytes_of_all = (1000 + 10 * tail) * token_bytes
    assert prompts.nbytes == bytes_of_all
    assert bytes_of_all <= held <= 1.05 * bytes_of_all
    assert len(prompts) == 10
    for told, logits in expected.values():
        caches, rest = prompts.fetch_nearest_cache("model", [*told, 5])
        assert rest == [5]
        assert np.array_equal(run(model, rest, caches), logits)
    prompts.trim_to(n_bytes=(1000 + 3 * tail) * token_bytes)
    assert len(prompts) == 3
    prompts.trim_to(n_sequences=0)
    del caches
    assert prompts.nbytes == 0
    until_memory_is(before + 0.02 * bytes_of_all)


def fits(added: int) -> bool:
    return True


@pytest.mark.parametrize("quantized", [False, True])
def test_what_comes_back_can_be_trimmed_and_written(
    quantized: bool, checkpoint: Callable[..., Path], not_compiled: None
) -> None:
    """As a request does whose prompt differs from the middle on: what is kept stays as it was."""
    model = small_model(checkpoint, "qwen3_moe")
    caches = computed(model, TOKENS[:100])
    if quantized:
        maybe_quantize_kv_cache(caches, 0, 32, 8)
    shared = SharedPrompts().share("model", TOKENS[:100], list(caches), fits)
    expected = run(model, [1, 2], copy.deepcopy(shared))
    other = copy.deepcopy(shared)
    trim_prompt_cache(other, 60)
    run(model, TOKENS[200:260], other)
    assert np.array_equal(run(model, [1, 2], copy.deepcopy(shared)), expected)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "quantized", "qwen3_next", "gpt_oss", "deepseek_v32"]
)
def test_what_is_kept_comes_back_bit_by_bit(
    family: str, checkpoint: Callable[..., Path], not_compiled: None
) -> None:
    """Whichever prompts share it, and after a segment was divided."""
    model = small_model(checkpoint, "qwen3_moe" if family == "quantized" else family)
    prompts = SharedPrompts()
    kept = []
    for told in (
        TOKENS[:150],
        [*TOKENS[:90], (TOKENS[90] + 1) % 128, *TOKENS[300:349]],
        TOKENS[:200],
        [(TOKENS[0] + 1) % 128, *TOKENS[8:80]],
    ):
        caches = computed(model, told)
        if family == "quantized":
            maybe_quantize_kv_cache(caches, 0, 32, 8)
        kept.append((told, prompts.share("model", told, list(caches), fits), caches))
    for _, shared, caches in kept:
        copies = copy.deepcopy(shared)
        assert np.array_equal(run(model, [1, 2], copies), run(model, [1, 2], caches))
    if family in ("qwen3_moe", "quantized"):
        distinct = 200 + 50 + 73
        assert {len(s.tokens) for _, p, _ in kept for s in p.segments} == {90, 60, 50, 73}
        one_token = kept[3][1].segments[0].nbytes / 73
        assert prompts.nbytes == distinct * one_token


def test_other_bits_or_another_model_share_nothing(
    checkpoint: Callable[..., Path], not_compiled: None
) -> None:
    model = small_model(checkpoint, "qwen3_moe")
    prompts, caches = SharedPrompts(), computed(model, TOKENS[:100])
    first = prompts.share("model", TOKENS[:100], list(caches), fits)
    again = prompts.share("model", TOKENS[:100], list(caches), fits)
    assert again.segments == first.segments
    other = prompts.share("other", TOKENS[:100], list(caches), fits)
    assert other.segments[0] is not first.segments[0]
    caches[-1].values[..., 99, 0] += 1
    changed = prompts.share("model", TOKENS[:100], list(caches), fits)
    assert changed.segments[0] is not first.segments[0]


def test_it_hears_before_it_copies_how_much_a_prompt_adds(
    checkpoint: Callable[..., Path], not_compiled: None
) -> None:
    model = small_model(checkpoint, "qwen3_moe")
    prompts, caches = SharedPrompts(), computed(model, TOKENS[:100])
    first = prompts.share("model", TOKENS[:80], list(caches), fits)
    asked: list[int] = []
    given = list(caches)
    assert prompts.share("model", TOKENS[:100], given, lambda n: bool(asked.append(n))) is None
    assert given == []
    assert asked == [first.segments[0].nbytes // 80 * 20]
    assert prompts.nbytes == first.segments[0].nbytes


def test_replies_are_those_of_a_server_without_the_cache(
    checkpoint: Callable[..., Path], not_compiled: None
) -> None:
    folder = letters(checkpoint("qwen3_next"), families.VOCAB)
    text = "".join(chr(33 + i * 37 % 90) for i in range(150))
    prompts = [text + str(i) * 9 for i in (1, 2, 3)]
    prompts += [p + "more" for p in prompts]
    said = []
    for size in ("10", "0"):
        options = ["--model", str(folder), "--cache", "4MB", "--prompt-cache-size", size]
        with serving(*options) as running:
            said.append([running.text(p, 6) for p in prompts])
    assert said[0] == said[1]
