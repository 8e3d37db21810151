"""Hooks: only the module asked for changes, and swapped attributes come back."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_streamexperts._hooks import intercept, swapped


def test_intercepting_changes_one_module_and_not_its_class() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    intercept(first, lambda self, x: x + 1)
    assert first(mx.array([1.0, 2.0])).tolist() == [2.0, 3.0]
    assert isinstance(first, nn.Linear)
    assert type(second) is nn.Linear
    assert type(first).__name__ == "Linear"


def test_swapped_attributes_come_back_after_an_error() -> None:
    owner = SimpleNamespace(load="old", argv=["old"])
    with pytest.raises(RuntimeError), swapped(owner, load="new", argv=["new"]):
        assert (owner.load, owner.argv) == ("new", ["new"])
        raise RuntimeError
    assert (owner.load, owner.argv) == ("old", ["old"])


def test_an_attribute_that_does_not_exist_changes_nothing() -> None:
    owner = SimpleNamespace(load="old")
    with pytest.raises(KeyError, match="laod"), swapped(owner, load="new", laod="new"):
        pass
    assert vars(owner) == {"load": "old"}
