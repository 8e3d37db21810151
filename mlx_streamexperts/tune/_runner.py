"""Runs a model once with some settings, as a user would, and measures it.

Each run loads the model anew, so that nothing of another run's settings is left: what counts is
what a user gets who loads with them. Untimed tokens come first and fill the cache; their logits are
kept as a digest. What the page cache holds is left to the runs themselves or dropped before each.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils

from .._config import StreamConfig, parse_size
from .._errors import StreamError
from .._experts.bank import numbers
from .._experts.stream import expert_files, stream
from .._loading.demo import demo_model
from .._loading.discover import DiscoveredModel, discover
from .._loading.lazy_load import original_load_model
from .._loading.load import patch
from .._loading.profiles import CACHE_SHARE, shared
from .._memory.budget import default_memory
from .._osinfo import drop_page_cache
from ._tuner import Run

_TOPICS = 4


@dataclass(frozen=True)
class Workload:
    """What is generated in a run.

    Attributes:
        prompts: texts.
        tokens: of each prompt's reply, greedy; fewer where the model ends it.
        warm_up: untimed tokens of a reply to the first prompt, before.
        page_cache: "keep", or "drop" what it has of the experts before each run.
    """

    prompts: tuple[str, ...]
    tokens: int = 32
    warm_up: int = 16
    page_cache: str = "keep"


class Runner:
    """A model, and what is run with it.

    Args:
        folder: of the model.
        config: the options that every run has, the budget among them.
        workload: what is generated.
        trust: run the model code that the checkpoint brings.

    Attributes:
        name: of the model, for people.
        located: the model's layers and sizes, for whoever wants to know the place.
        plan: what the options come to.

    Raises:
        StreamError: the model cannot be streamed with these options, or the page cache not dropped.
    """

    def __init__(
        self, folder: Path, config: StreamConfig, workload: Workload, trust: bool = False
    ) -> None:
        self._folder, self.name, self.workload = folder, folder.resolve().name, workload
        self.config = replace(config, profile="off", progress=False)
        self._trust: dict[str, Any] = {"trust_remote_code": trust}
        self.located: DiscoveredModel = discover(folder, self.config, self._trust)
        self.plan = self.located.plan(self.config)
        if self.plan.memory is not None:  # every run gets the same, whatever is free by then
            self.config = replace(self.config, memory=self.plan.memory)
        self._files = expert_files(self.located.layers)
        self._tokenizer: Any = mlx_lm.utils.load_tokenizer(folder, self._trust)
        self._prompts = [self._encoded(text) for text in workload.prompts]
        if workload.page_cache == "drop" and not drop_page_cache(Path(self._files[0])):
            raise StreamError("this system cannot be asked to drop its page cache: use keep")

    def run(self, settings: dict[str, Any]) -> Run:
        """Load with some settings, generate, measure, and let go of the model.

        Raises:
            StreamError: the settings cannot be used, or a read failed.
        """
        if self.workload.page_cache == "drop":
            for file in self._files:
                drop_page_cache(Path(file))
        before = self._nothing_held()
        try:
            return self._measured(settings, before)
        finally:
            self._nothing_held()

    def stock(self) -> tuple[str, str | None] | None:
        """Digests of mlx-lm's own tokens and logits, everything loaded; None if that does not fit.

        No logits where the device may choose its kernels by the number of experts.
        """
        needed = self.plan.trunk + self.plan.experts + self.plan.kv + self.plan.work
        bound = default_memory()
        if self.config.memory is not None:
            bound = min(bound, parse_size(self.config.memory))
        if needed > bound:
            return None
        self._nothing_held()
        try:
            tokens, logits = self._stock_digests()
        finally:
            self._nothing_held()
        return tokens, logits if mx.default_device() == mx.cpu else None

    def subject(self) -> dict[str, Any]:
        """What the runs are of, for a ledger's first line."""
        stated = {k: v for k, v in vars(self.config).items() if k not in ("profile", "progress")}
        return {
            "model": self.name,
            "options": stated,
            "prompts": len(self._prompts),
            "prompts_sha256": _digest(json.dumps(self._prompts)),
            "prompt_tokens": [len(p) for p in self._prompts],
            "tokens": self.workload.tokens,
            "warm_up": self.workload.warm_up,
            "page_cache": {
                "keep": "kept: what earlier runs read may be in it",
                "drop": "what it had of the experts was dropped before each run",
            }[self.workload.page_cache],
        }

    def _measured(self, settings: dict[str, Any], before: int) -> Run:
        with patch(config=self._with(settings)):
            model, _ = mlx_lm.utils.load_model(self._folder, **self._trust)
        with stream(model) as expert_stream:
            logits = self._warm_up(model)
            expert_stream.reset()
            rates, first, tokens = self._replies(model)
            stats, plan = expert_stream.stats(), self.plan
            return Run(
                rates=tuple(rates),
                first_token=tuple(first),
                tokens=tokens,
                logits=logits,
                peak_bytes=mx.get_peak_memory() - before,
                promised_bytes=plan.memory or plan.trunk + plan.cache + plan.kv + plan.work,
                read_bytes=stats.read.bytes,
                hit_rate=stats.cache.hit_rate,
            )

    def _stock_digests(self) -> tuple[str, str]:
        model, _ = original_load_model(self._folder, **self._trust)
        logits = self._warm_up(model)
        return self._replies(model)[2], logits

    def _with(self, settings: dict[str, Any]) -> StreamConfig:
        """The options of a run."""
        settings = dict(settings)
        share = settings.pop(CACHE_SHARE, 1.0)
        if share < 1:
            settings |= shared(self.located.layers, self.plan, share)
        return replace(self.config, **settings)

    def _encoded(self, text: str) -> list[int]:
        """A prompt's tokens, as mlx_lm.generate has them."""
        tokenizer = self._tokenizer
        if tokenizer.has_chat_template:
            return list(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True
                )
            )
        return list(tokenizer.encode(text))

    def _warm_up(self, model: nn.Module) -> str:
        """Untimed tokens; returns the digest of their logits."""
        digest = hashlib.sha256()
        for response in self._generate(model, self._prompts[0], self.workload.warm_up):
            digest.update(numbers(response.logprobs.astype(mx.float32)).tobytes())
        return digest.hexdigest()

    def _replies(self, model: nn.Module) -> tuple[list[float], list[float], str]:
        """Tokens/s after the first and seconds to it, by prompt, and the digest of all tokens."""
        rates, first, replies = list[float](), list[float](), list[list[int]]()
        for prompt in self._prompts:
            tokens, times = [], [time.perf_counter()]
            for response in self._generate(model, prompt, self.workload.tokens):
                tokens.append(response.token)
                times.append(time.perf_counter())
            if len(tokens) < 2:
                raise StreamError(
                    f"the model ends its reply to prompt {len(replies) + 1} at once: nothing can "
                    "be timed; use other prompts"
                )
            first.append(times[1] - times[0])
            rates.append((len(tokens) - 1) / (times[-1] - times[1]))
            replies.append(tokens)
        return rates, first, _digest(json.dumps(replies))

    def _generate(self, model: nn.Module, prompt: list[int], tokens: int) -> Any:
        return mlx_lm.stream_generate(
            model,
            self._tokenizer,
            prompt,
            max_tokens=tokens,
            prefill_step_size=self.plan.prefill_tokens,
        )

    @staticmethod
    def _nothing_held() -> int:
        """Collect what earlier runs left and watch MLX's memory anew; returns what it holds."""
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        return int(mx.get_active_memory())


