"""Streaming the stand-ins of the headline models from drives that are played, on a GPU.

    python benchmarks/gpu/standins.py --out RESULTS --model qwen3.5-397b --shares 0.25,0.5,0.75

The model is the full-size stand-in (examples/fullsize) with a random trunk; its experts are random
numbers put into the slots beforehand. The drive is played: a read ends when a bus of the stated
rate that carries one read after another would have delivered it, 80 us later, and moves no bytes.
CUDA moves managed memory by pages, at 2.6 GB/s when the host writes into slots, which no Mac does
and which would hide every drive faster than that; so what is timed is the data path and the
device's work, and not their competition for memory. Where a share of all experts is more than the
GPU holds, the model is cut to the layers that fit; a token's time is given for the whole model.

Tokens are drawn from a few hundred, so that experts come again; hit rates are stated beside every
figure, and are not those of a trained model. Of each way the time is that of the slowest of compute
and reads (roofline) against what was measured:
    ask          every layer's indices are waited for; the next router's guesses are read ahead
    trust        run-ahead, trusting the layers that it pays to trust
    scout        run-ahead, each token begun by a pass that tells what it will want
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from common import PLAIN, report
from decode import Throttle
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import ExpertStream, patch, platform, stream
from mlx_streamexperts.bank import byte_view
from mlx_streamexperts.layer import ExpertLayer
from mlx_streamexperts.runahead import RunAhead
from mlx_streamexperts.trust import Trust

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "fullsize"))
import write as fullsize

DRIVES = {"2.4": 2.4e9, "7.4": 7.4e9, "12.6": 12.6e9, "17.5": 17.5e9, "unthrottled": 1e15}
LAYERS = {"qwen3.5-397b": 60, "kimi-k2.5": 60}  # with experts
DENSE = {"qwen3.5-397b": 0, "kimi-k2.5": 1}
EXPERT_BYTES = {"qwen3.5-397b": (512, 7_077_888), "kimi-k2.5": (384, 27_525_120)}
KEPT_BYTES = 12 << 30  # for the trunk, caches and work


def fill(layer: ExpertLayer) -> None:
    """Random experts in every slot: 4-bit codes, scales as of weights of variance 1 / columns."""
    for name, t in layer.tensors.items():
        shape = (layer.cache.slots, *t.slot.shape)
        if t.slot.dtype == mx.uint32:
            array = mx.random.randint(0, (1 << 31) - 1, shape).astype(mx.uint32)
        else:
            columns = shape[-1] * t.slot.module.group_size
            scale = columns**-0.5 / 4.6
            value = -7.5 * scale if t.slot.attribute == "biases" else scale
            array = mx.full(shape, value, t.slot.dtype)
        mx.eval(array)
        setattr(t.slot.module, t.slot.attribute, array)
        layer.slots.bank._bytes[name] = byte_view(array)
    mx.clear_cache()


def pack(layer: ExpertLayer, file: str) -> None:
    """Places as in a packed store: an expert's parts side by side, one read. Nothing is read."""
    at = 0
    for name, t in layer.tensors.items():
        row = t.stored.row_bytes
        offsets = [e * 2 * layer.expert_bytes + at for e in range(layer.experts)]
        stored = replace(t.stored, files=(file,) * layer.experts, offsets=tuple(offsets))
        layer.tensors[name] = replace(t, stored=stored)
        at += row
    layer.slots.tensors = layer.tensors


class Played(Throttle):
    """A drive that takes its time and moves no bytes."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(bytes_per_s)
        self._read = lambda fd, buffers, offset: sum(map(len, buffers))


class Fixed(Trust):
    """One way, whatever is measured."""

    fixed = "ask"

    @property
    def way(self) -> str:
        return self.fixed


def steps(model: nn.Module, cache: list[Any], tokens: list[int]) -> list[float]:
    """Seconds of each of some one-token steps."""
    seconds = []
    for t in tokens:
        start = time.perf_counter()
        mx.eval(model(mx.array([[t]]), cache=cache))
        seconds.append(time.perf_counter() - start)
    return seconds


def compute_seconds(model: nn.Module, s: ExpertStream, tokens: list[int]) -> float:
    """A token's time with every expert in memory: nothing is asked, nothing is mapped."""

    def resident(self: ExpertLayer, x: mx.array, indices: mx.array) -> mx.array:
        return self.switch(x, indices % self.cache.slots)

    with (
        mock.patch.object(ExpertLayer, "ask", resident),
        mock.patch.object(s.run_ahead, "_usable", False),
    ):
        return statistics.median(steps(model, make_prompt_cache(model), tokens)[4:])


