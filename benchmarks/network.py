"""Two ranks with a stated delay between them: tokens and prompts against the arithmetic.

    python benchmarks/network.py                                  # the embedded model

Both run on this machine, each on one core, over MLX's ring backend. A relay (`relay.py`) stands
between them and adds the delay to every message. The same two processes run all delays in turns,
round by round, on the same tokens with the same expert caches, which they have filled before.

The arithmetic is `predict_ranks`'s, from what is measured without added delay and from what a
message takes longer with it (`more`), measured with nothing but messages:

    token = the same without delay + 2 more
    prompt of n chunks = one chunk on both ranks + (n - 1) x one chunk on one + a token + 2 n more

The second has each chunk pay for its messages. "Full pipe" pays for them once, and "one by one" is
a prompt whose chunks wait for each other. Each figure is that of its quietest round, since whatever
else runs on the machine only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from adapters.measure import prompt_logits
from decode import prompt_tokens
from mlx_lm.models.cache import make_prompt_cache
from ranks import free_port
from relay import Relay

from mlx_streamexperts import StreamConfig, demo_model, patch, stream
from mlx_streamexperts._config import parse_size

RANKS = 2


def work(args: argparse.Namespace) -> None:
    """One rank: a round for each line that arrives."""
    config = StreamConfig(cache=args.cache, prefetch="off", progress=False, pipeline=True, cores=1)
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(args.model)
    tokens = prompt_tokens(args.model, args.warm_up + args.tokens)
    kv = make_prompt_cache(model)

    def step(token: int) -> float:
        start = time.perf_counter()
        mx.eval(model(mx.array([[token]]), cache=kv))
        return time.perf_counter() - start

    def prompt(chunks: int) -> float:
        """Seconds to the first token."""
        start = time.perf_counter()
        words = (tokens * args.chunk)[: args.chunk * chunks + 1]
        prompt_logits(model, words, args.chunk)
        return time.perf_counter() - start

    group, word = mx.distributed.init(), mx.zeros(model.args.hidden_size)
    sends = [lambda: mx.distributed.send(word, 1 - group.rank()),
             lambda: mx.distributed.recv_like(word, 1 - group.rank())]  # fmt: skip

    def message() -> float:
        """Seconds of one, to the other rank or back."""
        start = time.perf_counter()
        for _ in range(args.messages):
            for way in sends if group.rank() == 0 else sends[::-1]:
                mx.eval(way())
        return (time.perf_counter() - start) / (2 * args.messages)

    prompt(args.chunks)
    for token in tokens[: args.warm_up]:
        step(token)
    for _ in sys.stdin:
        seconds = [step(token) for token in tokens[args.warm_up :]]
        found = {
            "token": sum(seconds) / len(seconds), "chunk": prompt(1), "message": message(),
            "prompt": prompt(args.chunks),
        }  # fmt: skip
        print(json.dumps(found), flush=True)
    stream(model).close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--cache", default="5MB", help="of each rank")
    parser.add_argument("--delays", default="0,1,5", help="milliseconds of a message")
    parser.add_argument("--rate", default="1GB", help="bytes/s of the link")
    parser.add_argument("--tokens", type=int, default=10, help="timed tokens a round")
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--messages", type=int, default=30, help="timed messages a round")
    parser.add_argument("--chunk", type=int, default=16, help="tokens of a prompt's chunk")
    parser.add_argument("--chunks", type=int, default=8, help="of the long prompt")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    delays = [float(d) / 1e3 for d in args.delays.split(",")]
    own = free_port(RANKS)
    ports = [own + rank for rank in range(RANKS)]
    relays = [
        Relay(("127.0.0.1", 0), ("127.0.0.1", port), 0.0, parse_size(args.rate)) for port in ports
    ]
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(RANKS):
            # A rank listens at its own address and connects to the other's: to its relay.
            hosts = [relay.port for relay in relays]
            hosts[rank] = ports[rank]
            file = Path(folder) / f"{rank}.json"
            file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in hosts]))
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--worker", *sys.argv[1:]],
                    env={**os.environ, "MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            rounds = measure(args.rounds, delays, relays, processes)
        finally:
            for process in processes:
                process.communicate()
    print_table(args.chunks, delays, rounds)


def measure(
    count: int, delays: list[float], relays: list[Relay], processes: list[subprocess.Popen[str]]
) -> list[dict[float, dict[str, float]]]:
    """By round and delay: seconds of the rank that ended last."""
    rounds = []
    for number in range(count):
        found: dict[float, dict[str, float]] = {}
        for delay in delays if number % 2 == 0 else delays[::-1]:
            for relay in relays:
                relay.delay = delay
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            each: list[dict[str, Any]] = []
            for process in processes:
                assert process.stdout is not None
                each.append(json.loads(process.stdout.readline()))
            found[delay] = {key: max(e[key] for e in each) for key in each[0]}
        rounds.append(found)
    return rounds


def print_table(
    chunks: int, delays: list[float], rounds: list[dict[float, dict[str, float]]]
) -> None:
    """What the quietest round of each delay took, in milliseconds."""
    head = ["added delay", "message", "token", "predicted", f"prompt of {chunks} chunks",
            "predicted", "full pipe", "one by one"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    least = {d: {key: min(r[d][key] for r in rounds) for key in rounds[0][d]} for d in delays}
    without = least[delays[0]]
    chunk = without["chunk"] - without["token"]  # a prompt's last token is a pass of its own
    pipe = (chunks + 1) / 2 * chunk + without["token"]
    for delay, there in least.items():
        more = there["message"] - without["message"]
        row = [
            delay, there["message"], there["token"], without["token"] + 2 * more, there["prompt"],
            pipe + 2 * chunks * more, pipe + 2 * more,
            chunks * (chunk + 2 * more) + without["token"] + 2 * more,
        ]  # fmt: skip
        print("| " + " | ".join(f"{1e3 * x:.3g} ms" for x in row) + " |")


if __name__ == "__main__":
    main()
