"""All measurements of a report, in order; each part's own module knows how to measure."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .._config import DEFAULT_CONTEXT, StreamConfig, format_size
from .._errors import StreamError
from .._experts.stream import stream
from .._experts.trace import read_trace
from .._loading.combinations import batches
from .._loading.load import load, plan
from .._osinfo import drop_page_cache
from .._progress import progress_bar
from . import _drive as drive
from . import _speed as speed
from ._caveats import caveats
from ._locality import locality
from ._method import load_average, method
from ._power import counted, find_sensors
from ._prompts import Prompt, report_choices, report_prompts
from ._quality import Answers, quality
from ._report import (
    SCHEMA,
    VERSION,
    ColdStart,
    Drive,
    Power,
    Repeats,
    Report,
    Settings,
    Speed,
)

_STEPS = 11
_LOGITS_BYTES = 256 << 20  # of all prompts: a vocabulary of 150,000 has 0.6 MB a token
_STEADY_SHARE = 0.25  # of the experts, if no budget is stated and all would fit

QUICK = Settings()
FULL = Settings(
    kind="full", prompt_tokens=256, tokens=128, repeats=5, lengths=(32, 128, 512, 2048),
    batches=(1, 2, 4, 8), seconds=1.0, depths=(1, 2, 4, 8, 16, 32), points=6, sustained=10.0,
    window=10.0, alone=32,
)  # fmt: skip


def make_report(
    folder: str, config: StreamConfig, settings: Settings, name: str, note: str = "",
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:  # fmt: skip
    """Measure everything.

    Args:
        folder: the model.
        config: how it is streamed.
        settings: how much is measured.
        name: of the model, on the page.
        note: for readers.
        keep: called before each part with the report so far, as if the run ended there.

    Raises:
        StreamError: the model cannot be streamed, or nothing of it would be with this budget.
    """
    needed = settings.prompt_tokens + max(settings.tokens, speed.SUSTAINED_TOKENS)
    if (config.context_tokens or DEFAULT_CONTEXT) < needed:
        raise StreamError(f"a report needs --context-tokens {needed} or more: prompt and reply")
    config = replace(config, progress=False) if not sys.stderr.isatty() else config
    config = with_something_to_stream(folder, config)
    load, begin = load_average(), time.perf_counter()
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def step(name: str) -> None:
        _show(bar, name)
        report.unfinished, report.seconds = name, time.perf_counter() - begin
        report.limits = list(caveats(report))
        keep(report)

    with progress_bar("Report", config.progress, _STEPS, unit="step") as bar:
        _show(bar, "loading")
        model, tokenizer, cold = _cold_start(folder, config)
        prompts = [
            replace(p, tokens=p.tokens[: settings.prompt_tokens])
            for p in report_prompts(tokenizer, settings.prompts)
        ]
        how = method(Path(folder), name, stream(model), settings, prompts, load)
        report = Report(SCHEMA, VERSION, created, note, "", 0.0, how, Speed(cold))
        with stream(model):
            _Study(model, tokenizer, settings, prompts, report, step).measure()
            step("quality")
            width = int(model(mx.array([[0]])).shape[-1])
            most = max(8, _LOGITS_BYTES // (4 * width * len(prompts)))
            prompts = [replace(p, tokens=p.tokens[:most]) for p in prompts]
            items = report_choices(tokenizer, settings.items)
            own = Answers.of(model, prompts, items, settings.alone)
        del model  # room for the stock model
        report.quality = quality(
            Path(folder), how.model, own, prompts, items, settings.alone, settings.bits
        )
    report.unfinished, report.seconds = "", time.perf_counter() - begin
    report.limits = list(caveats(report))
    return report


def _show(bar: Any, step: str) -> None:
    bar.set_postfix_str(step)
    bar.update(1)


def with_something_to_stream(folder: str, config: StreamConfig) -> StreamConfig:
    """The same options, with a cache for a quarter of the experts if all of them would fit.

    Raises:
        BudgetError: too small.
        StreamError: the stated budget holds all of them.
    """
    there = plan(folder, config=config)
    if there.resident_share < 1:
        return config
    if config.memory is not None or config.cache is not None:
        raise StreamError(
            "this budget holds all experts, so nothing would be streamed or measured: state a "
            f"--cache below {format_size(there.experts)}"
        )
    return replace(config, cache=max(1, int(_STEADY_SHARE * there.experts)))


def _cold_start(folder: str, config: StreamConfig) -> tuple[Any, Any, ColdStart]:
    """Load, and generate a first token, with the files out of the page cache if possible."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if config.store is not None:
        files += [f for f in sorted(Path(config.store).iterdir()) if f.is_file()]
    dropped = all([drop_page_cache(f) for f in files])
    begin = time.perf_counter()
    model, tokenizer = load(folder, config=config)[:2]
    loaded = time.perf_counter() - begin
    prompt = report_prompts(tokenizer, 1)[0].tokens[:64]
    first = speed.generate(model, prompt, 2).first_token
    return model, tokenizer, ColdStart(dropped, loaded, first, len(prompt), loaded + first)


