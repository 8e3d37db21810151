"""The tiny checkpoints are what they claim: stock mlx-lm loads and runs them, and they route."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.models
import numpy as np
import pytest
from families import (
    FAMILIES,
    FOUR_BITS,
    METAL_FAMILIES,
    NATIVE,
    NOT_BUILT,
    VOCAB,
    Quantize,
    build,
    run,
    switches,
    token_stream,
    unsupported,
)
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model

ALL = {**METAL_FAMILIES, **FAMILIES}
GLOBAL_SCALE = Quantize(mode="nvfp4", global_scale=True)  # everywhere, not only in experts


# What is tested here is mlx-lm itself; the package's own tests run on older ones too.
pytestmark = pytest.mark.skipif(
    tuple(int(n) for n in mlx_lm.__version__.split(".")[:3]) < (0, 32, 2),
    reason="the list of families is that of mlx-lm 0.32.2: older ones lack some, and nvfp4's scale",
)

Loaded = Callable[[str], tuple[Path, nn.Module]]


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A family's checkpoint and the stock model loaded from it, each made once a session."""

    @functools.cache
    def load(family: str) -> tuple[Path, nn.Module]:
        quantize = NATIVE.get(family, FOUR_BITS)
        folder = build(family, tmp_path_factory.mktemp(family), quantize=quantize)
        return folder, load_model(folder)[0]

    return load


def _written(folder: Path) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        part = mx.load(str(file))
        assert isinstance(part, dict)
        weights.update(part)
    return weights


def _same(a: mx.array, b: mx.array) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[np.ndarray]]:
    """The rows of indices [N, K] that each expert module is called with, by its id."""
    calls: dict[int, list[np.ndarray]] = {}
    for switch in (SwitchGLU, SwitchMLP):
        stock = switch.__call__

        def record(self: Any, x: mx.array, indices: mx.array, stock: Any = stock) -> mx.array:
            calls.setdefault(id(self), []).append(np.array(indices).reshape(-1, indices.shape[-1]))
            return stock(self, x, indices)

        monkeypatch.setattr(switch, "__call__", record)
    return calls


@pytest.mark.parametrize("family", ALL)
def test_stock_mlx_lm_loads_every_tensor_unchanged(family: str, loaded: Loaded) -> None:
    folder, model = loaded(family)
    written = _written(folder)
    params: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    assert params.keys() == written.keys()
    assert not [name for name in params if not _same(params[name], written[name])]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6


