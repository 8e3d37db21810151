"""Several sequences at once: right, and one read for all tokens that share an expert."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import families
import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, all_experts, load_streamed, smallest_cache
from mlx_lm import batch_generate
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import BudgetError, demo_model, load, patch, plan, stream


@pytest.mark.parametrize("times", [1.0, 1.8])
def test_a_batch_has_room_for_the_copies_that_mlx_lm_makes(
    times: float, tmp_path: Path, not_compiled: None
) -> None:
    """Of its KV cache, 131 kB a token, when a sequence joins or ends. Or it is refused."""
    changes = {"vocab_size": 512, "num_hidden_layers": 8, "head_dim": 128}
    changes |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    with mock.patch.dict(families.FAMILIES["qwen3_moe"], changes):
        families.build("qwen3_moe", tmp_path, quantize=None)
    config = replace(QUIET, context_tokens=256, prefill_tokens=64)
    memory = int(times * plan(str(tmp_path), config=replace(config, memory="2GB")).minimum)
    gc.collect()
    before = mx.get_active_memory()
    with patch(memory=memory, config=config):
        model, _ = mlx_lm.utils.load_model(tmp_path)
    _, tokenizer = mlx_lm.load(str(demo_model()), lazy=True)
    mx.reset_peak_memory()
    prompts = [[5, 6, 7] * 50, [8, 6, 7] * 30]
    with nullcontext() if times > 1 else pytest.raises(BudgetError, match="the batch"):
        batch_generate(model, tokenizer, prompts, max_tokens=3, prefill_step_size=64)
    assert mx.get_peak_memory() - before <= memory


@pytest.mark.parametrize("prefetch", ["off", "on"])
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_batch_generate_gives_the_tokens_of_stock(share: float, prefetch: str) -> None:
    """Prompts of different lengths, replies of different lengths, at half a step's experts too."""
    stock, tokenizer = mlx_lm.load(str(demo_model()))
    texts = ("In the beginning", "def main(", "The system call read", "fn", "Chapter 1. The")
    prompts = [tokenizer.encode(t) for t in texts]
    lengths = [12, 5, 9, 12, 3]
    arguments = {"max_tokens": lengths, "return_token_ids": True}
    expected = batch_generate(stock, tokenizer, prompts, **arguments)
    model, _ = load(str(demo_model()), cache="1GB", config=replace(QUIET, prefetch=prefetch))
    with stream(model) as expert_stream:
        expert_stream.resize(int(share * all_experts(expert_stream)))
        got = batch_generate(model, tokenizer, prompts, **arguments)
        assert got.token_ids == expected.token_ids
        assert got.texts == expected.texts
        assert expert_stream.stats().cache.misses > 0


def test_tokens_that_share_an_expert_share_its_read(checkpoint: Callable[..., Path]) -> None:
    """A step of a batch reads each expert at most once, however many of its tokens chose it."""
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40)
    tokens = families.token_stream(families.VOCAB, 48, seed=4).reshape(12, 4)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        chosen: list[np.ndarray] = []
        for layer in expert_stream.layers:
            layer.on_routing.add(chosen.append)
        caches = make_prompt_cache(stock), make_prompt_cache(model)
        for step in tokens:
            batch = mx.array(step)[:, None]  # [B, 1]
            expert_stream.reset()
            chosen.clear()
            expected, got = (m(batch, cache=c) for m, c in zip((stock, model), caches, strict=True))
            assert mx.array_equal(expected, got)
            distinct = sum(len(np.unique(c)) for c in chosen)
            stats = expert_stream.stats()
            assert stats.cache.hits + stats.cache.misses == distinct < sum(c.size for c in chosen)
            one = expert_stream.layers[0].expert_bytes
            assert stats.read.bytes == stats.cache.misses * one <= distinct * one


def test_interleaved_requests_decode_as_if_alone(checkpoint: Callable[..., Path]) -> None:
    """Each request's tokens are what it gets by itself, whoever's step came before."""
    folder = checkpoint("qwen3_moe")
    model = load_streamed(folder, 1 << 40, replace(QUIET, prefetch="on"))
    prompts = families.token_stream(families.VOCAB, 30, seed=6).reshape(3, 10)

    def first_tokens(requests: list[np.ndarray], steps: int) -> list[list[int]]:
        caches = [make_prompt_cache(model) for _ in requests]
        replies: list[list[int]] = [[] for _ in requests]
        inputs = [mx.array(r)[None] for r in requests]
        for _ in range(steps):
            # All built before any is evaluated, as a server with several generators would.
            logits = [model(x, cache=c) for x, c in zip(inputs, caches, strict=True)]
            for reply, y in zip(replies, logits, strict=True):
                reply.append(int(mx.argmax(y[0, -1]).item()))
            inputs = [mx.array([[reply[-1]]]) for reply in replies]
        return replies

    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        alone = [first_tokens([p], 8)[0] for p in prompts]
        assert first_tokens(list(prompts), 8) == alone
