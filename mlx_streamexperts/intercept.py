"""Exchanging what calling one module, or one model's forward passes, does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Check = Callable[[mx.array | None, Any], None]
"""Looks at a forward pass: its token ids [B, T], or None for embeddings, and its caches or None."""

Step = Callable[[Callable[[], Any], int, Any], Any]
"""Runs a forward pass: the model's own pass, the tokens of the call, and its caches or None."""


def intercept(module: nn.Module, call: Callable[..., Any]) -> None:
    """Let calls of this module, and of no other of its class, go to `call`.

    It gets a class of its own, derived from the one it had: no wrapper, so that every path in the
    model stays what it is, and `isinstance` and the signature say what they said.

    Args:
        module: the one.
        call: takes the module and what it is called with.
    """
    kind: Any = type(module)
    own = {"__call__": functools.wraps(kind.__call__)(call), "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), own)


def intercept_passes(model: nn.Module, step: Step, check: Check) -> None:
    """Let a model's forward passes go through `step`.

    Args:
        model: left alone unless its call takes a `cache`.
        step: what runs them.
        check: looks at each before, and raises where it must not run.
    """
    kind = type(model)
    parameters = list(inspect.signature(kind.__call__).parameters)[1:]
    if "cache" not in parameters:
        return
    place = parameters.index("cache")

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        embeddings = tokens = kwargs.get("input_embeddings")
        if tokens is None:
            tokens = args[0] if args else kwargs.get(parameters[0])
        if tokens is None or tokens.ndim < 2:
            return kind.__call__(self, *args, **kwargs)
        caches = args[place] if len(args) > place else kwargs.get("cache")
        check(tokens if embeddings is None else None, caches)
        rows = tokens.shape[0] * tokens.shape[1]
        return step(lambda: kind.__call__(self, *args, **kwargs), rows, caches)

    intercept(model, call)
