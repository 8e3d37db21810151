"""Is a stated memory kept? Each kind of attention, at several contexts, by each caller.

    python benchmarks/promise.py                  # all rows, as a table in Markdown
    python benchmarks/promise.py --family kimi_k25 --context 2000 --caller bare

Each family is a small random checkpoint whose attention is wide, so that its work space counts. It
is loaded in a process of its own with 1.1 times the smallest memory that works, and called as users
call it, with mlx-lm's own defaults. Peaks are MLX's (`mx.get_peak_memory`) and the system's
(VmHWM, less what the process had before the load). Prints rows above the promise, and exits with 1
if there are any.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("grouped queries", {"num_attention_heads": 32, "num_key_value_heads": 4}),
    "deepseek_v3": ("latent (MLA)", {"num_attention_heads": 32, "num_key_value_heads": 32}),
    "kimi_k25": ("latent (MLA)", {"num_attention_heads": 64, "num_key_value_heads": 64}),
    "mistral4": ("latent, expanded", {"num_attention_heads": 32, "num_key_value_heads": 32}),
    "gpt_oss": ("sliding windows, sinks", {"num_attention_heads": 32, "num_key_value_heads": 4}),
    "llama4": ("chunked", {"num_attention_heads": 32, "num_key_value_heads": 4}),
    "glm_moe_dsa": ("sparse indexer", {"num_attention_heads": 32, "num_key_value_heads": 32}),
    "deepseek_v41": ("sparse, own caches", {}),
    "qwen3_next": ("gated delta rule", {}),
    "kimi_linear": ("linear (KDA)", {}),
    "jamba": ("Mamba", {}),
    "gemma4": ("two head sizes", {"num_attention_heads": 16}),
}
CALLERS = ("generate", "quantized", "batch", "bare")
CONTEXTS = (500, 3000)
BATCH = 16
SLACK = 48 << 20
"""Of the resident peak: code that is loaded, and Python's objects, beside MLX's memory."""


def callers(model: Any, vocabulary: int, context: int) -> dict[str, Callable[[], Any]]:
    """What a user runs, by name."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.models.cache import make_prompt_cache

    chance = np.random.default_rng(0)
    tokens = chance.integers(1, vocabulary, context).tolist()

    def generate(**options: Any) -> None:
        for _ in generate_step(mx.array(tokens), model, max_tokens=4, **options):
            pass

    def batch() -> None:
        batch = BatchGenerator(model, max_tokens=4)
        lengths = [max(2, context // 4 - 7 * i) for i in range(BATCH)]
        batch.insert([tokens[:n] for n in lengths])
        while any(batch.next()):
            pass
        batch.close()

    def bare() -> None:
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([tokens]), cache=cache))
        mx.eval(model(mx.array([[1]]), cache=cache))

    return {
        "generate": generate,
        "quantized": lambda: generate(kv_bits=8, kv_group_size=32, quantized_kv_start=0),
        "batch": batch,
        "bare": bare,
    }


def resident(kind: str) -> int:
    """Bytes: `VmRSS`, or its peak `VmHWM`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell resident memory: run it on Linux")


def measure(family: str, context: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one family, in this process."""
    import families
    import mlx.core as mx
    import mlx_lm.utils

    from mlx_streamexperts import StreamConfig, UnsupportedModelError, patch, plan, stream

    kind, changes = KINDS[family]
    with tempfile.TemporaryDirectory() as temporary:
        known = families.FAMILIES[family]
        known.update(changes)
        folder = families.build(family, Path(temporary) / family, quantize=None)
        for name in names:
            # A batch's sequences take room in steps of 256 tokens each.
            together = BATCH * (context // 4 + 256) if name == "batch" else context + 16
            config = StreamConfig(progress=False, context_tokens=together)
            memory = int(1.1 * plan(str(folder), config=config).minimum)
            gc.collect()
            mx.clear_cache()
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            mx.reset_peak_memory()
            with patch(memory=memory, config=config):
                model, _ = mlx_lm.utils.load_model(folder)
            expert_stream = stream(model)
            call = callers(model, families.VOCAB, context)[name]
            row = {"family": family, "kind": kind, "context": context, "caller": name}
            planned = expert_stream.plan
            row |= {"memory": memory, "planned": planned.mlx_bound, "slots": sum(planned.slots)}
            try:
                call()
            except UnsupportedModelError as e:
                row["refused"] = str(e)
            except (ValueError, NotImplementedError) as e:  # mlx-lm has no such cache
                row["refused"] = f"mlx-lm: {e}"
            row["peak"] = mx.get_peak_memory()
            row["resident"] = resident("VmHWM") - before
            row["slots_after"] = sum(expert_stream.plan.slots)
            row["kept"] = row["peak"] <= memory and row["resident"] <= memory + SLACK
            yield row
            expert_stream.close()
            del model, call


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, sizes in MB."""
    lines = [
        "| family | attention | context | caller | stated | MLX peak | resident | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        sizes = " | ".join(f"{r[k] / 1e6:.0f}" for k in ("memory", "peak", "resident"))
        kept = "refused by name" if "refused" in r else "yes" if r["kept"] else "NO"
        lines.append(
            f"| {r['family']} | {r['kind']} | {r['context']} | {r['caller']} | {sizes} | {kept} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=list(KINDS))
    parser.add_argument("--context", action="append", type=int)
    parser.add_argument("--caller", action="append", choices=CALLERS)
    parser.add_argument("--json", action="store_true", help="one JSON object a row, as they come")
    args = parser.parse_args(argv)
    families, contexts = args.family or list(KINDS), args.context or list(CONTEXTS)
    names = args.caller or list(CALLERS)
    if len(families) == len(contexts) == 1:
        rows = list(measure(families[0], contexts[0], names))
    else:  # a process for each family and context: memory that one left is none of the next
        rows = []
        for family in families:
            for context in contexts:
                command = [sys.executable, __file__, "--json", "--family", family]
                command += ["--context", str(context)]
                for name in names:
                    command += ["--caller", name]
                done = subprocess.run(command, capture_output=True, text=True)
                found = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
                if not found:
                    raise SystemExit(f"{family}: {done.stderr}")
                rows += found
                print("\n".join(table(found).splitlines()[2:]), file=sys.stderr, flush=True)
    print("\n".join(map(json.dumps, rows)) if args.json else table(rows))
    return int(not all(r["kept"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
