"""Judges a model before it is loaded: the plan for each machine, and the speed to expect there.

Reads headers and times a few reads and kernels; it never reads weights otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .._analysis.catalogue import KNOWN_MODELS
from .._analysis.machines import Link, RankPlan, other_files, plan_ranks, predict_ranks
from .._analysis.measure import (
    DriveRate,
    Place,
    arithmetic_rate,
    expert_rate,
    layer_seconds,
    memory_rate,
    sync_seconds,
)
from .._analysis.predict import (
    REPORTED,
    Prediction,
    Range,
    Reported,
    predict,
    replayed_hit_rate,
)
from .._config import StreamConfig, format_size, from_arguments, parse_size
from .._errors import BudgetError, StreamError
from .._experts.bank import in_place_works
from .._experts.stream import unwritten
from .._io.checkpoint import extents, tokenizer_code
from .._io.files import direct_works
from .._io.hub import headers_only
from .._loading.demo import demo_model
from .._loading.discover import DiscoveredModel, discover
from .._memory.budget import Plan, check_device, default_memory, weight_bits
from .._memory.hardware import NAMED_MACHINES, Machine, named_machine, parse_rate
from .._osinfo import apple_budget, apple_limit, device_limit, device_memory_bytes, free_disk_bytes

_LONGEST = 3600  # seconds of reading
_MEASURED_EXPERTS = 2048  # at random; an expert of 77 kB or more: no drive's cache holds them


@dataclass(frozen=True)
class Verdict:
    """What one machine can do with the model."""

    machine: Machine  # measured, or as its maker specifies it
    plan: Plan
    prediction: Prediction
    hit_rate_from: str  # "trace" or "published curves"
    reported: list[Reported]  # published speeds of this model on this machine

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": asdict(self.machine),
            "plan": self.plan.as_dict(),
            "prediction": asdict(self.prediction),
            "hit_rate_from": self.hit_rate_from,
            "reported": [asdict(r) for r in self.reported],
        }


@dataclass(frozen=True)
class DoesNotFit:
    """The model does not fit into this machine's memory."""

    machine: Machine
    reason: str
    needed: int  # bytes

    def as_dict(self) -> dict[str, Any]:
        machine = asdict(self.machine)
        return {"machine": machine, "does_not_fit": self.reason, "needed": self.needed}


@dataclass(frozen=True)
class Measured:
    """What was measured here besides the figures of `Machine`."""

    device: str
    in_place: bool  # kernels see bytes that were written into arrays
    drive: list[DriveRate]  # empty if the weights are not here
    page_cache_bypassed: bool
    page_cache: DriveRate | None = None  # the same reads through it, as it is; None if unmeasured


@dataclass(frozen=True)
class Examination:
    """Everything that `doctor` prints about a model. `measured` is None for named machines."""

    model: str
    library: str  # that loads it
    machines: list[Verdict | DoesNotFit]
    measured: Measured | None = None
    downloaded: bool = False
    free_disk: int = 0  # bytes
    tokenizer_code: str | None = None  # the file of it, if the tokenizer is code

    def as_dict(self) -> dict[str, Any]:
        """The JSON object that `--json` prints."""
        here = {}
        if self.measured is not None:
            here = {"downloaded": self.downloaded, "free_disk": self.free_disk,
                    "measured": asdict(self.measured)}  # fmt: skip
        if self.tokenizer_code is not None:
            here["tokenizer_code"] = self.tokenizer_code
        return {"model": self.model, **here, "machines": [m.as_dict() for m in self.machines]}


