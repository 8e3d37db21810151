"""Will a model run on this machine, how fast, and what limits it? From headers, before loading.

python -m mlx_streamexperts.doctor --model mlx-community/Kimi-K2.5 --memory 96GB
python -m mlx_streamexperts.doctor --model ./my-model --machine "M4 Max 128 GB"
python -m mlx_streamexperts.doctor --selftest

Of a Hub repository only headers are fetched (a few megabytes), never weights. Speeds are
predictions, with a range (the formula is in predict.py); what is measured here is marked. The
self-test tries on this machine what streaming promises (selftest.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._analysis.machines import Link, other_files, plan_ranks, predict_ranks, report_lines
from .._analysis.measure import DriveRate, drive_rates, layer_seconds, memory_rate, sync_seconds
from .._analysis.predict import REPORTED, predict, replayed_hit_rate
from .._cli.options import failed, make_parser
from .._config import StreamConfig, format_size, from_arguments
from .._errors import BudgetError, StreamError
from .._experts.bank import in_place_works
from .._experts.stream import expert_files
from .._io.files import direct_works
from .._io.hub import headers_only
from .._loading.demo import demo_model
from .._loading.discover import Located, locate
from .._memory.budget import Plan, check_device
from .._memory.hardware import NAMED_MACHINES, Machine, parse_rate
from .._osinfo import apple_limit, device_limit, device_memory_bytes, free_disk_bytes
from ._selftest import Finding, as_dict, describe_device, lines, selftest

_DEPTHS = (1, 4, 8, 16)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of `doctor`, and those of streaming."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument(
        "--machine",
        action="append",
        metavar="NAME",
        help="predict for this machine instead of measuring here (repeatable; 'all'): "
        + ", ".join(NAMED_MACHINES),
    )
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="for time to first token")
    parser.add_argument("--trace", type=Path, help="a recorded trace: its hit rate is used")
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="judge the model on so many machines together (--pipeline); --memory and --machine "
        "are then for each, or one for each: --memory 96GB,64GB, and --machine as often as ranks",
    )
    parser.add_argument(
        "--link",
        default="1GB/s:300us",
        help="with --ranks: the network's rate and latency (default: 1GB/s:300us)",
    )
    parser.add_argument(
        "--files",
        type=int,
        metavar="RANK",
        help="with --ranks: print only the names of the files that this rank needs",
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="try on this machine what streaming promises, with small models that are here already "
        "(a minute or two); --model FOLDER also names files to read",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return make_parser(parser, "python -m mlx_streamexperts.doctor", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 1 on an error or where the self-test fails, 2 if the model does not fit.
    """
    args = setup_arg_parser().parse_args(argv)
    try:
        if args.selftest:
            return _selftest(args)
        if args.ranks > 1:
            print("\n".join(_several(args)))
            return 0
        report = examine(args)
    except BudgetError as e:
        print(f"does not fit: {e}", file=sys.stderr)
        return 2
    except StreamError as e:
        return failed(e)
    print(json.dumps(report, indent=1) if args.json else "\n".join(_lines(report)))
    return 0


