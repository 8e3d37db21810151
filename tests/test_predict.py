"""Predictions follow from sizes by the stated formula; replayed traces count as the live cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import pytest
from conftest import QUIET, all_experts, load_streamed
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import BudgetError, StreamError, plan, stream
from mlx_streamexperts._analysis.catalogue import KNOWN_MODELS, KnownModel, known_model
from mlx_streamexperts._analysis.predict import (
    PUBLISHED_HIT_RATES,
    REPORTED,
    Range,
    Reported,
    predict,
    published_hit_rate,
    replay,
    replayed_hit_rate,
)
from mlx_streamexperts._memory.budget import Plan, weight_bits
from mlx_streamexperts._memory.hardware import NAMED_MACHINES, Machine, named_machine

MACHINE = Machine(
    "test", 10**10, 100e9, 1e9, drive_latency=0.0, sync_seconds=0.0, layer_seconds=0.0
)


@pytest.fixture(scope="module")
def half(checkpoint: Callable[..., Path]) -> Plan:
    """A plan with half of the experts resident."""
    folder = checkpoint("qwen3_moe")
    whole = plan(folder, cache="1GB", config=QUIET)
    return plan(folder, cache=whole.experts // 2, config=QUIET)


def test_a_faster_drive_helps_while_reads_are_the_limit(half: Plan) -> None:
    slow = predict(half, MACHINE, hit_rate=Range(0.5, 0.5, 0.5))
    assert slow.limit == "drive"
    fast = predict(half, replace(MACHINE, drive_rate=2e9), hit_rate=Range(0.5, 0.5, 0.5))
    assert fast.read_seconds == pytest.approx(slow.read_seconds / 2)
    assert fast.compute_seconds == slow.compute_seconds
    assert fast.tokens_per_s.likely > slow.tokens_per_s.likely
    full = predict(half, MACHINE, hit_rate=Range(1.0, 1.0, 1.0))
    assert full.read_seconds == 0 and full.limit == "memory bandwidth"


def test_the_formula_by_hand(half: Plan) -> None:
    p = predict(half, MACHINE, hit_rate=Range(0.5, 0.5, 0.5))
    compute = half.active_bytes_per_token / (100e9 * 0.75)
    read = 0.5 * half.cold_bytes_per_token / 1e9
    assert p.compute_seconds == pytest.approx(compute)
    assert p.read_seconds == pytest.approx(read)
    assert p.tokens_per_s.likely == pytest.approx(1 / (compute + read))
    assert p.tokens_per_s.high == pytest.approx(1 / max(half.active_bytes_per_token / 90e9, read))
    assert p.limit == "drive"


def test_a_prompt_takes_the_time_of_its_arithmetic(half: Plan) -> None:
    whole = replace(half, cache=half.experts, slots=half.layer_experts)
    counting = replace(MACHINE, arithmetic_rate=1e9)
    p = predict(whole, counting, 1000)
    weights = whole.active_bytes_per_token * 8 / whole.weight_bits
    assert p.prompt_read_seconds == 0
    assert p.prompt_arithmetic_seconds == pytest.approx(2 * weights * 1000 / 1e9)
    assert p.first_token.low > p.prompt_arithmetic_seconds
    assert (
        predict(half, counting, 1000).first_token.likely
        > predict(half, MACHINE, 1000).first_token.likely
    )


@pytest.mark.parametrize(
    ("stated", "bits"),
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, 4.5),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, 4.25),
        ({"torch_dtype": "float32"}, 32),
        ({}, 16),
    ],
)
def test_bits_of_a_weight(stated: dict[str, Any], bits: float) -> None:
    assert weight_bits(stated) == bits


def test_what_is_resident_costs_neither_reads_nor_syncs(half: Plan) -> None:
    whole = replace(half, cache=half.experts, slots=half.layer_experts)
    p = predict(whole, replace(MACHINE, sync_seconds=1.0, drive_latency=1.0))
    assert (p.read_seconds, p.sync_seconds) == (0, 0)
    assert p.hit_rate.likely == 1


@pytest.mark.parametrize("better", ["memory_rate", "drive_rate"])
def test_better_machines_are_predicted_faster(better: str, half: Plan) -> None:
    slow = predict(half, MACHINE)
    fast = predict(half, replace(MACHINE, **{better: 10 * getattr(MACHINE, better)}))
    for end in ("low", "likely", "high"):
        assert getattr(fast.tokens_per_s, end) >= getattr(slow.tokens_per_s, end)
    assert fast.tokens_per_s.likely > slow.tokens_per_s.likely


@pytest.mark.parametrize("machine", NAMED_MACHINES.values(), ids=NAMED_MACHINES)
def test_ranges_are_in_order(machine: Machine, half: Plan) -> None:
    p = predict(half, machine)
    for r in (p.hit_rate, p.tokens_per_s):
        assert r.low <= r.likely <= r.high
    assert p.first_token.high >= p.first_token.likely >= p.first_token.low > 0


def test_longer_prompts_read_more_until_every_expert_is_read(half: Plan) -> None:
    seconds = [predict(half, MACHINE, n).first_token.likely for n in (1, 10, 2000)]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[2]


def test_published_curves_are_met_and_interpolated() -> None:
    assert published_hit_rate("qwen3_5_moe", 0.25).likely == 0.76
    between = published_hit_rate("qwen3_5_moe", 0.30).likely
    assert 0.76 < between < 0.83
    unknown = published_hit_rate("something_new", 0.25)
    assert (unknown.low, unknown.high) == pytest.approx((0.57, 0.90))  # wider: no own curve
    assert all(list(c) == sorted(c) for c in PUBLISHED_HIT_RATES.values())


@pytest.mark.parametrize("reported", REPORTED, ids=lambda r: f"{r.machine}-{r.tokens_per_s}")
def test_what_others_report_lies_in_the_range_or_the_note_says_why_not(reported: Reported) -> None:
    model = known_model(reported.model_type, reported.layers)
    assert model is not None
    try:
        sizes = model.plan(reported.memory, reported.top_k)
    except BudgetError:
        assert not reported.comparable and "does not fit" in reported.note
        return
    speed = predict(sizes, named_machine(reported.machine)).tokens_per_s
    inside = speed.low <= reported.tokens_per_s <= speed.high
    assert inside == reported.comparable, f"{reported.tokens_per_s} and {speed}"
    assert speed.high < 6 * speed.low  # a range that holds everything says nothing


def test_the_tables_of_the_readme_and_the_page_are_up_to_date() -> None:
    """`python docs/make_predictions.py` writes them."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
    import make_predictions

    for file, text in make_predictions.texts().items():
        assert file.read_text() == text, file


