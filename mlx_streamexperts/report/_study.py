"""All that a report measures, in order, as the plain values that its JSON file holds.

Each part's own module knows how; what is decided here is how much, and on what.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .._config import DEFAULT_CONTEXT, StreamConfig, format_size
from .._errors import StreamError
from .._experts.stream import ExpertStream, expert_files, stream
from .._experts.trace import read_trace
from .._loading.combinations import batches
from .._loading.discover import original_load_model
from .._loading.load import load, plan
from .._memory.hardware import NAMED_MACHINES
from .._osinfo import available_memory_bytes, device_memory_bytes, drop_page_cache
from .._progress import progress_bar
from . import _drive as drive
from . import _environment as facts
from . import _locality as locality
from . import _quality as quality
from . import _speed as speed
from ._caveats import limits_of
from ._power import Sensors, counted, find_sensors
from ._prompts import Prompt, report_choices, report_prompts

SCHEMA, VERSION = "mlx-streamexperts/report", 1
_STEPS = 11
_LOGITS_BYTES = 256 << 20  # of all prompts: a vocabulary of 150,000 has 0.6 MB a token
_STEADY_SHARE = 0.25  # of the experts, where nothing states a budget and all would fit


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        kind: "quick" or "full", which the page says.
        prompts: of the shipped ones; None for all.
        prompt_tokens: a prompt's tokens at most.
        tokens: generated after a prompt.
        repeats: of everything that is timed.
        lengths: of prompts for the first token.
        batches: sequences at once.
        seconds: of the drive at each size and depth.
        depths: reads in flight.
        points: throttled drives of either kind.
        sustained: minutes.
        window: seconds of one window of it.
        alone: tokens of each prompt that the comparison with stock decodes one by one.
        bits: of experts in the lossy what-ifs.
        items: of the task.
    """

    kind: str = "quick"
    prompts: int | None = None
    prompt_tokens: int = 64
    tokens: int = 24
    repeats: int = 3
    lengths: tuple[int, ...] = (16, 64, 256)
    batches: tuple[int, ...] = (1, 2, 4)
    seconds: float = 0.2
    depths: tuple[int, ...] = (1, 4, 16)
    points: int = 5
    sustained: float = 0.5
    window: float = 1.0
    shares: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.75)
    alone: int = 8
    bits: tuple[int, ...] = (3, 2)
    items: int | None = None


QUICK = Settings()
FULL = Settings(
    kind="full", prompt_tokens=256, tokens=128, repeats=5, lengths=(32, 128, 512, 2048),
    batches=(1, 2, 4, 8), seconds=1.0, depths=(1, 2, 4, 8, 16, 32), points=6, sustained=10.0,
    window=10.0, alone=32,
)  # fmt: skip