def batch_sizes(model: Any, settings: Settings) -> list[int]:
    """Numbers of sequences at once: as many as have room, if mlx-lm batches them well."""
    each = settings.prompt_tokens + settings.tokens
    room = stream(model).plan.context_tokens if batches(model, make_prompt_cache(model)) else 0
    return [n for n in settings.batches if n == 1 or n * each <= room]


@dataclass
class _Study:
    """One run: the model, how much is measured, and the report that the parts fill."""

    model: Any
    tokenizer: Any
    settings: Settings
    prompts: list[Prompt]
    report: Report
    step: Callable[[str], None]

    def measure(self) -> None:
        """Everything but quality."""
        self.step("warming up")
        self._generate_all()
        with tempfile.TemporaryDirectory() as traces:
            self._speed(Path(traces))
            self._drive()
            self._locality(Path(traces))
        self._sustained()

    def _generate_all(self) -> None:
        for p in self.prompts:
            speed.generate(self.model, p.tokens, self.settings.tokens)

    def _speed(self, traces: Path) -> None:
        found, model, s = self.report.speed, self.model, self.settings
        self.step("decoding")
        steady = speed.by_prompt(model, self.prompts, s.tokens, s.repeats, traces)
        found.tokens_per_s = Repeats.of([r.tokens_per_s.median for r in steady])
        found.by_prompt = steady
        self.step("first tokens")
        text = [t for p in report_prompts(self.tokenizer) for t in p.tokens]
        lengths = [n for n in s.lengths if n + 16 <= stream(model).plan.context_tokens]
        text = text * (max(lengths) // len(text) + 1)
        found.by_prompt_length = speed.first_tokens(model, text, lengths, s.repeats)
        self.step("batches")
        found.by_batch = speed.batches(
            model, self.tokenizer, self.prompts, batch_sizes(model, s), s.tokens, s.repeats
        )

    def _drive(self) -> None:
        s, expert_stream = self.settings, stream(self.model)
        found = self.report.ssd = Drive(expert_stream.bypasses_page_cache)
        self.step("the drive")
        found.rates = drive.rates_by_size(expert_stream, s.depths, s.seconds)
        self.step("reads of generation")
        with drive.logged(expert_stream.reader) as log:
            self._generate_all()
        found.in_generation = log.summary()
        self.step("slower drives")
        best = max(r.rate for r in found.rates)
        # One text for every drive: only the drive differs.
        text = self.prompts[len(self.prompts) // 2].tokens
        found.sensitivity = drive.sensitivity(self.model, text, s.tokens, s.repeats, best, s.points)

    def _locality(self, traces: Path) -> None:
        self.step("locality")
        recorded = [read_trace(traces / f"{i}.jsonl") for i in range(len(self.prompts))]
        policy = stream(self.model).config.policy
        self.report.locality = locality(recorded, self.settings.shares, policy, self.prompts)

    def _sustained(self) -> None:
        """Power at rest and under load, and the sustained rate that it was measured with."""
        self.step("decoding on and on")
        sensors, s = find_sensors(), self.settings
        sensors.begin()
        start = time.perf_counter()
        if sensors.energy:
            time.sleep(max(1.0, s.window))
        rest = {k: v / (time.perf_counter() - start) for k, v in sensors.end().items()}
        before = sensors.heat()
        run, joules = speed.sustained(self.model, self.prompts, 60 * s.sustained, s.window, sensors)
        self.report.speed.sustained = run
        self.report.power = Power(
            sources=sorted(joules),
            missing=sensors.missing,
            watts_at_rest={k: v for k, v in rest.items() if k in joules},
            watts={k: v / run.seconds for k, v in joules.items()},
            joules_per_token=sum(counted(joules).values()) / run.tokens if joules else None,
            celsius_before=before,
            celsius_after=sensors.heat(),
            throttled_windows=sum(bool(w.throttled) for w in run.windows),
            tells_throttling=bool(sensors.throttling),
        )
        if run.interrupted:
            raise KeyboardInterrupt
