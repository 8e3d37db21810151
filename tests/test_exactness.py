"""The streamed model gives the same bits as mlx-lm holding the same weights.

On the CPU backend every (token, expert) row is a matmul of its own, so prefill is bit-identical
too, however the rows are divided into waves. A GPU may choose another kernel for 64 and more sorted
rows, by the ratio of rows to experts: there prefill is held to `PREFILL_BOUND` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, all_experts, assert_same, demo_tokens, load_streamed, smallest_cache
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import StreamConfig, StreamStats, demo_model, stream
from mlx_streamexperts._analysis.exactness import prefill_bound, prefill_difference
from mlx_streamexperts._experts import cpu_streams as lanes
from mlx_streamexperts._experts.cpu_streams import CpuStreams
from mlx_streamexperts._experts.layer import ExpertLayer
from mlx_streamexperts._experts.split import RowRule
from mlx_streamexperts._loading.discover import discover

HEADLINE = (
    "qwen3_moe", "qwen3_5_moe", "kimi_k25", "deepseek_v3", "gpt_oss", "mixtral", "nemotron_h",
    "gemma4", "llama4", "glm4_moe", "granitemoe",
)  # fmt: skip
OTHERS = tuple(f for f in families.FAMILIES if f not in HEADLINE)
ON_CPU = mx.default_device() == mx.cpu
# From 64 (token, expert) rows on mlx-lm sorts them: short prompts stay below on a GPU.
PREFILL = 24 if ON_CPU else 7


@pytest.fixture(autouse=True)
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU every call is shared out over three cores, however small it is."""
    monkeypatch.setattr(lanes, "usable_cores", lambda: 3)
    monkeypatch.setattr(lanes, "_LEAST_BYTES", 1)


def assert_prefill(expected: mx.array, got: mx.array, what: str) -> None:
    """Equal bits on the CPU, else within the stated bound."""
    assert prefill_difference(expected, got) <= prefill_bound(expected.dtype), what


def compare(
    folder: Path, steps: int, shares: tuple[float, ...], config: StreamConfig = QUIET
) -> None:
    """Prefill and `steps` teacher-forced decode steps, streamed at several cache sizes."""
    tokens = families.token_stream(families.VOCAB, PREFILL + steps, seed=3)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, PREFILL)
    model = load_streamed(folder, 1 << 40, config)
    with stream(model) as expert_stream:
        whole, least = all_experts(expert_stream), smallest_cache(expert_stream)
        for share in shares:
            expert_stream.resize(max(least, int(share * whole)))
            expert_stream.reset()
            got = families.run(model, tokens, PREFILL)
            stats = expert_stream.stats()
            assert_same(expected, got, f"{folder.name} at {share:.0%}")
            assert (stats.cache.misses > 0) == (share < 1)
            assert (stats.resident_layers == len(expert_stream.layers)) == (share == 1)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", HEADLINE)
