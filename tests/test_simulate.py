"""The simulator reports what replays count, predicts by predict.py's formula, fits on others."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_streamexperts import StreamError
from mlx_streamexperts._analysis.replay import BEST, LayerReplay, replay
from mlx_streamexperts._analysis.sharing import hot_experts, keep_whole, miss_curves, share_by_gain
from mlx_streamexperts._analysis.simulation import CANDIDATES, simulate, speed
from mlx_streamexperts._experts.trace import Routing, read_trace
from mlx_streamexperts._memory.hardware import NAMED_MACHINES, Machine
from mlx_streamexperts.simulate import main

EXPERTS = (12, 12, 6)
BYTES = (1000, 1000, 2000)


def write_trace(file: Path, seed: int, tokens: int = 80, model: bool = True) -> Path:
    """Two prompts and decode steps, top-2; the second layer routes evenly, the others do not."""
    rng = np.random.default_rng(seed)
    head = {"layers": ["a", "b", "c"], "experts": EXPERTS, "expert_bytes": BYTES}
    if model:
        sizes = {"trunk": 5000, "active_bytes_per_token": 12_000, "top_k": 2}
        head["model"] = {"model_type": "test", **sizes}
    lines = [json.dumps(head)]
    for i in range(tokens):
        for layer, experts in enumerate(EXPERTS):
            weights = np.ones(experts) if layer == 1 else 1 / np.arange(1, experts + 1) ** 1.5
            rows = [
                rng.choice(experts, 2, replace=False, p=weights / weights.sum()).tolist()
                for _ in range(9 if i in (0, 40) else 1)
            ]
            lines.append(json.dumps({"layer": layer, "experts": rows}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def traces(tmp_path: Path) -> list[Path]:
    return [write_trace(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate("xyz")]


def report_of(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_simulation_is_a_row_for_each_trace_share_and_policy() -> None:
    calls = [np.array([row]) for row in ([0, 1], [0, 2], [0, 3], [1, 2])] * 9
    trace = Routing("chat", (4,), (1000,), (calls,))
    machine = NAMED_MACHINES["M4 Max 128 GB"]
    rows = simulate([trace], [0.5, 1.0], ["lru", BEST], machine).rows
    assert [(r.share, r.policy) for r in rows] == [
        (0.5, "lru"), (0.5, BEST), (1.0, "lru"), (1.0, BEST),
    ]  # fmt: skip
    lru, best, *whole = rows
    assert lru.slots == (2,) and lru.hits <= best.hits  # Belady's optimum
    assert lru.hits + lru.compulsory + lru.capacity == 2 * len(calls)
    assert all(r.compulsory == r.capacity == 0 for r in whole)  # resident: nothing is counted


def test_rows_are_what_the_replays_count(
    traces: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(capsys, *traces, "--shares", "0.25,0.5", "--policies", "lru,lrfu,belady")
    assert report == report_of(
        capsys, *traces, "--shares", "0.25,0.5", "--policies", "lru,lrfu,belady"
    )
    rows = report["rows"]
    assert {(r["trace"], r["share"], r["policy"]) for r in rows} == set(
        itertools.product(["x", "y", "z", "all"], [0.25, 0.5], ["lru", "lrfu", BEST])
    )
    for r in rows:
        assert sum(s * b for s, b in zip(r["slots"], BYTES, strict=True)) <= r["share"] * 36_000
        if r["trace"] != "all" and r["policy"] != BEST:
            file = next(t for t in traces if t.stem == r["trace"])
            stats, layers = replay(file, r["slots"], r["policy"])
            assert (r["hits"], r["compulsory"], r["capacity"]) == (
                stats.hits, stats.compulsory, stats.capacity,
            )  # fmt: skip
            assert r["layer_hit_rates"] == [x.hit_rate for x in layers]
        if r["trace"] == "all":
            mine = [x for x in rows if (x["share"], x["policy"]) == (r["share"], r["policy"])]
            assert 2 * r["capacity"] == sum(x["capacity"] for x in mine)
            assert 2 * r["prompt_missed"] == sum(x["prompt_missed"] for x in mine)
        # 78 calls of one token in each trace; prompts make up the rest of the misses.
        tokens = 78 * (3 if r["trace"] == "all" else 1)
        missed = round(r["missed_per_token"] * tokens)
        assert missed + r["prompt_missed"] == r["compulsory"] + r["capacity"]


def test_the_report_for_people_names_everything(
    traces: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main([*map(str, traces[:2]), "--fit", str(traces[2]), "--layers", "--shares", "0.75"]) == 0
    )
    text = capsys.readouterr().out
    for word in ("x", "all", "lru", "belady", "by gain", "1 whole", "by layer", "beforehand"):
        assert word in text


def test_without_sizes_no_speed_is_predicted(tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text('{"experts": [4]}\n{"layer": 0, "experts": [[1, 2]]}\n')
    report = simulate([read_trace(file)], [0.5], ["lru"], NAMED_MACHINES["M4 Max 128 GB"])
    assert report.rows[0].tokens_per_s is None
    assert report.rows[0].slots == (2,)


def test_speed_is_the_formula_of_predict() -> None:
    machine = Machine("test", 1, 1e6, 1e6, drive_latency=0.0, sync_seconds=0.1, layer_seconds=0.0)
    model = {"model_type": "", "trunk": 0, "active_bytes_per_token": 3_000, "top_k": 2}
    routing = Routing("t", (4, 4), (1000, 1000), ([], []), model)
    half = LayerReplay(needed=10, missed=5, tokens=5)
    compute = 3_000 / (1e6 * 0.75)
    seconds = 1 / speed(routing, [2, 2], [half, half], machine)
    assert seconds == pytest.approx(compute + 2 * 0.1 + 2 * 2 * 0.5 * 1000 / 1e6)
    # A whole layer costs neither sync nor reads, and its hits do not flatter the other's.
    whole = 1 / speed(routing, [4, 2], [LayerReplay(), half], machine)
    assert whole == pytest.approx(compute + 0.1 + 2 * 0.5 * 1000 / 1e6)


def test_another_size_of_experts_changes_speed_and_nothing_else(
    traces: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = report_of(capsys, traces[0], "--shares", "0.5", "--policies", "lru")["rows"][0]
    argv = [traces[0], "--shares", "0.5", "--policies", "lru", "--expert-bytes", "6.75MB"]
    large = report_of(capsys, *argv)["rows"][0]
    faster = report_of(capsys, *argv, "--ssd", "14GB/s:50us")["rows"][0]
    assert large["tokens_per_s"] < faster["tokens_per_s"] < first["tokens_per_s"]
    assert large["capacity"] == faster["capacity"]


def test_fitted_divisions_and_hot_sets_are_judged_on_the_other_traces(
    traces: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [traces[0], "--shares", "0.75", "--policies", "lru,lrfu", "--fit", *traces[1:]]
    report = report_of(capsys, *argv)
    rows = {r["way"]: r for r in report["rows"] if r["policy"] == "lrfu"}
    assert set(rows) >= {"even", "by gain", "1 whole"}
    assert rows["1 whole"]["slots"][1] == 12  # even routing misses most
    (w,) = report["warmth"]
    assert w["trace"] == "x"
    assert w["read"] == sum(rows["even"]["slots"])
    assert w["hot"] < w["cold"] <= w["cold_calls"]
    assert w["hot_calls"] < w["cold_calls"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policies", "lru,best"], "unknown policy 'best': choose of lru"),
        (["--shares", "half"], "--shares 'half'"),
        (["--shares", "0"], "above 0"),
        (["--shares", "0.01"], "smallest that works"),
        (["--ssd", "fast"], "not a size"),
        (["--ssd", "1GB/s:soon"], "write for example"),
    ],
)
def test_what_cannot_be_done_is_said(
    argv: list[str], message: str, traces: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(traces[0]), *argv]) == 1
    assert message in capsys.readouterr().err


def test_traces_of_different_models_are_refused(
    traces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"experts": [4]}\n{"layer": 0, "experts": [[1, 2]]}\n')
    assert main([str(traces[0]), str(other)]) == 1
    assert "different models" in capsys.readouterr().err


def test_a_drive_is_a_rate_and_a_latency() -> None:
    machine = NAMED_MACHINES["M4 Max 128 GB"].with_drive("7GB/s:150us")
    assert (machine.drive_rate, machine.drive_latency) == (7e9, 150e-6)
    assert machine.with_drive("500MB:2ms").drive_latency == 2e-3
    assert machine.with_drive("1GB").drive_latency == 150e-6


def falling_curves(draw: st.DrawFn) -> list[np.ndarray]:
    sizes = draw(st.lists(st.integers(2, 5), min_size=2, max_size=3))
    curves = []
    for n in sizes:
        drops = sorted(draw(st.lists(st.integers(0, 50), min_size=n, max_size=n)), reverse=True)
        curves.append(float(sum(drops)) - np.concatenate([[0], np.cumsum(drops)]))
    return curves


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_shares_by_gain_are_the_best_where_each_slot_gains_less(data: st.DataObject) -> None:
    """By trying every division; layers of one size, curves that bend one way."""
    curves = data.draw(st.composite(falling_curves)())
    most = [len(c) - 1 for c in curves]
    even = [data.draw(st.integers(1, n)) for n in most]
    got = share_by_gain(even, [7] * len(even), [1] * len(even), curves)
    assert sum(got) <= sum(even)
    assert all(1 <= n <= m for n, m in zip(got, most, strict=True))
    best = min(
        sum(float(c[n]) for c, n in zip(curves, slots, strict=True))
        for slots in itertools.product(*(range(1, m + 1) for m in most))
        if sum(slots) <= sum(even)
    )
    assert sum(float(c[n]) for c, n in zip(curves, got, strict=True)) == best


def test_shares_by_gain_look_beyond_a_flat_start() -> None:
    """Nothing is gained below four slots, everything with four."""
    flat = np.array([90, 90, 90, 90, 0, 0])
    steady = np.array([10, 9, 8, 7, 6, 5])
    assert share_by_gain([3, 2], [1, 1], [1, 1], [flat, steady]) == [4, 1]


def test_layers_kept_whole_leave_the_rest_even() -> None:
    curves = [np.full(11, v) for v in (5.0, 9.0, 1.0)]
    assert keep_whole(1, [6, 6, 6], [10] * 3, [2] * 3, [2] * 3, curves) == [4, 10, 4]
    assert keep_whole(2, [6, 6, 6], [10] * 3, [2] * 3, [2] * 3, curves) is None


def test_curves_and_hot_sets_come_from_all_traces(traces: list[Path]) -> None:
    routings = [read_trace(t) for t in traces]
    curves = miss_curves(routings, CANDIDATES["lru"])
    for layer, curve in enumerate(curves):
        assert len(curve) == EXPERTS[layer] + 1
        assert curve[-1] == 0
        slots = [4 if i == layer else EXPERTS[i] for i in range(3)]
        assert curve[4] == sum(replay(t, slots)[1][layer].capacity for t in traces)
    hot = hot_experts(routings)
    assert sorted(hot[0]) == list(range(12))
    assert hot[0][:2] == [0, 1]  # of falling weight


def test_pictures_are_drawn_the_same_each_time(traces: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    argv = [*map(str, traces[:2]), "--shares", "0.25,0.5"]
    pictures = []
    for name in ("a.svg", "b.svg", "c.png"):
        assert main([*argv, "--plot", str(tmp_path / name)]) == 0
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[2].startswith(b"\x89PNG")
    assert main([*argv, "--plot", str(tmp_path / "d.txt")]) == 1
    assert not list(tmp_path.glob("*.partial*"))


def test_a_trace_of_the_wrong_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="cannot read"):
        read_trace(tmp_path / "missing.jsonl")


def test_it_names_the_machine_and_ends_with_a_conclusion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    sizes = {"layers": ["a", "b"], "experts": [8, 8], "expert_bytes": [1000, 1000]}
    lines = [json.dumps(sizes)]
    for _ in range(40):
        for layer in range(2):
            chosen = rng.permutation(8)[:2].tolist()
            lines.append(json.dumps({"layer": layer, "experts": [chosen]}))
    (tmp_path / "talk.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--machine", "m3 max 64", "--shares", "0.5,0.75", "--policies", "lru,lfu"]
    assert main([str(tmp_path / "talk.jsonl"), *options]) == 0
    first, *_, before, last = capsys.readouterr().out.splitlines()
    assert "for an M3 Max 64 GB whose drive reads 4.05 GB/s to 5.94 GB/s" in first
    assert before.startswith("talk: with 75.0% resident the best is l")
    assert last.startswith("From 50.0% to 75.0% resident saves ")
