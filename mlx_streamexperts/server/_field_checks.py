"""Checks of single fields, from which the tables of every API are made.

A check returns None for a good value, else what is wrong with it ("must be a string").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

Check = Callable[[Any], str | None]

MOST = (1 << 31) - 1
"""Largest number of tokens that a field may state."""

LARGEST = 1e30
"""Below float32's maximum: a penalty must not make logits infinite."""


def number(low: float = -LARGEST, high: float = LARGEST) -> Check:
    must = f"must be a number from {low:g} to {high:g}"
    return lambda v: None if is_number(v) and low <= v <= high else must


def integer(low: int = 0, high: int = MOST) -> Check:
    must = f"must be an integer from {low} to {high}"
    return lambda v: None if is_number(v) and isinstance(v, int) and low <= v <= high else must


def one_of(*values: Any) -> Check:
    """One of these values, and of its type: true is not 1."""
    must = "must be " + " or ".join(repr(v) for v in values)
    if values == (True, False):
        must = "must be true or false"
    return lambda v: None if any(type(v) is type(w) and v == w for w in values) else must


def unless(good: Callable[[Any], bool], wrong: str) -> Check:
    return lambda value: None if good(value) else wrong


a_text = unless(lambda v: isinstance(v, str), "must be a string")
an_object = unless(lambda v: isinstance(v, dict), "must be an object")
a_flag = one_of(True, False)


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def are(values: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(v, kind) for v in values)