def examine(args: argparse.Namespace) -> Examination:
    """Judge a model on this machine, or on those that `--machine` names.

    Raises:
        BudgetError: the model does not fit into the stated memory.
        StreamError: the model cannot be read or streamed.
    """
    config = from_arguments(args)
    name = args.model or str(demo_model())
    if args.model is None:
        print(f"No --model given: examining the demonstration model {name}", file=sys.stderr)
    machines = [_with_drive(m, args.drive) for m in _named_machines(_names(args))]
    with headers_only(name) as (folder, downloaded):
        found = _discover(folder, config, args)
        code = tokenizer_code(folder)
        if machines:
            verdicts = [_on_machine(found, config, m, args) for m in machines]
            # A repository that is in this machine's cache is still a download for that machine.
            is_folder = Path(name).exists()
            return Examination(
                name, found.library, verdicts, downloaded=is_folder, tokenizer_code=code
            )
        plan = found.plan(config)
        check_device(plan, device_limit(plan.bound), config.oversubscribe)
        here, measured = _measure(found, downloaded, config, args.drive_seconds)
        here = _with_drive(here, args.drive)
        verdict = _verdict(plan, here, config, args)
        free = free_disk_bytes(folder)
        return Examination(name, found.library, [verdict], measured, downloaded, free, code)


@dataclass(frozen=True)
class Suited:
    """A model of the catalogue on a machine: its resident share and prediction."""

    name: str
    repo: str
    disk: int
    resident_share: float
    prediction: Prediction


@dataclass(frozen=True)
class MachineExamination:
    """A machine, and which well-known models suit it (`doctor` without a model)."""

    machine: Machine
    budget: int  # bytes
    suited: list[Suited]  # fastest first
    too_large: list[str]
    measured: Measured | None

    def as_dict(self) -> dict[str, Any]:
        """The JSON object that `--json` prints."""
        return asdict(self)


def examine_machines(args: argparse.Namespace) -> list[MachineExamination]:
    """Judge well-known models on this machine, or on those that `--machine` names.

    Raises:
        StreamError: an option is wrong.
    """
    config, measured = from_arguments(args), None
    machines = _named_machines(_names(args))
    if not machines:
        with headers_only(str(demo_model())) as (folder, downloaded):
            demo = _discover(folder, config, args)
            # The demonstration model's experts are tiny; large ones are read in megabytes.
            here, measured = _measure(demo, downloaded, config, args.drive_seconds, 1 << 20)
            machines = [here]
    found = []
    for machine in (_with_drive(m, args.drive) for m in machines):
        budget = apple_budget(machine.memory) if measured is None else default_memory()
        if config.memory is not None:
            budget = parse_size(config.memory)
            limit = (
                apple_limit(machine.memory, budget) if measured is None else device_limit(budget)
            )
            if budget > limit.nbytes and not config.oversubscribe:
                raise StreamError(
                    f"memory of {format_size(budget)} is more than {machine.name} can hold, "
                    f"{format_size(limit.nbytes)}: {limit.why}"
                )
        suited, too_large = [], []
        for model in KNOWN_MODELS:
            try:
                plan = model.plan(budget)
            except BudgetError:
                too_large.append(model.name)
                continue
            speed = predict(plan, machine, args.prompt_tokens)
            suited.append(Suited(model.name, model.repo, model.disk, plan.resident_share, speed))
        suited.sort(key=lambda s: -s.prediction.tokens_per_s.likely)
        found.append(MachineExamination(machine, budget, suited, too_large, measured))
    return found


def _names(args: argparse.Namespace) -> list[str]:
    return list(NAMED_MACHINES) if "all" in (args.machine or ()) else args.machine or []


def _with_drive(machine: Machine, drive: str | None) -> Machine:
    """The machine with the drive that `--drive` states, if it does."""
    return machine if drive is None else machine.with_drive(drive)


def _on_machine(
    found: DiscoveredModel, config: StreamConfig, machine: Machine, args: argparse.Namespace
) -> Verdict | DoesNotFit:
    """Predict for a machine that is not here, by default with all that its GPU can hold."""
    if config.memory is None and config.cache is None:
        config = replace(config, memory=apple_budget(machine.memory))
    try:
        plan = found.plan(config)
        check_device(plan, apple_limit(machine.memory, plan.bound), config.oversubscribe)
        return _verdict(plan, machine, config, args)
    except BudgetError as e:
        return DoesNotFit(machine, str(e), e.needed_bytes)


