"""mlx-vlm's families stream with the bits of its own loader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import families as lm
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import originals
import pytest
from mlx.utils import tree_flatten
from vlm_families import (
    FAMILIES,
    METAL_FAMILIES,
    TEXT,
    construct,
    make_vlm_checkpoint,
    run,
    switches,
)

from mlx_streamexperts import (
    CheckpointError,
    StreamConfig,
    UnsupportedModelError,
    patch,
    plan,
    stream,
)
from mlx_streamexperts._experts import cpu_streams
from mlx_streamexperts._experts.split import RowRule
from mlx_streamexperts._io.checkpoint import INDEX
from mlx_streamexperts._loading import discover
from mlx_streamexperts._loading.combinations import token_rows
from mlx_streamexperts._loading.vlm import decode_copies
from mlx_streamexperts._memory import model_graph

utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
make_prompt_cache = pytest.importorskip("mlx_vlm.models.cache").make_prompt_cache

pytestmark = pytest.mark.usefixtures("not_compiled")

# Families whose experts cannot be streamed, and what the refusal names.
REFUSED = {
    "moondream3": "MoEMLP",  # chooses experts itself
    "zaya1_vl": "ZayaSwitchMLP",  # takes what to do with the result as well
}
TOKENS = lm.token_stream(TEXT, 24, 0)


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Footprints from the configuration: tracing 80 families would take minutes."""
    monkeypatch.setattr(
        discover, "measure", lambda _, switches, config: model_graph._estimate(switches, config)
    )


KINDS = {"float32": {}, "4": {"bits": 4}, "mixed": {"bits": "mixed"}}
KINDS["bfloat16"] = {"bits": 4, "dtype": mx.bfloat16}
# Each family has three kinds here, and all in benchmarks/vlm_exactness.py, which has caches from
# the fewest experts to all. Only the first family of each class of experts needs no --full for it.
SAMPLE: list[Any] = []
_classes: set[tuple[str, ...]] = set()
for _i, _family in enumerate(f for f in FAMILIES if f not in METAL_FAMILIES):
    _known = FAMILIES[_family].switches in _classes
    _classes.add(FAMILIES[_family].switches)
    for _j, _kind in enumerate(("float32", "4", ("mixed", "bfloat16")[_i % 2])):
        _marks = [pytest.mark.full] if _known and _j != _i // 2 % 3 else []
        SAMPLE.append(pytest.param(_family, _kind, 2 + 2 * ((_i + _j) % 3), marks=_marks))


@pytest.mark.parametrize(("family", "kind", "slots"), SAMPLE)
def test_a_family_streams_with_misses_bit_by_bit(
    family: str, kind: str, slots: int, tmp_path: Path, estimated: None
) -> None:
    folder = make_vlm_checkpoint(tmp_path / family, family, **KINDS[kind])
    stock = utils.load_model(folder)
    config = StreamConfig(progress=False)
    with patch(cache="100MB", config=config) as patched:
        try:
            model = utils.load_model(folder)
        except UnsupportedModelError as e:
            assert family in REFUSED
            assert REFUSED[family] in str(e)
            return
    assert family not in REFUSED
    expert_stream = patched.streams[0]
    layers = expert_stream.layers
    needs = expert_stream.needs()
    assert all(max(slots, n.minimum) < n.experts for n in needs)
    expert_stream.resize(sum(max(slots, n.minimum) * n.expert_bytes for n in needs))
    for got, expected in zip(run(model, TOKENS, 20), run(stock, TOKENS, 20), strict=True):
        assert np.array_equal(got, expected)
    assert expert_stream.stats().cache.misses > 0
    modules, plain = dict(model.named_modules()), switches(stock)
    for layer in layers:
        shown = [name for name in plain[layer.name] if getattr(modules[layer.name], name, None)]
        assert not shown  # mlx-vlm would call them with numbers of experts


def test_a_folder_of_mlx_vlms_own_offloading_is_refused_by_name(tmp_path: Path) -> None:
    repack = pytest.importorskip("mlx_vlm.moe_offload").repack
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen3_moe")
    repack(str(folder), str(tmp_path / "repacked"))
    with pytest.raises(UnsupportedModelError, match="mlx-vlm's own offloading"):
        plan(tmp_path / "repacked", cache="1GB")


