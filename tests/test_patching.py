"""`load`, `stream` and `patch`: what is streamed, what is refused, what is left behind."""

from __future__ import annotations

import gc
import json
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, leftovers, load_streamed, smallest_cache, until_memory_is
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_streamexperts import (
    BudgetError,
    CheckpointError,
    ExpertStream,
    StreamConfig,
    StreamError,
    UnsupportedModelError,
    patch,
    plan,
    stream,
)
from mlx_streamexperts._loading import patching
from mlx_streamexperts._loading.discover import discover
from mlx_streamexperts._loading.patching import for_this_thread

ORIGINAL = mlx_lm.utils.load_model
TOKENS = mx.array([[3, 1, 4, 1, 5]])


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def test_experts_are_discovered_planned_and_streamed(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    config = replace(QUIET, cache="200kB")
    found = discover(folder, config, {})  # nothing is evaluated
    assert [x.name for x in found.layers][-1] == "model.layers.2.mlp.switch_mlp"
    assert found.layers[0].tensors["gate_proj.weight"].stored.experts == found.layers[0].experts
    planned = found.plan(config)
    assert all(s < n for s, n in zip(planned.slots, planned.layer_experts, strict=True))
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(folder)
    assert stream(model).plan.slots == planned.slots
    assert model(TOKENS).shape == (1, 5, families.VOCAB)
    stream(model).close()


def test_patch_leaves_mlx_lm_exactly_as_found(checkpoint: Callable[..., Path]) -> None:
    before = {k: id(v) for k, v in vars(mlx_lm.utils).items()}
    patched = patch(cache="1GB", config=QUIET).install()
    assert mlx_lm.utils.load_model is not ORIGINAL
    patched.remove()
    patched.remove()  # once more does no harm
    assert {k: id(v) for k, v in vars(mlx_lm.utils).items()} == before
    model, _ = mlx_lm.utils.load_model(checkpoint("qwen3_moe"))
    with pytest.raises(UnsupportedModelError, match="not streamed"):
        stream(model)


def test_a_patch_that_is_installed_twice_is_removed_once() -> None:
    first, second = patch(cache="1GB"), patch(cache="2GB").install()
    try:
        assert patching._active() is second
        first.install()
        assert patching._active() is first
        second.install()
        second.install()
        assert patching._active() is second  # the last one
        second.remove()
        assert patching._active() is first
        with pytest.raises(StreamError, match="installed already"), first:
            pass  # its end would have removed what was installed before
        assert patching._active() is first
    finally:
        first.remove()
    assert mlx_lm.utils.load_model is ORIGINAL


def test_patches_nest_and_the_innermost_counts(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    with patch(cache="1GB", config=QUIET) as outer:
        with patch(cache="400kB", config=QUIET) as inner:
            mlx_lm.utils.load_model(folder)
        mlx_lm.utils.load_model(folder)
    assert [len(p.streams) for p in (outer, inner)] == [1, 1]
    assert inner.streams[0].plan.cache < outer.streams[0].plan.cache
    assert mlx_lm.utils.load_model is ORIGINAL


def test_patch_covers_modules_that_imported_load_model(checkpoint: Callable[..., Path]) -> None:
    globals()["load_model"] = ORIGINAL  # as `from mlx_lm.utils import load_model` does
    try:
        with patch(cache="1GB", config=QUIET):
            model, _ = globals()["load_model"](checkpoint("qwen3_moe"))
        assert stream(model).layers
        assert globals()["load_model"] is ORIGINAL
    finally:
        del globals()["load_model"]


def test_another_threads_load_is_left_alone_by_ours(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    found: list[bool] = []

    def plain_load() -> None:
        model, _ = mlx_lm.utils.load_model(folder)
        found.append(any(isinstance(m, SwitchGLU) for _, m in model.named_modules()))

    with for_this_thread(patch(cache="1GB", config=QUIET)):
        other = threading.Thread(target=plain_load)
        other.start()
        other.join()
    assert found == [True]


def test_stream_reports_and_resets(streamed: tuple[nn.Module, ExpertStream]) -> None:
    model, expert_stream = streamed
    assert stream(model) is expert_stream
    mx.eval(model(TOKENS))
    stats = expert_stream.stats()
    assert stats.cache.misses > 0
    assert stats.read.bytes == stats.cache.misses * expert_stream.layers[0].expert_bytes
    assert json.loads(json.dumps(stats.as_dict()))["hit_rate"] == stats.cache.hit_rate
    expert_stream.reset()
    assert expert_stream.stats().cache.misses == 0
    assert expert_stream.stats().read.bytes == 0


def test_experts_are_no_parameters(streamed: tuple[nn.Module, ExpertStream]) -> None:
    """Adapters, quantizers and savers that walk the model must not see slots."""
    model, expert_stream = streamed
    slots = expert_stream.plan.cache
    visible = sum(a.nbytes for _, a in mlx_lm.utils.tree_flatten(model.parameters()))
    assert visible == expert_stream.plan.trunk
    assert slots > 0
    assert not any("switch_mlp.gate_proj" in path for path, _ in model.named_modules())


def test_what_hangs_on_a_switch_stays_a_parameter(checkpoint: Callable[..., Path]) -> None:
    """muse_spark keeps a norm inside its expert module; it belongs to the trunk."""
    model = load_streamed(checkpoint("muse_spark"), 1 << 40)
    norms = [
        path
        for path, _ in mlx_lm.utils.tree_flatten(model.parameters())
        if path.endswith("experts.post_expert_norm.weight")
    ]
    assert len(norms) == len(stream(model).layers)


def test_close_frees_memory_files_and_threads(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    gc.collect()
    mx.clear_cache()
    before = leftovers()
    active = mx.get_active_memory()
    for _ in range(3):
        model = load_streamed(folder, 1 << 40)
        expert_stream = stream(model)
        expert_stream.resize(smallest_cache(expert_stream))
        mx.eval(model(TOKENS))
        expert_stream.close()
        expert_stream.close()
        with pytest.raises(StreamError, match="closed"):
            model(TOKENS)
        del model, expert_stream
    until_memory_is(active + 4096)
    assert not leftovers() - before


def test_a_collected_model_closes_its_stream(checkpoint: Callable[..., Path]) -> None:
    gc.collect()
    before = leftovers()
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40)
    assert leftovers() - before
    del model
    gc.collect()
    assert not leftovers() - before


def test_resize_to_too_little_changes_nothing(streamed: tuple[nn.Module, ExpertStream]) -> None:
    model, expert_stream = streamed
    slots = [x.cache.slots for x in expert_stream.layers]
    before = np.array(model(TOKENS))
    least = sum(n.minimum * n.expert_bytes for n in expert_stream.needs())
    with pytest.raises(BudgetError) as e:
        expert_stream.resize(least - 1)
    assert e.value.needed_bytes == least
    assert [x.cache.slots for x in expert_stream.layers] == slots
    assert np.array_equal(before, np.array(model(TOKENS)))


def test_memory_budget_error_names_a_budget_that_works(checkpoint: Callable[..., Path]) -> None:
    config = StreamConfig(progress=False, context_tokens=64, prefill_tokens=16)
    with pytest.raises(BudgetError, match="bytes") as e:
        plan(str(checkpoint("qwen3_moe")), memory=2000, config=config)
    made = plan(str(checkpoint("qwen3_moe")), memory=e.value.needed_bytes, config=config)
    assert made.memory == e.value.needed_bytes
    with pytest.raises(BudgetError):
        plan(str(checkpoint("qwen3_moe")), memory=e.value.needed_bytes - 1, config=config)


def test_plan_reads_and_allocates_nothing(checkpoint: Callable[..., Path]) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    made = plan(str(checkpoint("qwen3_moe")), cache="400kB")
    assert mx.get_active_memory() - before < 100_000
    assert made.cache <= 400_000 < made.experts
    assert made.trunk > 0
    assert "resident" in str(made)


def test_a_dense_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = dense_model(tmp_path / "dense")
    with patch(cache="1GB", config=QUIET), pytest.raises(UnsupportedModelError, match="llama"):
        mlx_lm.utils.load_model(folder)


def test_a_dense_companion_loads_beside_a_streamed_model(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    draft = dense_model(tmp_path / "dense")
    with patch(cache="1GB", config=QUIET) as patched:
        mlx_lm.utils.load_model(checkpoint("qwen3_moe"))
        model, _ = mlx_lm.utils.load_model(draft)
    assert len(patched.streams) == 1
    mx.eval(model(TOKENS))


def rewritten(
    source: Path, folder: Path, rewrite: Callable[[dict[str, mx.array]], None], shards: int = 1
) -> Path:
    """A copy whose tensors `rewrite` has changed, spread over shards at random."""
    shutil.copytree(source, folder)
    tensors: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(mx.load(str(file)))
        mx.eval(tensors)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    rewrite(tensors)
    names = list(tensors)
    random.Random(4).shuffle(names)
    for i in range(shards):
        part = {n: tensors[n] for n in names[i::shards]}
        mx.save_safetensors(str(folder / f"model-{i}.safetensors"), part)
    return folder


def one_by_one(tensors: dict[str, mx.array]) -> None:
    """As original checkpoints have them: each expert's tensors by themselves."""
    for name in [n for n in tensors if ".switch_mlp." in n]:
        for e, part in enumerate(tensors.pop(name)):
            tensors[name.replace("switch_mlp", f"experts.{e}")] = part


@pytest.mark.parametrize(
    ("family", "quantize"),
    [("qwen3_moe", None), ("deepseek_v3", None), ("deepseek_v3", families.FOUR_BITS)],
)
def test_experts_stored_one_by_one_are_streamed_as_they_are(
    family: str,
    quantize: families.Quantize | None,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """mlx-lm stacks them in memory while loading; their bytes are read from where they lie."""
    source = checkpoint(family, quantize=quantize)
    folder = rewritten(source, tmp_path / "model", one_by_one, shards=3)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = np.array(stock(TOKENS))
    gc.collect()
    before = mx.get_active_memory()
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        cache = smallest_cache(expert_stream)
        expert_stream.resize(cache)
        assert mx.get_active_memory() - before <= expert_stream.plan.trunk + cache + 65_536
        for _ in range(2):
            assert np.array_equal(np.array(model(TOKENS)), expected)
        assert expert_stream.stats().cache.misses > 0


def test_single_experts_that_differ_in_shape_are_an_error(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    def damage(tensors: dict[str, mx.array]) -> None:
        one_by_one(tensors)
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        tensors[name] = tensors[name][:-1]

    folder = rewritten(checkpoint("qwen3_moe", quantize=None), tmp_path / "model", damage)
    with pytest.raises(CheckpointError):
        load_streamed(folder, 1 << 30)


def test_fused_experts_stream_from_where_they_lie(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """mlx-lm would split their rows in memory while loading."""

    def fuse(tensors: dict[str, mx.array]) -> None:
        for name in [n for n in tensors if n.endswith("switch_mlp.gate_proj.weight")]:
            up = tensors.pop(name.replace("gate_proj", "up_proj"))
            down = tensors.pop(name.replace("gate_proj", "down_proj"))
            base = name.removesuffix("switch_mlp.gate_proj.weight") + "experts."
            tensors[base + "gate_up_proj"] = mx.concatenate([tensors.pop(name), up], axis=1)
            tensors[base + "down_proj"] = down

    source = checkpoint("qwen3_5_moe", quantize=None)
    folder = rewritten(source, tmp_path / "model", fuse)
    expected = np.array(mlx_lm.utils.load_model(folder)[0](TOKENS))
    with stream(model := load_streamed(folder, 1 << 40)) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        assert np.array_equal(np.array(model(TOKENS)), expected)
        assert expert_stream.stats().cache.misses > 0


def test_damage_is_found_before_anything_loads(copy: Path) -> None:
    shard = copy / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    before = mx.get_active_memory()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*truncated"):
        load_streamed(copy, 1 << 30)
    until_memory_is(before)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*missing"):
        load_streamed(copy, 1 << 30)


def test_expert_counts_that_disagree_are_an_error(copy: Path) -> None:
    for file in sorted(copy.glob("*.safetensors")):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        for name, table in tensors.items():
            if "layers.1.mlp.switch_mlp.up_proj" in name:
                tensors[name] = table[:-1]
        mx.eval(tensors)  # mlx 0.32.2 would read from the file while it writes it
        mx.save_safetensors(str(file), tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.switch_mlp\.up_proj"):
        load_streamed(copy, 1 << 30)


def test_a_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_streamed(tmp_path, 1 << 30)


def test_a_checkpoints_own_model_file_needs_trust(copy: Path) -> None:
    (copy / "custom.py").write_text("from mlx_lm.models.qwen3_moe import Model, ModelArgs\n")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_file": "custom.py"}))
    with patch(cache="400kB", config=QUIET):
        with pytest.raises(ValueError, match="trust_remote_code"):
            mlx_lm.utils.load_model(copy)
        model, _ = mlx_lm.utils.load_model(copy, trust_remote_code=True)
    stock, _ = mlx_lm.utils.load_model(copy, trust_remote_code=True)
    assert mx.array_equal(model(TOKENS), stock(TOKENS))


def dense_model(folder: Path) -> Path:
    """A tiny llama."""
    from mlx_lm.models.llama import Model, ModelArgs

    config = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64,
        "num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": families.VOCAB,
    }  # fmt: skip
    folder.mkdir()
    mlx_lm.utils.save_model(folder, Model(ModelArgs.from_dict(config)))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_adapters_on_the_trunk_work_and_on_experts_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder = checkpoint("qwen3_moe")
    settings = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    adapted: dict[str, Path] = {}
    for part in ("self_attn.q_proj", "mlp.switch_mlp.up_proj"):
        model, _ = mlx_lm.utils.load_model(folder)
        linear_to_lora_layers(model, 2, {**settings, "keys": [part]})
        trained = dict(mlx_lm.utils.tree_flatten(model.trainable_parameters()))
        weights = {k: mx.random.normal(v.shape) * 0.1 for k, v in trained.items() if "lora" in k}
        assert weights
        adapted[part] = tmp_path / part
        adapted[part].mkdir()
        mx.save_safetensors(str(adapted[part] / "adapters.safetensors"), weights)
        config = {"fine_tune_type": "lora", "num_layers": 2}
        config["lora_parameters"] = {**settings, "keys": [part]}
        (adapted[part] / "adapter_config.json").write_text(json.dumps(config))
    trunk, experts = (str(p) for p in adapted.values())
    stock = mlx_lm.utils.load_adapters(mlx_lm.utils.load_model(folder)[0], trunk)
    with patch(cache="400kB", config=QUIET):
        model = mlx_lm.utils.load_adapters(mlx_lm.utils.load_model(folder)[0], trunk)
        assert mx.array_equal(model(TOKENS), stock(TOKENS))
        with pytest.raises(UnsupportedModelError, match="up_proj"):
            mlx_lm.utils.load_adapters(mlx_lm.utils.load_model(folder)[0], experts)


def test_trace_records_every_routing_decision(
    streamed: tuple[nn.Module, ExpertStream], tmp_path: Path
) -> None:
    model, expert_stream = streamed
    file = tmp_path / "routing.jsonl"
    with expert_stream.trace(file):
        mx.eval(model(TOKENS))
        mx.eval(model(TOKENS[:, :1]))
        assert not file.exists()  # nothing half-written under its name
    mx.eval(model(TOKENS))
    head, *calls = map(json.loads, file.read_text().splitlines())
    assert head["layers"] == [x.name for x in expert_stream.layers]
    assert [c["layer"] for c in calls] == [0, 1, 0, 1]
    assert [len(c["experts"]) for c in calls] == [5, 5, 1, 1]
    assert all(0 <= e < head["experts"][0] for c in calls for row in c["experts"] for e in row)


def test_no_host_sync_where_all_experts_are_resident(checkpoint: Callable[..., Path]) -> None:
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40)
    mx.eval(model(TOKENS))
    stats = stream(model).stats()
    assert stats.resident_layers == len(stream(model).layers)
    assert (stats.calls, stats.seconds["sync"]) == (0, 0.0)
