"""Which settings to try next. Knows their values and what earlier ones gave, and nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._errors import StreamError

Settings = dict[str, Any]
Space = dict[str, Sequence[Any]]
"""The values of each setting, the default first."""


def check(settings: Settings, space: Space) -> None:
    """Refuse what is not in the space.

    Raises:
        StreamError: there is no such setting, or its value has another type.
    """
    for name, value in settings.items():
        if name not in space:
            raise StreamError(
                f"{name!r} is no setting to tune here: it is one of {', '.join(space)}, "
                "those that were not stated as options"
            )
        if type(value) is not type(default := space[name][0]):
            raise StreamError(f"{name}={value!r}: a value such as {default!r} is needed")


def changed(settings: Mapping[str, Any], space: Space) -> Settings:
    """The settings that differ from the defaults and have an effect."""
    idle = "prefetch_depth" if settings.get("prefetch") == "off" else None
    return {n: v for n, v in settings.items() if v != space[n][0] and n != idle}


def next_settings(
    space: Space, tried: Iterable[tuple[Settings, float | None]], together: Iterable[Settings] = ()
) -> Settings | None:
    """The settings to try next: each value alone, then `together`, then all other combinations.

    The combination comes first whose values alone gave the most, multiplied.

    Args:
        space: the settings.
        tried: settings and their tokens/s over the defaults'; None if they failed or were
            disqualified.
        together: settings that may pay only together.

    Returns:
        What differs from the defaults; None if nothing is left.
    """
    ratios = {frozenset(settings.items()): ratio for settings, ratio in tried}
    ratios[frozenset()] = 1.0
    alone = [{name: value} for name, values in space.items() for value in values[1:]]
    for settings in (*alone, *together):
        if frozenset(changed(settings, space).items()) not in ratios:
            return changed(settings, space)

    def promise(settings: Settings) -> float:
        return math.prod(ratios.get(frozenset([item])) or 0.0 for item in settings.items())

    chosen = itertools.product(*space.values())
    combinations = (dict(zip(space, values, strict=True)) for values in chosen)
    different = (changed(c, space) for c in combinations)
    left = (s for s in different if frozenset(s.items()) not in ratios)
    return max(left, key=promise, default=None)
