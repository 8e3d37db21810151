"""One model shared by 1, 2 and 4 processes, each with the same expert cache.

    python benchmarks/ranks.py                                  # the embedded model, 5 MB each
    python benchmarks/ranks.py --random FOLDER --cache 600MB

Started by `mlx.launch` over MLX's ring backend, all on this machine: caches and the division of
reads add up as they would on several machines; the speed does not, since the processes share cores,
drive and memory. One-token steps over given tokens, counted after warm-up steps that fill the
caches.
Reads go past the page cache, prefetching is off. The logits of all runs are compared, bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from decode import prompt_tokens
from mlx_lm.models.cache import make_prompt_cache
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, demo_model, patch, stream
from mlx_streamexperts._config import format_size


def measure(model_folder: str, cache: str, warm_up: int, tokens: int) -> None:
    """One rank; rank 0 prints every rank's counts as a line of JSON."""
    config = StreamConfig(
        cache=cache, prefetch="off", bypass_page_cache="on", progress=False, pipeline=True
    )
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(Path(model_folder))
    s = stream(model)
    kv = make_prompt_cache(model)
    steps = prompt_tokens(Path(model_folder), warm_up + tokens)
    digest = hashlib.sha256()
    for i, token in enumerate(steps):
        if i == warm_up:
            s.reset()
            began = time.perf_counter()
        logits = model(mx.array([[int(token)]]), cache=kv)[0, -1].astype(mx.float32)  # [V]
        mx.eval(logits)
        digest.update(np.array(logits).tobytes())
    seconds = time.perf_counter() - began
    stats, plan = s.stats(), s.plan
    mine = {
        "layers": len(s.layers), "hit_rate": stats.cache.hit_rate, "tokens_per_s": tokens / seconds,
        "read_bytes_per_token": stats.read.bytes / tokens, "resident": plan.resident_share,
        "waited": stats.read.wait_seconds / seconds, "peak": mx.get_peak_memory(),
        "trunk": plan.trunk, "cache": plan.cache, "logits": digest.hexdigest(),
    }  # fmt: skip
    everybody = [mine] if s.ranks is None else s.ranks.exchange(mine)
    if mx.distributed.init().rank() == 0:
        print(json.dumps(everybody), flush=True)


def free_port(count: int) -> int:
    """The first of some ports in a row that nobody listens on."""
    for port in range(42000, 60000, 16):
        try:
            for offset in range(count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return port
    raise SystemExit("no free ports")


def launch(ranks: int, *words: str) -> list[dict[str, Any]]:
    """Run this script's `measure` on so many processes."""
    command = [sys.executable, __file__, "--worker", *words]
    if ranks > 1:
        launcher = str(Path(sys.executable).with_name("mlx.launch"))
        port = str(free_port(ranks))
        ring = ["-n", str(ranks), "--backend", "ring", "--starting-port", port]
        command = [launcher, *ring, "--", *command]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not done.stdout.strip():
        raise SystemExit(done.stderr)
    result: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--random", type=Path, help="write 4.8 GB of random weights here, use them")
    parser.add_argument("--cache", default="5MB", help="of each process")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = write_random_model(args.random) if args.random else args.model
    if args.worker:
        measure(str(folder), args.cache, args.warm_up, args.tokens)
        return
    words = ("--model", str(folder), "--cache", args.cache,
             "--warm-up", str(args.warm_up), "--tokens", str(args.tokens))  # fmt: skip
    results = {n: launch(n, *words) for n in map(int, args.ranks.split(","))}
    print("| processes | rank | layers | resident | hit rate | read per token | peak | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for ranks, report in results.items():
        for rank, r in enumerate(report):
            print(
                f"| {ranks} | {rank} | {r['layers']} | {r['resident']:.1%} | {r['hit_rate']:.1%} "
                f"| {format_size(r['read_bytes_per_token'])} | {format_size(r['peak'])} "
                f"| {r['tokens_per_s']:.1f} |"
            )
        total = sum(r["read_bytes_per_token"] for r in report)
        print(f"| {ranks} | all | {sum(r['layers'] for r in report)} "
              f"| {sum(r['cache'] for r in report) / 1e6:.3g} MB | "
              f"| {format_size(total)} | | |")  # fmt: skip
    same = len({r["logits"] for report in results.values() for r in report}) == 1
    print(f"\nLogits of all runs and ranks are {'the same bits' if same else 'DIFFERENT'}.")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
