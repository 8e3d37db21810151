"""Decides which settings are better than the defaults.

Knows nothing of models: it is given a function that runs settings once. The defaults run before and
after every candidate, and the amount by which they differ from themselves is the noise of the
machine. A candidate is kept only if it wins by more, and never if it gives other results.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .._errors import StreamError
from ._ledger import Ledger
from ._search import Settings, Space, changed, check, next_settings

_BASELINES = 4  # the first warms up; three more make two pairs that show the noise
_FEW = 5  # candidates worth a search
_ROUNDS = 2  # wins that verify a candidate
_FINALISTS = 3  # candidates that get the chance
_NOISE_SHARE = 0.9  # of all pairs of baselines differ by less than the noise
_SLOWEST_FIRST_TOKEN = 1.5  # times the baseline's: no later gain is worth more

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The measurements of one run.

    Attributes:
        rates: tokens/s of each prompt, after its first token.
        first_token: seconds to the first token of each prompt.
        tokens: digest of every prompt's greedy tokens.
        logits: digest of logits.
        peak_bytes: the most that MLX held.
        promised_bytes: the most that it may hold.
        read_bytes: read from the drive during the timed part.
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
    """The result of tuning.

    Attributes:
        ended: the reason, for people.
        trials: candidates that were run, those of resumed runs included.
        spread: the noise of the defaults, as a share.
        disqualified: candidates that gave other results or held more memory than promised.
        best: the best candidate, or None if none was kept. If its `phase` is "verify" it won again
            in runs that had no part in choosing it, and `ratio` is the mean of those.
    """

    ended: str
    trials: int = 0
    spread: float = 0.0
    disqualified: list[Record] = field(default_factory=list)
    best: Record | None = None


class Tuner:
    """Searches for the settings with the most tokens/s.

    Args:
        run: runs settings (those that differ from the defaults) once. If it raises, the trial is
            recorded as failed; for the defaults the error passes through.
        space: the values of each setting, the default first.
        ledger: receives a line per trial, and may hold earlier ones.
        seconds: time after which nothing new begins, verification included.
        trials: the most candidates to try, those in the ledger included.
        stock: returns digests of mlx-lm's own tokens and logits, or None if the model does not fit
            unstreamed; None for the logits if this device may sum in another order for it.
        together: settings that may pay only together.
        on_record: called with every record.
        clock: returns seconds.
    """

    def __init__(
        self,
        run: Callable[[Settings], Run],
        space: Space,
        ledger: Ledger | None = None,
        seconds: float = 600.0,
        trials: int | None = None,
        stock: Callable[[], tuple[str, str | None] | None] = lambda: None,
        together: Sequence[Settings] = (),
        on_record: Callable[[Record], None] = lambda record: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._space, self._ledger = run, space, ledger
        self._together = together
        self._seconds, self._trials, self._run_stock = seconds, trials, stock
        self._on_record, self._clock, self._began = on_record, clock, clock()
        self._stock: tuple[str, str | None] | None = None
        self._run_seconds: list[float] = []
        self._baselines: list[Run] = []
        self._records = list(ledger.records) if ledger else []
        self._noise = [pair for r in self._records for pair in r.get("noise_pairs", [])]
        # Digests that every run must have.
        self._reference: tuple[str, str] | None = None
        for record in self._of("baseline"):
            self._reference = record["tokens"], record["logits"]

    @property
    def spread(self) -> float:
        """The noise of the defaults: nine of ten pairs of their runs differ by less."""
        ordered = sorted(self._noise)
        return ordered[math.ceil(_NOISE_SHARE * len(ordered)) - 1] if ordered else math.inf

    def once(self, settings: Settings) -> Record:
        """Try some settings once; returns the record.

        Raises:
            StreamError: a setting is not in the space, or the defaults cannot be run.
        """
        check(settings, self._space)
        if not self._baselines:
            self._start(2)
        return self._try(changed(settings, self._space), "once")

    def tune(self) -> Outcome:
        """Search, then let the best win again. Ctrl-C ends the search with the best so far.

        Raises:
            StreamError: the defaults cannot be run, or their results differ from earlier ones or
                from mlx-lm's without streaming.
        """
        try:
            self._start(_BASELINES)
            ended = self._search()
            best = self._verified()
        except KeyboardInterrupt:
            ended, best = "interrupted", next(iter(self._finalists()), None)
        return Outcome(
            ended,
            len(self._of("search")),
            self.spread if self._noise else 0.0,
            [r for r in self._records if r.get("disqualified")],
            best,
        )

    def _start(self, baselines: int) -> None:
        """Run mlx-lm's own model if it fits, then the defaults until their noise is known."""
        self._stock = self._run_stock()
        self._baseline()
        self._baselines.clear()  # a warm-up only
        pairs: list[float] = []
        for _ in range(baselines - 1):
            pairs += self._baseline()
            if pairs and not self._time_for(1):
                break  # two runs that differ by something are the least
        same = None if self._stock is None else True  # otherwise _baseline raised
        record = {"phase": "baseline", "settings": {}, **asdict(self._baselines[-1])}
        self._record(record | {"noise_pairs": pairs, "same_as_stock": same})

    def _baseline(self) -> list[float]:
        """Run the defaults; returns their difference from the run before, if there was one.

        Raises:
            StreamError: their results differ from earlier ones or from mlx-lm's.
        """
        run = self._timed({})
        if (wrong := self._fault(run)) is not None:
            raise StreamError(f"the default settings fail: {wrong}. Please report this")
        pairs = [abs(statistics.median(_ratios(run, b)) - 1) for b in self._baselines[-1:]]
        self._noise += pairs
        self._baselines.append(run)
        return pairs

    def _fault(self, run: Run) -> str | None:
        """The reason why a run disqualifies its settings, however fast it was."""
        if self._reference is None:
            self._reference = (run.tokens, run.logits)
        tokens, logits = self._reference
        if (run.tokens, run.logits) != self._reference:
            other = "logits" if run.tokens == tokens else "greedy tokens"
            return f"other {other} than the default settings gave at first"
        if self._stock not in (None, (tokens, logits), (tokens, None)):
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

    def _time_for(self, runs: int) -> bool:
        """Is there time for so many more runs?"""
        took = statistics.median(self._run_seconds)
        return self._clock() - self._began + runs * took <= self._seconds

    @property
    def candidates(self) -> int:
        """How many there is time for, as long as runs have taken so far, beside verification."""
        left = self._seconds - (self._clock() - self._began)
        return max(0, int(left / statistics.median(self._run_seconds)) // 2 - _ROUNDS)

    def _search(self) -> str:
        """Try settings until there is a reason to end; returns it."""
        while self._trials is None or len(self._of("search")) < self._trials:
            # A candidate and a baseline, and the runs that verify one.
            if not self._time_for(2 + 2 * _ROUNDS):
                if self._of("search"):
                    return "the time is over"
                took = statistics.median(self._run_seconds)
                enough = self._clock() - self._began + (2 * _FEW + 2 * _ROUNDS) * took
                return (
                    f"the time is over. A run takes {took:.0f} s here, and a candidate needs two: "
                    f"--time-limit {math.ceil(enough / 60)}m has room for {_FEW}"
                )
            tried = [(r["settings"], _score(r)) for r in self._of("search")]
            settings = next_settings(self._space, tried, self._together)
            if settings is None:
                return "nothing is left to try"
            self._try(settings, "search")
        return "as many as were asked for"

    def _of(self, phase: str) -> list[Record]:
        return [r for r in self._records if r["phase"] == phase]

    def _try(self, settings: Settings, phase: str) -> Record:
        """Run settings between two runs of the defaults; judge and record them."""
        before = self._baselines[-1]
        record: Record = {"phase": phase, "settings": settings, "ratio": None}
        try:
            run = self._timed(settings)
        except Exception as e:
            why = f"failed: {type(e).__name__}: {e}"
            return self._record(record | {"disqualified": False, "kept": False, "why": why})
        wrong = self._fault(run)
        pairs = self._baseline()
        after = self._baselines[-1]
        by_prompt = _ratios(run, before, after)
        ratio = statistics.median(by_prompt)
        first_token = statistics.median(run.first_token) / statistics.median(
            before.first_token + after.first_token
        )
        kept, why = (False, wrong) if wrong else self._judged(ratio, first_token)
        return self._record(
            record
            | {
                **asdict(run),
                "tokens_per_s": statistics.median(run.rates),
                "baseline_tokens_per_s": statistics.median(before.rates + after.rates),
                "ratio": ratio,
                "ratio_by_prompt": by_prompt,
                "noise": self.spread,
                "noise_pairs": pairs,
                "first_token_ratio": first_token,
                "disqualified": wrong is not None,
                "kept": kept,
                "why": why,
            }
        )

    def _judged(self, ratio: float, first_token: float) -> tuple[bool, str]:
        """Whether settings are better than the defaults, and why."""
        why = f"{ratio:.3f} times the defaults' tokens/s, which vary by {self.spread:.1%}"
        if ratio - 1 <= self.spread:
            return False, why
        if first_token > _SLOWEST_FIRST_TOKEN:
            return False, f"{why}; but the first token takes {first_token:.2f} times as long"
        return True, why

    def _record(self, record: Record) -> Record:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"trial": len(self._records), "time": stamp, **record}
        self._records.append(record)
        if self._ledger is not None:
            self._ledger.append(record)
        self._on_record(record)
        return record

    def _finalists(self) -> list[Record]:
        """Candidates that win by more than all the noise known by now, best first."""
        kept = [r for r in self._of("search") if r["kept"] and r["ratio"] - 1 > self.spread]
        return sorted(kept, key=lambda r: -r["ratio"])

    def _verified(self) -> Record | None:
        """The best candidate that wins in fresh runs too: choosing the best of many flatters it."""
        for finalist in self._finalists()[:_FINALISTS]:
            rounds: list[Record] = []
            while len(rounds) < _ROUNDS and (not rounds or _score(rounds[-1])):
                rounds.append(self._try(finalist["settings"], "verify"))
            if _score(rounds[-1]):
                names = ("ratio", "first_token_ratio", "tokens_per_s", "baseline_tokens_per_s")
                mean = {name: statistics.fmean(r[name] for r in rounds) for name in names}
                if self._judged(mean["ratio"], mean["first_token_ratio"])[0]:
                    return rounds[-1] | mean
            if not self._time_for(2 * _ROUNDS):
                break
        return None


def _score(record: Record) -> float | None:
    """A candidate's ratio; None if it failed or is disqualified."""
    return None if record["disqualified"] else record["ratio"]


def _ratios(run: Run, *others: Run) -> list[float]:
    """By prompt: tokens/s of a run over the geometric mean of others."""
    means = [statistics.geometric_mean(r) for r in zip(*(o.rates for o in others), strict=True)]
    return [mine / mean for mine, mean in zip(run.rates, means, strict=True)]
