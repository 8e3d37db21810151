"""Hooks around the calls of one module, or around one model's forward passes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Check = Callable[[mx.array | None, Any], None]
"""Checks a forward pass: its token ids [B, T], or None for embeddings, and its caches or None."""

_EMBEDDINGS = "input_embeddings"


@dataclass(frozen=True, slots=True)
class Pass:
    """One call of a model.

    Attributes:
        model, kind: the model, and its class in mlx-lm.
        names: the parameters of its call, in order.
        given: the call's arguments by name. The first parameter takes the tokens, [B, L].
        sequences, tokens: B and L.
    """

    model: nn.Module
    kind: Any
    names: tuple[str, ...]
    given: dict[str, Any]
    sequences: int
    tokens: int

    def __call__(self) -> Any:
        """Run the pass."""
        return self.kind.__call__(self.model, **self.given)

    @property
    def caches(self) -> Any:
        """The KV caches that it changes, one per layer; None if it was given none."""
        caches = self.given.get("cache")
        return None if not caches or any(c is None for c in caches) else caches

    @property
    def divisible(self) -> bool:
        """Can it run in parts, one after another?

        It can if its only arguments are tokens and caches. A mask, for example, is for the whole.
        """
        known = {self.names[0], _EMBEDDINGS, "cache"}
        return bool(self.caches) and all(
            value is None or name in known for name, value in self.given.items()
        )

    def part(self, begin: int, end: int) -> Pass:
        """The pass over its tokens `begin` to `end`."""
        given = dict(self.given)
        for name in (self.names[0], _EMBEDDINGS):
            if isinstance(given.get(name), mx.array):
                given[name] = given[name][:, begin:end]
        return Pass(self.model, self.kind, self.names, given, self.sequences, end - begin)


Step = Callable[[Pass], Any]
"""Runs a forward pass and returns its result."""


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of a module within the `with` block; restore them after errors too.

    Args:
        owner: a module. It must have every attribute already.
        values: replacements by attribute name.
    """
    before = {name: vars(owner)[name] for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def intercept(module: nn.Module, call: Callable[..., Any], method: str = "__call__") -> None:
    """Redirect calls of this module, and of no other module of its class, to `call`.

    The module gets a class of its own, derived from the one it had. There is no wrapper, so paths
    in the model, `isinstance` and the signature stay the same.

    Args:
        module: the module.
        call: takes the module and the call's arguments.
        method: the method to redirect.
    """
    kind: Any = type(module)
    own = {method: functools.wraps(getattr(kind, method))(call), "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), own)


def intercept_passes(model: nn.Module, step: Step, check: Check) -> None:
    """Redirect a model's forward passes to `step`.

    Args:
        model: left alone unless its call takes a `cache`.
        step: runs each pass.
        check: is called before each pass, and raises if it must not run.
    """
    kind: Any = type(model)
    signature = inspect.signature(kind.__call__)
    names = tuple(signature.parameters)[1:]
    if "cache" not in names:
        return
    spread = {p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD}

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given[next(iter(given))]  # self
        for name in spread:
            given.update(given.pop(name, {}))
        embeddings = tokens = given.get(_EMBEDDINGS)
        if tokens is None:
            tokens = given.get(names[0])
        if not isinstance(tokens, mx.array) or tokens.ndim < 2:
            return kind.__call__(self, *args, **kwargs)
        check(tokens if embeddings is None else None, given.get("cache"))
        return step(Pass(self, kind, names, given, *tokens.shape[:2]))

    intercept(model, call)
