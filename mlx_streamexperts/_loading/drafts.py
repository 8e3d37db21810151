"""Draft models: what one takes beside a streamed model, and how its prompts stay within that.

mlx-lm runs a draft model over a prompt before the streamed one, in steps as long as that one's.
Here the draft model's passes are divided into what fits into the work space, which is free then.
Only passes of mlx-lm's loop for drafts are: in any other use such a model is as it was.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from .._config import DEFAULT_CONTEXT, StreamConfig, format_size
from .._experts.stream import ExpertStream, flatten
from .._hooks import Pass, random_state_kept
from .._io.checkpoint import read_checkpoint
from .._memory.budget import Plan
from .._memory.footprint import Footprint
from .._memory.passes import Passes
from .combinations import SPECULATIVE
from .discover import expert_modules, footprint_of, item_bytes_of
from .lazy_load import original_load_model

_LEAST_TOKENS = 32  # of a pass of the draft model that has no other work space


@dataclass(frozen=True)
class Draft:
    """A draft model that will be loaded.

    Attributes:
        name: as the user called it.
        weights: its bytes.
        footprint: memory of its passes; None if they cannot be built here.
    """

    name: str
    weights: int
    footprint: Footprint | None

    @classmethod
    def read(cls, name: str, folder: Path) -> Draft:
        """Size a draft model from its files' headers.

        Raises:
            CheckpointError: the files are damaged or incomplete.
        """
        stored = read_checkpoint(folder).nbytes
        try:
            with random_state_kept():
                model, model_config = original_load_model(folder, lazy=True)
            weights = sum(a.nbytes for _, a in flatten(model))
            return cls(name, weights, _footprint(model, model_config))
        except Exception:  # loading it will report what is wrong with its files
            return cls(name, stored, None)

    def parts(self, context: int) -> tuple[int, int, int]:
        """Weights, KV cache and work space for so many tokens of context, in bytes."""
        if self.footprint is None:
            return self.weights, 0, 0
        return self.weights, self.footprint.kv(context), _least_work(self.footprint, context)

    def leave_room(self, config: StreamConfig) -> StreamConfig:
        """Options with a reserve for this model and the context that they state."""
        return replace(config, reserve=sum(self.parts(config.context_tokens or DEFAULT_CONTEXT)))

    def told(self, config: StreamConfig) -> str:
        """What it takes with these options, as one line."""
        context = config.context_tokens or DEFAULT_CONTEXT
        weights, kv, work = self.parts(context)
        return (
            f"{format_size(weights + kv + work)} for the draft model {self.name}: weights "
            f"{format_size(weights)}, KV cache {format_size(kv)} for {context:,} tokens, "
            f"work space {format_size(work)}"
        )


def with_draft(plan: Plan, draft: Draft) -> Plan:
    """A plan as requests see it: each of their tokens is in the draft model's KV cache too.

    Args:
        plan: the streamed model's. Its reserve has the draft model's weights, and its KV cache as
            far as that fits.
        draft: the draft model.
    """
    footprint = draft.footprint
    if footprint is None or plan.footprint is None:
        return plan
    weights, kv, _ = draft.parts(plan.context_tokens)
    kv = min(kv, max(0, plan.reserve - weights))
    return replace(
        plan,
        kv=plan.kv + kv,
        state=plan.state + footprint.state,
        reserve=plan.reserve - kv,
        footprint=replace(plan.footprint, layers=plan.footprint.layers + footprint.layers),
    )


def bound_drafts(model: nn.Module, model_config: dict[str, Any], main: ExpertStream) -> None:
    """Keep a model without experts within the memory of a streamed one while it drafts for it.

    Args:
        model: the model, loaded.
        model_config: its config.json.
        main: the streamed model's.
    """
    _DraftPasses(_Beside(main, model_config)).install(model, lambda *_: None)


class _DraftPasses(Passes):
    """Divides the passes of mlx-lm's loop for drafts, and no others."""

    def __init__(self, holder: _Beside) -> None:
        super().__init__(holder)
        self._beside = holder

    def step(self, whole: Pass) -> Any:
        if sys._getframe(2).f_code not in SPECULATIVE:
            return whole()
        self._beside.follow(whole.model)
        return super().step(whole)


class _Beside:
    """Holds the memory of a draft model: what it needs, the streamed model gives.

    Attributes:
        plan: the streamed model's, for passes of this one.
    """

    batches_copied_whole = True

    def __init__(self, main: ExpertStream, model_config: dict[str, Any]) -> None:
        self._main, self._model_config = main, model_config
        self._footprint: Footprint | None = None
        self.plan = main.plan

    def follow(self, model: nn.Module) -> None:
        """Take the streamed model's plan as it is now; measure this model before its first pass."""
        if self._footprint is None:
            self._footprint = _footprint(model, self._model_config)
        plan = self._main.plan
        work = plan.work + _least_work(self._footprint, plan.context_tokens)
        self.plan = replace(plan, footprint=self._footprint, work=work)

    def held_bytes(self) -> int:
        return 0  # the streamed model has a reserve for it

    def make_room(self, needed: int, what: str, instead: str) -> None:
        self._main.make_room(needed, f"{what} of the draft model", instead)


def _least_work(footprint: Footprint, context: int) -> int:
    """What passes of a useful length take where the streamed model has little work space."""
    return footprint.work(min(_LEAST_TOKENS, context), context)


def _footprint(model: nn.Module, model_config: dict[str, Any]) -> Footprint:
    return footprint_of(model, expert_modules(model), model_config, item_bytes_of(model))
