"""Full-size models on a GPU with experts on a simulated ("played") drive.

The model is the full-size stand-in (examples/fullsize) with a random trunk; its experts are random
numbers put into the slots beforehand. A read ends when a bus of the stated rate that carries one
read after another would have delivered it, 80 us later, and moves no bytes. CUDA moves managed
memory by pages, at 2.6 GB/s when the host writes into slots, which no Mac does and which would hide
every drive faster than that. So this times the data path and the device's work, but not their
competition for memory.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from common import PLAIN, Fixed

from mlx_streamexperts import ExpertStream, patch, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._analysis.throttle import Throttle
from mlx_streamexperts._experts.bank import byte_view
from mlx_streamexperts._experts.layer import ExpertLayer
from mlx_streamexperts._experts.speculative.runahead import RunAhead

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "fullsize"))
import write as fullsize

_KEPT_BYTES = 12 << 30  # for the trunk, caches and work
_LOUDNESS = 8.0


@dataclass(frozen=True)
class Shape:
    """What a stand-in is made of: layers with experts and without, experts and their bytes."""

    layers: int
    dense: int
    experts: int
    expert_bytes: int


SHAPES = {
    "qwen3.5-397b": Shape(60, 0, 512, 7_077_888),
    "kimi-k2.5": Shape(60, 1, 384, 27_525_120),
}


class Played(Throttle):
    """A drive that takes its time and moves no bytes."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(bytes_per_s)
        self._read = lambda fd, buffers, offset: sum(map(len, buffers))


@dataclass
class Standin:
    """A loaded stand-in, its slots full of random experts.

    Attributes:
        layers: with experts.
        whole: a time of these, times this, is the whole model's.
        policy: says how steps start.
    """

    model: nn.Module
    stream: ExpertStream
    layers: int
    whole: float
    policy: Fixed

    @property
    def run_ahead(self) -> RunAhead:
        assert self.stream.run_ahead is not None
        return self.stream.run_ahead


def write(name: str, folder: Path, layers: int) -> None:
    """Write the stand-in's first layers with experts, and a file for reads of any of them."""
    shape = SHAPES[name]
    cut = None if layers == shape.layers else layers + shape.dense
    fullsize.write(name, folder, trunk=True, layers=cut, seed=0)
    with open(folder / "experts", "wb") as f:
        os.truncate(f.fileno(), shape.experts * shape.expert_bytes)


def load(name: str, folder: Path, share: float, layers: int) -> Standin:
    """Load as many of the layers as fit with a share of their experts in memory."""
    shape = SHAPES[name]
    slots = max(2, int(share * shape.experts))
    room = platform.device_memory_bytes() - _KEPT_BYTES
    fitting = int(room / (slots * shape.expert_bytes))
    layers = layers if layers <= fitting else fitting // 4 * 4
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"num_hidden_layers": layers + shape.dense}
    least = layers * max(2, slots // 8) * shape.expert_bytes  # opened anew below, filled
    options = replace(PLAIN, run_ahead="on", prefetch="on", cache=least)
    with patch(config=options):
        model, _ = mlx_lm.utils.load_model(folder, strict=False, model_config={"text_config": text})
    _louden(model)
    s = stream(model)
    s._open((slots,) * layers)
    for layer in s.layers:
        _fill(layer)
        _pack(layer, str(folder / "experts"))
    standin = Standin(model, s, layers, shape.layers / layers, Fixed(layers))
    standin.run_ahead.always = False
    standin.run_ahead.policy = standin.policy
    return standin


def _louden(model: nn.Module) -> None:
    """Raise the embeddings to a token's usual weight in the residual stream.

    At a random matrix' own scale what the layers add drowns the token, and every token would want
    the same experts.
    """
    [table] = [m for p, m in model.named_modules() if p.endswith("embed_tokens")]
    rows = table(mx.arange(64)).astype(mx.float32)
    factor = _LOUDNESS / float(mx.sqrt((rows * rows).mean()))
    for key in ("scales", "biases") if "scales" in table else ("weight",):
        table[key] = (table[key] * factor).astype(table[key].dtype)
        mx.eval(table[key])


def _fill(layer: ExpertLayer) -> None:
    """Random experts in every slot: 4-bit codes, scales as of weights of variance 1 / columns."""
    for name, t in layer.tensors.items():
        shape = (layer.cache.slots, *t.slot.shape)
        if t.slot.dtype == mx.uint32:
            halves = mx.random.randint(0, 1 << 16, (2, *shape)).astype(mx.uint32)
            array = halves[0] << 16 | halves[1]  # all codes alike: a bias would add up
        else:
            columns = shape[-1] * t.slot.module.group_size
            scale = columns**-0.5 / 4.6
            value = -7.5 * scale if t.slot.attribute == "biases" else scale
            array = mx.full(shape, value, t.slot.dtype)
        mx.eval(array)
        setattr(t.slot.module, t.slot.attribute, array)
        layer.slots.bank._bytes[name] = byte_view(array)
    mx.clear_cache()


def _pack(layer: ExpertLayer, file: str) -> None:
    """Places as in a packed store: an expert's parts side by side, one read."""
    at, packed = 0, {}
    for name, t in layer.tensors.items():
        row = t.stored.row_bytes
        offsets = [e * layer.expert_bytes + at for e in range(layer.experts)]
        files = (file,) * layer.experts
        packed[name] = replace(t.stored, files=files, offsets=tuple(offsets))
        at += row
    layer.slots.relocate(packed)
