"""Several processes share a model: the same bits, each its own layers, budget and reads."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import families
import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import assert_same
from launching import Ended, run_ranks
from mlx_lm.utils import _get_classes
from rank_programs import PREFILL, TOKENS

from mlx_streamexperts import StreamConfig, StreamError, UnsupportedModelError, demo_model
from mlx_streamexperts.pipeline import Part, Stage, cut, parse_split
from mlx_streamexperts.watch import address_of_rank_0

HOST = socket.gethostname()


def deepened(family: str, layers: int = 4) -> dict[str, object]:
    """A family's configuration with enough layers to divide: the second half as the first."""
    config = copy.deepcopy(families.FAMILIES[family])
    for part in (config, config.get("text_config") or {}):
        if "num_hidden_layers" not in part:
            continue
        had, part["num_hidden_layers"] = part["num_hidden_layers"], layers
        for owner in (part, *(v for v in part.values() if isinstance(v, dict))):
            for key, value in owner.items():
                if (
                    isinstance(value, list)
                    and len(value) == had
                    and key.endswith(("types", "freq"))
                ):
                    owner[key] = [value[min(i, had - 1)] for i in range(layers)]
    return config


def can_pipeline(family: str) -> bool:
    """mlx-lm's own condition, in `sharded_load`."""
    config = copy.deepcopy(families.FAMILIES[family])
    try:
        model_class, arguments = _get_classes(config)
    except ValueError:  # this mlx-lm does not have it
        return False
    return hasattr(getattr(model_class(arguments.from_dict(config)), "model", None), "pipeline")


def build_deep(
    family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, layers: int = 4, **options: object
) -> Path:
    with monkeypatch.context() as m:
        m.setitem(families.FAMILIES, family, deepened(family, layers))
        return families.build(family, folder, **options)  # type: ignore[arg-type]


def stock_logits(folder: Path) -> list[np.ndarray]:
    model, _ = mlx_lm.utils.load_model(folder)
    return families.run(model, families.token_stream(families.VOCAB, TOKENS, 0), PREFILL)


def read_logits(file: Path) -> list[np.ndarray]:
    with np.load(file) as saved:
        return [saved[name] for name in saved.files]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe of 8 layers, of which the first is dense."""
    with pytest.MonkeyPatch.context() as m:
        return build_deep("qwen3_moe", tmp_path_factory.mktemp("deep"), m, layers=8)


def test_every_family_that_mlx_lm_can_divide_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has half of the layers, no layer is on two, and experts are read again."""
    names = [f for f in families.FAMILIES if can_pipeline(f)]
    assert {"qwen3_moe", "deepseek_v3", "kimi_k25", "qwen3_5_moe", "glm4_moe"} <= set(names)
    folders = [build_deep(name, tmp_path / name, monkeypatch) for name in names]
    ended = run_ranks("logits", 2, tmp_path, tmp_path, *folders)
    low, high = (e.json() for e in ended)
    for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
        expected = stock_logits(folder)
        for rank in range(2):
            assert_same(expected, read_logits(tmp_path / f"{number}-{rank}.npz"), f"{name} {rank}")
        for own, others in ((low, high), (high, low)):
            assert own["layers"][number]
            assert not set(own["layers"][number]) & set(others["layers"][number])
        assert low["misses"][number] > 0, name


def test_four_ranks_with_guesses_and_unequal_parts(deep: Path, tmp_path: Path) -> None:
    """Bits do not depend on the number of ranks, the split, budgets or reading ahead."""
    expected = stock_logits(deep)
    options = {"cache": "160kB,90kB,90kB,200kB", "split": "3,1,1,3", "prefetch": "on"}
    reports = [e.json() for e in run_ranks("measured", 4, tmp_path, deep, json.dumps(options))]
    assert [r["stage"] for r in reports] == [
        "rank 0 of 4, layers 5 to 7", "rank 1 of 4, layers 4 to 4",
        "rank 2 of 4, layers 3 to 3", "rank 3 of 4, layers 0 to 2",
    ]  # fmt: skip
    for rank, report in enumerate(reports):
        assert_same(expected, read_logits(deep / f"measured-{rank}.npz"), f"rank {rank}")
        assert report["stats"]["misses"] > 0
    numbers = [
        sorted(name.split(".")[2] for name in r["stats"]["layer_hit_rates"]) for r in reports
    ]
    assert numbers == [["5", "6", "7"], ["4"], ["3"], ["1", "2"]]


