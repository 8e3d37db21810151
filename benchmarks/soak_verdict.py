"""What a soak's record says: figures, and each of the promises as a sentence, kept or broken.

Nothing here knows how the record was made. Memory is flat where it grew by less than `MOST_GROWTH`
after the first sixth, or by no more than its own noise would give in 19 of 20 runs. Resident memory
is what is in use, MLX's and malloc's beside it, and what malloc keeps for later. Minutes are
taken together in ten blocks for that: each is like the one before (memory goes up and down over ten
minutes), and taken for independent they made a dip at the middle of an hour look like growth after
it. Latency drifts where the server's processor time per token did by more than `MOST_DRIFT`, since
seconds are also the machine's.
"""

from __future__ import annotations

from statistics import mean, median
from typing import Any

MOST_GROWTH = 0.01
MOST_DRIFT = 0.10
BLOCKS = 10
_MEMORY = {
    "resident": "resident memory",
    "beside": "malloc's memory in use beside MLX's",
    "active": "MLX's memory",
}
NOISE = 2.31  # standard errors: Student's t of BLOCKS - 2 degrees of freedom, 95 %, two-sided


def slope(values: list[float]) -> tuple[float, float]:
    """Least squares over equal steps: growth per step, and its standard error."""
    steps = len(values)
    middle, level = (steps - 1) / 2, mean(values)
    spread = sum((i - middle) ** 2 for i in range(steps))
    rise = sum((i - middle) * (v - level) for i, v in enumerate(values)) / spread
    off = sum((v - level - rise * (i - middle)) ** 2 for i, v in enumerate(values))
    return rise, (off / (steps - 2) / spread) ** 0.5 if steps > 2 else float("inf")


def growth(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """How a figure of bytes grew after the first sixth of the rows."""
    values = [float(r[key]) for r in rows[len(rows) // 6 :]]
    size = max(1, len(values) // BLOCKS)
    first = len(values) % size
    blocks = [mean(values[i : i + size]) for i in range(first, len(values), size)]
    rise, error = (x / size for x in slope(blocks))
    grown = rise * (len(values) - 1)
    flat = grown < MOST_GROWTH * mean(values) or rise < NOISE * error
    return {
        "bytes_per_hour": round(60 * rise), "error": round(60 * error), "flat": flat,
        "least": min(values), "most": max(values),
    }  # fmt: skip


def drift(rows: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """Medians of the second and of the last quarter of the rows, and their ratio."""
    values = [r[key] for r in rows]
    quarter = len(values) // 4
    early = [v for v in values[quarter : 2 * quarter] if v is not None]
    late = [v for v in values[-quarter:] if v is not None] if quarter else []
    if not early or not late:
        return None
    return {"early": median(early), "late": median(late), "ratio": median(late) / median(early)}


def verdict(record: dict[str, Any], against: str = "stock mlx-lm") -> dict[str, Any]:
    """Figures, `words`, and whether all promises were kept (`kept`).

    Args:
        against: what replies were compared with.
    """
    rows, start, end = record["rows"], record["start"], record["end"]
    measured = [k for k in _MEMORY if rows and rows[0].get(k) is not None and len(rows) > 5]
    memory = {k: growth(rows, k) for k in measured}
    latency = {
        k: drift(rows, k)
        for k in ("first_token_s", "tokens_per_s", "cpu_ms_per_token", "yardstick_ms")
    }
    compared, wrong = (sum(r[k] for r in rows) for k in ("compared", "wrong"))
    requests, errors = (sum(r[k] for r in rows) for k in ("requests", "errors"))
    cpu = latency["cpu_ms_per_token"]
    left = {k: (start[k], end[k]) for k in ("descriptors", "threads")}
    peak, promised = end["peak"] / 1e6, end["budget"] / 1e6
    promises: list[tuple[bool, str]] = [
        (
            not wrong and compared > 0,
            f"{compared:,} of {requests:,} requests compared with {against}, {wrong} differ",
        ),
        (not errors, f"{errors} answers other than the ones there should be"),
        (peak <= promised, f"MLX's peak was {peak:.1f} MB, promised were {promised:.1f} MB"),
        *(
            (
                m["flat"],
                f"{_MEMORY[k]} grew by {m['bytes_per_hour'] / 1e6:+.2f} MB an hour after the "
                f"first sixth (standard error {m['error'] / 1e6:.2f}; {m['least'] / 1e6:.1f} to "
                f"{m['most'] / 1e6:.1f} MB)",
            )
            for k, m in memory.items()
        ),
        *(
            (b <= a, f"{what}: {a} before the first request, {b} after the last")
            for what, (a, b) in left.items()
            if a is not None
        ),
        (
            record["exit_status"] == 0 and not record["tracebacks"],
            f"the server ended with status {record['exit_status']}, {record['tracebacks']} "
            "tracebacks in its log",
        ),
    ]
    if cpu is not None:
        promises.append(
            (cpu["ratio"] < 1 + MOST_DRIFT, "processor time per token: " + _words(cpu, "ms"))
        )
    words = [f"{'kept' if ok else 'BROKEN'}: {text}" for ok, text in promises]
    for key, unit in (("first_token_s", "s"), ("tokens_per_s", ""), ("yardstick_ms", "ms")):
        if (found := latency[key]) is not None:
            words.append(f"{key}: " + _words(found, unit))
    return {
        "kept": all(ok for ok, _ in promises),
        "words": words,
        "memory": memory,
        "latency": latency,
    }


def _words(found: dict[str, float], unit: str) -> str:
    return (
        f"{found['early']:.3g} {unit} in the second quarter, {found['late']:.3g} in the last "
        f"({found['ratio']:.2f} times)"
    ).replace("  ", " ")
