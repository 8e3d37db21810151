"""The search for the fastest settings: what is tried, what counts as better, what is refused.

Knows nothing of models: it is handed a function that runs settings once. The defaults run before
and after every candidate, and what they differ by among themselves is the noise of the machine; a
candidate is kept only where it beats them by more. What gives other results is never kept.
Which settings come next is the search's to say.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._errors import StreamError
from ._ledger import Ledger
from ._search import Search, Settings, Space

_BASELINES = 4  # the first warms up; three more make two pairs to tell the noise from
_ROUNDS = 2  # that a winner has to win again
_FINALISTS = 3  # that get the chance
_NOISE_SHARE = 0.9  # of all pairs of baselines differ by less than what is taken for noise
_SLOWEST_FIRST_TOKEN = 1.5  # times the baseline's: no gain later is worth more


@dataclass(frozen=True)
class Run:
    """What one run of some settings gave.

    Attributes:
        rates: tokens/s of each prompt, after its first token.
        first_token: seconds to it, of each prompt.
        tokens: digest of every prompt's greedy tokens.
        logits: digest of logits.
        peak_bytes: the most that MLX held.
        promised_bytes: what it may hold.
        read_bytes: from the drive, while it was timed.
        hit_rate: 0 to 1.
    """

    rates: tuple[float, ...]
    first_token: tuple[float, ...]
    tokens: str
    logits: str
    peak_bytes: int
    promised_bytes: int
    read_bytes: int
    hit_rate: float


@dataclass
class Outcome:
    """What tuning came to.

    Attributes:
        settings: those that differ from the defaults, of the best that was kept; empty if none was.
        gain: its tokens/s over the defaults'.
        spread: by how much the defaults differed from themselves, as a share.
        verified: it won again in runs that had no part in choosing it.
        tokens_per_s, baseline_tokens_per_s: medians behind the gain.
        first_token_seconds: its median.
        trials: how many candidates were run, earlier sessions of the ledger included.
        ended: "time", "trials", "nothing left to try" or "interrupted".
        disqualified: those that gave other results or held more memory than promised.
    """

    settings: Settings = field(default_factory=dict)
    gain: float = 1.0
    spread: float = 0.0
    verified: bool = False
    tokens_per_s: float = 0.0
    baseline_tokens_per_s: float = 0.0
    first_token_seconds: float = 0.0
    trials: int = 0
    ended: str = ""
    disqualified: list[dict[str, Any]] = field(default_factory=list)


class Tuner:
    """Searches settings for the most tokens/s.

    Args:
        run: runs settings (those that differ from the defaults) once. What it raises for other than
            the defaults is recorded, and the trial skipped.
        space: the values of each setting; the first one is the default.
        ledger: gets a line a trial, and may have some of earlier sessions; None keeps none.
        seconds: after which nothing new is begun; verification is counted in.
        trials: candidates to try at most, those in the ledger included.
        stock: gives the digests of tokens and logits of the model without streaming, or None where
            it does not fit; None for the logits where a device may sum in another order for it.
        seed: of the search.
        on_record: is told of every line.
        clock: seconds.
    """

    def __init__(
        self,
        run: Callable[[Settings], Run],
        space: Space,
        ledger: Ledger | None = None,
        seconds: float = 600.0,
        trials: int | None = None,
        stock: Callable[[], tuple[str, str | None] | None] = lambda: None,
        seed: int = 0,
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._space, self._ledger = run, space, ledger
        self._seconds, self._trials, self._run_stock, self._seed = seconds, trials, stock, seed
        self._stock: tuple[str, str | None] | None = None
        self._on_record, self._clock = on_record, clock
        self._began = clock()
        self._run_seconds: list[float] = []
        self._baselines: list[Run] = []
        self._noise: list[float] = []  # of pairs of baselines, earlier sessions' included
        self._reference: tuple[str, str] | None = None  # digests that every run must have
        self._records = list(ledger.records) if ledger else []
        for record in self._records:
            self._noise += record.get("noise_pairs", [])
            if "tokens" in record:
                self._reference = (record["tokens"], record["logits"])

    @property
    def spread(self) -> float:
        """What the defaults differ by among themselves: nine of ten pairs by less."""
        ordered = sorted(self._noise)
        return ordered[math.ceil(_NOISE_SHARE * len(ordered)) - 1] if ordered else math.inf

    def once(self, settings: Settings) -> dict[str, Any]:
        """Try some settings; returns what went into the ledger.

        Raises:
            StreamError: a setting that is not in the space, or the defaults cannot be run.
        """
        changed = self.changed(settings)
        if not self._baselines:
            self._start(2)
        return self._try(changed, "once")

    def tune(self) -> Outcome:
        """Search, then let the best win again. Ctrl-C ends it with what was found.

        Raises:
            StreamError: Optuna is not installed; the defaults cannot be run, or give other results
                than they did or than mlx-lm without streaming.
        """
        try:
            search = Search(self._space, self.changed, self._known(), self._seed + self._tried())
            self._start(_BASELINES)
            ended = self._search(search)
            best = self._verified()
        except KeyboardInterrupt:
            return self._outcome("interrupted", self._best_unverified())
        return self._outcome(ended, best)

    def changed(self, settings: Settings) -> Settings:
        """The settings that differ from the defaults, and matter.

        Raises:
            StreamError: one is not in the space, or has a value of another kind.
        """
        for name, value in settings.items():
            if name not in self._space:
                raise StreamError(
                    f"{name!r} is no setting to tune here: it is one of {', '.join(self._space)}, "
                    "those that were not stated as options"
                )
            default = self._space[name][0]
            if isinstance(default, str) != isinstance(value, str) or isinstance(value, bool):
                raise StreamError(f"{name}={value!r}: a value such as {default!r} is needed")
        changed = {
            k: settings[k] for k in self._space if k in settings and settings[k] != self._default(k)
        }
        if changed.get("prefetch", self._default("prefetch")) == "off":
            changed.pop("prefetch_depth", None)  # nobody asks ahead
        return changed

    def _default(self, name: str) -> Any:
        return self._space[name][0] if name in self._space else None

    def _start(self, baselines: int) -> None:
        """Run mlx-lm's own model if it fits, then the defaults until their noise is known."""
        self._stock = self._run_stock()
        self._baseline()
        first = self._baselines.pop()  # warmed up what there is to warm up
        pairs: list[float] = []
        while len(self._baselines) < baselines - 1:
            pairs += self._baseline()
        last = self._baselines[-1]
        self._record(
            {
                "phase": "baseline",
                "settings": {},
                **_figures(last),
                "tokens": first.tokens,
                "logits": first.logits,
                "noise_pairs": pairs,
                "same_as_stock": None if self._stock is None else True,
            }
        )

    def _baseline(self) -> list[float]:
        """Run the defaults; returns by how much they differ from the time before.

        Raises:
            StreamError: their results are not what they were, or not mlx-lm's.
        """
        run = self._timed({})
        if (wrong := self._check(run)) is not None:
            raise StreamError(f"the default settings fail: {wrong}. Please report this")
        pairs = []
        if self._baselines:
            pairs = [abs(_ratio([run], [self._baselines[-1]]) - 1)]
            self._noise += pairs
        self._baselines.append(run)
        return pairs

    def _check(self, run: Run) -> str | None:
        """What is wrong with a run, whatever its speed."""
        if self._reference is None:
            self._reference = (run.tokens, run.logits)
        for what, mine, first in zip(
            ("greedy tokens", "logits"), (run.tokens, run.logits), self._reference, strict=True
        ):
            if mine != first:
                return f"other {what} than the default settings gave at first"
        if self._stock is not None:
            tokens, logits = self._stock
            if run.tokens != tokens or logits not in (None, run.logits):
                return "other results than mlx-lm without streaming"
        if run.peak_bytes > run.promised_bytes:
            return f"held {run.peak_bytes:,} bytes, {run.promised_bytes:,} were promised"
        return None

    def _timed(self, settings: Settings) -> Run:
        start = self._clock()
        try:
            return self._run(settings)
        finally:
            self._run_seconds.append(self._clock() - start)

    def _left(self, runs: int) -> bool:
        """Is there time for so many runs more?"""
        took = statistics.median(self._run_seconds)
        return self._clock() - self._began + runs * took <= self._seconds

    def _search(self, search: Search) -> str:
        while self._trials is None or self._tried() < self._trials:
            # A candidate and a baseline; and what it takes to verify one.
            if not self._left(2 + 2 * _ROUNDS):
                return "time"
            if (settings := search.ask()) is None:
                return "nothing left to try"
            record = self._try(settings, "search")
            search.tell(None if record["disqualified"] else record["ratio"])
        return "trials"

    def _known(self) -> list[tuple[Settings, float | None]]:
        """What the ledger had."""
        return [
            (r["settings"], None if r["disqualified"] else r["ratio"])
            for r in self._records
            if r["phase"] == "search"
        ]

    def _tried(self) -> int:
        return sum(r["phase"] == "search" for r in self._records)

    def _try(self, settings: Settings, phase: str) -> dict[str, Any]:
        """Run settings between two runs of the defaults, judge and record them."""
        before = self._baselines[-1]
        blank = dict.fromkeys(("ratio", "ratio_spread", "baseline_tokens_per_s"))
        record: dict[str, Any] = {"phase": phase, "settings": settings, **blank}
        try:
            run = self._timed(settings)
        except Exception as e:
            failed = f"failed: {type(e).__name__}: {e}"
            return self._record(record | {"disqualified": False, "kept": False, "why": failed})
        wrong = self._check(run)
        pairs = self._baseline()
        bracket = [before, self._baselines[-1]]
        ratio = _ratio([run], bracket)
        by_prompt = _ratios([run], bracket)
        first = statistics.median(run.first_token) / statistics.median(
            [s for b in bracket for s in b.first_token]
        )
        kept, why = False, wrong
        if why is None:
            kept, why = self._judged(ratio, first)
        return self._record(
            record
            | {
                **_figures(run),
                "ratio": ratio,
                "ratio_spread": [min(by_prompt), max(by_prompt)],
                "baseline_tokens_per_s": statistics.median(r for b in bracket for r in b.rates),
                "noise": self.spread,
                "noise_pairs": pairs,
                "first_token_ratio": first,
                "disqualified": wrong is not None,
                "kept": kept,
                "why": why,
            }
        )

    def _judged(self, ratio: float, first_token: float) -> tuple[bool, str]:
        """Is it better than the defaults, and by what measure?"""
        said = f"{ratio:.3f} times the defaults' tokens/s, which vary by {self.spread:.1%}"
        if ratio - 1 <= self.spread:
            return False, said
        if first_token > _SLOWEST_FIRST_TOKEN:
            return False, f"{said}; but the first token takes {first_token:.2f} times as long"
        return True, said

    def _record(self, record: dict[str, Any]) -> dict[str, Any]:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"trial": len(self._records), "time": stamp, **record}
        self._records.append(record)
        if self._ledger is not None:
            self._ledger.append(record)
        self._on_record(record)
        return record

    def _finalists(self) -> list[dict[str, Any]]:
        """Kept candidates that still are with all the noise that is known now, best first."""
        kept = [
            r
            for r in self._records
            if r["phase"] == "search" and r["kept"] and r["ratio"] - 1 > self.spread
        ]
        return sorted(kept, key=lambda r: -r["ratio"])

    def _best_unverified(self) -> dict[str, Any] | None:
        return next(iter(self._finalists()), None)

    def _verified(self) -> dict[str, Any] | None:
        """The best candidate that wins in fresh runs too: choosing the best of many flatters it."""
        for finalist in self._finalists()[:_FINALISTS]:
            rounds = []
            for _ in range(_ROUNDS):
                rounds.append(self._try(finalist["settings"], "verify"))
                if rounds[-1]["ratio"] is None or rounds[-1]["disqualified"]:
                    break
            else:
                ratio = statistics.fmean(r["ratio"] for r in rounds)
                first = statistics.fmean(r["first_token_ratio"] for r in rounds)
                if self._judged(ratio, first)[0]:
                    mean = {
                        key: statistics.fmean(r[key] for r in rounds)
                        for key in ("tokens_per_s", "baseline_tokens_per_s", "first_token_seconds")
                    }
                    return rounds[-1] | {"ratio": ratio, **mean}
            if not self._left(2 * _ROUNDS):
                break
        return None

    def _outcome(self, ended: str, best: dict[str, Any] | None) -> Outcome:
        records = self._records
        outcome = Outcome(
            spread=self.spread if self._noise else 0.0,
            trials=self._tried(),
            ended=ended,
            disqualified=[r for r in records if r.get("disqualified")],
        )
        if best is not None:
            outcome.settings, outcome.gain = best["settings"], best["ratio"]
            outcome.verified = best["phase"] == "verify"
            outcome.tokens_per_s = best["tokens_per_s"]
            outcome.baseline_tokens_per_s = best["baseline_tokens_per_s"]
            outcome.first_token_seconds = best["first_token_seconds"]
        return outcome


def _figures(run: Run) -> dict[str, Any]:
    """A run's figures for the ledger."""
    return {
        "tokens_per_s": statistics.median(run.rates),
        "spread": [min(run.rates), max(run.rates)],
        "first_token_seconds": statistics.median(run.first_token),
        "read_bytes": run.read_bytes,
        "hit_rate": run.hit_rate,
        "peak_bytes": run.peak_bytes,
        "promised_bytes": run.promised_bytes,
    }


def _ratios(runs: Sequence[Run], others: Sequence[Run]) -> list[float]:
    """By prompt: tokens/s of runs over those of others, geometric means of each."""

    def means(some: Sequence[Run]) -> list[float]:
        return [statistics.geometric_mean(r) for r in zip(*(s.rates for s in some), strict=True)]

    return [a / b for a, b in zip(means(runs), means(others), strict=True)]


def _ratio(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """The median over the prompts, each compared with itself."""
    return statistics.median(_ratios(runs, others))
