"""Is a stated memory kept on a GPU? Kimi K2.5 at its true width, three layers, long prompts.

    python benchmarks/gpu/memory.py FOLDER --out memory.json

Writes the stand-in's first layers (examples/fullsize) into FOLDER, and runs prompts through
mlx-lm's own `generate_step`, with its step of 2,048 tokens. No bytes are read: only memory counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.generate import generate_step
from played import Played, write

from mlx_streamexperts import BudgetError, StreamConfig, patch, stream
from mlx_streamexperts import _osinfo as platform

LAYERS = 2  # with experts; the first layer has none
RUNS = (("30GB", 24576, 16000), ("14GB", 4096, 4000), ("20GB", None, 12000), ("14GB", 24576, 20000))


def measure(folder: Path, memory: str, context: int | None, prompt: int) -> dict[str, Any]:
    """Peaks of one prompt."""
    gc.collect()
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    config = StreamConfig(progress=False, context_tokens=context)
    row: dict[str, Any] = {"memory": memory, "context_tokens": context, "prompt": prompt}
    with patch(memory=memory, config=config):
        model, _ = mlx_lm.utils.load_model(folder, strict=False)
    s = stream(model)
    row |= {"plan": str(s.plan), "passes": s.plan.passes(prompt), "loaded": mx.get_peak_memory()}
    tokens = mx.random.randint(0, 100_000, (prompt,))
    begin = time.perf_counter()
    try:
        for _ in generate_step(tokens, model, max_tokens=4):
            pass
    except BudgetError as e:
        row["refused"] = str(e)
    row |= {"seconds": time.perf_counter() - begin, "peak": mx.get_peak_memory() - base}
    row |= {"bound": s.plan.bound, "kept": mx.get_peak_memory() - base <= s.plan.bound}
    row["plan after"] = str(s.plan)
    s.close()
    return row


def main() -> int:
    """Run the command line; returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        write("kimi-k2.5", args.folder, LAYERS)
    platform.read_into = Played(math.inf)
    rows = []
    for run in RUNS:
        rows.append(measure(args.folder, *run))
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps({"device": mx.device_info(), "rows": rows}, indent=1))
    return int(not all(r["kept"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
