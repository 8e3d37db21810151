"""How far a model's answers are from a reference's, and what lossy settings cost and bring.

One owner of the arithmetic: `quality`, `tune --quality-budget` and `report` use it. It compares; it
never decides what is good enough.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from .._cache.lossy import LEVELS, Ways
from .._config import StreamConfig
from .._errors import StreamError, UnsupportedModelError
from .._experts.lossy import LossyRun
from .._experts.stream import ExpertStream, stream
from .._loading.load import load
from .._progress import progress_bar

DATA = Path(__file__).parent.parent / "data"
EXACT = "exact"
_MOST_NATS = 700.0  # whose exponential is still a number: a shortcut may be that bad


def logits(model: nn.Module, tokens: Sequence[int], alone: int) -> np.ndarray:
    """Logits after each token, float32 [T, V]: the last `alone` tokens decoded one by one."""
    cache = make_prompt_cache(model)
    split = max(1, len(tokens) - alone)
    rows = []
    for part in (tokens[:split], *([t] for t in tokens[split:])):
        out = model(mx.array([part]), cache=cache)[0].astype(mx.float32)  # [T, V]
        mx.eval(out)
        rows.append(np.array(out))
    return np.concatenate(rows)


def log_probabilities(x: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [T, V], in float64."""
    wide = x.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@dataclass(frozen=True)
class Difference:
    """How logits differ from a reference's.

    Attributes:
        kl_nats: mean KL(reference || these) a token.
        same_first: share of tokens whose likeliest successor is the reference's.
        perplexity: over every token of the texts but each first.
        perplexity_change: of the perplexity, relative to the reference's; 0.01 is one percent.
        change_error: standard error of that, from the differences token by token.
    """

    kl_nats: float
    same_first: float
    perplexity: float
    perplexity_change: float
    change_error: float


def difference(
    reference: Sequence[np.ndarray], other: Sequence[np.ndarray], following: Sequence[Sequence[int]]
) -> Difference:
    """Compare logits, text by text.

    Args:
        reference, other: logits [T, V] of each text.
        following: the token after each of these T; the last one may be missing.
    """
    kl, first, losses, before = [], [], [], []
    for a, b, tokens in zip(reference, other, following, strict=True):
        p, q = log_probabilities(a), log_probabilities(b)
        kl.append(np.maximum(0.0, (np.exp(p) * (p - q)).sum(-1)))
        first.append(a.argmax(-1) == b.argmax(-1))
        at = np.arange(len(tokens)), np.asarray(tokens, int)
        losses.append(-q[at])
        before.append(-p[at])
    loss, more = np.concatenate(losses), np.concatenate(losses) - np.concatenate(before)
    change = math.expm1(min(_MOST_NATS, float(more.mean())))
    return Difference(
        kl_nats=float(np.concatenate(kl).mean()),
        same_first=float(np.concatenate(first).mean()),
        perplexity=math.exp(min(_MOST_NATS, float(loss.mean()))),
        perplexity_change=change,
        change_error=(1 + change) * float(more.std()) / math.sqrt(max(1, len(more))),
    )


@dataclass(frozen=True)
class Choice:
    """One item of the bundled task, as tokens: a context and two ways to go on.

    The model's answer is the one that it finds likelier; `right` is an index into `choices`.
    """

    context: list[int]
    choices: list[list[int]]
    right: int


def bundled_task(tokenizer: Any, count: int | None = None) -> list[Choice]:
    """The shipped task, at most its first `count` items."""
    items = []
    for x in json.loads((DATA / "report-tasks.json").read_text())[:count]:
        choices = [list(tokenizer.encode(t, add_special_tokens=False)) for t in x["choices"]]
        items.append(Choice(tokenizer.encode(x["context"]), choices, x["right"]))
    return items


def bundled_texts() -> list[str]:
    """The texts of a report's prompts: several tasks and languages."""
    return [t["text"] for t in json.loads((DATA / "report-prompts.json").read_text())]


def task_score(model: nn.Module, items: Sequence[Choice], alone: int = 0) -> float:
    """Share of a task's items that a model gets right, the last `alone` tokens decoded singly."""
    return sum(answer(model, x, alone) == x.right for x in items) / len(items) if items else 0.0


def answer(model: nn.Module, item: Choice, alone: int = 0) -> int:
    """The choice whose tokens have the highest mean log-probability."""
    means = []
    for choice in item.choices:
        found = log_probabilities(logits(model, item.context + choice, alone))
        at = np.arange(len(item.context) - 1, len(item.context) + len(choice) - 1)
        means.append(found[at, choice].mean())
    return int(np.argmax(means))


@dataclass(frozen=True)
class Speed:
    """A kind of passes: tokens of prompts, or decoded ones.

    Attributes:
        tokens: how many.
        tokens_per_s: as measured; every text begins with an empty expert cache.
        bytes_per_token: read from the drive, or the page cache.
    """

    tokens: int
    tokens_per_s: float
    bytes_per_token: float