@pytest.mark.parametrize("model", KNOWN_MODELS, ids=lambda m: m.name)
def test_more_memory_is_predicted_faster(model: KnownModel) -> None:
    rates = []
    for memory in (64, 128, 512):
        try:
            machine = named_machine(f"M3 Ultra {memory}")
            rates.append(predict(model.plan(memory * 10**9 * 3 // 4), machine).tokens_per_s.likely)
        except BudgetError as e:
            assert e.needed_bytes > memory * 10**9 * 3 // 4
    assert rates and rates == sorted(rates)


@pytest.mark.parametrize(
    "spelling",
    [
        "M4 Max 128 GB",
        "m4 max 128",
        "M4MAX 128gb",
        "apple m4-max, 128",
        "m4 max/128g",
        "MacBook Pro M4 Max 128GB",
        "Apple M4 Max (16 core) with 128 GB unified memory",
        "MacBook Pro 16 inch M4 Max 128 GB",
    ],
)
def test_a_mac_is_understood_however_it_is_spelled(spelling: str) -> None:
    assert named_machine(spelling) == NAMED_MACHINES["M4 Max 128 GB"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("Cray", "unknown machine"), ("m4 max", "how much memory"), ("m4 ultra 128", "no figures"),
     ("m9 64", "no figures"), ("m0 64", "no figures"), ("m4 3", "no Mac has 3 GB")],
)  # fmt: skip
def test_a_mac_that_does_not_exist_is_refused(name: str, says: str) -> None:
    with pytest.raises(StreamError, match=says):
        named_machine(name)


def test_a_better_mac_never_has_a_slower_drive() -> None:
    """One basis: nobody's own figure makes a smaller Mac beat a bigger one."""
    rates = [named_machine(f"M{n} Max 64").drive_rate for n in range(1, 6)]
    assert rates == sorted(rates)
    for n in range(1, 6):
        assert named_machine(f"M{n} 16").drive_rate < named_machine(f"M{n} Pro 32").drive_rate


def test_specified_machines_have_wider_ranges_than_measured_ones(half: Plan) -> None:
    specified = named_machine("M4 Max 128 GB")
    measured = replace(specified, drive_share=(1.0, 1.0), sync_share=1.0)
    wide, narrow = (predict(half, m).tokens_per_s for m in (specified, measured))
    assert wide.low < narrow.low and narrow.high < wide.high


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_replay_counts_exactly_what_the_live_cache_counted(
    policy: str, share: float, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Prompts that go through in waves included."""
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40, replace(QUIET, policy=policy))
    with stream(model) as expert_stream:
        least = sum(n.top_k * n.expert_bytes for n in expert_stream.needs())
        expert_stream.resize(max(least, int(share * all_experts(expert_stream))))
        expert_stream.reset()
        with expert_stream.trace(tmp_path / "trace.jsonl"):
            for seed in (1, 2):
                cache = make_prompt_cache(model)
                tokens = families.token_stream(families.VOCAB, 40, seed)
                mx.eval(model(mx.array(tokens[:20])[None], cache=cache))
                for t in tokens[20:]:
                    mx.eval(model(mx.array([[int(t)]]), cache=cache))
        slots = [x.cache.slots for x in expert_stream.layers]
        total, layers = replay(tmp_path / "trace.jsonl", slots, policy)
        assert total == expert_stream.stats().cache
        assert layers == [x.cache.stats for x in expert_stream.layers]
        r = replayed_hit_rate(tmp_path / "trace.jsonl", slots, policy)
        assert r.low <= r.likely <= r.high
        assert r.likely == total.hit_rate


HEAD = {"layers": ["a", "b"], "experts": [4, 4], "expert_bytes": [1, 1]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "not a trace"),
        (["nonsense"], "line 1: not JSON"),
        (["[1]"], "line 1: not a JSON object"),
        ([json.dumps({"experts": "four"})], "not a trace"),
        ([json.dumps({"experts": [4]})], "1 expert layers, the model has 2"),
        ([json.dumps(HEAD), '{"layer": 2, "experts": [[1]]}'], "line 2"),
        ([json.dumps(HEAD), '{"layer": 0, "experts": [[4]]}'], "no such expert"),
        ([json.dumps(HEAD), '{"layer": 0, "experts": [[-1]]}'], "no such expert"),
        ([json.dumps(HEAD), '{"layer": 0}'], "line 2"),
        ([json.dumps(HEAD), '{"layer": 0, "experts": 3}'], "line 2"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(
    lines: list[str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(StreamError, match=message):
        replay(file, [2, 2])


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="no-such"):
        replay(tmp_path / "no-such", [2])
