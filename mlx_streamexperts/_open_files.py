"""Keeps mlx-lm from setting the limits of open files to 2048 and 4096 when it is imported.

Setting them fails if less is allowed, and lowers the limits of a process that had more. mlx-lm is
not imported here: that takes a second, and much works without it.
"""

from __future__ import annotations

import resource
import sys


def keep_limits() -> None:
    """Let mlx-lm's call, which may come later, raise the limit to 2048 if that is allowed."""
    if "mlx_lm.utils" in sys.modules:
        _raise()
        return
    original = resource.setrlimit

    def setrlimit(which: int, limits: tuple[int, int]) -> None:
        if sys._getframe(1).f_globals.get("__name__") == "mlx_lm.utils":
            resource.setrlimit = original
            _raise()
        else:
            original(which, limits)

    resource.setrlimit = setrlimit


def _raise() -> None:
    from ._osinfo import allow_descriptors  # here: it imports mlx

    allow_descriptors(2048)
