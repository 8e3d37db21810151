"""Replaces calls: of one module, of a model's forward passes, or of a library's functions.

A replacement of a module's call never affects other modules of its class. A replacement of a
library's function ends with its `with` block.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Check = Callable[[mx.array | None, Any], None]
"""Checks a pass before it runs, given its token ids [B, L] (None for embeddings) and its caches."""

_EMBEDDINGS = ("input_embeddings", "inputs_embeds")  # as mlx-lm and mlx-vlm call them
_STEP = "n_to_process"  # tokens of a step of mlx-vlm's prompt loop
_HIDDEN = {"capture_layer_ids", "return_hidden", "return_shared_kv"}


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward call of a model.

    Attributes:
        model, kind: the model, and its original class.
        names: names of the call's parameters, in order.
        given: arguments by name. The first one holds the tokens, [B, L].
        sequences, tokens: B and L.
    """

    model: nn.Module
    kind: Any
    names: tuple[str, ...]
    given: dict[str, Any]
    sequences: int
    tokens: int

    def __call__(self) -> Any:
        """Run the pass and return its result."""
        return self.kind.__call__(self.model, **self.given)

    @property
    def caches(self) -> Any:
        """The caches that the pass changes, one for each layer; None if it was given none."""
        caches = self.given.get("cache")
        return None if not caches or any(c is None for c in caches) else caches

    @property
    def divisible(self) -> bool:
        """Do consecutive parts of the pass compute the same as the whole?

        They do if tokens and caches are the only arguments: a mask, for example, covers the whole.
        In a step of mlx-vlm's prompt loop they do too: every step gets the other arguments of the
        whole prompt. Not if an array is as long as the step, or a draft model asks for hidden
        states.
        """
        known = {self.names[0], "inputs", *_EMBEDDINGS, "cache"}
        others = {n: v for n, v in self.given.items() if v is not None and n not in known}
        if _STEP in others:
            sizes = {d for v in others.values() if isinstance(v, mx.array) for d in v.shape[1:]}
            return bool(self.caches) and not sizes & {self.tokens} and not others.keys() & _HIDDEN
        return bool(self.caches) and not others

    def part(self, begin: int, end: int) -> Pass:
        """The pass over tokens `begin` to `end - 1`."""
        given = dict(self.given)
        for name in {self.names[0], "inputs", *_EMBEDDINGS}:
            if isinstance(given.get(name), mx.array):
                given[name] = given[name][:, begin:end]
        if _STEP in given:
            given[_STEP] = end - begin
        return Pass(self.model, self.kind, self.names, given, self.sequences, end - begin)


def logits_of(result: Any) -> mx.array:
    """The logits [B, L, V] of a pass: mlx-vlm returns an object that holds them."""
    logits: mx.array = getattr(result, "logits", result)
    return logits


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


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Let nothing within the `with` block take random numbers from the caller.

    A model that is built has random weights. A caller may have set the seed before loading, as
    mlx_lm.generate does, and its text must not depend on models that we build beside its own.
    """
    state: Any = mx.random.state
    high, low = np.array(state[0]).tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # the inverse of mx.random.key


@contextmanager
def swapped_in_thread(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Replace functions of a module within the `with` block, for calls of this thread alone.

    One thread at a time does this, whichever functions it replaces: a second one would take the
    stand-ins of the first for the originals, and put them back for good. Blocks may be nested.

    Args:
        owner: a module. It must have every function already.
        functions: replacements by name.
    """
    active: int | None = threading.get_ident()

    def either(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return (ours if threading.get_ident() == active else original)(*args, **kwargs)

        return call

    with _swapping:
        originals = vars(owner)
        with swapped(owner, **{n: either(originals[n], ours) for n, ours in functions.items()}):
            try:
                yield
            finally:
                active = None  # whoever has kept a stand-in calls the original from now on


_swapping = threading.RLock()


def intercept(module: nn.Module, call: Callable[..., Any], method: str = "__call__") -> None:
    """Redirect calls of this module, and of no other of its class, to `call`.

    The module gets a class of its own, derived from its old one. Without a wrapper, every path in
    the model stays the same, and so do `isinstance` and the signature.

    Args:
        module: the module.
        call: receives the module and the arguments of the call.
        method: the method to redirect; calling the module by default.
    """
    kind: Any = type(module)
    own = {method: functools.wraps(getattr(kind, method))(call), "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), own)


def intercept_passes(model: nn.Module, step: Step, check: Check) -> None:
    """Redirect a model's forward passes to `step`.

    Args:
        model: the model; it is left unchanged if its call takes no `cache`.
        step: runs a pass.
        check: called before each pass; raises if the pass must not run.
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
        embeddings = tokens = next(
            (e for n in _EMBEDDINGS if (e := given.get(n)) is not None), None
        )
        if tokens is None:
            tokens = given.get(names[0])
        if not isinstance(tokens, mx.array) or tokens.ndim < 2:
            return kind.__call__(self, *args, **kwargs)
        check(tokens if embeddings is None else None, given.get("cache"))
        return step(Pass(self, kind, names, given, *tokens.shape[:2]))

    intercept(model, call)