def test_decode_and_prefill_are_bit_identical_at_every_cache_size(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    shares = (0.0, 0.5, 0.9, 1.0) if family == HEADLINE[0] else (0.0, 0.7, 1.0)
    compare(checkpoint(family), steps=110, shares=shares)


@pytest.mark.usefixtures("compiled")
def test_the_shipped_model_is_bit_identical_at_every_cache_size() -> None:
    """A trained router, on real text of every topic: 110 decode steps after a prompt."""
    folder = demo_model()
    tokens = demo_tokens(PREFILL + 110)
    assert len(tokens) == PREFILL + 110
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, PREFILL)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        whole, least = all_experts(expert_stream), smallest_cache(expert_stream)
        for size in (least // 4, least, whole // 2, whole):
            expert_stream.resize(size)
            expert_stream.reset()
            assert_same(expected, families.run(model, tokens, PREFILL), f"{size} bytes")
            assert (expert_stream.stats().cache.misses > 0) == (size < whole)


@pytest.mark.parametrize("family", OTHERS)
def test_every_other_family_is_bit_identical(family: str, checkpoint: Callable[..., Path]) -> None:
    compare(checkpoint(family), steps=20, shares=(0.0, 0.7, 1.0))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_every_dtype_and_bit_width(
    dtype: mx.Dtype, bits: int, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint("qwen3_moe", dtype=dtype, quantize=families.Quantize(bits=bits))
    compare(folder, steps=12, shares=(0.3,))


@pytest.mark.parametrize(
    "quantize",
    [
        families.Quantize(mode="mxfp4"),
        families.Quantize(mode="mxfp8"),
        families.Quantize(mode="nvfp4"),
        families.Quantize(bits=2),
        families.Quantize(bits=5, group_size=32),
        families.Quantize(
            group_size=32,
            per_projection={
                "gate_proj": {"bits": 3, "group_size": 64},
                "up_proj": {"bits": 8, "group_size": 32},
                "down_proj": {"bits": 6, "group_size": 32},
            },
        ),
        families.Quantize(per_projection={"down_proj": None}),
        None,
    ],
    ids=["mxfp4", "mxfp8", "nvfp4", "2bit", "5bit", "mixed", "part-unquantized", "unquantized"],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_every_mode_and_mixture_of_projections(
    family: str, quantize: families.Quantize | None, checkpoint: Callable[..., Path]
) -> None:
    if reason := families.unsupported(family, mx.float32, quantize):
        pytest.skip(f"stock mlx-lm cannot run it on this device: {reason}")
    compare(checkpoint(family, quantize=quantize), steps=12, shares=(0.4,))


WIDE = 128  # a group of 128 needs rows of as many


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**families.FAMILIES["qwen3_moe"], "hidden_size": WIDE}
    monkeypatch.setitem(families.FAMILIES, "qwen3_moe", config)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_bit_width_in_every_group_size(bits: int, wide: None, tmp_path: Path) -> None:
    groups = {"gate_proj": 32, "up_proj": 64, "down_proj": 128}
    own = {part: {"bits": bits, "group_size": size} for part, size in groups.items()}
    folder = families.build("qwen3_moe", tmp_path, quantize=families.Quantize(per_projection=own))
    stored = discover(folder, QUIET, {}).layers[0].tensors
    for part, size in groups.items():
        assert stored[f"{part}.weight"].slot.shape[-1] == WIDE * bits // 32
        assert stored[f"{part}.scales"].slot.shape[-1] == WIDE // size
    compare(folder, steps=12, shares=(0.4,))


def test_paths_of_one_model_quantized_differently(wide: None, tmp_path: Path) -> None:
    """As mlx-lm's mixed recipes do: more bits, or none, for one projection of one layer."""
    first, second = (f"model.layers.{i}.mlp.switch_mlp." for i in (1, 2))
    own = {
        first + "down_proj": {"bits": 6, "group_size": 128},
        first + "gate_proj": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        second + "down_proj": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
        second + "gate_proj": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
        second + "up_proj": None,
    }
    quantize = families.Quantize(bits=3, group_size=32, per_projection=own)
    folder = families.build("qwen3_moe", tmp_path, quantize=quantize)
    one, two = discover(folder, QUIET, {}).layers
    assert one.expert_bytes != two.expert_bytes
    compare(folder, steps=12, shares=(0.0, 0.4))


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(not families.HAS_GLOBAL_SCALE, reason="this mlx-lm has none")
def test_nvfp4_with_a_scale_for_each_expert(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if ON_CPU:  # its kernels do not take the scale; which is a factor of each row's result
        monkeypatch.setattr(mx, "gather_qmm", scaled_afterwards(mx.gather_qmm))
    folder = checkpoint("qwen3_moe", quantize=families.GLOBAL_SCALE)
    for layer in discover(folder, QUIET, {}).layers:
        scale = layer.tensors["up_proj.global_scale"]
        assert (scale.slot.shape, scale.stored.row_bytes) == ((), 4)
    compare(folder, steps=30, shares=(0.0, 0.5, 1.0))


def scaled_afterwards(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def gather_qmm(
        *args: mx.array, rhs_indices: mx.array, global_scale: mx.array | None, **options: object
    ) -> mx.array:
        y = stock(*args, rhs_indices=rhs_indices, **options)  # [..., 1, D]
        if global_scale is None:
            return y
        return y * global_scale[rhs_indices][..., None, None].astype(y.dtype)

    return gather_qmm


@pytest.mark.parametrize("option", ["overlap", "policy", "in_place", "bypass_page_cache"])
def test_no_option_changes_a_bit(option: str, checkpoint: Callable[..., Path]) -> None:
    choices = {
        "overlap": ("on", "off"),
        "policy": ("lru", "s3fifo"),
        "in_place": ("off",),
        "bypass_page_cache": ("on", "off"),
    }
    for value in choices[option]:
        config = StreamConfig(progress=False, **{option: value})
        compare(checkpoint("qwen3_moe"), 30, (0.0, 0.5), config)


def rows_of_calls(layers: Sequence[ExpertLayer], rule: RowRule) -> list[int]:
    """Have layers follow a rule, and note how many rows each of their kernel calls has."""
    rows: list[int] = []
    for layer in layers:
        layer._rows, layer._cpu_streams = rule, CpuStreams(1)  # as on a GPU

        def counted(
            x: mx.array, slots: mx.array, run: Callable[..., mx.array] = layer.switch
        ) -> mx.array:
            rows.append(slots.size)
            return run(x, slots)

        layer.switch = counted
    return rows


def rows_while_misses_overlap(folder: Path, rule: RowRule) -> tuple[list[int], StreamStats]:
    """Rows of each kernel call while experts run as others are read; the bits are stock's."""
    tokens = families.token_stream(families.VOCAB, 60, seed=11)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, prefill=4)
    model = load_streamed(folder, 1 << 40, StreamConfig(progress=False, overlap="on"))
    with stream(model) as expert_stream:
        # Enough for a token, not for the prompt: that goes in waves.
        expert_stream._open((families.TOP_K + 1,) * len(expert_stream.layers))
        rows = rows_of_calls(expert_stream.layers, rule)
        assert_same(expected, families.run(model, tokens, prefill=4), folder.name)
        assert expert_stream.stats().overlapped > 10
        return rows, expert_stream.stats()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_row_count_is_kept_for_backends_that_choose_kernels_by_it(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    """As on a GPU: every kernel sees as many rows as stock's, and the results are the same bits."""
    folder = checkpoint(family)
    rows, stats = rows_while_misses_overlap(folder, RowRule(count=True, padded=True))
    assert stats.waves > 0
    top_k = min(rows)
    assert set(rows) == {top_k, 4 * top_k}


def test_on_metal_a_part_of_a_token_has_only_its_own_rows(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels compute unsorted rows one by one, so stand-in rows would be work for nothing."""
    folder = checkpoint("qwen3_moe")
    model = load_streamed(folder, 1 << 40, StreamConfig(progress=False, overlap="on"))
    with stream(model) as expert_stream, monkeypatch.context() as metal:
        metal.setattr(mx, "default_device", lambda: mx.gpu)
        metal.setattr(mx.metal, "is_available", lambda: True)
        rule = RowRule.of(expert_stream.layers[0].switch)
    assert rule == RowRule(count=True, ratio=True, padded=False)  # quantized, of mlx-lm
    rows, _ = rows_while_misses_overlap(folder, rule)
    assert min(rows) < families.TOP_K


@pytest.mark.parametrize("quantized", [False, True])
def test_kernels_of_other_modules_are_not_known(
    quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mlx-vlm's: its own class, with Metal kernels for a few rows."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    linear = nn.Module()
    linear.weight = mx.zeros((2, 4, 4))
    if quantized:
        linear.scales = mx.zeros((2, 4, 1))
    switch = nn.Module()
    switch.up_proj = linear
    assert RowRule.of(switch) == RowRule(count=True, ratio=quantized, padded=True)


@pytest.fixture
def many_experts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Forty of them a layer, four a token."""
    config = {**families.FAMILIES["qwen3_moe"], "num_experts": 40, "num_experts_per_tok": 4}
    monkeypatch.setitem(families.FAMILIES, "qwen3_moe", config)
    return families.build("qwen3_moe", tmp_path)


@pytest.mark.parametrize("slots", [1, 3, 25])
@pytest.mark.parametrize("length", [30, 200])
@pytest.mark.parametrize("rule", [RowRule(True), RowRule(True, True)], ids=["count", "ratio"])
def test_parts_of_a_prompt_are_run_by_the_kernels_that_the_whole_would_have(
    rule: RowRule, length: int, slots: int, many_experts: Path
) -> None:
    """A GPU sorts, and chooses, by how many rows a call has, or has for each expert of its table.

    On Metal the limit is 4 rows for each: stock has 3 with 30 tokens, and 20 with 200.
    """
    folder = many_experts
    tokens = mx.array(families.token_stream(families.VOCAB, length, seed=5))[None]
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = stock(tokens)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream._open((slots,) * len(expert_stream.layers))
        sizes = rows_of_calls(expert_stream.layers, rule)
        assert_same([expected], [model(tokens)], f"{slots} slots")
        assert len(sizes) > len(expert_stream.layers)
    if rule.ratio and length == 30:
        assert not [n for n in sizes if n >= 64 and n // slots >= 4]
    else:
        assert min(sizes) >= 64
        assert not rule.ratio or min(sizes) // slots >= 4


def test_a_prompt_whose_experts_are_all_there_is_divided_where_it_has_to_be(
    many_experts: Path,
) -> None:
    """With fewer slots than experts there are more rows for each than stock has."""
    folder = many_experts
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        layer = expert_stream.layers[0]
        x = mx.random.normal((1, 30, families.HIDDEN))
        chosen = mx.array(np.tile(np.arange(4, dtype=np.uint32), (1, 30, 1)))
        expected = dict(stock.named_modules())[layer.name](x, chosen)
        expert_stream._open((4,) * len(expert_stream.layers))
        sizes = rows_of_calls([layer], RowRule(True, True))
        assert_same([expected], [layer(x, chosen)], "divided")
    assert len(sizes) > 1 and sum(sizes) == chosen.size


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("length", [1, 7, 40, 300])
def test_prefill_in_waves_at_any_length(length: int, checkpoint: Callable[..., Path]) -> None:
    # From 64 indices on, mlx-lm sorts rows by expert: both sides of that are covered.
    folder = checkpoint("gpt_oss", dtype=mx.bfloat16)
    tokens = mx.array(families.token_stream(families.VOCAB, length, seed=5))[None]
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = stock(tokens)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        for slots in (1, 2, 3, 5):
            expert_stream._open((slots,) * len(expert_stream.layers))
            expert_stream.reset()
            assert_prefill(expected, model(tokens), f"{slots} slots")
            stats = expert_stream.stats()
            # Each expert is read at most once per call, however many waves it takes.
            assert stats.cache.misses <= sum(x.experts for x in expert_stream.layers)
            assert stats.waves > 0 or length == 1


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_decode_with_fewer_slots_than_one_token_has_experts(
    family: str, slots: int, checkpoint: Callable[..., Path]
) -> None:
    """A budget too small for one token's experts is slow, not wrong."""
    folder = checkpoint(family)
    tokens = families.token_stream(families.VOCAB, 30, seed=17)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, prefill=5)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        least = sum(n.minimum * n.expert_bytes for n in expert_stream.needs())
        expert_stream.resize(least)
        assert {x.cache.slots for x in expert_stream.layers} == {2}
        expert_stream._open((slots,) * len(expert_stream.layers))
        assert_same(expected, families.run(model, tokens, prefill=5), family)


def test_batches_share_reads(checkpoint: Callable[..., Path]) -> None:
    """Sequences of one batch that want the same expert cost one read."""
    folder = checkpoint("qwen3_moe")
    batch = mx.array(np.stack([families.token_stream(families.VOCAB, 6, s) for s in range(4)]))
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.resize(all_experts(expert_stream) // 2)
        caches = [make_prompt_cache(m) for m in (stock, model)]
        for step in range(batch.shape[1]):
            a, b = (
                m(batch[:, step : step + 1], cache=c)
                for m, c in zip((stock, model), caches, strict=True)
            )
            assert mx.array_equal(a, b), f"step {step}"
        per_call = max(x.experts for x in expert_stream.layers)
        stats = expert_stream.stats()
        assert stats.cache.hits + stats.cache.misses <= stats.calls * per_call
