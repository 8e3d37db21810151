"""Decode speed with nothing missing: stock, everything resident, and a cache that holds it all.

The last one maps experts to slots like any cache, and happens to hold every needed expert. What
remains is the cost of streaming itself, with a wait for the device in every layer and with
run-ahead. Stock builds a token while the last one runs; a step that is checked has to end first.
Stock with a wait for each token shows the cost of that alone.
Layers have the shape of Qwen3.5-397B-A17B's with fewer experts, so that stock mlx-lm fits too.

There are two measurements: the model as it is, with which the host decides on a fast GPU (it takes
longer to build a layer than the device to compute it); and an attention so wide that the device
decides, as on a machine whose memory is slower. Rounds take turns. Figures are medians of the
rounds' ratios, and their spread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from common import PLAIN, Fixed, generate, report
from mlx.utils import tree_map
from mlx_lm.models import qwen3_moe
from random_model import write_random_model

from mlx_streamexperts import ExpertStream, patch, stream
from mlx_streamexperts._experts.speculative.policy import SpeculationPolicy

_WAITED = "stock, each token waited for"
_HEADS = 1024  # of the wide attention: 2 x 1 GB of weights a layer, one layer's for all


def settings(s: ExpertStream) -> dict[str, Callable[[], None]]:
    """What is compared with stock, by name: each makes the streamed model work that way."""
    run_ahead = s.run_ahead
    assert run_ahead is not None

    def way(resident: bool, policy: SpeculationPolicy | None) -> Callable[[], None]:
        def choose() -> None:
            for layer in s.layers:
                layer.resident = resident  # or the map is in use, and holds everything
            run_ahead._usable = policy is not None
            run_ahead.policy = policy or run_ahead.policy

        return choose

    fixed = {name: Fixed(len(s.layers)) for name in ("speculate", "at once")}
    for name, policy in fixed.items():
        policy.fixed = name
    return {
        "resident": way(True, None),
        "held, asked": way(False, None),
        "held, run ahead in groups": way(False, fixed["speculate"]),
        "held, run ahead at once": way(False, fixed["at once"]),
        "held, run ahead as it pays": way(False, SpeculationPolicy(len(s.layers))),
    }


def widen(models: list[nn.Module]) -> None:
    """Give every layer one and the same attention, which takes the device longer than the host."""
    args = replace(models[0].args, num_attention_heads=_HEADS, head_dim=128)
    attention = qwen3_moe.Attention(args, 0)
    attention.update(tree_map(lambda a: a.astype(mx.bfloat16), attention.parameters()))
    mx.eval(attention.parameters())
    for model in models:
        for layer in model.layers:
            layer.self_attn = attention


def compare(stock: nn.Module, model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of every setting, in turns."""
    ways = settings(stream(model))
    expected, _ = generate(stock, 1, args.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ("stock", _WAITED, *ways)}
    same = True
    for name, choose in ways.items():
        choose()  # kernels compiled, the cache's counts settled, trials over (128 steps)
        generate(model, 1, args.settling if name.endswith("as it pays") else 8)
    for _ in range(args.rounds):
        for name in ("stock", _WAITED):
            _, times = generate(stock, 1, args.tokens, ahead=name == "stock")
            seconds[name].append(statistics.median(times[args.tokens // 3 :]))
        for name, choose in ways.items():
            choose()
            tokens, times = generate(model, 1, args.tokens)
            same = same and tokens == expected
            seconds[name].append(statistics.median(times[args.tokens // 3 :]))
    rows: dict[str, Any] = {"same": same}
    for name, each in seconds.items():
        ratios = [a / b for a, b in zip(seconds["stock"], each, strict=True)]
        rows[name] = {
            "ms_a_token": 1e3 * statistics.median(each),
            "of_stock": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        }
    run_ahead = stream(model).run_ahead
    assert run_ahead is not None
    rows[name]["way"] = run_ahead.policy.start  # the last setting's
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    for name, default in (("layers", 60), ("experts", 16), ("top-k", 10), ("hidden", 4096)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=40, help="a round")
    parser.add_argument("--settling", type=int, default=170, help="steps that trials may take")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = write_random_model(
            Path(work) / "model", layers=args.layers, experts=args.experts, top_k=args.top_k,
            hidden=args.hidden, inner=args.inner, bits=4, dtype=mx.bfloat16,
        )  # fmt: skip
        stock, _ = mlx_lm.utils.load_model(folder)
        with patch(config=replace(PLAIN, run_ahead="on")):
            model, _ = mlx_lm.utils.load_model(folder)
    s = stream(model)
    with s:
        assert s.run_ahead is not None
        s.run_ahead.always = False
        rows: dict[str, Any] = {}
        for regime in ("the host decides", "the device decides"):
            if regime == "the device decides":
                widen([stock, model])
            rows[regime] = compare(stock, model, args)
            for name, row in rows[regime].items():
                print(regime, name, row, flush=True)
            report(args.out, "speed", {"shape": vars(args) | {"out": ""}, "rows": rows})


if __name__ == "__main__":
    main()
