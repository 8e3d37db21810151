"""Modules and functions that others have hung into a streamed model: recorders, say.

mlx-lm's own keep nothing of what passes through them. To run a pass twice (runahead.py), or to call
a router early (prefetch.py), changes nothing that anybody sees, as long as there are no others. Who
records activations must see each pass once, and as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_OURS = ("mlx", "mlx_lm", "mlx_vlm", __package__.partition(".")[0])


class Strangers:
    """Looks for them below some modules.

    Args:
        modules: what is called in them now is known, whoever wrote it. Lists of some, too.
    """

    def __init__(self, *modules: Any) -> None:
        self._modules = [
            weakref.ref(m) if isinstance(m, nn.Module) else _always(m) for m in modules
        ]
        self._known = {id(call): call for m in modules for call in _calls(m)}

    def any(self) -> bool:
        """Is there something that was not there, and is not mlx-lm's either?"""
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
    """What runs when a module and those below it are called."""
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
