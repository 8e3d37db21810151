"""What mlx-lm computes wrongly is found by trying every family, and refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, load_streamed
from mlx_lm.generate import (
    BatchGenerator,
    PromptProcessingBatch,
    generate_step,
    speculative_generate_step,
)
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from mlx_streamexperts import demo_model, load, stream
from mlx_streamexperts._errors import TokenError, UnsupportedModelError
from mlx_streamexperts._loading import combinations
from mlx_streamexperts._loading.combinations import (
    BATCHED,
    Options,
    batches,
    check_options,
    check_tokens,
    drafts,
    family,
    token_rows,
    trims,
)
from mlx_streamexperts.report._study import QUICK, batch_sizes

TOKENS = families.token_stream(families.VOCAB, 200, seed=4).tolist()
STEPS = 6
DRAFT = str(demo_model())  # it knows more tokens than the families
ROUNDING = 1e-4
"""Logarithms of probabilities, float32: those of other kernels are within 2e-5, wrong ones not."""

Reply = tuple[list[int], np.ndarray]  # tokens [T], logarithms of probabilities [T, V]


def test_options_that_a_family_cannot_do_are_refused_before_loading(
    checkpoint: Callable[..., Path],
) -> None:
    drafting = Options(draft_model=DRAFT)
    check_options(checkpoint("qwen3_moe"), QUIET, Options())
    with pytest.raises(UnsupportedModelError, match=r"--draft-model.* does not work with jamba"):
        check_options(checkpoint("jamba"), QUIET, drafting)
    check_tokens(mx.array([[0, 99]]), rows=100)
    with pytest.raises(TokenError, match="token 100: the model has no such token, only 0 to 99"):
        check_tokens(mx.array([[0, 100]]), rows=100)


def alone(model: nn.Module, prompt: list[int], caches: list[Any] | None = None) -> Reply:
    """Greedy, mlx-lm's way."""
    tokens, rows = [], []
    steps = generate_step(mx.array(prompt), model, max_tokens=STEPS, prompt_cache=caches)
    for token, logprobs in steps:
        tokens.append(token)
        rows.append(np.array(logprobs.astype(mx.float32)))
    return tokens, np.stack(rows)


def collected(batch: Any, uids: Sequence[int], later: list[int] | None = None) -> list[Reply]:
    """What a BatchGenerator or a GenerationBatch gives; `later` joins it after two tokens."""
    replies: dict[int, tuple[list[int], list[np.ndarray]]] = {u: ([], []) for u in uids}
    while any(len(tokens) < STEPS for tokens, _ in replies.values()):
        found = batch.next_generated() if isinstance(batch, BatchGenerator) else batch.next()
        for r in found:
            replies[r.uid][0].append(r.token)
            replies[r.uid][1].append(np.array(r.logprobs.astype(mx.float32)))
        if later is not None and max(len(tokens) for tokens, _ in replies.values()) == 2:
            replies[batch.insert([list(later)])[0]] = ([], [])
            later = None
    return [(tokens, np.stack(rows)) for tokens, rows in replies.values()]


def off(expected: Reply, got: Reply) -> float:
    """The largest difference, as far as both go on from the same tokens."""
    same = [a == b for a, b in zip(expected[0], got[0], strict=True)]
    end = same.index(False) + 1 if False in same else len(same)
    return float(np.abs(expected[1][:end] - got[1][:end]).max())


