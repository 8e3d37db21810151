"""Hooks: replaced attributes come back, and only the module that was asked for changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mlx_streamexperts._hooks import swapped


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