def _verdict(
    plan: Plan, machine: Machine, config: StreamConfig, args: argparse.Namespace
) -> Verdict:
    hits = _hit_rate(args.trace, config, plan.slots)
    reported = [
        r
        for r in REPORTED
        if (r.model_type, r.layers, r.machine) == (plan.model_type, len(plan.slots), machine.name)
    ]
    prediction = predict(plan, machine, args.prompt_tokens, hits)
    return Verdict(
        machine, plan, prediction, "trace" if args.trace else "published curves", reported
    )


def _measure(
    found: DiscoveredModel,
    downloaded: bool,
    config: StreamConfig,
    seconds: float,
    size: int | None = None,
) -> tuple[Machine, Measured]:
    """Measure what decides the speed here; the drive only if the weights are on it.

    Args:
        found: the model.
        downloaded: whether its weights are here.
        config: how it would be read.
        seconds: of reads at the depth of the reader.
        size: of a read, in bytes, wherever it falls; None reads this model's experts.
    """
    if not 0 < seconds <= _LONGEST:
        raise StreamError(
            f"--drive-seconds must be above 0 and at most {_LONGEST}, got {seconds:g}"
        )
    parts = _expert_parts(found, config, size) if downloaded else []
    direct = downloaded and direct_works(Path(parts[0][0]))
    rates: list[DriveRate] = []
    cached = None
    if downloaded:
        threads = config.with_defaults().threads
        print(f"Measuring the drive for {seconds:g} s ...", file=sys.stderr, flush=True)
        plan = ((1, min(1.0, seconds)), (threads, seconds))
        rates = [expert_rate(parts, depth, direct, time) for depth, time in plan]
        if direct:
            cached = expert_rate(parts, threads, False, min(1.0, seconds))
    print("Measuring memory and the device ...", file=sys.stderr, flush=True)
    machine = Machine(
        name="this machine",
        memory=device_memory_bytes(),
        memory_rate=memory_rate(),
        drive_rate=rates[-1].sustained if rates else 5e9,
        drive_latency=rates[0].latency if rates else 100e-6,
        sync_seconds=sync_seconds(layers=max(1, len(found.layers))),
        layer_seconds=layer_seconds(),
        arithmetic_rate=arithmetic_rate(weight_bits(found.model_config)),
    )
    return machine, Measured(str(mx.default_device()), in_place_works(), rates, direct, cached)