@pytest.mark.parametrize("how", ["index", "no index"])
def test_the_files_that_mlx_vlm_reads_count_whatever_their_names(
    how: str, tmp_path: Path, estimated: None
) -> None:
    """Those that its index names, and without an index every safetensors file."""
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen3_5_moe")
    if how == "index":
        for file in folder.glob("model-*"):  # experts are in both
            file.rename(folder / file.name.replace("model-", "part-"))
        index = folder / INDEX
        index.write_text(index.read_text().replace("model-0", "part-0"))
    else:
        (folder / INDEX).unlink()  # mlx-vlm leaves such tensors out
        mx.save_safetensors(str(folder / "mtp.safetensors"), {"mtp.fc.weight": mx.zeros((4, 4))})
    stock = utils.load_model(folder)
    config = StreamConfig(progress=False, loader="mlx-vlm")
    with patch(cache="100MB", config=config) as patched:
        model = utils.load_model(folder)
    expert_stream = patched.streams[0]
    expert_stream.resize(sum(4 * n.expert_bytes for n in expert_stream.needs()))
    for got, expected in zip(run(model, TOKENS, 20), run(stock, TOKENS, 20), strict=True):
        assert np.array_equal(got, expected)
    assert expert_stream.stats().cache.misses > 0
    if how == "index":
        (folder / "part-00001-of-00002.safetensors").rename(tmp_path / "part.safetensors")
        index.write_text(index.read_text().replace("part-00001-of-00002", "../part"))
        with pytest.raises(CheckpointError, match="is not in this folder"):
            plan(folder, cache="1GB", config=config)


def tuned(folder: Path, change: Callable[[str, mx.array], mx.array]) -> Path:
    """Change arrays of a checkpoint where they lie."""
    for file in folder.glob("*.safetensors"):
        arrays = cast(dict[str, mx.array], mx.load(str(file)))
        mx.save_safetensors(str(file), {k: change(k, a) for k, a in arrays.items()})
    return folder


@pytest.mark.parametrize("ones", [True, False])
def test_inklings_scales_of_each_expert_follow_it_into_its_slot(ones: bool, tmp_path: Path) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "inkling", bits=4)
    if ones:  # stock then leaves them out, and so do we
        tuned(folder, lambda k, a: mx.ones_like(a) if k.endswith(("e_scale", "t_scale")) else a)
    stock = utils.load_model(folder)
    config = StreamConfig(progress=False, in_place="off" if ones else "auto")
    with patch(cache="100KB", config=config) as patched:
        model = utils.load_model(folder)
    expert_stream = patched.streams[0]
    layer = expert_stream.layers[0]
    assert list(layer.slots.small) == ([] if ones else ["gate_scale", "out_scale"])
    for cache in (2 * sum(2 * x.expert_bytes for x in expert_stream.layers), "100MB"):
        expert_stream.resize(cache)
        assert layer.resident == (cache == "100MB")
        for got, expected in zip(run(model, TOKENS, 12, 5), run(stock, TOKENS, 12, 5), strict=True):
            assert np.array_equal(got, expected)
    with pytest.raises(UnsupportedModelError):
        model.set_dtype(mx.bfloat16)


def test_the_shared_expert_of_minimax_m3_stays_and_is_never_counted(tmp_path: Path) -> None:
    stock = utils.load_model(folder := make_vlm_checkpoint(tmp_path / "m", "minimax_m3"))
    config = StreamConfig(progress=False)
    with patch(cache="100MB", config=config):
        model = utils.load_model(folder)
    expert_stream = stream(model)
    layer, shared = expert_stream.layers[0], lm.EXPERTS
    assert layer.experts == lm.EXPERTS + 1
    expert_stream.resize(sum(n.minimum * n.expert_bytes for n in expert_stream.needs()))
    assert layer.cache.slots == 3  # two in turn, and the shared one
    slot, before = layer.cache.slot_of[shared], expert_stream.reader.stats.bytes
    with expert_stream.trace(tmp_path / "trace"):
        got, expected = (run(m, TOKENS, 12) for m in (model, stock))
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert layer.cache.slot_of[shared] == slot >= 0
    assert shared not in layer.cache.resident
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()][1:]
    chosen = [call["experts"] for call in lines]
    assert max(np.max(x) for x in chosen) < shared
    stats = expert_stream.stats().cache
    assert stats.hits + stats.misses == sum(len(np.unique(x)) for x in chosen)
    read = expert_stream.reader.stats.bytes - before
    assert read == stats.misses * layer.expert_bytes > 0


COMPRESSED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
    }
}
MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


