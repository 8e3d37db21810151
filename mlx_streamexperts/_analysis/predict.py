"""Predict the speed of a streamed model from sizes: a model of time, not a measurement.

Everything here is arithmetic on a `Plan` and a `Machine`. Docstrings state the formulas, comments
name the published figures behind them, and every result is a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._memory.budget import Plan
from .._memory.hardware import Machine
from .replay import replay

# Hit rate of LRU by resident share, replayed from real traces by the project boyle
# (Qwen3.5-397B, Qwen3-235B, GLM-5.2). They contain the first touches of short traces.
_SHARES = (0.0, 0.12, 0.25, 0.36, 0.64, 1.0)
PUBLISHED_HIT_RATES: dict[str, tuple[float, ...]] = {
    "qwen3_5_moe": (0.0, 0.58, 0.76, 0.83, 0.89, 1.0),
    "qwen3_moe": (0.0, 0.58, 0.80, 0.89, 0.97, 1.0),
    "glm_moe_dsa": (0.0, 0.50, 0.67, 0.76, 0.90, 1.0),
}
"""Hit rates at resident shares 0, .12, .25, .36, .64 and 1, by model type."""


@dataclass(frozen=True)
class Reported:
    """A result that others published for a streamed model, on their machine.

    Attributes:
        model_type: as in config.json.
        layers: expert layers of the model.
        machine: as `named_machine` takes it.
        memory: the budget that they state, or else the machine's, in bytes.
        tokens_per_s: decode rate.
        note: the authors, and differences from plain exact decoding.
        top_k: experts of a token, if they changed the model's own number.
        comparable: False if `note` says why no prediction can contain the result.
    """

    model_type: str
    layers: int
    machine: str
    memory: int
    tokens_per_s: float
    note: str
    top_k: int | None = None
    comparable: bool = True


REPORTED = (
    Reported("qwen3_5_moe", 60, "M5 Max 128 GB", 90 * 10**9, 7.2, "boyle/oMLX, served, 83 % hits"),
    Reported(
        "qwen3_5_moe", 60, "M3 Max 48 GB", 42 * 10**9, 4.36, "flash-moe, top-4 instead of top-10",
        top_k=4,
    ),
    Reported(
        "qwen3_5_moe", 60, "iPhone class 12 GB", 8 * 10**9, 0.6,
        "anemll; by this package's rules the model does not fit", comparable=False,
    ),
    Reported("qwen3_moe", 94, "M5 Max 128 GB", 70 * 10**9, 11.7, "boyle, Qwen3-235B-A22B"),
    Reported("qwen3_moe", 94, "M5 Max 128 GB", 90 * 10**9, 15.5, "boyle, Qwen3-235B-A22B"),
    Reported("qwen3_moe", 48, "M4 16 GB", 10 * 10**9, 14.1, "mlx-vlm; budget not stated"),
    Reported("kimi_k25", 60, "M4 Max 128 GB", 110 * 10**9, 1.7, "Daniel Isaac; budget not stated"),
)  # fmt: skip

_RATE_SHARE = (0.6, 0.9)
"""Share of the specified memory bandwidth that decode reaches: low, high."""

_UNKNOWN_CURVE = 0.1
"""Added on both sides of the published hit rates for a model of which none were published."""


@dataclass(frozen=True)
class Range:
    """A prediction: lowest, likely and highest value."""

    low: float
    likely: float
    high: float

    def __str__(self) -> str:
        return self.rounded(3)

    def rounded(self, digits: int) -> str:
        """The likely value and the range, as text.

        Args:
            digits: significant ones of each value.
        """
        likely, low, high = (
            f"{v:.{digits}g}" if v < 10**digits - 0.5 else f"{round(v, -1):.0f}"
            for v in (self.likely, self.low, self.high)
        )
        return f"{likely} ({low} to {high})"


@dataclass(frozen=True)
class Prediction:
    """Result of `predict`.

    Attributes:
        hit_rate: share of needed experts that are resident.
        tokens_per_s: decode rate.
        first_token: seconds to the first token after a prompt of `prompt_tokens`.
        prompt_tokens: length of that prompt.
        prompt_read_seconds, prompt_arithmetic_seconds: the likely parts of its time.
        compute_seconds, sync_seconds, read_seconds: the likely parts of one token's time.
        limit: the largest of them: "memory bandwidth", "host sync and launches" or "drive".
    """

    hit_rate: Range
    tokens_per_s: Range
    first_token: Range
    prompt_tokens: int
    compute_seconds: float
    sync_seconds: float
    read_seconds: float
    limit: str
    prompt_read_seconds: float = 0.0
    prompt_arithmetic_seconds: float = 0.0


def predict(
    plan: Plan, machine: Machine, prompt_tokens: int = 1000, hit_rate: Range | None = None
) -> Prediction:
    """Predict decode rate and time to first token.

    One token:

        compute = bytes of weights used / memory rate     (trunk, no embeddings, + top-k experts)
        sync    = streamed layers x sync seconds           (wholly resident layers ask nothing)
                  + layers x layer seconds
        read    = missed bytes / drive rate + layers with a miss x drive latency
                  + one drive latency if rows of tables are read (their bytes do not count)
        likely  = compute + sync + read                       (reads of a layer wait for its router)
        high    = max(compute + sync, read, launches), optimistic rates: perfect overlap
        low     = the sum with the pessimistic hit rate and rates

    A specified drive counts with `Machine.drive_share` of its rate, at the middle for `likely`, and
    a specified machine's sync with `Machine.sync_share` for `high`.

    First token: each chunk of `plan.prefill_tokens` reads every expert that it needs and that is
    not resident once: `E (1 - (1 - k/E)^T)` distinct experts of E for T tokens, if routing is even.
    Each token then takes two operations for each weight that it uses; reads and arithmetic add up,
    but at best the shorter hides behind the longer. Attention's own operations are left out.

    Args:
        plan: sizes of the model and its cache.
        machine: the machine.
        prompt_tokens: length of the prompt for `first_token`.
        hit_rate: measured or replayed; default: `published_hit_rate`.
    """
    hits = hit_rate or published_hit_rate(plan.model_type, plan.resident_share)
    streamed = [s for s, n in zip(plan.slots, plan.layer_experts, strict=True) if s < n]
    layers = len(streamed)
    launches = _layers(plan) * machine.layer_seconds
    sync = layers * machine.sync_seconds + launches
    wanted = plan.top_k * layers  # experts of one token that may miss

    low_drive, high_drive = (share * machine.drive_rate for share in machine.drive_share)
    drive = (low_drive + high_drive) / 2

    def read(rate: float, drive_rate: float) -> float:
        missed = (1 - rate) * plan.cold_bytes_per_token * layers / max(1, len(plan.slots))
        stalls = layers * (1 - rate ** (wanted / max(1, layers)))
        return missed / drive_rate + (stalls + bool(plan.tables)) * machine.drive_latency

    def compute(share: float) -> float:
        return plan.active_bytes_per_token / (machine.memory_rate * share)

    middle = sum(_RATE_SHARE) / 2
    likely = compute(middle) + sync + read(hits.likely, drive)
    slow = compute(_RATE_SHARE[0]) + sync + read(hits.low, low_drive)
    asked = machine.sync_share * (sync - launches)
    fast = max(
        compute(_RATE_SHARE[1]) + asked,
        read(hits.high, high_drive),
        machine.sync_share * launches,
    )
    parts = {
        "memory bandwidth": compute(middle),
        "host sync and launches": sync,
        "drive": read(hits.likely, drive),
    }

    chunks = plan.passes(prompt_tokens)
    sweep = sum(_touched(plan, tokens) for tokens in chunks) * (1 - plan.resident_share)
    cold = plan.experts if plan.resident_share < 1 else 0  # a prompt may push out what was resident
    weights = plan.active_bytes_per_token * 8 / plan.weight_bits
    work = 2 * weights * prompt_tokens / machine.arithmetic_rate if machine.arithmetic_rate else 0.0
    low_share, high_share = machine.arithmetic_share
    arithmetic = work / ((low_share + high_share) / 2)
    return Prediction(
        hit_rate=hits,
        tokens_per_s=Range(1 / slow, 1 / likely, 1 / fast),
        first_token=Range(
            # Uneven routing needs fewer experts: half is a guess.
            max(sweep / high_drive / 2, work / high_share) + fast,
            sweep / drive + arithmetic + likely,
            cold * len(chunks) / low_drive + work / low_share + slow,
        ),
        prompt_tokens=prompt_tokens,
        compute_seconds=parts["memory bandwidth"],
        sync_seconds=sync,
        read_seconds=parts["drive"],
        limit=max(parts, key=lambda k: parts[k]),
        prompt_read_seconds=sweep / drive,
        prompt_arithmetic_seconds=arithmetic,
    )


def _layers(plan: Plan) -> int:
    """Layers with experts; of a model that has none, all of them."""
    if plan.slots or plan.footprint is None:
        return len(plan.slots)
    return len(plan.footprint.layers)


def _touched(plan: Plan, tokens: int) -> float:
    """Expected bytes of the distinct experts that `tokens` tokens need, if routing is even."""
    total = 0.0
    for experts in plan.layer_experts:
        share = 1 - (1 - min(1.0, plan.top_k / experts)) ** tokens
        total += share * plan.experts * experts / sum(plan.layer_experts)
    return total


def published_hit_rate(model_type: str, resident_share: float) -> Range:
    """Hit rate of LRU at a resident share, interpolated in `PUBLISHED_HIT_RATES`.

    The range spans the published models; the likely value is the model's own curve if there is one,
    else their mean, and the range is then wider by `_UNKNOWN_CURVE` on both sides.
    """
    rates = [float(np.interp(resident_share, _SHARES, c)) for c in PUBLISHED_HIT_RATES.values()]
    own = PUBLISHED_HIT_RATES.get(model_type)
    likely = float(np.interp(resident_share, _SHARES, own)) if own else sum(rates) / len(rates)
    if own or resident_share >= 1:
        return Range(min(rates), likely, max(rates))
    low, high = max(0.0, min(rates) - _UNKNOWN_CURVE), min(1.0, max(rates) + _UNKNOWN_CURVE)
    return Range(low, likely, high)


def replayed_hit_rate(trace: Path, slots: Sequence[int], policy: str = "lru") -> Range:
    """Hit rate of a recorded trace (`ExpertStream.trace`) at a cache size.

    The likely value counts every needed expert. The high one leaves out first uses, as in a long
    run. The low one is the mean of the worst tenth of the layers.

    Args:
        trace: the recording.
        slots: slots of each layer, in model order.
        policy: replacement policy.

    Raises:
        StreamError: the file is no trace, or of a model with other layers.
    """
    total, layers = replay(trace, slots, policy)
    later = total.hits + total.capacity
    worst = sorted(x.hit_rate for x in layers)[: max(1, len(layers) // 10)]
    return Range(
        sum(worst) / len(worst), total.hit_rate, total.hits / later if later else total.hit_rate
    )
