"""Passes whose result mlx-lm drops do without the last layer's experts, and change no result."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import pytest
from conftest import assert_same, load_streamed, smallest_cache
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import ExpertStream, demo_model, discarded, stream
from mlx_streamexperts.discarded import PromptPasses, is_dropped

PROMPT = mx.array(families.token_stream(families.VOCAB, 40, seed=2))


@pytest.fixture
def models(checkpoint: Callable[..., Path]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Stock, and streamed with the least that it can do with."""
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as s:
        s.resize(smallest_cache(s))
        yield stock, model


def left_out(s: ExpertStream) -> list[int]:
    return [layer.stats.left_out for layer in s.layers]


def logits(model: nn.Module, **options: Any) -> list[mx.array]:
    """Of a prompt's last token and of five more, as `mlx_lm.generate` computes them."""
    seen: list[mx.array] = []

    def note(tokens: mx.array, row: mx.array) -> mx.array:
        seen.append(row)
        return row

    steps = generate_step(PROMPT, model, max_tokens=5, logits_processors=[note], **options)
    assert len(list(steps)) == 5
    mx.eval(seen)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_step_size": 16},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
        {"max_kv_size": 24},
    ],
    ids=["whole", "chunks", "quantized cache", "rotating cache"],
)
def test_generating_leaves_the_last_layer_out_of_the_prompt(
    options: dict[str, Any], models: tuple[nn.Module, nn.Module]
) -> None:
    stock, model = models
    for _ in range(2):  # the first time it is tried out
        s = stream(model)
        s.reset()
        assert_same(logits(stock, **options), logits(model, **options), str(options))
        chunks = -(-39 // options.get("prefill_step_size", 2048))
        assert left_out(s) == [0] * (len(s.layers) - 1) + [chunks]
        assert [x.stats.calls for x in s.layers[:-1]] == [6 + chunks] * (len(s.layers) - 1)
        assert s.layers[-1].stats.calls == 6


def test_batches_and_drafts_do_so_too(models: tuple[nn.Module, nn.Module]) -> None:
    stock, model = models
    tokenizer = mlx_lm.utils.load_tokenizer(demo_model())
    prompts = [PROMPT.tolist(), PROMPT.tolist()[:11]]
    texts = [
        mlx_lm.batch_generate(m, tokenizer, prompts, max_tokens=4).texts for m in (stock, model)
    ]
    assert texts[0] == texts[1]
    assert left_out(stream(model))[-1] == 1
    said = [
        [t for t, *_ in speculative_generate_step(PROMPT, m, stock, max_tokens=6)]
        for m in (stock, model)
    ]
    assert said[0] == said[1]
    assert left_out(stream(model))[-1] == 2


def test_who_may_look_at_the_result_has_it(models: tuple[nn.Module, nn.Module]) -> None:
    stock, model = models
    expected = stock(PROMPT[None])
    assert mx.array_equal(expected, model(PROMPT[None]))
    model(PROMPT[None], cache=make_prompt_cache(model))  # dropped, but not by mlx-lm
    assert left_out(stream(model))[-1] == 0


def test_a_trace_has_every_layer(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    _, model = models
    with stream(model).trace(tmp_path / "trace"):
        logits(model)
    calls = [json.loads(x) for x in (tmp_path / "trace").read_text().splitlines()[1:]]
    prompts = [call["layer"] for call in calls if len(call["experts"]) > 1]
    assert prompts == list(range(len(stream(model).layers)))


def test_where_a_cache_depends_on_the_layer_it_takes_part(
    models: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer in the place of the last: the pass is run again, and nothing left out."""
    stock, model = models
    s = stream(model)
    monkeypatch.setattr(discarded, "is_dropped", lambda frame: True)
    passes = PromptPasses(s.layers[0], None)
    caches = [make_prompt_cache(m) for m in models]
    stock(PROMPT[None], cache=caches[0])
    as_it_was = type(model).__bases__[0].__call__  # without its own passes
    for _ in range(2):
        passes.step(lambda: as_it_was(model, PROMPT[None], cache=caches[1]), 40, caches[1])
        assert left_out(s)[0] == 1
        for a, b in zip(*caches, strict=True):
            assert mx.array_equal(a.keys[..., :40, :], b.keys[..., :40, :])
            assert mx.array_equal(a.values[..., :40, :], b.values[..., :40, :])
            b.trim(40)


def test_an_interrupted_pass_leaves_nothing_out_of_the_next(
    models: tuple[nn.Module, nn.Module],
) -> None:
    stock, model = models
    last = stream(model).layers[-1]
    last.aside = threading.get_ident()  # Ctrl-C within `finally`
    assert mx.array_equal(stock(PROMPT[None]), model(PROMPT[None]))
    assert last.aside is None and last.stats.left_out == 0


CALLERS = """
def dropped(f):
    f()

def handed_on(f):
    return f()

def dropped_below(f):
    handed_on(f)

def dropped_by_name(f):
    handed_on(
        f=f
    )

def kept(f):
    y = f()

def kept_below(f):
    y = handed_on(f)

def collected(f, into):
    into.append(f())

def in_a_block(f, lock):
    with lock:
        f()

def steps(f):
    while True:
        f()
        yield
"""


@pytest.mark.parametrize(
    ("caller", "module", "expected"),
    [
        ("dropped", "mlx_lm.generate", True),
        ("dropped_below", "mlx_lm.generate", True),
        ("dropped_by_name", "mlx_lm.generate", True),
        ("in_a_block", "mlx_lm.generate", True),
        ("steps", "mlx_lm.generate", True),
        ("kept", "mlx_lm.generate", False),
        ("kept_below", "mlx_lm.generate", False),
        ("collected", "mlx_lm.generate", False),
        ("handed_on", "mlx_lm.generate", False),  # to this test
        ("dropped", "mlx_lmx.generate", False),
        ("dropped", "__main__", False),
    ],
)
def test_what_counts_as_dropped(caller: str, module: str, expected: bool) -> None:
    said: list[bool] = []

    def f() -> int:
        said.append(is_dropped(sys._getframe(1)))
        return 1

    names: dict[str, Any] = {"__name__": module}
    exec(compile(CALLERS, "callers", "exec"), names)
    more = {"collected": [[]], "in_a_block": [threading.Lock()]}.get(caller, [])
    got = names[caller](f, *more)
    if caller == "steps":
        next(got)
        next(got)
        assert said.pop() == expected
    assert said == [expected]
