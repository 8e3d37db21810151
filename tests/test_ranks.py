"""Several processes share a model: the same bits, each its own layers, budget and reads."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import ClassVar

import families
import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, assert_same
from launching import run_ranks
from mlx_lm.utils import _get_classes
from rank_programs import PREFILL, TOKENS

from mlx_streamexperts import (
    BudgetError,
    CheckpointError,
    StreamConfig,
    StreamError,
    UnsupportedModelError,
    demo_model,
    generate,
    patch,
    plan,
)
from mlx_streamexperts._analysis.machines import Link, plan_ranks, predict_ranks
from mlx_streamexperts._analysis.predict import predict
from mlx_streamexperts._distributed.pipeline import Part, Stage, cut, parse_split, wait_on_host
from mlx_streamexperts._distributed.watch import Watch, address_of_rank_0
from mlx_streamexperts._experts.packed_store import write_store
from mlx_streamexperts._loading.discover import discover
from mlx_streamexperts._loading.on_ranks import part_of_repository
from mlx_streamexperts._memory.budget import default_memory
from mlx_streamexperts._memory.hardware import NAMED_MACHINES
from mlx_streamexperts.doctor import _command as doctor

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


def test_a_rank_keeps_its_own_layers(deep: Path) -> None:
    model, _ = mlx_lm.utils.load_model(deep, lazy=True)
    stage = cut(model, Part(index=1, count=2))
    assert str(stage) == "rank 1 of 2, layers 0 to 3"  # rank 0 has the last layers
    assert stage.needs("model.layers.3.self_attn.q_proj.weight")
    assert not stage.needs("model.layers.4.self_attn.q_proj.weight")
    assert stage.needs("model.embed_tokens.weight")  # every rank does
    assert len(model.model.layers[stage.start : stage.end]) == 4


class TwoRanks:
    """One of two `Ranks` in the same process."""

    size, names = 2, ("rank 0", "rank 1")
    statements: ClassVar[list[object]] = [None, None]
    barrier = threading.Barrier(2, timeout=60)

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def exchange(self, statement: object) -> list[object]:
        self.statements[self.rank] = statement
        self.barrier.wait()
        everybody = list(self.statements)
        self.barrier.wait()
        return everybody


def test_a_rank_that_leaves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_HOST_IP", "127.0.0.1")
    for reason, news in (
        (None, "rank 1 left the run"),
        ("the drive is gone", "rank 1 was lost: the drive is gone"),
    ):
        with ThreadPoolExecutor() as threads:
            first, second = threads.map(lambda r: Watch(TwoRanks(r)), range(2))  # type: ignore[arg-type]
        assert first.why(seconds=0) is None
        second.close(reason)
        assert first.why() == news
        first.close()


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


def test_four_ranks_with_prefetching_and_unequal_parts(deep: Path, tmp_path: Path) -> None:
    """Bits do not depend on the number of ranks, the split, budgets or prefetching."""
    expected = stock_logits(deep)
    options = {"cache": "160kB,90kB,90kB,200kB", "split": "3,1,1,3", "prefetch": "on"}
    reports = [e.json() for e in run_ranks("measured", 4, tmp_path, deep, json.dumps(options))]
    assert [r["stage"] for r in reports] == [
        "rank 0 of 4, layers 5 to 7", "rank 1 of 4, layers 4 to 4",
        "rank 2 of 4, layers 3 to 3", "rank 3 of 4, layers 0 to 2",
    ]  # fmt: skip
    planned = plan_ranks(str(deep), 4, StreamConfig(**options))  # type: ignore[arg-type]
    for rank, report in enumerate(reports):
        assert_same(expected, read_logits(deep / f"measured-{rank}.npz"), f"rank {rank}")
        p = planned[rank].plan
        assert report["plan"] == {"trunk": p.trunk, "cache": p.cache, "experts": p.experts}
        assert report["prefill_tokens"] == p.prefill_tokens
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
    """And, of a packed store, only the files of its layers."""
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
    store = tmp_path / "store"
    list(write_store(discover(whole, QUIET, {}).layers, store))
    for rank, numbers in enumerate(((3, 4, 5, 6), (0, 1, 2))):
        (tmp_path / f"store-{rank}").mkdir()
        for file in ("manifest.json", *(f"layer-{n:05d}.experts" for n in numbers)):
            shutil.copy(store / file, tmp_path / f"store-{rank}")
    stores = str(tmp_path / "store-{rank}")
    shard = "model-2.safetensors"
    ended = run_ranks("parts_of_a_copy", 2, tmp_path, tmp_path / "part-{rank}", stores, shard)
    for e, folder in zip(ended, parts, strict=True):
        said = e.json()
        assert f"part-1/{shard} is missing: rank 1 of 2, layers 0 to 3" in said
        for name in ("in-place", "packed"):
            assert_same(expected, read_logits(folder / f"{name}.npz"), f"{folder.name} {name}")


def test_of_a_repository_each_rank_downloads_its_own_shards(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, cache = by_layer(deep, tmp_path / "remote"), tmp_path / "cache"
    cache.mkdir()

    def download(repo: str, allow_patterns: list[str], revision: str | None = None) -> Path:
        if repo != "some/repo":
            raise FileNotFoundError(f"no repository {repo}")
        for file in remote.iterdir():
            if any(fnmatch(file.name, p) for p in allow_patterns):
                shutil.copy(file, cache)
        return cache

    monkeypatch.setattr(mlx_lm.utils, "_download", download)
    config = StreamConfig(split="6,2")
    assert part_of_repository("some/repo", config, Part(1, 2), False) == cache  # type: ignore[arg-type]
    assert sorted(f.name for f in cache.iterdir()) == [
        "config.json", "model-0.safetensors", "model-1.safetensors", "model-rest.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="other/repo cannot be downloaded: no repository"):
        part_of_repository("other/repo", config, Part(1, 2), False)  # type: ignore[arg-type]


def test_what_is_wrong_on_one_rank_fails_on_all_and_is_named(deep: Path, tmp_path: Path) -> None:
    """Nobody is left waiting: the same processes try again, and succeed."""
    with pytest.MonkeyPatch.context() as m:
        other = build_deep("qwen3_moe", tmp_path / "other", m, layers=8, seed=1)
    free = [default_memory()]
    first, second = (e.json() for e in run_ranks("failures", 2, tmp_path, deep, other))
    free.append(default_memory())
    small, unlike, options, split, versions, nothing, memory = first
    assert small.startswith(f"RankError: rank 1 ({HOST}): memory=1 MB is too small")
    assert second[0].startswith("BudgetError: memory=1 MB is too small")
    assert "the ranks disagree: the digest of tensor lm_head" in unlike
    assert f"the option context_tokens is 4096 on rank 0 ({HOST}) and 64 on rank 1" in options
    assert "adds up to 9 layers, but the model has 8" in split
    assert "the version of mlx-lm is '2.0' on rank 0" in versions
    assert second[1:][:-1] == [unlike, options, split, versions, ""]
    assert nothing == ""
    # Both are on this machine; what is free there varies on Linux.
    assert 0.7 * min(free) / 2 < int(memory) < 1.3 * max(free) / 2


@pytest.mark.parametrize(
    ("how", "ranks", "why"),
    [
        ("SIGKILL", 2, "its process or its connection ended"),
        ("SIGSTOP", 3, "not a sign of life for 4 s"),
        ("loading", 2, "its process or its connection ended"),
        ("read", 2, "cannot read expert 7 of model.layers.1.mlp"),
    ],
)
def test_a_lost_rank_is_named_by_all_others_and_nobody_hangs(
    how: str, ranks: int, why: str, tmp_path: Path
) -> None:
    frozen = 1 if how == "SIGSTOP" else None
    ended = run_ranks("one_ends", ranks, tmp_path, 1, how, frozen=frozen)
    for survivor in (ended[0], *ended[2:]):
        assert survivor.status == 1
        assert f"error: rank 1 ({HOST}) was lost: {why}" in survivor.err, survivor.err
    assert ended[1].status == (1 if how == "read" else -signal.SIGKILL)


def test_text_is_the_same_on_all_ranks_and_on_one(tmp_path: Path) -> None:
    model, tokenizer = mlx_lm.load(str(demo_model()))
    prompt = tokenizer.encode("In the beginning " * 10)
    expected = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=15)
    first, second = (e.json() for e in run_ranks("texts", 2, tmp_path, demo_model()))
    assert first["greedy"] == second["greedy"] == expected
    assert first["drawn"] == second["drawn"]
    assert "use pipeline=True (--pipeline)" in first["refused"]


def test_the_command_line_prints_once(tmp_path: Path) -> None:
    arguments = ("-p", "def main(", "-m", "12", "--no-progress", "--cache", "5MB")
    first, second = run_ranks("command", 2, tmp_path, *arguments)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    model, tokenizer = mlx_lm.load(str(demo_model()))
    assert mlx_lm.generate(model, tokenizer, "def main(", max_tokens=12) in first.out
    assert second.out == ""
    for words in (f"rank 0 ({HOST}): layers 4 to 7", f"rank 1 ({HOST}): layers 0 to 3"):
        assert words in first.out
    for ended in run_ranks("command", 2, tmp_path, *arguments, "-m", own=["10", "11"]):
        assert ended.status == 1
        assert "the option max_tokens is '10' on rank 0" in ended.err
    args = generate.setup_arg_parser().parse_args(["--draft-model", "x"])
    with pytest.raises(StreamError, match="--draft-model does not work with several machines"):
        generate._for_several(args)


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


def test_the_plan_of_several_machines_divides_that_of_one(deep: Path) -> None:
    whole = plan(str(deep), cache="1GB", config=QUIET)
    parts = plan_ranks(str(deep), 3, StreamConfig(cache="1GB"))
    assert [(p.stage.start, p.stage.end) for p in parts] == [(5, 8), (2, 5), (0, 2)]
    assert sum(p.plan.experts for p in parts) == whole.experts
    assert sum(p.plan.kv for p in parts) == whole.kv
    assert all(whole.trunk / 3 < p.plan.trunk < whole.trunk for p in parts)
    assert [len(p.plan.slots) for p in parts] == [3, 3, 1]
    needed = max(p.plan.minimum for p in plan_ranks(str(deep), 3, QUIET))
    assert needed < plan(str(deep), config=QUIET).minimum
    tight = plan_ranks(str(deep), 3, StreamConfig(memory=needed))
    assert all(p.plan.memory == needed for p in tight)
    assert len({p.plan.prefill_tokens for p in tight}) == 1
    with pytest.raises(BudgetError, match="rank 0: memory=") as caught:
        plan_ranks(str(deep), 3, StreamConfig(memory=needed - 1))
    assert caught.value.needed_bytes == needed


def test_the_prediction_for_several_machines_follows_its_formula(deep: Path) -> None:
    machine = NAMED_MACHINES["M4 Max 128 GB"]
    (one,) = plan_ranks(str(deep), 1, StreamConfig(cache="400kB"))
    tokens, first, (alone,) = predict_ranks([one], [machine])
    assert tokens.likely == pytest.approx(predict(one.plan, machine).tokens_per_s.likely)
    assert first.likely == pytest.approx(alone.first_token.likely)
    two = plan_ranks(str(deep), 2, StreamConfig(cache="400kB"))
    assert two[0].hidden_bytes == 4 * families.HIDDEN
    link = Link(rate=1e6, latency=0.01)
    tokens, _, alone_of_two = predict_ranks(two, [machine] * 2, link)
    seconds = sum(1 / p.tokens_per_s.likely for p in alone_of_two) + 2 * (0.01 + 256 / 1e6)
    assert 1 / tokens.likely == pytest.approx(seconds)
    assert alone_of_two[0].hit_rate.likely > alone.hit_rate.likely  # of a larger cache


def test_doctor_shows_the_split(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", str(deep), "--ranks", "2", "--machine", "M4 Max 128 GB"]
    assert doctor.main([*command, "--split", "3,5"]) == 0
    text = capsys.readouterr().out
    for words in ("rank 0 on M4 Max 128 GB: layers 5 to 7 of 8", "rank 1", "layers 0 to 4 of 8"):
        assert words in text
    assert "predicted decode" in text and "together" in text
    assert doctor.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [r["stage"]["end"] for r in report["ranks"]] == [8, 4]
    assert doctor.main([*command, "--files", "1"]) == 0
    files = capsys.readouterr().out.split()
    assert {"config.json", "model-00001-of-00002.safetensors"} <= set(files)
    assert doctor.main([*command, "--memory", "1GB,1MB"]) == 2
    assert "does not fit: rank 1: memory=1 MB" in capsys.readouterr().err
    for wrong, words in (
        (["--split", "3,4"], "adds up to 7 layers"),
        (["--machine", "Cray"], "unknown machine 'Cray'"),
        (["--machine", "M2 Max 96 GB", "--machine", "M2 Max 96 GB"], "3 machines for 2 ranks"),
        (["--link", "slow"], "not a size"),
        (["--files", "2"], "there are ranks 0 to 1"),
    ):
        assert doctor.main([*command, *wrong]) == 1
        assert words in capsys.readouterr().err


def test_mlx_lm_s_own_programs_load_parts_through_the_patch() -> None:
    """chat and server import `sharded_load` by name; without the patch they have mlx-lm's."""
    chat = importlib.import_module("mlx_lm.chat")
    original = mlx_lm.utils.sharded_load
    with patch(cache="1MB"):
        assert chat.sharded_load is mlx_lm.utils.sharded_load is not original
    assert chat.sharded_load is mlx_lm.utils.sharded_load is original


def test_the_host_waits_for_other_ranks_and_not_the_device(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was received is evaluated before a layer uses it, and the last hidden state of one
    token; of a prompt's chunk it is not, so that ranks can work on two chunks at once.
    """
    (model, _), (last, _) = mlx_lm.utils.load_model(deep), mlx_lm.utils.load_model(deep)
    names = [name for name, _ in model.named_modules()]
    stage = cut(model, Part(1, 3))
    wait_on_host(model, stage)
    evaluated: list[tuple[int, ...]] = []
    monkeypatch.setattr(mx, "eval", lambda x: evaluated.append(x.shape))
    width = families.HIDDEN
    for tokens in (1, 4):
        x = mx.ones((1, tokens, width))
        for layer in model.model.layers[stage.start : stage.end]:
            x = layer(x)
        model.model.norm(x)
    assert evaluated == [(1, 1, width), (1, 1, width), (1, 4, width)]
    wait_on_host(last, cut(last, Part(2, 3)))
    evaluated.clear()
    last.model.layers[0](mx.ones((1, 1, width)))
    assert evaluated == []  # it has the first layers and receives nothing
    assert {name for name, _ in model.named_modules()} < set(names)