@pytest.mark.parametrize(
    ("family", "form", "small", "settings"),
    [
        ("glm4_moe", originals.single, [], {}),
        ("qwen3_5_moe", originals.fused, [], {}),
        ("minimax_m3_vl", originals.minimax_m3, [], {}),  # two ranges of bytes an expert
        ("deepseek_v3", originals.nvfp4, [(), (), ()], MODELOPT),
        ("deepseek_v3", originals.nvfp4_packed, [(), (), ()], COMPRESSED),
        ("qwen3_5_moe", originals.nvfp4_fused, [(128,), (128,), ()], MODELOPT),
    ],
)
def test_published_layouts_stream_from_where_they_lie(
    family: str,
    form: Callable[[originals.Weights], originals.Weights],
    small: list[tuple[int, ...]],
    settings: dict[str, Any],
    tmp_path: Path,
    estimated: None,
) -> None:
    def published(weights: originals.Weights) -> originals.Weights:
        made = form(weights)
        if family == "minimax_m3_vl":
            return made
        return {name.removeprefix("language_model."): array for name, array in made.items()}

    built = make_vlm_checkpoint(tmp_path / "built", family)
    folder = originals.write(built, tmp_path / "original", published, **settings)
    stock = utils.load_model(folder)
    with patch(cache="100MB", config=StreamConfig(progress=False)):
        expert_stream = stream(model := utils.load_model(folder))
    expert_stream.resize(sum(4 * x.expert_bytes for x in expert_stream.layers))
    for layer in expert_stream.layers:
        assert [t.slot.shape for t in layer.slots.small.values()] == small
        assert ("gate_up_proj.weight (2)" in layer.tensors) == (family == "minimax_m3_vl")
    for got, expected in zip(run(model, TOKENS, 20), run(stock, TOKENS, 20), strict=True):
        assert np.array_equal(got, expected)
    assert expert_stream.stats().cache.misses > 0


def test_a_layout_that_mlx_vlm_computes_is_refused_and_says_what_to_run(tmp_path: Path) -> None:
    """Kimi's experts have no biases; mlx-vlm makes them of the scales."""
    built = make_vlm_checkpoint(tmp_path / "built", "kimi_k25")
    folder = originals.write(built, tmp_path / "original", originals.int4)
    utils.load_model(folder)
    with (
        patch(cache="100MB", config=StreamConfig(progress=False)),
        pytest.raises(UnsupportedModelError, match=r"biases.*mlx-vlm computes it.*mlx_vlm.convert"),
    ):
        utils.load_model(folder)


def verified(model: nn.Module) -> mx.array:
    """The last hidden states [1, 3, D] of a model's own check of three drafted tokens."""
    language = model.language_model
    cache = make_prompt_cache(language)
    language(mx.array(TOKENS[:9])[None], cache=cache)
    tokens = mx.array(TOKENS[9:12])[None]
    if hasattr(language, "speculative_verify_hidden"):
        return language.speculative_verify_hidden(tokens, cache)[0]
    return language(tokens, cache=cache, speculative_verify=True).logits


@pytest.mark.parametrize("family", ["glm_moe_dsa", "qwen3_5_moe", "qwen4_exp"])
def test_a_models_own_check_of_a_draft_is_exact(
    family: str, tmp_path: Path, estimated: None
) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", family, bits=4)
    with patch(cache="150KB", config=StreamConfig(progress=False)):
        model = utils.load_model(folder)
    expected = verified(utils.load_model(folder))
    assert mx.array_equal(verified(model), expected)
    assert stream(model).stats().cache.misses > 0


@pytest.mark.parametrize("family", ["lfm2_moe", "nemotron_h", "gemma4"])
def test_a_check_of_a_draft_that_goes_around_the_experts_is_refused(
    family: str, tmp_path: Path, estimated: None
) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", family)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", {})["exact_speculative_verify"] = True  # of gemma4
    (folder / "config.json").write_text(json.dumps(config))
    with patch(cache="10MB", config=StreamConfig(progress=False)):
        model = utils.load_model(folder)
    run(model, TOKENS, 12)
    with pytest.raises(UnsupportedModelError, match="generate without a draft model"):
        verified(model)


