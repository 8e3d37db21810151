"""The self-test: checks on this machine that streaming does what it promises.

Lists the checks, runs them and words their findings; _selfchecks.py has the checks themselves. A
failed check is repeated with options that might avoid the fault, so that advice is only given if it
has helped here. Only a small model in a temporary folder is written.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._analysis.exactness import PLAIN
from .._config import StreamConfig
from .._experts.lossy import refuse_lossy
from ._selfchecks import Lab, Outcome, ways_left, while_computing, written_bytes

_KEPT = (
    "in_place", "bypass_page_cache", "run_ahead", "prefetch", "overlap", "policy", "threads",
    "read_size", "keep_awake",
)  # fmt: skip
"""Options that are tested as stated."""

_SAFER = ("run_ahead", "prefetch", "keep_awake", "overlap", "bypass_page_cache", "in_place")
"""Options that may avoid a fault when they are off, the cheapest first."""


@dataclass(frozen=True)
class Check:
    """A check of one promise.

    Attributes:
        name: what is checked.
        run: runs the check with given streaming options.
        config: the options to check.
        meaning: what a failure means for the user.
        always: the option that certainly avoids a failure when it is off. If empty, the check is
            repeated with each option of `_SAFER` off.
    """

    name: str
    run: Callable[[StreamConfig], Outcome]
    config: StreamConfig
    meaning: str
    always: str = ""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        name: what was checked.
        passed: whether the promise holds.
        detail: how much was checked, or what is wrong.
        seconds: how long it took.
        meaning, advice: what a failure means, and what avoids it.
    """

    name: str
    passed: bool
    detail: str
    seconds: float
    meaning: str = ""
    advice: str = ""


def selftest(
    config: StreamConfig, reads: Path | None = None, begin: Callable[[str, int], None] | None = None
) -> Iterator[Finding]:
    """Run every check that applies to these options, and yield its finding.

    Args:
        config: options to test; sizes and folders among them are ignored.
        reads: a model folder on the drive to test; None for the embedded model's.
        begin: called before each check with its name and the number of checks.

    Raises:
        StreamError: the options are lossy.
    """
    refuse_lossy(config.lossy, "a self-test")
    with tempfile.TemporaryDirectory() as work:
        checks = list_checks(Lab(Path(work), reads), config)
        for check in checks:
            if begin is not None:
                begin(check.name, len(checks))
            yield _examine(check)
            gc.collect()
            mx.clear_cache()


def _examine(check: Check) -> Finding:
    start = time.perf_counter()
    outcome = _outcome(check, check.config)
    seconds = time.perf_counter() - start
    if outcome.passed:
        return Finding(check.name, True, outcome.detail, seconds)
    return Finding(check.name, False, outcome.detail, seconds, check.meaning, _advice(check))


def _outcome(check: Check, config: StreamConfig) -> Outcome:
    try:
        return check.run(config)
    except Exception as e:  # any error means that the check did not pass
        return Outcome(False, f"{type(e).__name__}: {e}")


def _advice(check: Check) -> str:
    """An option that avoids the fault, tried out if that is not certain."""
    if check.always:
        return f"{_flag(check.always)} does without it"
    for name in _SAFER:
        if getattr(check.config, name) == "off":
            continue
        off: dict[str, Any] = {name: "off"}
        if _outcome(check, replace(check.config, **off)).passed:
            return f"{_flag(name)} avoids it (the same check passed with it just now)"
    return "no option avoids it: do not rely on streaming on this machine, and please report it"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')} off"


def list_checks(lab: Lab, stated: StreamConfig) -> list[Check]:
    """The checks that apply to the stated options."""
    base = replace(PLAIN, **{name: getattr(stated, name) for name in _KEPT})
    return [*_machine_checks(lab, base), *_model_checks(lab, base)]


def _machine_checks(lab: Lab, base: StreamConfig) -> Iterator[Check]:
    """Checks of the operating system and the device, without a model."""
    if base.in_place != "off":
        yield Check(
            "kernels see bytes written into arrays",
            written_bytes,
            base,
            "loading notices it and copies every expert, which is slow; answers stay right",
            always="in_place",
        )
        yield Check(
            "slots and tables are written while kernels use others",
            while_computing,
            base,
            "an expert that is read while the device computes could change an answer",
            always="in_place",
        )
    yield Check(
        "a device's error is reported",
        lab.failing_device,
        base,
        "after an error of the device answers could be wrong without a word",
    )
    if base.bypass_page_cache != "off":
        yield Check(
            "reads past the page cache give the file's bytes",
            lab.direct_reads,
            base,
            "experts read past the page cache could be wrong",
            always="bypass_page_cache",
        )


def _model_checks(lab: Lab, base: StreamConfig) -> Iterator[Check]:
    ways = ways_left(base)
    for name, way in ways.items():
        for model in lab.models:
            yield Check(
                f"decoding, {name}: {model}",
                partial(lab.decoding, model),
                way,
                "answers would differ from mlx-lm's with everything loaded",
            )
    yield Check(
        "sequences interleaved at random",
        lab.schedules,
        base,
        "answers could differ where several sequences share a model",
    )
    for model in lab.models:
        yield Check(
            f"prompt: {model}",
            partial(lab.prefill, model),
            ways["ordinary"],
            "answers to prompts would differ by more than the order of sums explains",
        )
    for model in lab.models:
        yield Check(
            f"prompts around four rows an expert: {model}",
            partial(lab.around_four_rows, model),
            ways["ordinary"],
            "answers to prompts of such lengths would differ by more than the order of sums "
            "explains",
        )
    yield Check(
        "memory stays within the budget",
        lab.memory,
        base,
        "more memory could be taken than was stated: leave some room",
    )


def describe_device() -> dict[str, Any]:
    """The device that the checks run on."""
    return {
        "device": str(mx.default_device()),
        "name": str(mx.device_info().get("device_name", "")),
        "mlx": version("mlx"),
    }


def finding_lines(finding: Finding) -> list[str]:
    """The lines about a finding that follow its name."""
    verdict = "PASS" if finding.passed else "FAIL"
    text = [f"{verdict}  {finding.detail} ({finding.seconds:.1f} s)"]
    if not finding.passed:
        text += [f"      it means: {finding.meaning}", f"      way out: {finding.advice}"]
    return text


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    """All findings, for JSON."""
    return {
        **describe_device(),
        "passed": all(f.passed for f in findings),
        "checks": [asdict(f) for f in findings],
    }
