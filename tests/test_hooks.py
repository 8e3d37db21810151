"""Hooks: only the module asked for changes, and swapped attributes come back."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_streamexperts._hooks import intercept, swapped, swapped_in_thread


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


def test_functions_swapped_in_a_thread_are_the_originals_for_others() -> None:
    owner = SimpleNamespace(load=lambda: "old", save=lambda: "old")
    before, seen = dict(vars(owner)), []
    with swapped_in_thread(owner, load=lambda: "new"):
        kept = owner.load
        other = threading.Thread(target=lambda: seen.append(owner.load()))
        other.start()
        other.join()
        with swapped_in_thread(owner, load=lambda: "inner", save=lambda: "new"):
            assert (owner.load(), owner.save()) == ("inner", "new")
        assert (owner.load(), owner.save()) == ("new", "old")
    assert seen == ["old"]
    assert vars(owner) == before
    assert kept() == "old"


def test_threads_that_swap_at_once_leave_the_originals() -> None:
    owner = SimpleNamespace(load=lambda: "old")
    original, inside, go = owner.load, threading.Event(), threading.Event()

    def first() -> None:
        with swapped_in_thread(owner, load=lambda: "first"):
            inside.set()
            go.wait()

    def second() -> None:
        with swapped_in_thread(owner, load=lambda: "second"):
            assert owner.load() == "second"

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join()
    assert owner.load is original
