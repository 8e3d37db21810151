"""Cuts a lazily loaded model down to one rank's decoder layers.

mlx-lm divides the layers (`PipelineMixin.pipeline`): rank 0 has the last ones, the highest rank the
first; embedding, final norm and output matrix are on every rank. This module also tells which files
of the checkpoint a rank needs. It evaluates nothing and never communicates.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._errors import StreamError, UnsupportedModelError
from .._hooks import intercept

# mlx-lm's `sharded_load` takes a layer's number from a tensor's name in the same way.
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NORMS = ("norm", "ln_f", "final_layernorm")


@dataclass(frozen=True)
class Part:
    """A rank's position in a run; `pipeline` accepts it in place of an `mx.distributed.Group`.

    Attributes:
        index: the rank.
        count: number of ranks.
        split: decoder layers of each rank, in rank order; None divides evenly.
    """

    index: int
    count: int
    split: tuple[int, ...] | None = None

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


@dataclass(frozen=True)
class Stage:
    """The decoder layers of one rank.

    Attributes:
        rank, ranks: the rank, and the number of ranks.
        start, end: it has layers `start` to `end - 1` of the whole model.
        layers: decoder layers of the whole model.
    """

    rank: int
    ranks: int
    start: int
    end: int
    layers: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks}, layers {self.start} to {self.end - 1}"

    def needs(self, tensor: str) -> bool:
        """Does this rank use a stored tensor? Every rank uses tensors outside the layers.

        Decided by name, as in mlx-lm. No rank uses layers past the model's own (multi-token
        prediction).

        Args:
            tensor: name in the checkpoint.
        """
        match = _LAYER.search(tensor)
        return match is None or self.start <= int(match[1]) < self.end

    def files(self, weight_map: Mapping[str, str]) -> tuple[str, ...]:
        """Names of the shards that this rank needs.

        Args:
            weight_map: shard of each tensor, from the checkpoint's index.
        """
        return tuple(sorted({f for tensor, f in weight_map.items() if self.needs(tensor)}))


def parse_split(split: str | None, ranks: int) -> tuple[int, ...] | None:
    """Parse decoder layers of each rank from a string such as "31,30".

    Raises:
        StreamError: it is not `ranks` positive numbers.
    """
    if split is None:
        return None
    try:
        layers = tuple(int(n) for n in split.split(","))
    except ValueError:
        layers = ()
    if len(layers) != ranks or any(n < 1 for n in layers):
        raise StreamError(
            f"split={split!r}: write the number of layers of each of the {ranks} ranks, rank 0 "
            "(which has the last layers) first, for example 31,30"
        )
    return layers


def cut(model: nn.Module, part: Part) -> Stage:
    """Leave only one rank's decoder layers in a lazily loaded model. Nothing is evaluated.

    Raises:
        UnsupportedModelError: mlx-lm cannot pipeline this family, or not with a split.
        StreamError: there are more ranks than layers, or the split does not add up to the layers.
    """
    inner: Any = getattr(model, "model", None)  # where mlx_lm.utils.sharded_load looks
    if not hasattr(inner, "pipeline"):
        raise UnsupportedModelError(
            f"{type(model).__module__.rpartition('.')[2]} models cannot be divided over machines: "
            "this mlx-lm has no pipeline for them. Run it on one machine."
        )
    layers = len(inner.layers)
    if part.count > layers:
        raise StreamError(f"{layers} layers cannot be divided over {part.count} ranks")
    if part.split is None:
        inner.pipeline(part)
    else:
        if "split" not in inspect.signature(inner.pipeline).parameters:
            raise UnsupportedModelError(
                f"{type(model).__module__.rpartition('.')[2]} models are divided evenly only: "
                "leave out the split"
            )
        if sum(part.split) != layers:
            raise StreamError(
                f"split={','.join(map(str, part.split))} adds up to {sum(part.split)} layers, but "
                f"the model has {layers}"
            )
        inner.pipeline(part, split=list(part.split))
    return Stage(part.index, part.count, inner.start_idx, inner.end_idx, layers)


def wait_on_host(model: nn.Module, stage: Stage) -> None:
    """Let the host wait for other ranks instead of the device.

    A layer that reads its experts from a drive may take seconds. If a GPU waited in a kernel for
    another machine, the system's watchdog would stop it sooner. So received hidden states are
    evaluated before a layer uses them, and so is the final hidden state of a single token, which
    all ranks receive. That of a prompt's chunk is never used; waiting for it would keep the ranks
    from working on two chunks at once.
    """
    inner = getattr(model, "model")  # noqa: B009, mypy knows no attributes of a Module
    while "layers" not in inner:  # a wrapper of a text model
        inner = next(m for m in inner.children().values() if hasattr(m, "pipeline_layers"))
    if stage.rank < stage.ranks - 1:
        _before(inner.layers[stage.start], lambda x: True)
    for name in _NORMS:
        if name in inner:
            _before(inner[name], lambda x: x.ndim > 1 and x.shape[-2] == 1)


def _before(module: nn.Module, when: Callable[[mx.array], bool]) -> None:
    """Evaluate a module's input before each call for which `when(input)` is true."""
    kind: Any = type(module)

    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if when(x):
            mx.eval(x)
        return kind.__call__(self, x, *args, **kwargs)

    intercept(module, call)
