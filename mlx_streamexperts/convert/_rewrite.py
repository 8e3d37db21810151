"""Computes the weights that mlx-lm would load, a few experts at a time.

All computation is mlx-lm's own: `load_model` builds every parameter lazily, and `sanitize`,
`mx.stack` and `mx.quantize` produce the rows of expert tables. This module never guesses a
transformation from tensor names, and never evaluates a whole expert table.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_map_with_path
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, mixed_quant_predicate_builder
from mlx_lm.models import switch_layers
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from .._errors import CheckpointError, UnsupportedModelError
from .._experts.stream import flatten
from .._io.checkpoint import Checkpoint, TensorEntry
from .._loading.discover import PROJECTIONS, SWITCHES, no_experts_message
from .._loading.lazy_load import LoadRecord, load_recorded
from ._fused import FusedTables, layer_of, read_rows
from ._shards import Piece

# Bytes computed at a time: enough to keep a drive busy, little compared to an expert table.
_STEP_BYTES = 4 << 20
# Larger modules outside the experts are also written in steps: Kimi K2.5's embedding has 2.35 GB.
_LONG_BYTES = 16 << 20
_BY_ROWS = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)

_QUANTIZED = (QuantizedSwitchLinear, nn.QuantizedLinear, nn.QuantizedEmbedding)

# Origin of a table: a stored tensor, one array per expert, or None if rewritten from other tables.
Origin = TensorEntry | list[mx.array | None] | None


@dataclass(frozen=True)
class Options:
    """Changes to the weights; each option means the same as in `mlx_lm.convert`."""

    quantize: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str = "affine"
    quant_predicate: str | None = None
    dtype: str | None = None


@dataclass
class Projection:
    """One projection of an expert layer, and the origin of its rows.

    A large matrix outside the experts is treated alike; its rows take the place of experts.

    Attributes:
        path: module path.
        switch: module path of the expert layer; `path` for a matrix outside the experts.
        experts: number of rows.
        origins: origin of each table, by attribute.
        loaded: element type and shape of one expert's part after loading with mlx-lm.
        dtypes: element type after the cast of `--dtype` or config.json.
        quantize: arguments of `mx.quantize`; None if the rows are not quantized.
    """

    path: str
    switch: str
    experts: int
    origins: dict[str, Origin]
    loaded: dict[str, tuple[mx.Dtype, tuple[int, ...]]]
    dtypes: dict[str, mx.Dtype]
    quantize: dict[str, Any] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one expert before quantization."""
        return sum(d.size * int(np.prod(s, dtype=np.int64)) for d, s in self.loaded.values())

    def finish(self, rows: dict[str, mx.array]) -> dict[str, mx.array]:
        """Cast and quantize loaded rows; returns the rows to store, by tensor name."""
        rows = {
            attribute: array.astype(self.dtypes[attribute]) for attribute, array in rows.items()
        }
        if self.quantize is not None:
            options = dict(self.quantize)
            weight = rows.pop("weight")
            if options.pop("global_scale"):
                made = switch_layers._quantize_experts(weight, **options)
                rows.update(zip(("weight", "scales", "global_scale"), made, strict=True))
            else:
                made = mx.quantize(weight, **options)
                rows.update(zip(("weight", "scales", "biases"), made, strict=False))
        return {f"{self.path}.{a}": mx.contiguous(array) for a, array in rows.items()}