def test_each_rank_keeps_its_own_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`memory` is a rank's own; the layers of others take none of it."""
    for key, value in (("hidden_size", 256), ("moe_intermediate_size", 256), ("num_experts", 64)):
        monkeypatch.setitem(families.FAMILIES["qwen3_moe"], key, value)
    folder = build_deep("qwen3_moe", tmp_path / "big", monkeypatch, layers=6, quantize=None)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    expected = stock_logits(folder)
    memory = 80_000_000
    options = {"memory": memory, "context_tokens": 256, "prefill_tokens": 64, "prefetch": "off"}
    for rank, ended in enumerate(run_ranks("measured", 2, tmp_path, folder, json.dumps(options))):
        report = ended.json()
        assert_same(expected, read_logits(folder / f"measured-{rank}.npz"), f"rank {rank}")
        assert report["peak"] <= memory < size / 3
        assert report["plan"]["experts"] < 0.65 * size
        assert report["loaded"] <= 1.05 * (report["plan"]["trunk"] + report["plan"]["cache"])
        assert report["stats"]["misses"] > 0


def by_layer(whole: Path, folder: Path) -> Path:
    """The same checkpoint with one shard a layer, and one for the rest."""
    weights: dict[str, mx.array] = {}
    for shard in whole.glob("model*.safetensors"):
        weights.update(mx.load(str(shard)))
    place = {
        name: "model-" + (name.split(".")[2] if ".layers." in name else "rest") + ".safetensors"
        for name in weights
    }
    folder.mkdir()
    for shard in set(place.values()):
        mx.save_safetensors(
            str(folder / shard), {n: w for n, w in weights.items() if place[n] == shard}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    shutil.copy(whole / "config.json", folder)
    return folder


def test_a_machine_needs_only_the_shards_of_its_layers(deep: Path, tmp_path: Path) -> None:
    whole = by_layer(deep, tmp_path / "whole")
    expected = stock_logits(whole)
    weight_map = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    parts = []
    for rank, stage in enumerate((Stage(0, 2, 4, 8, 8), Stage(1, 2, 0, 4, 8))):
        parts.append(tmp_path / f"part-{rank}")
        parts[-1].mkdir()
        for file in ("config.json", "model.safetensors.index.json", *stage.files(weight_map)):
            shutil.copy(whole / file, parts[-1])
    assert sorted(f.name for f in parts[0].glob("*.safetensors")) == [
        *(f"model-{i}.safetensors" for i in (4, 5, 6, 7)), "model-rest.safetensors",
    ]  # fmt: skip
    for folder, ended in zip(parts, run_ranks("logits_here", 2, tmp_path, own=parts), strict=True):
        ended.json()
        assert_same(expected, read_logits(folder / "logits.npz"), folder.name)
    (parts[1] / "model-2.safetensors").unlink()
    for ended in run_ranks("only_load", 2, tmp_path, own=parts):
        assert ended.status != 0
        assert "part-1/model-2.safetensors is missing: rank 1 of 2, layers 0 to 3" in ended.err


def all_say(ended: list[Ended], *words: str) -> None:
    for e in ended:
        assert e.status != 0
        for word in words:
            assert word in e.err, e.err


def test_a_budget_too_small_on_one_rank_fails_on_all(deep: Path, tmp_path: Path) -> None:
    options = {"memory": "1GB,1MB", "context_tokens": 64}
    ended = run_ranks("measured", 2, tmp_path, deep, json.dumps(options))
    all_say(ended, "memory=1 MB is too small")
    assert f"RankError: rank 1 ({HOST}): memory=1 MB is too small" in ended[0].err
    assert "BudgetError" in ended[1].err


def test_ranks_that_disagree_are_named(deep: Path, tmp_path: Path) -> None:
    names = (f"on rank 0 ({HOST})", f"on rank 1 ({HOST})", "the ranks disagree")
    with pytest.MonkeyPatch.context() as m:
        other = build_deep("qwen3_moe", tmp_path / "other", m, layers=8, seed=1)
    ended = run_ranks("only_load", 2, tmp_path, own=[deep, other])
    all_say(ended, *names, "the digest of tensor lm_head")
    ended = run_ranks("other_options", 2, tmp_path, deep, own=["{}", '{"context_tokens": 64}'])
    all_say(ended, *names, "the option context_tokens is 4096", "and 64 on rank 1")
    ended = run_ranks("other_versions", 2, tmp_path, deep, own=["1.0", "2.0"])
    all_say(ended, *names, "the version of mlx-lm is '1.0'", "and '2.0' on rank 1")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("SIGKILL", "its process or its connection ended"),
        ("SIGSTOP", "not a sign of life for 3 s"),
        ("read", "cannot read expert 7 of model.layers.1.mlp"),
    ],
)
def test_a_lost_rank_is_named_by_all_others_and_nobody_hangs(
    how: str, why: str, tmp_path: Path
) -> None:
    ended = run_ranks("one_ends", 3, tmp_path, 1, how, frozen=1 if how == "SIGSTOP" else None)
    for rank in (0, 2):
        assert ended[rank].status == 1
        assert f"error: rank 1 ({HOST}) was lost: {why}" in ended[rank].err, ended[rank].err
    assert ended[1].status == (1 if how == "read" else -signal.SIGKILL)


