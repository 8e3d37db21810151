"""How long requests may be where nobody said so, and the line that tells what a server has.

A longer context costs resident experts: its KV cache and work space come out of the same budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._analysis.predict import predict
from .._config import StreamConfig, format_size
from .._errors import BudgetError, StreamError
from .._loading.discover import discover
from .._memory.budget import Plan, text_config
from .._memory.hardware import named_machine
from .._osinfo import processor_name, total_memory_bytes

_LENGTHS = (262_144, 131_072, 65_536, 49_152, 32_768, 16_384, 8_192)  # tokens, the best first
_SHARE = 0.1  # of the expert cache that a longer context may take
_WANTED, _WANTED_SHARE = 32_768, 0.25  # agents send 10,000 to 20,000 tokens: worth more of it

_REPLY, _STEP = 1024, 4096  # tokens


@dataclass(frozen=True)
class ContextChoice:
    """A context that nobody stated.

    Attributes:
        tokens: of prompt and reply.
        cost: resident share that it takes, compared with the default context.
    """

    tokens: int
    cost: float


def choose_context(
    folders: Sequence[str],
    config: StreamConfig,
    trust_remote_code: bool,
    longer: Callable[[StreamConfig], StreamConfig] | None = None,
) -> ContextChoice | None:
    """Choose the longest context that leaves nine tenths of the expert cache, at most the model's.

    Up to 32,768 tokens three quarters are enough.

    Args:
        folders: of the models that are served within one budget.
        config: the options.
        trust_remote_code: run the model code that checkpoints bring.
        longer: returns the options with a reserve for the context that they state.

    Returns:
        None if the context is stated, if only `cache` is (its contexts take what else is free), on
        several machines, or if no longer context than the default fits.

    Raises:
        StreamError: a model does not fit with the default context either.
    """
    cache_only = config.cache is not None and config.memory is None
    if config.context_tokens is not None or cache_only or config.pipeline:
        return None

    trust = {"trust_remote_code": trust_remote_code}
    models = [discover(Path(f), config, trust, as_converted=True) for f in folders]

    def planned(tokens: int | None) -> list[Plan]:
        stated = replace(config, context_tokens=tokens)
        return [m.plan(stated if longer is None else longer(stated)) for m in models]

    before = planned(None)
    config = replace(config, memory=before[0].memory)
    most = min(_most_context(m.model_config) for m in models)
    free = min(p.longest_context for p in before)  # what the default leaves over, if anything
    for tokens in (n for n in _LENGTHS if free < n <= most):
        share = _WANTED_SHARE if tokens <= _WANTED else _SHARE
        try:
            after = planned(tokens)
        except BudgetError:
            continue
        if all(a.cache >= (1 - share) * b.cache for b, a in zip(before, after, strict=True)):
            return ContextChoice(tokens, before[0].resident_share - after[0].resident_share)
    return None


def enough(prompt: int) -> int:
    """A context for a prompt of so many tokens and a reply: whole steps of 4,096 tokens."""
    return -(-(prompt + _REPLY) // _STEP) * _STEP


def _most_context(model_config: dict[str, Any]) -> int:
    """Tokens that a model was made for; the longest of ours if its configuration does not say."""
    most = text_config(model_config).get("max_position_embeddings")
    return most if isinstance(most, int) and most > 0 else _LENGTHS[0]


def start_line(url: str, plan: Plan | None, choice: ContextChoice | None) -> str:
    """Where the server is, and what it has.

    Args:
        url: the server's address.
        plan: of the loaded model; None if nothing is streamed.
        choice: the context, if nobody stated it.
    """
    if plan is None:
        return f"Serving at {url}"
    budget = f"a cache of {format_size(plan.cache)}"
    if plan.memory is not None:
        budget = format_size(plan.memory)
    context = f"room for {plan.longest_context:,} tokens of context"
    if choice is not None:
        context += f" ({format_size(plan.kv)}, {choice.cost:.1%} of the experts less in memory)"
    return (
        f"Serving at {url}: {plan.resident_share:.0%} of the experts resident within {budget}, "
        f"{context}{_expected(plan)}"
    )


def _expected(plan: Plan) -> str:
    """Predicted tokens/s, on a Mac whose figures are known."""
    try:
        machine = named_machine(f"{processor_name()} {total_memory_bytes() >> 30}")
    except StreamError:
        return ""
    rate = predict(plan, machine).tokens_per_s
    return f"; predicted {rate.likely:.2g} tokens/s ({rate.low:.2g} to {rate.high:.2g})"