class Rewrite:
    """A checkpoint loaded, cast and quantized by mlx-lm, not yet evaluated.

    Attributes:
        config: the new config.json.
        pieces: everything to be written, layer by layer.
        parameters: number of parameters before quantization.
        keep_vision_config: the model has a vision tower.

    Raises:
        CheckpointError: mlx-lm cannot load the checkpoint.
        UnsupportedModelError: no routed experts, or mlx-lm cannot compute their rows separately.
    """

    def __init__(self, checkpoint: Checkpoint, options: Options, arguments: dict[str, Any]) -> None:
        self._folder = checkpoint.folder
        model, config, record = load_recorded(checkpoint.folder, arguments)
        entries = {id(array): checkpoint.tensors[name] for name, array in record.stored.items()}
        self._projections = _find_projections(model, entries, record)
        if not self._projections:
            raise UnsupportedModelError(no_experts_message(checkpoint.folder, model, config))
        self._projections.update(_find_long(model, entries))
        self._fused = FusedTables(checkpoint, record.build_empty)
        del record, entries
        _cast(model, config, options.dtype)
        modules = dict(model.named_modules())
        for path, projection in self._projections.items():
            projection.dtypes = {name: array.dtype for name, array in flatten(modules[path])}
        self.config = config
        if options.quantize:
            with contextlib.redirect_stdout(io.StringIO()):  # the bits per weight
                model, self.config = _quantize(model, config, options)
        modules = dict(model.named_modules())
        for path, projection in self._projections.items():
            _note_quantization(projection, modules[path])
        self.parameters = mlx_lm.utils.get_total_parameters(model)
        self.keep_vision_config = "vision_tower" in getattr(model, "model", {})
        self.pieces, self._trunk = _pieces(model, self._projections)
        # From here on only its origin refers to an expert's array, and drops it once written. Any
        # other reference would keep the array in memory.
        del model, modules
        gc.collect()
        self._check_fused()

    def trunk(self, name: str) -> mx.array:
        """Evaluate a tensor outside the experts; call once, since it is dropped."""
        array = mx.contiguous(self._trunk.pop(name))
        _evaluate([array], f"{self._folder}: {name}")
        return array

    def switch_of(self, piece: Piece) -> str | None:
        """Path of a piece's expert layer or large matrix; None for any other tensor."""
        projection = self._projections.get(piece.name)
        return None if projection is None else projection.switch

    def steps(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Ranges of experts of a layer, or of a matrix's rows, for calls of `rows`."""
        mine = [self._projections[p.name] for p in pieces]
        size = max(1, _STEP_BYTES // max(1, sum(p.row_bytes for p in mine)))
        experts = mine[0].experts
        return [(e, min(e + size, experts)) for e in range(0, experts, size)]

    def rows(self, pieces: Sequence[Piece], first: int, end: int) -> dict[str, mx.array]:
        """Evaluate experts `first` to `end - 1` of a layer's projections; call once for each.

        Returns:
            Rows [end - first, ...] by tensor name.
        """
        mine = [self._projections[p.name] for p in pieces]
        result: dict[str, mx.array] = {}
        wanted = [
            f"{p.path}.{a}" for p in mine for a, origin in p.origins.items() if origin is None
        ]
        fused = self._fused.rows(wanted, mine[0].experts, first, end) if wanted else {}
        for p in mine:
            loaded = {}
            for attribute, origin in p.origins.items():
                dtype, shape = p.loaded[attribute]
                where = f"{p.path}.{attribute}"
                if isinstance(origin, TensorEntry):
                    loaded[attribute] = read_rows(origin, dtype, first, end)
                elif origin is None:
                    loaded[attribute] = _checked(fused[where], where, dtype, (end - first, *shape))
                else:
                    parts = [part for part in origin[first:end] if part is not None]
                    loaded[attribute] = mx.stack(parts).astype(dtype)  # [end - first, ...]
                    origin[first:end] = [None] * (end - first)
            result.update(p.finish(loaded))
        del fused, loaded
        _evaluate(
            list(result.values()),
            f"{self._folder}: rows {first} to {end - 1} of {mine[0].switch}",
        )
        return result

    def _check_fused(self) -> None:
        """Check that an expert's rows do not depend on the experts computed with it."""
        checked = set()
        for p in self._projections.values():
            wanted = [f"{p.path}.{a}" for a, origin in p.origins.items() if origin is None]
            # The same code makes every layer, so one layer of each kind is enough.
            kind = tuple(sorted((a, p.loaded[a]) for a in p.origins)), p.path.rpartition(".")[2]
            if not wanted or str(kind) in checked:
                continue
            checked.add(str(kind))
            last = p.experts - 1
            pair = self._fused.rows(wanted, p.experts, max(0, last - 1), last + 1)
            alone = self._fused.rows(wanted, p.experts, last, last + 1)
            for name in wanted:
                dtype, shape = p.loaded[name.rpartition(".")[2]]
                _checked(alone[name], name, dtype, (1, *shape))
                _checked(pair[name], name, dtype, (min(2, p.experts), *shape))
                beside, single = pair[name][-1:].view(mx.uint8), alone[name].view(mx.uint8)
                if not mx.array_equal(beside, single).item():
                    raise UnsupportedModelError(
                        f"{name}: mlx-lm does not compute one expert independently of the others, "
                        "so it cannot be converted in parts: use mlx_lm.convert"
                    )


def _find_projections(
    model: nn.Module, entries: dict[int, TensorEntry], record: LoadRecord
) -> dict[str, Projection]:
    """All projections of all expert layers, by path, with the origins of their tables."""
    found = {}
    for path, switch in model.named_modules():
        if not isinstance(switch, SWITCHES):
            continue
        for part, projection in switch.children().items():
            if not isinstance(projection, PROJECTIONS):
                continue
            tables = dict(flatten(projection))
            origins: dict[str, Origin] = {}
            for attribute, table in tables.items():
                _, parts = record.stacks.get(id(table), (table, None))
                origins[attribute] = entries.get(id(table), None if parts is None else [*parts])
            counts = {a: table.shape[0] for a, table in tables.items()}
            if len(set(counts.values())) != 1:
                raise CheckpointError(f"{path}.{part}: its tables differ in experts: {counts}")
            found[f"{path}.{part}"] = _projection(f"{path}.{part}", path, tables, origins)
    return found


def _find_long(model: nn.Module, entries: dict[int, TensorEntry]) -> dict[str, Projection]:
    """Large matrices outside the experts that are stored as mlx-lm loads them, by path."""
    found = {}
    for path, module in model.named_modules():
        if type(module) not in _BY_ROWS:  # a derived class may do anything
            continue
        tables = dict(flatten(module))
        origins: dict[str, Origin] = {a: entries.get(id(t)) for a, t in tables.items()}
        if (
            sum(t.nbytes for t in tables.values()) > _LONG_BYTES
            and None not in origins.values()
            and len({t.shape[0] for t in tables.values()}) == 1
        ):
            found[path] = _projection(path, path, tables, origins)
    return found


def _projection(
    path: str, switch: str, tables: dict[str, mx.array], origins: dict[str, Origin]
) -> Projection:
    loaded = {a: (table.dtype, tuple(table.shape[1:])) for a, table in tables.items()}
    return Projection(path, switch, len(next(iter(tables.values()))), origins, loaded, {})


def _cast(model: nn.Module, config: dict[str, Any], dtype: str | None) -> None:
    """Cast the weights as mlx_lm.convert does."""
    dtype = dtype or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if dtype not in MODEL_CONVERSION_DTYPES:
        return
    kind = getattr(mx, dtype)
    keep: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

    def cast(name: str, array: mx.array) -> mx.array:
        if keep(name) and mx.issubdtype(array.dtype, mx.floating):
            return array.astype(kind)
        return array

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantize(
    model: nn.Module, config: dict[str, Any], options: Options
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize the weights as mlx_lm.convert does; nothing is evaluated."""
    predicate: Any = None
    if options.quant_predicate is not None:
        predicate = mixed_quant_predicate_builder(
            options.quant_predicate, model, options.q_group_size or 64
        )
    return mlx_lm.utils.quantize_model(
        model,
        copy.deepcopy(config),
        options.q_group_size,
        options.q_bits,
        mode=options.q_mode,
        quant_predicate=predicate,
    )


def _note_quantization(projection: Projection, final: nn.Module) -> None:
    """Take a projection's quantization from the module that mlx-lm made of it."""
    if "scales" in projection.loaded or not isinstance(final, _QUANTIZED):
        return
    projection.quantize = {
        "group_size": final.group_size,
        "bits": final.bits,
        "mode": final.mode,
        "global_scale": "global_scale" in final,
    }


def _pieces(
    model: nn.Module, projections: dict[str, Projection]
) -> tuple[list[Piece], dict[str, mx.array]]:
    """All pieces in the model's order, and the trunk's arrays by name."""
    tensors: dict[str, dict[str, tuple[mx.Dtype, tuple[int, ...]]]] = {}
    trunk = {}
    for name, array in flatten(model):
        path = name.rpartition(".")[0]
        piece = path if path in projections else name
        tensors.setdefault(piece, {})[name] = (array.dtype, tuple(array.shape))
        if piece == name:
            trunk[name] = array
    return [Piece(name, layer_of(name), t) for name, t in tensors.items()], trunk


def _checked(rows: mx.array, where: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> mx.array:
    if (rows.dtype, tuple(rows.shape)) != (dtype, shape):
        raise UnsupportedModelError(
            f"{where}: mlx-lm makes {rows.dtype} {list(rows.shape)} of some of the experts, not "
            f"{dtype} {list(shape)}; convert with mlx_lm.convert"
        )
    return rows


def _evaluate(arrays: list[mx.array], what: str) -> None:
    try:
        mx.eval(arrays)
    except RuntimeError as e:
        raise CheckpointError(f"{what}: cannot be computed: {e}") from e