def batched(model: nn.Module, prompts: list[list[int]]) -> list[list[Reply]]:
    """Greedy in a batch: as mlx-lm's server has it, and with prompts padded over several passes."""
    n = len(prompts) - 1
    generator = BatchGenerator(model, max_tokens=STEPS, prefill_step_size=16)
    served = collected(generator, generator.insert([list(p) for p in prompts[:n]]), prompts[n])
    generator.close()
    batch = PromptProcessingBatch(
        model,
        list(range(n)),
        [make_prompt_cache(model) for _ in range(n)],
        prefill_step_size=5,
        max_tokens=[STEPS] * n,
    )
    padded = collected(batch.generate([list(p) for p in prompts[:n]]), range(n))
    return [served, padded]


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_every_family_as_stock_computes_it(name: str, checkpoint: Callable[..., Path]) -> None:
    """Batches against each alone, trimmed caches against fresh ones: what we say is what is so."""
    model, _ = mlx_lm.utils.load_model(checkpoint(name))
    caches = make_prompt_cache(model)
    assert token_rows(model) == families.VOCAB

    if all(hasattr(c, "merge") for c in caches):  # the others mlx-lm does not batch
        prompts = [TOKENS[:29], TOKENS[40:43], TOKENS[50:62], TOKENS[90:91], TOKENS[100:117]]
        expected = [alone(model, p) for p in prompts]
        for got in batched(model, prompts):
            worst = max(off(e, g) for e, g in zip(expected, got, strict=False))
            if worst > ROUNDING:
                break
        assert batches(model, caches) == (worst < ROUNDING), worst

    # Chunks and windows are 8 tokens.
    exact = []
    for length, back, step in ((6, 2, 4), (7, 6, 1), (60, 1, 16), (60, 20, 16), (60, 33, 1)):
        trimmed, fresh = make_prompt_cache(model), make_prompt_cache(model)
        for cache, tokens in ((trimmed, length), (fresh, length - back)):
            for i in range(0, tokens, step):
                mx.eval(model(mx.array([TOKENS[i : min(i + step, tokens)]]), cache=cache))
        if can_trim_prompt_cache(trimmed):
            trim_prompt_cache(trimmed, back)
            rest = TOKENS[120:126]
            exact.append(off(alone(model, rest, fresh), alone(model, rest, trimmed)) < ROUNDING)
    assert trims(caches) == all(exact) or not exact
    # Drafts are taken back at any length.
    assert drafts(caches) == (len(exact) == 5 and all(exact))


def test_nothing_is_said_of_families_that_were_not_tried() -> None:
    tried = set()
    for name, config in families.FAMILIES.items():
        model_class, _ = mlx_lm.utils._get_classes(config)
        assert name
        tried.add(model_class.__module__.rpartition(".")[2])
    assert tried >= BATCHED

    class Unknown(nn.Module):
        pass

    class Window(RotatingKVCache):  # of which nothing is known
        pass

    assert family(Unknown()) == "test_combinations"
    assert batches(Unknown(), [KVCache(), RotatingKVCache(8)])
    for check in (lambda c: batches(Unknown(), c), trims, drafts):
        assert check([KVCache()])
        assert not check([KVCache(), Window(8)])