def test_draft_models_with_experts_are_refused_however_they_are_loaded(tmp_path: Path) -> None:
    drafters = pytest.importorskip("mlx_vlm.speculative.drafters")
    package = pytest.importorskip("mlx_vlm.speculative.drafters.qwen3_5_mtp")
    text = FAMILIES["qwen3_5_moe"].config["text_config"]
    config = {"model_type": "qwen3_5_mtp", "text_config": text}
    model = package.Model(package.ModelConfig.from_dict(config))
    (tmp_path / "drafter").mkdir()
    lm.write(tmp_path / "drafter", config, model, shards=1)
    target = make_vlm_checkpoint(tmp_path / "target", "qwen3_moe")
    split = sys.modules["mlx_vlm.speculative.drafters.mtp_split"]  # for those in their target
    with patch(cache="10MB", config=StreamConfig(progress=False)):
        utils.load_model(target)
        with pytest.raises(
            UnsupportedModelError, match="qwen3_5_mtp: this draft model has experts"
        ):
            drafters.load_drafter(str(tmp_path / "drafter"))
        with pytest.raises(UnsupportedModelError, match="generate without a draft model"):
            split.load_model_weights(model, config, {}, target)
    assert split.load_model_weights is utils.load_model_weights
    assert drafters.load_drafter(str(tmp_path / "drafter"))[1] == "mtp"


@pytest.mark.parametrize("batch", [5, 16])
@pytest.mark.parametrize("slots", [3, lm.EXPERTS - 1])
def test_a_few_tokens_run_one_by_one_as_in_stock_where_kernels_depend_on_it(
    batch: int, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-vlm's SwitchGLU calls itself for each of 2 to 8 tokens; a GPU sums in that order."""
    monkeypatch.setattr(RowRule, "of", lambda _: RowRule(count=True, padded=True))
    monkeypatch.setattr(cpu_streams, "_MOST", 1)
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen3_moe")
    with patch(cache="100MB", config=StreamConfig(progress=False)):
        model = utils.load_model(folder)
    expert_stream = stream(model)
    expert_stream.resize(slots * sum(x.expert_bytes for x in expert_stream.layers))
    layer = expert_stream.layers[0]
    stock = dict(utils.load_model(folder).named_modules())[layer.name]
    calls: list[tuple[int, ...]] = []  # of projections: [B, L, K], or [rows] if they are sorted

    def noted(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        calls.append(indices.shape)
        return original(self, x, indices, sorted_indices)

    linear = type(stock.up_proj)
    original = linear.__call__
    monkeypatch.setattr(linear, "__call__", noted)
    x = mx.random.normal((batch, 5, lm.HIDDEN), key=mx.random.key(0))
    indices = mx.random.randint(0, layer.experts, (batch, 5, 4), key=mx.random.key(1))
    expected = stock(x, indices)
    wanted = {*calls}
    calls.clear()
    assert mx.array_equal(layer(x, indices), expected)
    assert wanted == ({(batch * 4,)} if batch * 4 >= 64 else {(batch, 1, 4)})
    assert {*calls} == wanted
    assert layer.cache.stats.misses > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "kimi_k25", "qwen3_vl_moe"])