def make_report(
    folder: str, config: StreamConfig, settings: Settings, name: str, note: str = "",
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure everything; returns what the JSON file holds.

    Args:
        folder: the model.
        config: how it is streamed.
        settings: how much is measured.
        name: what the page calls it.
        note: what readers should know.
        keep: gets what there is whenever a part is measured, as the report of a run that ended
            there would be.

    Raises:
        StreamError: the model cannot be streamed, or nothing of it would be with this budget.
    """
    needed = settings.prompt_tokens + max(settings.tokens, speed.SUSTAINED_TOKENS)
    if (config.context_tokens or DEFAULT_CONTEXT) < needed:
        raise StreamError(f"a report needs --context-tokens {needed} or more: prompt and reply")
    config = replace(config, progress=False) if not sys.stderr.isatty() else config
    config = with_something_to_stream(folder, config)
    load = facts.load_average()
    begin = time.perf_counter()
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "note": note,
        "unfinished": "",
    }

    def step(what: str) -> None:
        bar.set_postfix_str(what)
        bar.update(1)
        if "method" in found:
            found.update(unfinished=what, seconds=time.perf_counter() - begin)
            found["limits"] = limits_of(found)
            keep(found)

    with progress_bar("Report", config.progress, _STEPS, unit="step") as bar:
        step("loading")
        model, tokenizer, cold = _cold_start(folder, config)
        expert_stream = stream(model)
        prompts = [
            replace(p, tokens=p.tokens[: settings.prompt_tokens])
            for p in report_prompts(tokenizer, settings.prompts)
        ]
        found["method"] = _method(folder, name, expert_stream, settings, prompts, load)
        found["speed"] = {"cold_start": cold}
        with expert_stream, tempfile.TemporaryDirectory() as traces:
            step("warming up")
            for p in prompts:
                speed.generate(model, p.tokens, settings.tokens)
            _speed(found["speed"], model, tokenizer, prompts, settings, Path(traces), step)
            found["ssd"] = {"bypasses_page_cache": expert_stream.bypasses_page_cache}
            _ssd(found["ssd"], model, prompts, settings, step)
            step("locality")
            found["locality"] = _locality(expert_stream, Path(traces), prompts, settings)
            step("decoding on and on")
            _sustained(found, model, prompts, settings, find_sensors())
            if found["speed"]["sustained"]["interrupted"]:
                raise KeyboardInterrupt
            step("quality")
            items = report_choices(tokenizer, settings.items)
            width = int(model(mx.array([[0]])).shape[-1])
            most = max(8, _LOGITS_BYTES // (4 * width * len(prompts)))
            shorter = [replace(p, tokens=p.tokens[:most]) for p in prompts]
            own = quality.Logits.of(model, shorter, settings.alone)
            score = quality.score(model, items)
        del model
        found["quality"] = _quality(folder, found, own, score, shorter, items, settings)
    found.update(unfinished="", seconds=time.perf_counter() - begin)
    found["limits"] = limits_of(found)
    return found


def with_something_to_stream(folder: str, config: StreamConfig) -> StreamConfig:
    """The same options with a cache for a quarter of the experts, where all of them would fit.

    Raises:
        BudgetError: too small.
        StreamError: the stated budget holds all of them.
    """
    there = plan(folder, config=config)
    if there.resident_share < 1:
        return config
    if config.memory is not None or config.cache is not None:
        raise StreamError(
            "this budget holds all experts, so that nothing would be streamed or measured: state a "
            f"--cache below {format_size(there.experts)}"
        )
    return replace(config, cache=max(1, int(_STEADY_SHARE * there.experts)))


def _cold_start(folder: str, config: StreamConfig) -> tuple[Any, Any, dict[str, Any]]:
    """Load, and bring a first token, with the files out of the page cache where that can be had."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if config.store is not None:
        files += [f for f in sorted(Path(config.store).iterdir()) if f.is_file()]
    dropped = all([drop_page_cache(f) for f in files])
    begin = time.perf_counter()
    model, tokenizer = load(folder, config=config)[:2]
    loaded = time.perf_counter()
    prompt = report_prompts(tokenizer, 1)[0]
    first = speed.generate(model, prompt.tokens[:64], 2)
    return (
        model,
        tokenizer,
        {
            "page_cache_dropped": dropped,
            "load_s": loaded - begin,
            "first_token_s": first.first_token,
            "prompt_tokens": min(64, len(prompt.tokens)),
            "total_s": loaded - begin + first.first_token,
        },
    )


def _method(
    folder: str, name: str, expert_stream: ExpertStream, settings: Settings,
    prompts: list[Prompt], load: float | None,
) -> dict[str, Any]:  # fmt: skip
    options = asdict(expert_stream.config)  # but for paths, which are nobody's business
    hidden: dict[str, Any] = {k: bool(options[k]) for k in ("store", "hot_set")}
    del options["about"]
    return {
        "machine": facts.machine(),
        "load_average": load,
        "versions": facts.versions(),
        "model": facts.checkpoint(Path(folder), name, expert_stream),
        "options": {**options, **hidden},
        "resident_share": expert_stream.plan.resident_share,
        "cache_bytes": expert_stream.plan.cache,
        "page_cache": facts.page_cache(expert_stream),
        "bypasses_page_cache": expert_stream.bypasses_page_cache,
        "settings": asdict(settings),
        "prompts": [
            {"task": p.task, "language": p.language, "tokens": len(p.tokens)} for p in prompts
        ],
        "sampling": "greedy",
        "warm_up": "every prompt, length and batch once, untimed",
    }


def _speed(
    found: dict[str, Any], model: Any, tokenizer: Any, prompts: list[Prompt], settings: Settings,
    traces: Path, step: Callable[[str], None],
) -> None:  # fmt: skip
    step("decoding")
    steady = speed.by_prompt(model, prompts, settings.tokens, settings.repeats, traces)
    found["tokens_per_s"] = speed.summary([r["tokens_per_s"]["median"] for r in steady])
    found["by_prompt"] = steady
    step("first tokens")
    text = [t for p in report_prompts(tokenizer) for t in p.tokens]
    room = stream(model).plan.context_tokens
    lengths = [n for n in settings.lengths if n + 16 <= room]
    text = text * (max(lengths) // len(text) + 1)
    found["by_prompt_length"] = speed.first_tokens(model, text, lengths, settings.repeats)
    step("batches")
    sizes = batch_sizes(model, settings)
    found["by_batch"] = speed.batches(
        model, tokenizer, prompts, sizes, settings.tokens, settings.repeats
    )


def batch_sizes(model: Any, settings: Settings) -> list[int]:
    """How many sequences at once are tried: as many as have room, if mlx-lm batches them well."""
    each = settings.prompt_tokens + settings.tokens
    room = stream(model).plan.context_tokens if batches(model, make_prompt_cache(model)) else 0
    return [n for n in settings.batches if n == 1 or n * each <= room]


def _ssd(
    found: dict[str, Any], model: Any, prompts: list[Prompt], settings: Settings,
    step: Callable[[str], None],
) -> None:  # fmt: skip
    step("the drive")
    expert_stream = stream(model)
    files = expert_files(expert_stream.layers)
    rates = drive.rates_by_size(expert_stream, files, settings.depths, settings.seconds)
    found["rates"] = rates
    step("reads of generation")
    with drive.logged(expert_stream.reader) as log:
        for p in prompts:
            speed.generate(model, p.tokens, settings.tokens)
    found["in_generation"] = log.summary()
    step("slower drives")
    best = max(r["rate"] for r in rates)
    # One text, the same for every drive: what differs is the drive alone.
    middle = prompts[len(prompts) // 2].tokens
    slower = drive.sensitivity(
        model, middle, settings.tokens, settings.repeats, best, settings.points
    )
    error = drive.error_of_model(slower["by_rate"] + slower["by_latency"])
    found["sensitivity"] = {**slower, "median_error_of_model": error}


def _locality(
    expert_stream: ExpertStream, traces: Path, prompts: list[Prompt], settings: Settings
) -> dict[str, Any]:
    recorded = [read_trace(traces / f"{i}.jsonl") for i in range(len(prompts))]
    # Its tokens/s are not used, only counts: any machine will do.
    machine = next(iter(NAMED_MACHINES.values()))
    joined = locality.one_after_another(recorded)
    caches = locality.caches(recorded, settings.shares, expert_stream.config.policy, machine)
    return {
        "tokens": sum(len(rows) for rows in joined.layers[0]),
        "caches": caches,
        "by_kind": locality.by_kind(
            caches["by_prompt_alone"], [(p.task, p.language) for p in prompts]
        ),
        "reuse": locality.reuse_distances(joined),
        "token_overlap": locality.token_overlap(recorded),
        "request_overlap": locality.request_overlap(recorded),
    }


def _sustained(
    found: dict[str, Any], model: Any, prompts: list[Prompt], settings: Settings, sensors: Sensors
) -> None:
    """Power at rest and under load, and the sustained rate that it was measured with."""
    sensors.begin()
    start = time.perf_counter()
    if sensors.energy:
        time.sleep(max(1.0, settings.window))
    rest = {k: v / (time.perf_counter() - start) for k, v in sensors.end().items()}
    before = sensors.heat()
    run = speed.sustained(model, prompts, 60 * settings.sustained, settings.window, sensors)
    joules = run.pop("joules")
    found["speed"]["sustained"] = run
    found["power"] = {
        "sources": sorted(joules),
        "missing": sensors.missing,
        "watts_at_rest": {k: v for k, v in rest.items() if k in joules},
        "watts": {k: v / run["seconds"] for k, v in joules.items()},
        "joules_per_token": sum(counted(joules).values()) / run["tokens"] if joules else None,
        "celsius_before": before,
        "celsius_after": sensors.heat(),
        "throttled_windows": sum(bool(w["throttled"]) for w in run["windows"]),
        "tells_throttling": bool(sensors.throttling),
    }


def _quality(
    folder: str, found: dict[str, Any], own: quality.Logits, score: float, prompts: list[Prompt],
    items: list[Any], settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    """Streamed logits against the stock model's, if that fits; what shortcuts would cost."""
    texts = [p.tokens for p in prompts]
    model = found["method"]["model"]
    task = {"task_score": score, "task_items": len(items)}
    alone = quality.compare(own.whole, own.whole, texts)
    result: dict[str, Any] = {
        "package_offers_lossy_options": False,
        "streamed_perplexity": alone["perplexity"],
        "tokens": alone["tokens"],
        **task,
        "stock": None,
        "streamed": None,
        "exactness": None,
        "lossy": [],
        "not_measured": "",
    }
    needed = model["bytes"] + model["experts_bytes"] + (1 << 30)  # and the experts a second time
    have = min(available_memory_bytes(), device_memory_bytes())
    if needed > have:
        result["not_measured"] = (
            f"The stock model and a second copy of its experts need {format_size(needed)} of "
            f"memory, {format_size(have)} are free: streamed and stock were not compared here."
        )
        return result
    stock, _ = original_load_model(Path(folder))  # mlx-lm's own, even inside `patch`
    reference = quality.Logits.of(stock, prompts, settings.alone)
    result["stock"] = quality.compare(reference.whole, reference.whole, texts) | {
        **task,
        "task_score": quality.score(stock, items),
    }
    result["streamed"] = quality.compare(reference.whole, own.whole, texts) | task
    dtype = stock(mx.array([[0]])).dtype  # of a pass that is built, not run
    result["exactness"] = quality.exact(reference, own, dtype)
    result["lossy"] = quality.shortcuts(
        stock, reference.whole, prompts, items, settings.alone, settings.bits
    )
    return result