def _expert_parts(
    found: DiscoveredModel, config: StreamConfig, size: int | None = None
) -> list[Place]:
    """The reads of some of the model's experts, each no longer than `read_size`; or of `size`."""
    longest = parse_size(config.with_defaults().read_size)
    rng = np.random.default_rng(0)
    parts: list[Place] = []
    if size is not None or not found.layers or unwritten(found.layers):
        # Experts that are still to be converted are in no file, and a row is less than a drive's
        # block. Any part of the files stands for them.
        names = sorted(found.rows.files) or [str(f) for f in found.shards]
        sizes = [(f, os.path.getsize(f)) for f in names]
        if size is None:
            size = max((x.expert_bytes // len(x.tensors) for x in found.layers), default=4096)
        size = max(1, min(max(4096, size), longest, *(nbytes for _, nbytes in sizes)))
        for _ in range(_MEASURED_EXPERTS):
            file, nbytes = sizes[int(rng.integers(len(sizes)))]
            begin = int(rng.integers(nbytes - size + 1))
            parts.append((file, begin, begin + size))
        return parts
    for _ in range(_MEASURED_EXPERTS):
        layer = found.layers[int(rng.integers(len(found.layers)))]
        tables = [t.stored for t in layer.tensors.values()]
        for file, begin, end in extents(tables, [int(rng.integers(layer.experts))]):
            parts += [(file, at, min(end, at + longest)) for at in range(begin, end, longest)]
    return parts


@dataclass(frozen=True)
class RanksExamination:
    """A model divided over several machines (`--ranks`)."""

    model: str
    ranks: tuple[RankPlan, ...]  # in rank order
    machines: list[Machine]  # of each rank
    link: Link
    prompt_tokens: int
    hits: Range | None  # hit rate replayed from a trace; None for published curves

    def as_dict(self) -> dict[str, Any]:
        """The JSON object that `--json` prints."""
        tokens, first, alone = predict_ranks(
            self.ranks, self.machines, self.link, self.prompt_tokens, self.hits
        )
        ranks = [
            {"stage": asdict(r.stage), "plan": r.plan.as_dict(), "files": r.files,
             "hidden_bytes": r.hidden_bytes, "machine": asdict(m), "prediction": asdict(p)}
            for r, m, p in zip(self.ranks, self.machines, alone, strict=True)
        ]  # fmt: skip
        return {
            "model": self.model, "ranks": ranks, "tokens_per_s": asdict(tokens),
            "first_token": asdict(first), "link": asdict(self.link),
        }  # fmt: skip


def examine_ranks(args: argparse.Namespace) -> RanksExamination:
    """Judge a model that `--ranks` machines run together.

    Raises:
        BudgetError: it does not fit on one of the ranks.
        StreamError: the model cannot be read, streamed or divided, or an option is wrong.
    """
    config = from_arguments(args)
    name, machines, ranks = _divide(args, config)
    if not machines:
        with headers_only(name) as (folder, downloaded):
            found = _discover(folder, config.for_rank(0, args.ranks), args)
            here, _ = _measure(found, downloaded, config, args.drive_seconds)
            machines = [here] * args.ranks
    slots = [s for r in reversed(ranks) for s in r.plan.slots]  # rank 0 has the last layers
    link = Link(*parse_rate(args.link, Link.latency))
    hits = _hit_rate(args.trace, config, slots)
    return RanksExamination(name, ranks, machines, link, args.prompt_tokens, hits)


def rank_files(args: argparse.Namespace) -> list[str]:
    """Names of the files that rank `--files` needs.

    Raises:
        BudgetError, StreamError: as `examine_ranks`.
    """
    name, _, ranks = _divide(args, from_arguments(args))
    if not 0 <= args.files < args.ranks:
        raise StreamError(f"--files {args.files}: there are ranks 0 to {args.ranks - 1}")
    with headers_only(name) as (folder, _):
        return [*other_files(folder), *ranks[args.files].files]


def _divide(
    args: argparse.Namespace, config: StreamConfig
) -> tuple[str, list[Machine], tuple[RankPlan, ...]]:
    """The model, the machines that were named, and each rank's plan."""
    name, named = args.model or str(demo_model()), args.machine or []
    machines = _named_machines(named * args.ranks if len(named) == 1 else named)
    if machines and len(machines) != args.ranks:
        raise StreamError(
            f"{len(machines)} machines for {args.ranks} ranks: give --machine once for all ranks, "
            "or once for each"
        )
    memories = [apple_budget(m.memory) for m in machines]
    return name, machines, plan_ranks(name, args.ranks, config, args.trust_remote_code, memories)


def _named_machines(names: list[str]) -> list[Machine]:
    return [named_machine(m) for m in names]


def _discover(folder: Path, config: StreamConfig, args: argparse.Namespace) -> DiscoveredModel:
    return discover(
        folder, config, {"trust_remote_code": args.trust_remote_code}, as_converted=True
    )


def _hit_rate(trace: Path | None, config: StreamConfig, slots: Sequence[int]) -> Range | None:
    """From `--trace`; None for published curves."""
    if trace is None:
        return None
    return replayed_hit_rate(trace, slots, config.with_defaults().policy)
