"""All measurements of a report, in order; each part's own module knows how to measure."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .._analysis.quality import bundled_task
from .._config import DEFAULT_CONTEXT, StreamConfig, format_size
from .._errors import StreamError
from .._experts.stream import ExpertStream, refuse_without_experts, stream
from .._experts.trace import read_trace
from .._loading.combinations import batches
from .._loading.load import load, plan
from .._osinfo import drop_page_cache
from .._progress import StatusLine
from . import _drive as drive
from . import _speed as speed
from ._locality import locality
from ._method import Prompt, load_average, method, report_prompts
from ._power import counted, find_sensors
from ._quality import Exam, quality
from ._report import SCHEMA, VERSION, ColdStart, Drive, Power, Repeats, Report, Settings, Speed

_STEPS = 11
_LOGITS_BYTES = 256 << 20  # of all prompts: a vocabulary of 150,000 has 0.6 MB a token
_STEADY_SHARE = 0.25  # of the experts, if no budget is stated and all would fit

QUICK = Settings()
FULL = Settings(
    kind="full", prompt_tokens=256, tokens=128, repeats=5, lengths=(32, 128, 512, 2048),
    batches=(1, 2, 4, 8), seconds=1.0, depths=(1, 2, 4, 8, 16, 32), points=6, sustained=10.0,
    window=10.0, alone=32,
)  # fmt: skip


def measure(
    folder: str, config: StreamConfig, settings: Settings, name: str, note: str = "",
    trust: bool = False,
) -> Iterator[Report]:  # fmt: skip
    """Measure everything; yields the report before each part, as if the run ended there.

    It is the same object each time: parts are added to it, and at its end it is whole.

    Args:
        name: of the model, on the page.
        note: for readers of the page.
        trust: run the code of a tokenizer that is code.

    Raises:
        StreamError: the model cannot be streamed, or nothing of it would be with this budget.
    """
    needed = settings.prompt_tokens + max(settings.tokens, speed.SUSTAINED_TOKENS)
    if (config.context_tokens or DEFAULT_CONTEXT) < needed:
        raise StreamError(f"a report needs --context-tokens {needed} or more: prompt and reply")
    shown, config = config.progress, replace(config, progress=False)
    config = with_something_to_stream(folder, config)
    load, begin = load_average(), time.perf_counter()
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    status = _Status()
    with StatusLine(status, shown=shown) as line:
        line.show()
        model, tokenizer, cold = _cold_start(folder, config, trust)
        status.stream = stream(model)
        prompts = _cut(report_prompts(tokenizer, settings.prompts), settings.prompt_tokens)
        how = method(Path(folder), name, stream(model), settings, prompts, load)
        report = Report(SCHEMA, VERSION, created, note, "", 0.0, how, Speed(cold))
        with stream(model):
            for step in _measure(model, tokenizer, prompts, report):
                status.step, status.steps = step, status.steps + 1
                line.show()
                if step == "warming up":
                    warm = time.perf_counter()
                elif step == "decoding":
                    seconds = _seconds_in_all(time.perf_counter() - warm, settings)
                    line.say(
                        f"Report: about {max(1, round(seconds / 60))} min in all; Ctrl-C "
                        "leaves a page of what was measured by then"
                    )
                report.unfinished, report.seconds = step, time.perf_counter() - begin
                yield report
            width = int(model(mx.array([[0]])).shape[-1])
            prompts = _cut(prompts, max(8, _LOGITS_BYTES // (4 * width * len(prompts))))
            exam = Exam(prompts, bundled_task(tokenizer, settings.items), settings.alone)
            own = exam.ask(model)
        del model  # room for the stock model
        report.quality = quality(Path(folder), how.model, own, exam, settings.bits)
    report.unfinished, report.seconds = "", time.perf_counter() - begin
    yield report


class _Status:
    """The step under way, bytes read, and the time: a step may take minutes."""

    def __init__(self) -> None:
        self.step, self.steps = "loading", 1
        self.stream: ExpertStream | None = None
        self._begin = time.perf_counter()

    def __call__(self) -> str:
        nbytes = 0 if self.stream is None else self.stream.reader.stats.bytes
        seconds = time.perf_counter() - self._begin
        done = f"{format_size(nbytes)} read, {seconds:.0f} s"
        return f"Report: {self.step} (step {self.steps} of {_STEPS}), {done}"


def _seconds_in_all(warm_up: float, s: Settings) -> float:
    """About how long a report takes, of which the warm-up generated each prompt once."""
    return warm_up * (3 + 3 * s.repeats) + 60 * s.sustained + 4 * s.seconds * len(s.depths)


def _cut(prompts: list[Prompt], tokens: int) -> list[Prompt]:
    return [replace(p, tokens=p.tokens[:tokens]) for p in prompts]


def with_something_to_stream(folder: str, config: StreamConfig) -> StreamConfig:
    """The same options, with a cache for a quarter of the experts if all of them would fit.

    Raises:
        StreamError: the stated budget holds all of them, or is too small, or there are none.
    """
    there = plan(folder, config=config)
    refuse_without_experts(there.slots, f"{folder}: a report is about streamed experts")
    if there.resident_share < 1:
        return config
    if config.memory is not None or config.cache is not None:
        raise StreamError(
            "this budget holds all experts, so nothing would be streamed or measured: state a "
            f"--cache below {format_size(there.experts)}"
        )
    return replace(config, cache=max(1, int(_STEADY_SHARE * there.experts)))


def _cold_start(folder: str, config: StreamConfig, trust: bool) -> tuple[Any, Any, ColdStart]:
    """Load, and generate a first token, with the files out of the page cache if possible."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if config.store is not None:
        files += [f for f in sorted(Path(config.store).iterdir()) if f.is_file()]
    dropped = all([drop_page_cache(f) for f in files])
    begin = time.perf_counter()
    tokenizer_config = {"trust_remote_code": trust}
    model, tokenizer = load(folder, config=config, tokenizer_config=tokenizer_config)[:2]
    loaded = time.perf_counter() - begin
    prompt = report_prompts(tokenizer, 1)[0].tokens[:64]
    first = speed.generate(model, prompt, 2).first_token
    return model, tokenizer, ColdStart(dropped, loaded, first, len(prompt), loaded + first)


