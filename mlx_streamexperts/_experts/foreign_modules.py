"""Finds modules and functions that others have attached to a streamed model, such as recorders.

mlx-lm's own modules keep nothing of the arrays that pass through them. Running a pass twice
(`runahead.py`) or probing a router early (`prefetch.py`) is therefore invisible, unless foreign
code is attached: a recorder of activations must see each pass once, and complete.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
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
        for ref in self._modules:
            for call in _calls(ref()):
                if id(call) not in self._known and not _is_ours(call):
                    return True
        return False


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


def _is_ours(call: Any) -> bool:
    name = getattr(call, "__globals__", {}).get("__name__", "")
    return str(name).partition(".")[0] in _OURS


def _calls(root: Any) -> list[Any]:
    """Everything that runs when a module and the modules below it are called.

    A loop, and not a recursive generator: it runs before every probe of a router.
    """
    found, left = [], [root]
    while left:
        node = left.pop()
        if isinstance(node, nn.Module):
            for kind in type(node).__mro__:
                if "__call__" in vars(kind):
                    found.append(vars(kind)["__call__"])
                    break
            else:
                found.append(None)
            left += (*node.values(), *vars(node).values())
        elif isinstance(node, (list, tuple)):
            left += node
        elif isinstance(node, dict):
            left += node.values()
        elif callable(node) and not isinstance(node, (mx.array, type)):
            found.append(node)
    return found