def test_text_is_the_same_on_all_ranks_and_on_one(tmp_path: Path) -> None:
    model, tokenizer = mlx_lm.load(str(demo_model()))
    prompt = tokenizer.encode("In the beginning " * 10)
    expected = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=15)
    assert [e.json()["text"] for e in run_ranks("greedy", 2, tmp_path, demo_model())] == 2 * [
        expected
    ]
    drawn = [e.json() for e in run_ranks("sampled", 2, tmp_path, demo_model())]
    assert drawn[0]["text"] == drawn[1]["text"]
    assert "use --pipeline" in drawn[0]["refused"]


def test_the_command_line_prints_once(tmp_path: Path) -> None:
    arguments = ("-p", "def main(", "-m", "12", "--no-progress", "--cache", "5MB")
    first, second = run_ranks("command", 2, tmp_path, *arguments)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    model, tokenizer = mlx_lm.load(str(demo_model()))
    assert mlx_lm.generate(model, tokenizer, "def main(", max_tokens=12) in first.out
    assert second.out == ""
    for words in (f"rank 0 ({HOST}): layers 4 to 7", f"rank 1 ({HOST}): layers 0 to 3"):
        assert words in first.out
    ended = run_ranks("command", 2, tmp_path, *arguments, "-m", own=["10", "11"])
    all_say(ended, "the option max_tokens is '10' on rank 0")
    ended = run_ranks("command", 2, tmp_path, *arguments, "--draft-model", "x")
    all_say(ended, "--draft-model does not work with several machines")


def test_a_model_that_cannot_be_divided_is_refused_by_name(checkpoint: Callable[..., Path]) -> None:
    model, _ = mlx_lm.utils.load_model(checkpoint("olmoe"), lazy=True)
    with pytest.raises(UnsupportedModelError, match="olmoe models cannot be divided"):
        cut(model, Part(0, 2))
    model, _ = mlx_lm.utils.load_model(checkpoint("kimi_k3"), lazy=True)
    with pytest.raises(UnsupportedModelError, match="kimi_k3 models are divided evenly"):
        cut(model, Part(0, 2, (1, 2)))
    model, _ = mlx_lm.utils.load_model(checkpoint("qwen3_moe"), lazy=True)
    with pytest.raises(StreamError, match="3 layers cannot be divided over 4 ranks"):
        cut(model, Part(0, 4))
    with pytest.raises(StreamError, match="adds up to 5 layers, but the model has 3"):
        cut(model, Part(0, 2, (3, 2)))


def test_splits_and_budgets_of_ranks() -> None:
    assert parse_split("31,30", 2) == (31, 30)
    for wrong in ("31", "31,0", "a,b", "1,2,3"):
        with pytest.raises(StreamError, match="number of layers of each of the 2 ranks"):
            parse_split(wrong, 2)
    config = StreamConfig(memory="96GB,64GB", hot_set="hot-{rank}.json")
    assert config.for_rank(1, 2) == StreamConfig(memory="64GB", hot_set="hot-1.json")
    with pytest.raises(StreamError, match="2 sizes for 3 ranks"):
        config.for_rank(0, 3)
    with pytest.raises(StreamError, match="not a size"):
        StreamConfig(memory="96GB,lots")


def test_where_rank_0_is(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:32323", "10.0.1.1:32324"], ["10.0.0.2:32325"]]')
    assert address_of_rank_0({"MLX_HOSTFILE": str(hosts)}) == "10.0.0.1"
    assert address_of_rank_0({"MLX_JACCL_COORDINATOR": "10.0.0.7:5000"}) == "10.0.0.7"
    assert address_of_rank_0({}) == HOST