def batch_sizes(model: Any, settings: Settings) -> list[int]:
    """Numbers of sequences at once: as many as have room, if mlx-lm batches them well."""
    each = settings.prompt_tokens + settings.tokens
    room = stream(model).plan.context_tokens if batches(model, make_prompt_cache(model)) else 0
    return [n for n in settings.batches if n == 1 or n * each <= room]


def _measure(model: Any, tokenizer: Any, prompts: list[Prompt], report: Report) -> Iterator[str]:
    """Measure everything but quality, and fill the report with it; yields each step's name."""
    experts, s, found = stream(model), report.method.settings, report.speed

    def generate_all() -> None:
        for p in prompts:
            speed.generate(model, p.tokens, s.tokens)

    yield "warming up"
    generate_all()
    with tempfile.TemporaryDirectory() as traces:
        yield "decoding"
        rows = speed.by_prompt(model, prompts, s.tokens, s.repeats, Path(traces))
        recorded = [read_trace(Path(traces) / f"{i}.jsonl") for i in range(len(prompts))]
    found.by_prompt = rows
    found.tokens_per_s = Repeats.of([r.tokens_per_s.median for r in rows])
    yield "first tokens"
    text = [t for p in report_prompts(tokenizer) for t in p.tokens]
    lengths = [n for n in s.lengths if n + 16 <= experts.plan.context_tokens]
    text *= max(lengths) // len(text) + 1
    found.by_prompt_length = speed.first_tokens(model, text, lengths, s.repeats)
    yield "batches"
    sizes = batch_sizes(model, s)
    found.by_batch = speed.batches(model, tokenizer, prompts, sizes, s.tokens, s.repeats)

    ssd = report.ssd = Drive(experts.bypasses_page_cache)
    yield "the drive"
    ssd.rates = drive.rates_by_size(experts, s.depths, s.seconds)
    yield "reads of generation"
    log = drive.ReadLog()
    experts.reader.on_read.add(log.note)
    generate_all()
    experts.reader.on_read.remove(log.note)
    ssd.in_generation = log.summary()
    yield "slower drives"
    best = max(r.rate for r in ssd.rates)
    one = prompts[len(prompts) // 2].tokens  # for every drive: only the drive differs
    ssd.sensitivity = drive.sensitivity(model, one, s.tokens, s.repeats, best, s.points)

    yield "locality"
    report.locality = locality(recorded, s.shares, experts.config.policy, prompts)
    yield "decoding on and on"
    _sustained(model, prompts, report)
    yield "quality"


def _sustained(model: Any, prompts: list[Prompt], report: Report) -> None:
    """Power at rest and under load, and the sustained rate that it was measured with."""
    sensors, s = find_sensors(), report.method.settings
    sensors.begin()
    start = time.perf_counter()
    if sensors.energy:
        time.sleep(max(1.0, s.window))
    rest = {k: v / (time.perf_counter() - start) for k, v in sensors.end().items()}
    before = sensors.heat()
    run, joules = speed.sustained(model, prompts, 60 * s.sustained, s.window, sensors)
    report.speed.sustained = run
    report.power = Power(
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
