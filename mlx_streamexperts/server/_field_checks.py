"""Checks of single fields, from which the tables of every API are made.

A check returns None for a good value, else what is wrong with it ("must be a string").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from ._refusals import Refused

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


a_list = unless(lambda v: isinstance(v, list), "must be a list")


def wrong(path: str, must: str) -> Refused:
    """The error for a field: `path` says where, `must` what is wrong."""
    key = path.partition(".")[0].partition("[")[0]
    return Refused(400, f"{path} {must}", "invalid_request", key)


def check_fields(body: dict[str, Any], fields: dict[str, Check], where: str = "") -> dict[str, Any]:
    """The fields that are not null, each of which is known and good.

    Args:
        body: an object of a request.
        fields: the check of each field that it may have.
        where: the object's own place in the request; nothing for the request itself.

    Raises:
        Refused: names the field.
    """
    found = {key: value for key, value in body.items() if value is not None}
    for key, value in found.items():
        path, check = f"{where}.{key}" if where else key, fields.get(key)
        if check is None:
            raise wrong(path, "is not a field that this path knows; leave it out")
        if (must := check(value)) is not None:
            raise wrong(path, must)
    return found


def objects(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of objects.

    Raises:
        Refused: it is something else.
    """
    if not are(value, dict):
        raise wrong(where, "must be a list of objects")
    return value


def text_of(value: Any, where: str) -> str:
    """A string.

    Raises:
        Refused: it is something else.
    """
    if not isinstance(value, str):
        raise wrong(where, "must be a string")
    return value