@dataclass(frozen=True)
class Price:
    """What a setting costs and brings.

    Attributes:
        setting: as it is stated for `lossy`; "exact" for none.
        decoded, prompts: logits compared with exact ones.
        decoding, prefill: speed.
        task_score: share of the bundled task that is right; None if it was left out.
        share_left_out, mass_left_out: of the experts chosen, and of the router's mass.
    """

    setting: str
    decoded: Difference
    prompts: Difference
    decoding: Speed
    prefill: Speed
    task_score: float | None
    share_left_out: float
    mass_left_out: float

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Ran:
    """One setting's logits [T, V] of each text: of its prompt, and of what was decoded."""

    prompts: list[np.ndarray]
    decoded: list[np.ndarray]
    prefill: Speed
    decoding: Speed
    task_score: float | None
    share_left_out: float
    mass_left_out: float


def default_settings(top_k: int, prefer: bool) -> list[str]:
    """Settings worth a try on any model.

    Args:
        top_k: experts of a token.
        prefer: the model can do that.
    """
    fewer = sorted({top_k - 1, top_k * 3 // 4} - {0, top_k}, reverse=True)
    return [
        *(str(level) for level in LEVELS),
        *(f"prefer={share}" for share in (0.1, 0.2) if prefer),
        *(f"top={k}" for k in fewer),
    ]


def windows(tokens: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Cut a text into windows of `length` tokens, `most` tokens in all, spread over it.

    Raises:
        StreamError: it is shorter than a window.
    """
    there = len(tokens) // length
    if not there:
        raise StreamError(
            f"the text has {len(tokens)} tokens, fewer than a window of {length}: give a longer "
            "text, or a smaller --window"
        )
    count = max(1, min(there, most // length))
    starts = [i * there // count * length for i in range(count)]
    return [list(tokens[at : at + length]) for at in starts]


def measure(
    folder: str,
    config: StreamConfig,
    texts: Sequence[str],
    settings: Sequence[str] | None = None,
    tokens: int = 1024,
    window: int = 128,
    prompt: int = 32,
    items: int = 12,
    trust: bool = False,
    progress: bool = False,
) -> Iterator[Price]:
    """Load a model and measure what lossy settings cost and bring; see `prices`.

    Args:
        folder: of the model.
        config: options; `lossy` among them is ignored.
        texts: of the user.
        settings: values of `lossy`; None for `default_settings`.
        tokens: of the texts, at most.
        window, prompt: tokens of a window, and of its beginning that runs as a prompt. Texts that
            are shorter than a window, but longer than two prompts, are one.
        items: of the bundled task; 0 for none.
        trust: run the model code that the checkpoint brings.
        progress: show a bar with the time left.

    Raises:
        StreamError: a setting or a size is not understood, the texts are too short, or nothing is
            streamed. Loading raises what `load` raises.
    """
    if not 0 < prompt < window - 1:
        raise StreamError(f"a window of {window} tokens cannot begin with a prompt of {prompt}")
    stated = [x for s in settings or () if (x := Ways.parse(s)) is not None]
    prefer = settings is None or any(x.prefer for x in stated)
    try:
        model, tokenizer = _load(folder, config, prefer, trust)
    except UnsupportedModelError:
        if settings is not None:
            raise
        prefer = False  # its router gives no logits: measure the other ways
        model, tokenizer = _load(folder, config, prefer, trust)
    with stream(model) as s:
        if all(x.resident for x in s.layers):
            raise StreamError(
                "all experts are resident: nothing is read, so leaving experts out saves nothing. "
                "State a smaller --memory or --cache to see what it would cost"
            )
        if settings is None:
            settings = default_settings(max(n.top_k for n in s.needs()), prefer)
        ids = [t for text in texts for t in tokenizer.encode(text)]
        cut = windows(ids, max(2 * prompt, min(window, len(ids))), tokens)
        task = bundled_task(tokenizer, items) if items else []
        with progress_bar("Measuring", progress, unit=" windows") as bar:

            def show(setting: str, total: int) -> None:
                bar.total = total
                bar.set_postfix_str(setting)
                bar.update(1)

            yield from prices(model, cut, settings, prompt, task, show)


def _load(folder: str, config: StreamConfig, prefer: bool, trust: bool) -> tuple[nn.Module, Any]:
    """A model that is exact for now, and may run with any setting; with `prefer` or without."""
    config = replace(config, lossy="prefer=0.1" if prefer else "skip=0.1")
    trusted: dict[str, Any] = {"trust_remote_code": True} if trust else {}
    log = logging.getLogger(load.__module__)
    log.addFilter(_is_no_first_line)  # what it is loaded with is not what it runs with
    try:
        model, tokenizer = load(folder, config=config, tokenizer_config=trusted, **trusted)[:2]
    finally:
        log.removeFilter(_is_no_first_line)
    return model, tokenizer


def _is_no_first_line(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("lossy: ")


def prices(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    settings: Sequence[str],
    prompt: int,
    items: Sequence[Choice] = (),
    on_window: Callable[[str, int], None] = lambda setting, total: None,
) -> Iterator[Price]:
    """Measure settings on texts: the exact model first, then one after the other.

    Each text runs from an empty expert cache: its first `prompt` tokens as a prompt, in one call,
    the others decoded one by one, as they are in the text. Passes are lossy in both parts.

    Args:
        model: a streamed model, loaded with some `lossy`.
        texts: tokens of each, more than `prompt`.
        settings: values of `lossy`.
        prompt: tokens of each text that are its prompt.
        items: of the bundled task, decoded token by token.
        on_window: called after each text of each setting, with the setting and the number of
            such calls in all.

    Yields:
        A price as soon as it is known.

    Raises:
        StreamError: the model was loaded exact, or a setting is not understood.
    """
    run = stream(model).lossy
    if run is None:
        raise StreamError("prices need a model that was loaded with lossy")
    ways = {EXACT: None, **{s: Ways.parse(s) for s in settings}}
    after = [[t[1 : prompt + 1] for t in texts], [t[prompt + 1 :] for t in texts]]
    exact: _Ran | None = None
    for setting, way in ways.items():
        told = partial(on_window, setting, len(ways) * len(texts))
        ran = _run(model, run, way, texts, prompt, items, told)
        exact = exact or ran
        yield Price(
            setting,
            difference(exact.decoded, ran.decoded, after[1]),
            difference(exact.prompts, ran.prompts, after[0]),
            ran.decoding, ran.prefill, ran.task_score, ran.share_left_out, ran.mass_left_out,
        )  # fmt: skip


def _run(
    model: nn.Module, run: LossyRun, ways: Ways | None, texts: Sequence[Sequence[int]], prompt: int,
    items: Sequence[Choice], on_window: Callable[[], None],
) -> _Ran:  # fmt: skip
    s = stream(model)
    prompts: list[np.ndarray] = []
    decoded: list[np.ndarray] = []
    seconds, nbytes = [0.0, 0.0], [0, 0]
    s.reset()
    with run.using(ways):
        for text in texts:
            empty_cache(s)
            cache = make_prompt_cache(model)
            for part in (0, 1):
                begin, before = time.perf_counter(), s.reader.stats.bytes
                rows = []
                for tokens in [text[:prompt]] if not part else [[t] for t in text[prompt:]]:
                    out = model(mx.array([tokens]), cache=cache)[0].astype(mx.float32)  # [T, V]
                    mx.eval(out)
                    rows.append(np.array(out))
                seconds[part] += time.perf_counter() - begin
                nbytes[part] += s.reader.stats.bytes - before
                (decoded if part else prompts).append(np.concatenate(rows))
            on_window()
        stats = run.stats()
        score = task_score(model, items, alone=1 << 30) if items else None
    counts = [sum(len(t[:prompt]) for t in texts), sum(len(t[prompt:]) for t in texts)]
    prefill, decoding = (
        Speed(n, n / s, b / n) for n, s, b in zip(counts, seconds, nbytes, strict=True)
    )
    return _Ran(
        prompts, decoded, prefill, decoding, score, stats.share_left_out, stats.mass_left_out
    )


def empty_cache(s: ExpertStream) -> None:
    """Empty the expert cache: another size, and the old one again."""
    size = sum(x.cache.slots * x.expert_bytes for x in s.layers)
    least = sum(n.minimum * n.expert_bytes for n in s.needs())
    more = sum(x.expert_bytes for x in s.layers if x.cache.slots < x.experts)
    s.resize(least if size > least else size + more)
    s.resize(size)


def frontier(found: Sequence[Price]) -> list[Price]:
    """Those that no other one beats in both speed and price, from the slowest on."""
    kept: list[Price] = []
    for x in sorted(found, key=lambda p: (-p.decoding.tokens_per_s, p.decoded.perplexity_change)):
        if not kept or x.decoded.perplexity_change < kept[-1].decoded.perplexity_change:
            kept.append(x)
    return kept[::-1]


def best_within(found: Sequence[Price], budget: float) -> Price:
    """The fastest of those whose perplexity rises by at most `budget` (0.01 is one percent).

    The first one is the exact model's.
    """
    within = [p for p in found if p.decoded.perplexity_change <= budget]
    return max(within, key=lambda p: p.decoding.tokens_per_s, default=found[0])


def recommendation(found: Sequence[Price], budget: float) -> str:
    """One sentence about what to use; see `best_within`."""
    exact, best = found[0], best_within(found, budget)
    if best is exact:
        return f"Stay exact: no setting within {budget:.1%} of perplexity was faster on this text."
    name = f"level {best.setting}" if best.setting.isdigit() else best.setting
    less = 1 - best.decoding.bytes_per_token / max(exact.decoding.bytes_per_token, 1e-9)
    gain = best.decoding.tokens_per_s / exact.decoding.tokens_per_s
    cost = max(0.0, best.decoded.perplexity_change)
    return (
        f"{name[0].upper()}{name[1:]} costs {cost:.1%} perplexity "
        f"(± {best.decoded.change_error:.1%}) on this text, reads {less:.0%} less and decodes "
        f"{gain:.2f} times as fast: use --lossy {best.setting}."
    )