@pytest.mark.parametrize("name", ["jamba", "minimax_m3_vl", "nemotron_h"])
def test_a_batch_that_mlx_lm_computes_wrongly_is_refused(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    model = load_streamed(checkpoint(name), 1 << 40)
    prompts = [TOKENS[:9], TOKENS[20:24]]
    with stream(model):
        generator = BatchGenerator(model, max_tokens=STEPS)
        generator.insert([list(p) for p in prompts])
        with pytest.raises(UnsupportedModelError, match=name):
            generator.next_generated()
        # What needs no padding is right, and goes on to work.
        equal = [TOKENS[:9], TOKENS[20:29]]
        expected = [alone(model, p) for p in equal]
        for some in (equal, equal[:1]):
            generator = BatchGenerator(model, max_tokens=STEPS)
            got = collected(generator, generator.insert([list(p) for p in some]))
            assert max(map(off, expected, got)) < ROUNDING
        # One that joins makes the padding of the others.
        generator = BatchGenerator(model, max_tokens=STEPS)
        uids = generator.insert([list(p) for p in equal])
        with pytest.raises(UnsupportedModelError, match="unequal length"):
            collected(generator, uids, later=prompts[1])


@pytest.mark.parametrize(("name", "sizes"), [("jamba", [1]), ("qwen3_moe", [1, 2, 4])])
def test_a_report_tries_no_batches_that_are_wrong(
    name: str, sizes: list[int], checkpoint: Callable[..., Path]
) -> None:
    model = load_streamed(checkpoint(name), 1 << 40)
    with stream(model):
        assert batch_sizes(model, QUICK) == sizes


@pytest.mark.parametrize(("name", "works"), [("gpt_oss", False), ("qwen3_moe", True)])
def test_draft_models_with_sliding_windows_are_refused(
    name: str, works: bool, checkpoint: Callable[..., Path]
) -> None:
    model = load_streamed(checkpoint(name), 1 << 40)
    draft, _ = mlx_lm.utils.load_model(checkpoint("qwen3_moe"))
    prompt = mx.array(TOKENS[:20])
    with stream(model):
        drafted = speculative_generate_step(prompt, model, draft, max_tokens=STEPS)
        if works:
            assert [token for token, _, _ in drafted] == alone(model, TOKENS[:20])[0]
        else:
            with pytest.raises(UnsupportedModelError, match=r"draft_model.*gpt_oss"):
                next(drafted)
            alone(model, TOKENS[:20])  # nothing else is refused


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen3_next", Options(draft_model=DRAFT), "--draft-model.*qwen3_next.*ArraysCache"),
        ("gpt_oss", Options(draft_model=DRAFT), "--draft-model.*gpt_oss.*RotatingKVCache"),
        ("llama4", Options(draft_model=DRAFT), "--draft-model.*llama4.*ChunkedKVCache"),
        ("deepseek_v3", Options(kv_bits=8, kv_group_size=32), "--kv-bits 8.*deepseek_v3"),
        ("gpt_oss", Options(kv_bits=4), "--kv-bits 4.*gpt_oss"),
        ("qwen3_moe", Options(kv_bits=8, max_kv_size=64), "--kv-bits 8.*--max-kv-size 64.*qwen3"),
        ("qwen3_moe", Options(kv_bits=8, kv_group_size=128), "--kv-group-size 128.*qwen3_moe"),
        ("qwen3_moe", Options(kv_bits=8, kv_group_size=32), None),
        ("qwen3_moe", Options(draft_model=DRAFT, max_kv_size=64), None),
        ("qwen3_next", Options(kv_bits=8, kv_group_size=32), None),
        ("gpt_oss", Options(max_kv_size=64), None),
    ],
)
def test_options_that_cannot_work_are_found_without_reading_a_weight(
    name: str,
    options: Options,
    message: str | None,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(name)
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("something was computed"))
    if message is None:
        check_options(folder, QUIET, options)
        return
    with pytest.raises(UnsupportedModelError, match=message) as e:
        check_options(folder, QUIET, options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_quantized_caches_are_refused_where_mlx_lm_fails(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(name)
    model, _ = mlx_lm.utils.load_model(folder)
    options = {"kv_bits": 8, "kv_group_size": 32}
    try:
        list(
            generate_step(
                mx.array(TOKENS[:9]), model, max_tokens=2, quantized_kv_start=0,
                prefill_step_size=4, **options,
            )
        )  # fmt: skip
    except Exception:
        with pytest.raises(UnsupportedModelError, match=family(model)):
            check_options(folder, QUIET, Options(**options))
    else:
        check_options(folder, QUIET, Options(**options))


def test_options_are_those_of_any_command_line() -> None:
    args = argparse.Namespace(draft_model="a", kv_bits=4, kv_group_size=32, max_kv_size=9)
    assert Options.of(args) == Options("a", 4, 32, 9)
    assert Options.of(argparse.Namespace(draft_model=None)) == Options()


def test_tokens_that_a_model_has_no_row_for(checkpoint: Callable[..., Path]) -> None:
    rows = families.VOCAB
    for bad in ([1, rows], [-1], [2**31 - 1], np.array([2**32 - 1], np.uint32)):
        with pytest.raises(TokenError, match=f"only 0 to {rows - 1}"):
            check_tokens(mx.array(bad), rows)
    check_tokens(mx.array([0, rows - 1]), rows)
    check_tokens(mx.array([rows]), None)
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40)
    with stream(model) as expert_stream:
        assert expert_stream.token_rows == rows
        for prompt in ([*TOKENS[:5], rows], [rows, *TOKENS[:5]], [rows]):
            with pytest.raises(TokenError, match=f"token {rows}"):
                alone(model, prompt)
            generator = BatchGenerator(model, max_tokens=STEPS)
            generator.insert([list(prompt), TOKENS[:3]])
            with pytest.raises(TokenError, match=f"token {rows}"):
                generator.next_generated()
        alone(model, TOKENS[:5])


def test_decoding_does_not_wait_for_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a prompt are looked at; those that the model's own logits chose are not."""
    model, tokenizer = load(str(demo_model()), cache="10MB", config=QUIET)
    looked: list[tuple[int, ...]] = []
    monkeypatch.setattr(combinations, "check_tokens", lambda ids, _: looked.append(ids.shape))
    with stream(model):
        mlx_lm.generate(model, tokenizer, TOKENS[:5], max_tokens=8)
    assert looked == [(1, 4), (1, 1)]
