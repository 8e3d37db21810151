"""Finds modules and functions that others have attached to a streamed model, such as recorders.

mlx-lm's own modules keep nothing of the arrays that pass through them. Running a pass twice
(`runahead.py`) or probing a router early (`prefetch.py`) is therefore invisible, unless foreign
code is attached: a recorder of activations must see each pass once, and complete.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_OURS = ("mlx", "mlx_lm", "mlx_vlm", __package__.partition(".")[0])


class ForeignModules:
    """Watches some modules for foreign code that is attached after this object was made.

    Args:
        modules: modules, or lists of modules. Everything that they call now is accepted.
    """

    def __init__(self, *modules: Any) -> None:
        self._modules = [
            weakref.ref(m) if isinstance(m, nn.Module) else _always(m) for m in modules
        ]
        self._known = {id(call): call for m in modules for call in _calls(m)}

    def any(self) -> bool:
        """Is anything attached that was not there before and is not mlx-lm's?"""
        modules = [m for ref in self._modules if (m := ref()) is not None]
        return any(
            id(call) not in self._known and not _is_ours(call)
            for m in modules
            for call in _calls(m)
        )


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


def _is_ours(call: Any) -> bool:
    name = getattr(call, "__globals__", {}).get("__name__", "")
    return str(name).partition(".")[0] in _OURS


def _calls(node: Any) -> Iterator[Any]:
    """Everything that runs when a module and the modules below it are called."""
    if isinstance(node, nn.Module):
        yield next((vars(k)["__call__"] for k in type(node).__mro__ if "__call__" in vars(k)), None)
        for value in (*node.values(), *vars(node).values()):
            yield from _calls(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _calls(value)
    elif isinstance(node, dict):
        for value in node.values():
            yield from _calls(value)
    elif callable(node) and not isinstance(node, (mx.array, type)):
        yield node
