"""Runs a model once with some settings, as a user would, and measures it.

Each run loads the model anew, so that no run inherits anything from another's settings. Untimed
tokens come first and fill the cache.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.generate import generate_step

from .._analysis.quality import bundled_texts
from .._cache.expert_map import fewest_slots
from .._config import StreamConfig, parse_size
from .._errors import StreamError
from .._experts.bank import numbers
from .._experts.stream import expert_files, refuse_without_experts, stream
from .._loading.discover import DiscoveredModel, discover
from .._loading.lazy_load import original_load_model
from .._loading.load import patch
from .._memory.budget import default_memory
from .._memory.process_memory import held_bytes
from .._osinfo import drop_page_cache
from ._tuner import Run

CACHE_SHARE = "cache_share"
"""The setting for the part of the budget's room that the expert cache takes, 0 to 1."""

_SHIPPED = 4


@dataclass(frozen=True)
class Workload:
    """The text that a run generates.

    Attributes:
        prompts: texts.
        tokens: of each prompt's reply, greedy; the end of a text does not end it.
        warm_up: untimed tokens of a reply to the first prompt, before the others.
        page_cache: "keep" the files' pages, or "drop" those of the experts before each run.
    """

    prompts: tuple[str, ...]
    tokens: int = 32
    warm_up: int = 16
    page_cache: str = "keep"