def measure(
    model: nn.Module, s: ExpertStream, run_ahead: RunAhead, way: str, drive: float,
    text: np.ndarray, count: int, compute: float, whole: float,
) -> dict[str, Any]:  # fmt: skip
    """One way on one drive."""
    trust = run_ahead.trust
    assert isinstance(trust, Fixed)
    trust.fixed = way
    for layer in s.layers:
        if layer.ahead is not None:
            layer.ahead.always = way == "ask"
    cache, settling = make_prompt_cache(model), min(12, count)
    platform.read_into = Played(1e15)
    steps(model, cache, text[:settling].tolist())  # caches settle
    platform.read_into = Played(drive)
    s.reset()
    seconds = steps(model, cache, text[settling : settling + count].tolist())
    stats = s.stats()
    needed = (stats.cache.misses + stats.cache.prefetched) / count * s.layers[0].expert_bytes
    each = statistics.mean(seconds)
    bound = max(compute, needed / drive)
    return {
        "ms": 1e3 * each * whole,
        "tokens_per_s": 1 / each / whole,
        "spread_ms": [1e3 * min(seconds) * whole, 1e3 * max(seconds) * whole],
        "hit_rate": stats.cache.hit_rate,
        "needed_mb": needed * whole / 1e6,
        "read_mb": stats.read.bytes * whole / count / 1e6,
        "roofline_ms": 1e3 * bound * whole,
        "efficiency": bound / each,
        "bound_by": "reads" if bound > compute else "compute",
        "passes": stats.run_ahead.passes / max(1, stats.run_ahead.steps),
        "asked": stats.run_ahead.asked / count,
        "seconds": {k: v / count for k, v in stats.seconds.items()},
        "reads": stats.read.reads / count,
        "foretold": stats.run_ahead.foretold,
        "came_true": stats.run_ahead.came_true,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", choices=tuple(LAYERS), required=True)
    parser.add_argument("--shares", default="0.25,0.5,0.75", help="of the experts in memory")
    parser.add_argument("--drives", default=",".join(DRIVES), help="GB/s")
    parser.add_argument("--ways", default="ask,trust,scout")
    parser.add_argument("--tokens", type=int, default=16, help="timed steps of each setting")
    parser.add_argument("--warm-up", type=int, default=120, help="tokens that fill the cache")
    parser.add_argument("--layers", type=int, help="default: as many as the device holds")
    parser.add_argument("--words", type=int, default=300, help="different tokens in the text")
    args = parser.parse_args()
    room = platform.device_memory_bytes() - KEPT_BYTES
    experts, nbytes = EXPERT_BYTES[args.model]
    order = np.random.default_rng(0)
    weights = 1 / np.arange(1, args.words + 1)
    text = order.choice(args.words, 10_000, p=weights / weights.sum())
    rows: dict[str, Any] = {}
    for share in map(float, args.shares.split(",")):
        slots = int(share * experts)
        layers = args.layers or min(LAYERS[args.model], int(room / (slots * nbytes)) // 4 * 4)
        work = tempfile.TemporaryDirectory()
        folder = Path(work.name)
        cut = None if layers == LAYERS[args.model] else layers + DENSE[args.model]
        fullsize.write(args.model, folder / "model", trunk=True, layers=cut, seed=0)
        least = layers * max(2, slots // 8) * nbytes  # opened anew below, filled
        config = replace(PLAIN, run_ahead="on", prefetch="on", cache=least)
        with patch(config=config):
            model, _ = mlx_lm.utils.load_model(folder / "model")
        s = stream(model)
        with s:
            run_ahead = s.run_ahead
            assert run_ahead is not None
            run_ahead.always = False
            s._open((slots,) * layers)
            for layer in s.layers:
                fill(layer)
                pack(layer, str(next(folder.glob("model/*.safetensors"))))
            platform.read_into = Played(1e15)
            run_ahead.trust = Fixed(layers)
            compute = compute_seconds(model, s, text[: min(16, args.warm_up)].tolist())
            steps(model, make_prompt_cache(model), text[: args.warm_up].tolist())  # fills the cache
            whole = LAYERS[args.model] / layers  # from what was run to the whole model
            at = args.warm_up  # every setting goes on in the text: none has just seen its part
            for drive in args.drives.split(","):
                for way in args.ways.split(","):
                    name = f"{share:.0%}, {drive}, {way}"
                    rows[name] = measure(
                        model, s, run_ahead, way, DRIVES[drive], text[at:], args.tokens,
                        compute, whole,
                    )  # fmt: skip
                    at += 12 + args.tokens
                    rows[name] |= {"layers": layers, "compute_ms": 1e3 * compute * whole}
                    r = rows[name]
                    print(
                        f"{name:28s} {r['ms']:7.1f} ms, roofline {r['roofline_ms']:7.1f} "
                        f"({r['bound_by']}), {r['efficiency']:.2f}; hits {r['hit_rate']:.2f}, "
                        f"{r['passes']:.2f} passes, {r['asked']:.1f} asked, "
                        f"{r['reads']:.0f} reads; "
                        + " ".join(f"{k} {1e3 * v:.0f}" for k, v in r["seconds"].items()),
                        flush=True,
                    )
                    report(args.out, f"standin-{args.model}", {"rows": rows})
        work.cleanup()
        del model, s
        mx.clear_cache()


if __name__ == "__main__":
    main()