def test_memory_is_planned_from_the_language_models_graph(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_vlm_checkpoint(tmp_path / family, family)
    with patch(memory="600MB", config=StreamConfig(progress=False, context_tokens=2000)) as patched:
        model = utils.load_model(folder)
    assert "estimated" not in caplog.text
    footprint = patched.streams[0].plan.footprint
    assert footprint is not None
    cache = make_prompt_cache(model.language_model)
    mx.eval(model.language_model(mx.zeros((1, 600), mx.int32), cache=cache).logits)
    held = sum(array.nbytes for _, array in tree_flatten([c.state for c in cache]))
    assert held <= footprint.kv(600) + footprint.state


def test_a_family_that_starts_its_layers_itself_reads_nothing_before_it_streams(
    tmp_path: Path,
) -> None:
    """Qwen3.8-Flash-Next would be read whole: its own code evaluates every layer of a token."""
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen4_exp")
    language = utils.load_model(folder, lazy=True).language_model
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert token_rows(language) == lm.VOCAB
    mx.synchronize()
    assert mx.get_peak_memory() - before < 10_000  # of weights of 4.8 MB


def test_projections_that_decoding_copies_are_planned(tmp_path: Path) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen4_exp", bits=4)
    model = utils.load_model(folder)
    language = model.language_model
    assert decode_copies(model) == 0  # with this output matrix it decodes in the usual way
    language.lm_head = nn.Linear(lm.HIDDEN, lm.VOCAB, bias=False)
    expected = decode_copies(model)
    cache = language.make_cache()
    for ids in ([[1, 2, 3]], [[4]]):
        mx.eval(language(mx.array(ids), cache=cache).logits)
    copies = [
        m["_fused_decode_linears"] for m in language.modules() if "_fused_decode_linears" in m
    ]
    assert sum(a.nbytes for copy in copies for a in copy[1:4]) == expected > 0


def test_a_prompt_longer_than_planned_runs_in_chunks_with_the_same_bits(tmp_path: Path) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen3_moe")
    config = StreamConfig(progress=False, context_tokens=600, prefill_tokens=64)
    with patch(memory="600MB", config=config):
        model = utils.load_model(folder)
    stock = utils.load_model(folder)
    ids = mx.array(lm.token_stream(TEXT, 150, 1))[None]
    cache, chunks = make_prompt_cache(stock.language_model), []
    for begin in range(0, 150, 64):
        part = ids[:, begin : begin + 64]
        chunks.append(stock.language_model(part, cache=cache).logits)
    got = model.language_model(ids, cache=make_prompt_cache(model.language_model)).logits
    assert mx.array_equal(got, mx.concatenate(chunks, axis=1))


PATCH_FIRST = """
import sys
from mlx_streamexperts import StreamConfig, patch, stream
with patch(cache="10MB", config=StreamConfig(progress=False)) as patched:
    assert "mlx_vlm" not in sys.modules
    from mlx_vlm.utils import load_model
    model = load_model(__import__("pathlib").Path(sys.argv[1]))
    assert stream(model) is stream(model.language_model) is patched.streams[0]
import mlx_vlm.utils
assert mlx_vlm.utils.load_model.__module__ == "mlx_vlm.utils"
assert not any("mlx_streamexperts" in type(finder).__module__ for finder in sys.meta_path)
"""


def test_a_patch_covers_mlx_vlm_if_it_is_imported_later(tmp_path: Path) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen3_moe")
    subprocess.run([sys.executable, "-c", PATCH_FIRST, str(folder)], check=True)


def test_several_machines_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen3_moe")
    config = StreamConfig(cache="10MB", pipeline=True)
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with (
        patch(config=config),
        pytest.MonkeyPatch.context() as monkeypatch,
        pytest.raises(UnsupportedModelError, match="not of mlx-vlm"),
    ):
        monkeypatch.setattr(mx.distributed, "init", lambda: group)
        utils.load_model(folder)


IMPORTING = """
import os, sys, threading, time
from mlx_streamexperts import StreamConfig, patch
started = threading.Event()
class Slow:  # mlx_vlm.utils imports this when its own load_model is not defined yet
    def find_spec(self, name, path, target=None):
        if name == "mlx_vlm.quant_utils":
            started.set()
            time.sleep(1)
sys.meta_path.insert(0, Slow())
first = patch(cache="10MB") if sys.argv[1] == "before" else None
if first:
    first.install()
other = threading.Thread(target=lambda: __import__("mlx_vlm.utils"))
other.start()
started.wait(60)
with patch(cache="10MB"):  # installed, and removed, while another thread imports it
    import mlx_vlm.utils
    ours = mlx_vlm.utils.load_model
    assert "mlx_streamexperts" in ours.__code__.co_filename, ours.__code__
other.join()
if first:
    first.remove()
assert "mlx_streamexperts" not in mlx_vlm.utils.load_model.__code__.co_filename
os._exit(0)  # MLX 0.32.4 aborts now and then if Python ends just after a thread that used it
"""


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_patch_covers_mlx_vlm_while_another_thread_imports_it(when: str) -> None:
    subprocess.run([sys.executable, "-c", IMPORTING, when], check=True, timeout=300)


def test_a_model_without_experts_loads_as_usual_after_one_with(tmp_path: Path) -> None:
    dense = make_vlm_checkpoint(tmp_path / "dense", "qwen3_moe")
    for file in dense.glob("*.safetensors*"):
        file.unlink()
    config = {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    config |= {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    lm.write(dense, config, construct(config), shards=1)
    sparse = make_vlm_checkpoint(tmp_path / "sparse", "qwen3_moe")
    with patch(cache="10MB", config=StreamConfig(progress=False)) as patched:
        with pytest.raises(UnsupportedModelError, match="no routed experts"):
            utils.load_model(dense)
        utils.load_model(sparse)
        utils.load_model(dense)
        for file in dense.glob("model*"):  # mlx-vlm reads shards of any name
            file.rename(file.with_name(file.name.replace("model", "part")))
        utils.load_model(dense)
    assert len(patched.streams) == 1