def shipped_prompts() -> list[str]:
    """One text of each of some topics, those that the embedded model knows."""
    by_topic: dict[str, str] = {}
    for entry in json.loads((demo_model() / "prompts.json").read_text()):
        by_topic.setdefault(entry["topic"], entry["prompt"])
    return list(by_topic.values())[:: max(1, len(by_topic) // _TOPICS)][:_TOPICS]


def read_prompts(file: Path) -> list[str]:
    """Prompts of a file.

    Args:
        file: JSON lines (`.jsonl`), each a text or an object with `prompt`; or any other text, in
            which blank lines part the prompts.

    Raises:
        StreamError: it cannot be read, or has no prompts.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise StreamError(f"{file}: cannot be read: {e}") from e
    prompts: list[str] = []
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            entry: Any = None
            with suppress(ValueError):
                entry = json.loads(line)
            prompt = entry.get("prompt") if isinstance(entry, dict) else entry
            if not isinstance(prompt, str) or not prompt:
                raise StreamError(f'{file}: line {number} is neither a text nor {{"prompt": text}}')
            prompts.append(prompt)
    else:
        prompts = [p.strip("\n") for p in text.split("\n\n") if p.strip()]
    if not prompts:
        raise StreamError(f"{file}: there are no prompts in it")
    return prompts


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
