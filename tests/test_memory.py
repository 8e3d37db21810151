"""A stated budget holds, at load and later; measured in a fresh process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from families import VOCAB

MEASURE = """
import gc, json, sys
import mlx.core as mx, mlx_lm.utils
import numpy as np
from mlx_streamexperts import StreamConfig, patch, stream
from mlx_streamexperts._osinfo import resident_bytes
folder, options, prompt = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
mx.eval(mx.zeros(1))
start = resident_bytes()
with patch(config=StreamConfig(progress=False, **options)):
    model, _ = mlx_lm.utils.load_model(folder)
plan = stream(model).plan
loaded, loaded_rss = mx.get_peak_memory(), resident_bytes() - start
from mlx_lm.models.cache import make_prompt_cache
cache = make_prompt_cache(model)
tokens = mx.array(np.random.default_rng(0).integers(0, VOCAB, prompt).tolist())[None]
for i in range(0, prompt, 256):  # as mlx_lm.generate does, in steps of --prefill-step-size
    model(tokens[:, i : i + 256], cache=cache)
    mx.eval([c.state for c in cache])
for _ in range(30):
    mx.eval(model(tokens[:, :1], cache=cache))
stats = stream(model).stats()
print(json.dumps({
    "trunk": plan.trunk, "cache": plan.cache, "experts": plan.experts, "loaded": loaded,
    "loaded_rss": loaded_rss, "peak": mx.get_peak_memory(), "misses": stats.cache.misses,
    "rss": resident_bytes() - start, "reusable": mx.get_cache_memory(),
}))
""".replace("VOCAB", str(VOCAB))


def measure(folder: Path, prompt: int, **options: object) -> dict[str, int]:
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), json.dumps(options), str(prompt)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(out.stdout)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of about 200 MB, nearly all of it experts."""
    import families

    config = families.FAMILIES["qwen3_moe"]
    saved = dict(config)
    config.update(hidden_size=256, moe_intermediate_size=256, num_experts=64)
    try:
        return families.build("qwen3_moe", tmp_path_factory.mktemp("big"), quantize=None)
    finally:
        config.clear()
        config.update(saved)


def test_loading_never_materializes_an_expert_table(big: Path) -> None:
    """Peak <= trunk + cache + 5 % on a checkpoint ten times the budget."""
    size = sum(f.stat().st_size for f in big.glob("*.safetensors"))
    m = measure(big, prompt=1, cache=size // 12)
    assert m["trunk"] + m["cache"] < size / 10
    assert m["loaded"] <= 1.05 * (m["trunk"] + m["cache"])
    # RSS also counts interpreter state that loading pulls in; a table would be several times that.
    assert m["loaded_rss"] <= m["trunk"] + m["cache"] + (25 << 20)


@pytest.mark.parametrize("prompt", [3, 700])
def test_the_memory_promise_holds_through_prefill_and_decode(big: Path, prompt: int) -> None:
    memory = 96 << 20
    m = measure(big, prompt, memory=memory, prefill_tokens=256, context_tokens=1024)
    assert m["misses"] > 0
    assert m["cache"] < m["experts"]
    assert m["peak"] <= memory
    assert m["rss"] <= memory + (40 << 20)  # code and interpreter besides MLX's memory
    assert m["peak"] + m["reusable"] <= memory + (16 << 20)


def test_the_promise_is_used(big: Path) -> None:
    """More memory means more slots, until everything is resident."""
    sizes = [
        measure(big, 3, memory=n << 20, prefill_tokens=64, context_tokens=256)["cache"]
        for n in (50, 80, 2000)
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    m = measure(big, 3, memory=2000 << 20)
    assert m["cache"] == m["experts"]
    assert m["misses"] == 0


def test_shrinking_gives_the_memory_back(big: Path) -> None:
    """At once: no idle thread of the reader holds on to an old bank."""
    from conftest import all_experts, load_streamed

    from mlx_streamexperts import stream

    gc.collect()
    before = mx.get_active_memory()
    model = load_streamed(big, 1 << 40)
    with stream(model) as expert_stream:
        whole, trunk = all_experts(expert_stream), expert_stream.plan.trunk
        for size in (whole // 4, whole, whole // 8):
            expert_stream.resize(size)
            assert mx.get_active_memory() - before <= trunk + size + (1 << 20)


def test_resizing_stays_within_the_larger_size(big: Path) -> None:
    from conftest import all_experts, load_streamed

    from mlx_streamexperts import stream

    model = load_streamed(big, 40 << 20)
    with stream(model) as expert_stream:
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        expert_stream.resize(20 << 20)
        expert_stream.resize(60 << 20)
        assert mx.get_peak_memory() <= base + (20 << 20) + (1 << 20)
        assert all_experts(expert_stream) > 60 << 20