@pytest.mark.parametrize("family", ALL)
def test_the_experts_of_every_layer_are_spread_over_the_shards(family: str, loaded: Loaded) -> None:
    folder, model = loaded(family)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(switches(model)) >= 2
    for path in switches(model):
        parts = {file for name, file in index.items() if name.startswith(f"{path}.")}
        assert len(parts) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_routes_and_repeats(
    family: str, loaded: Loaded, routed: dict[int, list[np.ndarray]]
) -> None:
    _, model = loaded(family)
    tokens = token_stream(VOCAB, 28, seed=1)
    first, second = (run(model, tokens, prefill=24) for _ in range(2))
    assert [logits.shape for logits in first] == [(24, VOCAB)] + [(1, VOCAB)] * 4
    assert all(np.isfinite(logits).all() for logits in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    for switch in switches(model).values():
        calls = routed[id(switch)]
        assert len(calls) == 2 * 5  # once per forward pass
        decoded = {tuple(sorted(rows[0])) for rows in calls[1:5]}
        prefilled = {tuple(sorted(row)) for row in calls[0]}
        assert len(decoded) >= 2
        assert len(prefilled) >= 4


def test_every_family_of_mlx_lm_is_here_or_says_why_not(loaded: Loaded) -> None:
    models = Path(mlx_lm.models.__path__[0])
    has_experts = {
        file.stem
        for file in models.glob("*.py")
        if re.search(r"\bSwitch(GLU|MLP)\(", file.read_text()) and file.stem != "switch_layers"
    }
    covered = set()
    for family in ALL:
        _, model = loaded(family)
        modules = dict(model.named_modules())
        for path in switches(model):
            owner = modules[path.rpartition(".")[0]]
            covered.add(type(owner).__module__.rpartition(".")[2])
    assert has_experts - covered - NOT_BUILT.keys() == set()
    assert not NOT_BUILT.keys() & FAMILIES.keys()


AFFINE = [Quantize(bits=bits, group_size=size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)]
OTHERS = [Quantize(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        pytest.param(family, q, marks=[pytest.mark.full] if q in AFFINE and i != n % 3 else [])
        for i, family in enumerate(("qwen3_moe", "gpt_oss", "nemotron_h"))
        for n, q in enumerate([None, *AFFINE, *OTHERS, GLOBAL_SCALE])
    ],
    ids=lambda q: q if isinstance(q, str) else str(q and q.params()),
)
def test_every_quantization_loads(family: str, quantize: Quantize | None, tmp_path: Path) -> None:
    model, _ = load_model(build(family, tmp_path, quantize=quantize))
    for switch in switches(model).values():
        for projection in switch.children().values():
            if quantize is None:
                assert not isinstance(projection, QuantizedSwitchLinear)
            elif isinstance(projection, QuantizedSwitchLinear):
                got = (projection.group_size, projection.bits, projection.mode)
                assert got == tuple(quantize.params().values())
                assert (projection.get("global_scale") is not None) == quantize.global_scale
    if unsupported(family, mx.float32, quantize) is None:
        assert np.isfinite(run(model, token_stream(VOCAB, 8, seed=2), prefill=7)[-1]).all()


def test_projections_of_one_expert_can_differ(tmp_path: Path) -> None:
    quantize = Quantize(
        per_projection={
            "gate_proj": {"bits": 3},
            "up_proj": None,
            "down_proj": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        },
        experts_only=True,
    )
    folder = build("qwen3_moe", tmp_path, quantize=quantize)
    model, config = load_model(folder)
    assert len(config["quantization"]) == 3 + 2 * 2  # the default, two projections, two layers
    for switch in switches(model).values():
        assert (switch.gate_proj.bits, switch.gate_proj.mode) == (3, "affine")
        assert (switch.down_proj.bits, switch.down_proj.mode) == (4, "mxfp4")
        assert not isinstance(switch.up_proj, QuantizedSwitchLinear)
    assert not any(isinstance(m, nn.QuantizedLinear) for m in model.modules())
    assert np.isfinite(run(model, token_stream(VOCAB, 8, seed=2), prefill=7)[-1]).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_checkpoint_keeps_in_float32_what_its_family_does(
    dtype: mx.Dtype, tmp_path: Path
) -> None:
    folder = build("deepseek_v3", tmp_path, dtype=dtype)
    floating = {k: v for k, v in _written(folder).items() if mx.issubdtype(v.dtype, mx.floating)}
    float32 = {name for name, w in floating.items() if w.dtype == mx.float32}
    assert float32 == {name for name in floating if "e_score_correction_bias" in name}
    assert {w.dtype for w in floating.values()} == {dtype, mx.float32}
    assert np.isfinite(run(load_model(folder)[0], token_stream(VOCAB, 8, seed=2), 7)[-1]).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_5_moe"])
def test_a_seed_decides_every_bit(family: str, tmp_path: Path) -> None:
    a, b, c = (_written(build(family, tmp_path / str(i), seed=i // 2)) for i in range(3))
    assert all(_same(a[name], b[name]) for name in a)
    assert not any(_same(a[name], c[name]) for name in a if name.endswith(".weight"))


def test_a_token_never_follows_itself() -> None:
    tokens = token_stream(50, 1000, seed=3)
    assert tokens.min() >= 0 and tokens.max() < 50
    assert (tokens[1:] != tokens[:-1]).all()
    assert len(set(tokens.tolist())) == 50
