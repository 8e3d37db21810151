"""Hold the formula of `doctor` against decoding here: the embedded model behind slower drives.

    python benchmarks/predictions.py

Each row decodes the same text with a share of the experts resident, behind a drive of a stated
rate. The prediction takes what `doctor` measures here, the stated rate and the hit rate of the
run, so its error is that of the time model alone. Rates are low because the experts are small.
"""

from __future__ import annotations

import statistics
import sys

import mlx.core as mx

from mlx_streamexperts import demo_model, load, stream
from mlx_streamexperts._analysis.measure import layer_seconds, memory_rate, sync_seconds
from mlx_streamexperts._analysis.predict import Range, predict
from mlx_streamexperts._analysis.throttle import slowed
from mlx_streamexperts._memory.hardware import Machine
from mlx_streamexperts.report._speed import combined, generate

CACHES = ("10MB", "20MB")
RATES = (100e6, 50e6, 25e6)
TOKENS, REPEATS = 32, 3


def main() -> int:
    """Print a table and the median error."""
    errors = []
    print(f"MLX {mx.__version__}, {mx.default_device()}")
    print("| resident | drive | hits | measured tokens/s | predicted | range | error |")
    print("|---|---|---|---|---|---|---|")
    for cache in CACHES:
        model, tokenizer = load(str(demo_model()), cache=cache)
        text = tokenizer.encode("In the beginning God created the heaven and the earth. And")
        plan = stream(model).plan
        layers = len(plan.slots)
        here = Machine(
            "here", 0, memory_rate(), 1.0, 0.0, sync_seconds(layers=layers), layer_seconds()
        )
        generate(model, text, TOKENS)
        for rate in RATES:
            with slowed(rate, 0.0):
                found = combined([generate(model, text, TOKENS) for _ in range(REPEATS)])
            hits = Range(found.hit_rate, found.hit_rate, found.hit_rate)
            machine = Machine(
                "here", 0, here.memory_rate, rate, 0.0, here.sync_seconds, here.layer_seconds
            )
            speed = predict(plan, machine, 1, hits).tokens_per_s
            measured = found.tokens_per_s.median
            errors.append(abs(speed.likely / measured - 1))
            print(
                f"| {plan.resident_share:.0%} | {rate / 1e6:.0f} MB/s | {found.hit_rate:.0%} | "
                f"{measured:.3g} | {speed.likely:.3g} | {speed.low:.3g} to {speed.high:.3g} | "
                f"{speed.likely / measured - 1:+.0%} |",
                flush=True,
            )
        stream(model).close()
    print(f"median error {statistics.median(errors):.0%}, largest {max(errors):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