class Runner:
    """A model and a workload.

    Args:
        folder: of the model.
        config: the options of every run, the budget among them.
        workload: the text to generate.
        trust: run the model code that the checkpoint brings.

    Attributes:
        name: of the model, for people.
        located: the model's layers and sizes.
        plan: the division of the budget.

    Raises:
        StreamError: the model cannot be streamed with these options, or this system cannot drop
            its page cache.
    """

    def __init__(
        self, folder: Path, config: StreamConfig, workload: Workload, trust: bool = False
    ) -> None:
        self._folder, self.name, self.workload = folder, folder.resolve().name, workload
        self.config = replace(config, progress=False, about=None)
        self._trust: dict[str, Any] = {"trust_remote_code": trust}
        self.located: DiscoveredModel = discover(folder, self.config, self._trust)
        refuse_without_experts(self.located.layers, f"{folder}: tuning is about reading experts")
        self.plan = self.located.plan(self.config, held_bytes())
        if self.plan.memory is not None:  # the same in every run, whatever is free by then
            self.config = replace(self.config, memory=self.plan.memory)
        self._files = [Path(f) for f in expert_files(self.located.layers)]
        tokenizer = mlx_lm.utils.load_tokenizer(folder, self._trust)
        self._prompts = [_encoded(tokenizer, text) for text in workload.prompts]
        if workload.page_cache == "drop" and not drop_page_cache(self._files[0]):
            raise StreamError("this system cannot be asked to drop its page cache: use keep")

    def run(self, settings: dict[str, Any]) -> Run:
        """Load with some settings, generate, measure, and let go of the model.

        Raises:
            StreamError: the settings cannot be used, or a read failed.
        """
        if self.workload.page_cache == "drop":
            for file in self._files:
                drop_page_cache(file)
        before = _release()
        with patch(config=self.applied(settings, self.config)):
            model, _ = mlx_lm.utils.load_model(self._folder, **self._trust)
        with stream(model) as expert_stream:
            logits = self._warm_up(model)
            expert_stream.reset()
            rates, first_token, tokens = self._replies(model)
            stats, plan = expert_stream.stats(), self.plan
            return Run(
                tuple(rates),
                tuple(first_token),
                tokens,
                logits,
                peak_bytes=mx.get_peak_memory() - before,
                promised_bytes=plan.memory or plan.trunk + plan.cache + plan.kv + plan.work,
                read_bytes=stats.read.bytes,
                hit_rate=stats.cache.hit_rate,
            )

    def stock(self) -> tuple[str, str | None] | None:
        """Digests of mlx-lm's own tokens and logits, or None if the model does not fit whole.

        No logits if the device may choose its kernels by the number of experts.
        """
        plan, bound = self.plan, default_memory()
        if self.config.memory is not None:
            bound = min(bound, parse_size(self.config.memory))
        if plan.trunk + plan.experts + plan.kv + plan.work > bound:
            return None
        _release()
        model, _ = original_load_model(self._folder, **self._trust)
        logits = self._warm_up(model)
        tokens = self._replies(model)[2]
        return tokens, logits if mx.default_device() == mx.cpu else None

    def subject(self) -> dict[str, Any]:
        """Plain values that identify the runs, for a ledger's first line."""
        hidden = ("progress", "about")
        return {
            "model": self.name,
            "options": {k: v for k, v in vars(self.config).items() if k not in hidden},
            "prompts": len(self._prompts),
            "prompts_sha256": _digest(json.dumps(self._prompts)),
            "prompt_tokens": [len(p) for p in self._prompts],
            "tokens": self.workload.tokens,
            "warm_up": self.workload.warm_up,
            "page_cache": self.workload.page_cache,
        }

    def applied(self, settings: dict[str, Any], config: StreamConfig) -> StreamConfig:
        """`config` with some settings, the cache's share as bytes: at least the fewest slots."""
        settings = dict(settings)
        if (share := settings.pop(CACHE_SHARE, 1.0)) < 1:
            few = fewest_slots(self.plan.top_k)
            least = sum(min(few, x.experts) * x.expert_bytes for x in self.located.layers)
            cache = max(least, int(share * self.plan.cache))
            settings |= {"cache": cache, "memory": self.plan.memory}
        return replace(config, **settings)

    def _warm_up(self, model: nn.Module) -> str:
        """Generate untimed tokens; returns the digest of their logits."""
        digest = hashlib.sha256()
        for _, logprobs in self._generate(model, self._prompts[0], self.workload.warm_up):
            digest.update(numbers(logprobs.astype(mx.float32)).tobytes())
        return digest.hexdigest()

    def _replies(self, model: nn.Module) -> tuple[list[float], list[float], str]:
        """By prompt: tokens/s after the first token, seconds to it; and the tokens' digest."""
        rates, first, replies = list[float](), list[float](), list[list[int]]()
        for prompt in self._prompts:
            tokens, times = [], [time.perf_counter()]
            for token, _ in self._generate(model, prompt, self.workload.tokens):
                tokens.append(token)
                times.append(time.perf_counter())
            first.append(times[1] - times[0])
            rates.append((len(tokens) - 1) / (times[-1] - times[1]))
            replies.append(tokens)
        return rates, first, _digest(json.dumps(replies))

    def _generate(self, model: nn.Module, prompt: list[int], tokens: int) -> Iterator[Any]:
        """Tokens and log-probabilities; the end of a text does not end it."""
        chunk = self.plan.prefill_tokens
        return generate_step(mx.array(prompt), model, max_tokens=tokens, prefill_step_size=chunk)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """A prompt's tokens, as mlx_lm.generate has them."""
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def shipped_prompts() -> list[str]:
    """Some texts that come with the package, of several tasks and languages."""
    texts = bundled_texts()
    return texts[:: len(texts) // _SHIPPED][:_SHIPPED]


def read_prompts(file: Path) -> list[str]:
    """The prompts in a file.

    Args:
        file: JSON lines (`.jsonl`), each a text or an object with `prompt`; or any other text, in
            which blank lines separate the prompts.

    Raises:
        StreamError: the file cannot be read, or has no prompts.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise StreamError(f"{file}: cannot be read: {e}") from e
    prompts = [p.strip("\n") for p in text.split("\n\n") if p.strip()]
    if file.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        prompts = [_prompt(line, f"{file}: line {n}") for n, line in lines if line.strip()]
    if not prompts:
        raise StreamError(f"{file}: there are no prompts in it")
    return prompts


def _prompt(line: str, place: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(prompt, str) or not prompt:
        raise StreamError(f'{place} is neither a text nor {{"prompt": text}}')
    return prompt


def _release() -> int:
    """Free what the run before left and reset MLX's peak; returns the bytes that are still held."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return int(mx.get_active_memory())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