def _selftest(args: argparse.Namespace) -> int:
    """Print what comes of each check as it is known; returns the exit status."""
    out = sys.stderr if args.json else sys.stdout
    about = describe_device()
    print(f"Self-test on {about['device']} {about['name']}, MLX {about['mlx']}", file=out)
    findings: list[Finding] = []

    def begin(name: str, count: int) -> None:
        print(f"{len(findings) + 1:2d}/{count} {name} ...", end=" ", flush=True, file=out)

    for finding in selftest(from_arguments(args), args.model and Path(args.model), begin):
        findings.append(finding)
        print("\n".join(lines(finding)), flush=True, file=out)
    report = as_dict(findings)
    failed = sum(not f.passed for f in findings)
    seconds = sum(f.seconds for f in findings)
    print(
        f"FAIL: {failed} of {len(findings)} checks did not pass; see above what avoids them"
        if failed
        else f"PASS: all {len(findings)} checks, in {seconds:.0f} s",
        file=out,
    )
    if args.json:
        print(json.dumps(report, indent=1))
    return int(failed > 0)


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that `doctor` prints, as plain values.

    Raises:
        BudgetError: the model does not fit into the stated memory.
        StreamError: the model cannot be read or streamed.
    """
    config = from_arguments(args)
    args.policy = config.with_defaults().policy
    name = args.model or str(demo_model())
    if args.model is None:
        print(f"No --model given: examining the demonstration model {name}", file=sys.stderr)
    wanted = list(NAMED_MACHINES) if "all" in (args.machine or ()) else args.machine or []
    if unknown := [m for m in wanted if m not in NAMED_MACHINES]:
        raise StreamError(f"unknown machine {unknown[0]!r}: choose of {', '.join(NAMED_MACHINES)}")
    with headers_only(name) as (folder, downloaded):
        trust = {"trust_remote_code": args.trust_remote_code}
        located = locate(folder, config, trust, as_converted=True)
        if wanted:
            results = [_named(located, config, NAMED_MACHINES[m], args) for m in wanted]
            return {"model": name, "machines": results}
        plan = located.plan(config)
        check_device(plan, device_limit(plan.bound), config.oversubscribe)
        here, measured = _this_machine(located, downloaded)
        return {
            "model": name,
            "downloaded": downloaded,
            "free_disk": free_disk_bytes(folder),
            "measured": measured,
            "machines": [_result(plan, here, args)],
        }


def _several(args: argparse.Namespace) -> list[str]:
    """What `--ranks` prints."""
    config = from_arguments(args)
    policy = config.with_defaults().policy
    name = args.model or str(demo_model())
    names = args.machine or []
    if len(names) == 1:
        names *= args.ranks
    machines: list[Machine] = []
    if names:
        if unknown := [m for m in names if m not in NAMED_MACHINES]:
            raise StreamError(
                f"unknown machine {unknown[0]!r}: choose of {', '.join(NAMED_MACHINES)}"
            )
        if len(names) != args.ranks:
            raise StreamError(f"{len(names)} machines for {args.ranks} ranks")
        machines = [NAMED_MACHINES[m] for m in names]
    memories = [int(0.75 * m.memory) for m in machines]
    ranks = plan_ranks(name, args.ranks, config, args.trust_remote_code, memories)
    if args.files is not None:
        if not 0 <= args.files < args.ranks:
            raise StreamError(f"--files {args.files}: there are ranks 0 to {args.ranks - 1}")
        with headers_only(name) as (folder, _):
            return [*other_files(folder), *ranks[args.files].files]
    if not machines:
        with headers_only(name) as (folder, downloaded):
            trust = {"trust_remote_code": args.trust_remote_code}
            whole = locate(folder, config.for_rank(0, args.ranks), trust, as_converted=True)
            machines = [_this_machine(whole, downloaded)[0]] * args.ranks
    slots = [s for r in reversed(ranks) for s in r.plan.slots]  # rank 0 has the last layers
    hits = None if args.trace is None else replayed_hit_rate(args.trace, slots, policy)
    link = Link(*parse_rate(args.link, Link.latency))
    if args.json:
        tokens, first, alone = predict_ranks(ranks, machines, link, args.prompt_tokens, hits)
        result = {
            "ranks": [
                {"stage": asdict(r.stage), "plan": r.plan.as_dict(), "files": r.files,
                 "hidden_bytes": r.hidden_bytes, "machine": asdict(m), "prediction": asdict(p)}
                for r, m, p in zip(ranks, machines, alone, strict=True)
            ],
            "tokens_per_s": asdict(tokens), "first_token": asdict(first), "link": asdict(link),
        }  # fmt: skip
        return [json.dumps({"model": name, **result}, indent=1)]
    return [f"Model: {name}", *report_lines(ranks, machines, link, args.prompt_tokens, hits)]


def _named(
    located: Located, config: StreamConfig, machine: Machine, args: argparse.Namespace
) -> dict[str, Any]:
    """Prediction for a machine that is not here; its own memory unless a budget is stated."""
    if config.memory is None and config.cache is None:
        config = replace(config, memory=int(0.75 * machine.memory))
    try:
        plan = located.plan(config)
        check_device(plan, apple_limit(machine.memory, plan.bound), config.oversubscribe)
        return _result(plan, machine, args)
    except BudgetError as e:
        return {"machine": asdict(machine), "does_not_fit": str(e), "needed": e.needed_bytes}


def _result(plan: Plan, machine: Machine, args: argparse.Namespace) -> dict[str, Any]:
    hits = None if args.trace is None else replayed_hit_rate(args.trace, plan.slots, args.policy)
    prediction = predict(plan, machine, args.prompt_tokens, hits)
    reported = [
        asdict(r)
        for r in REPORTED
        if (r.model_type, r.layers, r.machine) == (plan.model_type, len(plan.slots), machine.name)
    ]
    return {
        "machine": asdict(machine),
        "plan": plan.as_dict(),
        "prediction": asdict(prediction),
        "hit_rate_from": "trace" if args.trace else "published curves",
        "reported": reported,
    }


def _this_machine(located: Located, downloaded: bool) -> tuple[Machine, dict[str, Any]]:
    """Measure what decides the speed here; the drive only where the weights are on it."""
    expert_bytes = max(x.expert_bytes for x in located.layers)
    # Experts that are yet to be converted lie in no file: any shard then stands for the drive.
    names = expert_files(located.layers) or [str(f) for f in located.shards]
    files = [(f, Path(f).stat().st_size) for f in names]
    # A miss reads every part by itself, unless they lie side by side.
    read_bytes = max(4096, expert_bytes // len(located.layers[0].tensors))
    direct = downloaded and direct_works(Path(files[0][0]))
    rates: list[DriveRate] = []
    if downloaded:
        rates = drive_rates(files, read_bytes, _DEPTHS, direct)
    best = max(rates, key=lambda r: r.rate, default=None)
    machine = Machine(
        name="this machine",
        memory=device_memory_bytes(),
        memory_rate=memory_rate(),
        drive_rate=best.rate if best else 5e9,
        drive_latency=rates[0].latency if rates else 100e-6,
        sync_seconds=sync_seconds(layers=len(located.layers)),
        layer_seconds=layer_seconds(),
    )
    return machine, {
        "device": str(mx.default_device()),
        "in_place": in_place_works(),
        "drive": [asdict(r) for r in rates],
        "page_cache_bypassed": direct,
    }


def _lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"Model: {report['model']}"]
    if measured := report.get("measured"):
        check = "passed" if measured["in_place"] else "FAILED: reads are copied, which is slow"
        lines.append(f"Device: {measured['device']}, check of in-place reads {check}")
        for r in measured["drive"]:
            how = "past the page cache" if measured["page_cache_bypassed"] else "page cache warm"
            lines.append(
                f"Drive (measured, {how}): {format_size(r['rate'])}/s at {r['depth']} reads of "
                f"{format_size(r['read_bytes'])} in flight ({r['mean_depth']:.1f} on average), "
                f"{1e3 * r['latency']:.2f} ms each"
            )
        if not measured["drive"]:
            lines.append("Drive: not measured, the weights are not here; 5 GB/s assumed")
        m = report["machines"][0]["machine"]
        lines.append(
            f"Memory (measured): {format_size(m['memory_rate'])}/s; asking the device for a "
            f"layer's experts: {1e6 * m['sync_seconds']:.0f} us (measured)"
        )
        lines.append(f"Free disk: {format_size(report['free_disk'])}")
    for result in report["machines"]:
        lines += ["", *_result_lines(result)]
    return lines


def _result_lines(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    lines = [f"{machine['name']} ({format_size(machine['memory'])})"]
    if "does_not_fit" in result:
        return [*lines, f"  does not fit: {result['does_not_fit']}"]
    plan, p = result["plan"], result["prediction"]
    lines += [
        f"  plan: {plan['text']}",
        f"  smallest memory that works: {format_size(plan['minimum'])}; disk needed: "
        f"{format_size(plan['disk'])}; cold bytes per token: "
        f"{format_size(plan['cold_bytes_per_token'])}",
        *_conversion(plan),
        f"  expected hit rate: {_range(p['hit_rate'], '.0%')} ({result['hit_rate_from']})",
        f"  predicted decode: {_range(p['tokens_per_s'], '.3g')} tokens/s; first token of "
        f"{p['prompt_tokens']} after {_range(p['first_token'], '.3g')} s",
        f"  a token, likely: compute {1e3 * p['compute_seconds']:.1f} ms + sync and "
        f"launches {1e3 * p['sync_seconds']:.1f} ms + reads {1e3 * p['read_seconds']:.1f} ms; "
        f"limited by: {p['limit']}",
    ]
    for r in result["reported"]:
        off = p["tokens_per_s"]["likely"] / r["tokens_per_s"]
        lines.append(
            f"  reported: {r['tokens_per_s']} tokens/s with {format_size(r['memory'])} "
            f"({r['note']}); the prediction above is {off:.2f} times that"
        )
    return lines


def _conversion(plan: dict[str, Any]) -> list[str]:
    if not plan["conversion"]:
        return []
    return [
        "  has to be converted first (python -m mlx_streamexperts.convert), which takes "
        f"{format_size(plan['conversion'])} of disk beside the original; all here is for the result"
    ]


def _range(value: dict[str, float], form: str) -> str:
    return f"{value['likely']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
