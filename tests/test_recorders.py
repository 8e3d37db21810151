"""Who looks into a streamed model's passes sees what stock's have, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from conftest import QUIET, all_experts, load_streamed, smallest_cache
from mlx_lm.generate import generate_step

from mlx_streamexperts import stream
from mlx_streamexperts._experts.foreign_modules import ForeignModules

PROMPT = mx.array(families.token_stream(families.VOCAB, 40, seed=2))


def test_code_attached_after_loading_is_foreign(checkpoint: Callable[..., Path]) -> None:
    model, _ = mlx_lm.utils.load_model(checkpoint("qwen3_moe"))
    foreign = ForeignModules(model)
    assert not foreign.any()
    norm = model.model.norm
    model.model.norm = lambda x: norm(x)
    assert foreign.any()
    model.model.norm = norm
    assert not foreign.any()


class Recorder(nn.Module):
    """Wraps a module and keeps what comes out of it."""

    def __init__(self, inner: Any, seen: list[mx.array]) -> None:
        super().__init__()
        self.inner, self.seen = inner, lambda: seen  # a list would be part of the module tree

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self.inner(*args, **kwargs)
        self.seen().append(y)
        return y


class Plain:
    """The same, and no module."""

    def __init__(self, inner: Any, seen: list[mx.array]) -> None:
        self.inner, self._seen = inner, seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self.inner(*args, **kwargs)
        self._seen.append(y)
        return y


def wrap(model: nn.Module, place: str, kind: type) -> list[mx.array]:
    """Record what comes out of a place in the last decoder layer."""
    seen: list[mx.array] = []
    last = model.layers[-1]
    match place:
        case "layer":
            model.model.layers[-1] = kind(last, seen)
        case "norm":
            model.model.norm = kind(model.model.norm, seen)
        case "block":
            last.mlp = kind(last.mlp, seen)
        case "gate":
            last.mlp.gate = kind(last.mlp.gate, seen)
        case "experts":
            last.mlp.switch_mlp = kind(last.mlp.switch_mlp, seen)
    return seen


def recorded(model: nn.Module, seen: list[mx.array], **options: Any) -> list[mx.array]:
    """During a prompt and six tokens, by mlx-lm's own loop."""
    del seen[:]
    steps = generate_step(PROMPT, model, max_tokens=6, **options)
    assert len(list(steps)) == 6
    mx.eval(seen)
    return list(seen)


@pytest.mark.parametrize("kind", [Recorder, Plain])
@pytest.mark.parametrize("place", ["layer", "norm", "block", "gate", "experts"])
@pytest.mark.parametrize(
    "options",
    [{}, {"prefetch": "on", "prefetch_depth": 2}, {"run_ahead": "on", "prefetch": "on"}],
    ids=str,
)
def test_activations_are_stocks(
    options: dict[str, Any], place: str, kind: type, checkpoint: Callable[..., Path]
) -> None:
    """Each once, in the same order, the same bits: no placeholder, no pass that was wrong."""
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40, replace(QUIET, **options))
    with stream(model) as s:
        s.resize(max(smallest_cache(s), all_experts(s) // 3))
        recorded(model, [])  # what there is to learn about the model is learned
        seen = [wrap(m, place, kind) for m in (stock, model)]
        for chunk in (2048, 16):
            expected, got = (
                recorded(m, its, prefill_step_size=chunk)
                for m, its in zip((stock, model), seen, strict=True)
            )
            assert len(expected) == len(got)
            for a, b in zip(expected, got, strict=True):
                assert mx.array_equal(a, b)


def test_a_class_that_records_is_seen_too(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`__call__` of a class exchanged, as some libraries do it."""
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40)
    with stream(model):
        foreign = ForeignModules(model)
        assert not foreign.any()
        block = type(model.layers[-1].mlp)
        real = block.__call__
        monkeypatch.setattr(block, "__call__", lambda self, x: real(self, x))
        assert foreign.any()
        monkeypatch.undo()
        assert not foreign.any()


def test_mlx_lms_own_modules_are_not_foreign(checkpoint: Callable[..., Path]) -> None:
    """Adapters of the trunk may come after the load, and cost no speed."""
    from mlx_lm.tuner.lora import LoRALinear

    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40)
    with stream(model):
        foreign = ForeignModules(model)
        attention = model.layers[0].self_attn
        attention.q_proj = LoRALinear.from_base(attention.q_proj)
        assert not foreign.any()
        attention.act = nn.ReLU()
        assert not foreign.any()
        attention.note = lambda x: x
        assert foreign.any()
