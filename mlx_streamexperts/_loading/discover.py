"""Finds a model's expert layers and ties their tables to bytes on disk.

Tables are matched by identity, never by name: lazy_load.py records the arrays that mlx-lm passes to
the model's `sanitize`, and the stacks it makes of them. A table is streamed only if its module
holds one of these arrays, such a stack, or whole rows of stored tensors, and if the trace of
`sanitize` (provenance.py) shows no operation that changes a value. If mlx-lm computes a table
(scales or unpacks it), the model is refused. Nothing is evaluated here but a few scales of
mlx-vlm's Inkling (`vlm.traits`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._config import StreamConfig
from .._distributed.pipeline import Part, Stage, cut
from .._errors import CheckpointError, StreamError, UnsupportedModelError
from .._experts.bank import SlotTensor
from .._experts.layer import ExpertLayer
from .._experts.moving import use_moved
from .._experts.packed_store import check_mirrors, use_store
from .._experts.rows import Rows
from .._experts.slots import ExpertTensor, SmallTable
from .._experts.stream import flatten, layer_needs, refuse_without_experts, unwritten
from .._io.checkpoint import (
    Checkpoint,
    ExpertTable,
    TensorEntry,
    check_model_folder,
    is_weights,
    read_checkpoint,
    read_header,
)
from .._io.moved import read_moved
from .._io.output import check_not_written
from .._memory.budget import Plan, Sizes, divide, text_config
from .._memory.footprint import Footprint
from .._memory.model_graph import copied, measure
from .._osinfo import unfinished_bytes
from . import vlm
from .lazy_load import MLX_LM, MLX_VLM, PROJECTIONS, SWITCHES, LoadRecord, load_recorded
from .libraries import library
from .provenance import Stored
from .tables import stream_tables

# NVFP4's second scale of an expert's table, or of its rows, as mlx-vlm keeps it.
_SCALES = ("weight_scale_2", "weight_global_scale")

_PARTS = 4  # more reads for one tensor of an expert are not worth it

_SCORE_COPIES = 3  # scores, the mask added, their softmax


@dataclass(frozen=True)
class DiscoveredModel:
    """A lazily loaded model, not evaluated, and the places of its experts on disk.

    Attributes:
        model, model_config: results of mlx-lm's `load_model`.
        layers: the expert layers, in model order; none if only tables are streamed.
        sizes: bytes of the model's parts.
        item_bytes: bytes of one activation.
        shards: the checkpoint's files.
        whole: the part whose calls are passes, with the layers of all ranks.
        language: the part of the model whose calls are passes: all of it, or its language model.
        modules: the expert modules of `whole`, each with the width of an expert's hidden layer.
        stage: this rank's decoder layers, if several machines share the model.
        library: the library that loaded it.
        rows: tables that are streamed; the model has `StreamedRows` in their places, which return
            blanks until the stream opens them.
    """

    model: nn.Module
    model_config: dict[str, Any]
    layers: list[ExpertLayer]
    sizes: Sizes
    item_bytes: int
    shards: list[Path]
    whole: nn.Module
    language: nn.Module
    modules: list[tuple[nn.Module, int]]
    stage: Stage | None = None
    library: str = MLX_LM
    rows: Rows = field(default_factory=Rows)

    def plan(self, config: StreamConfig, held: int = 0) -> Plan:
        """Divide the budget that `config` states; other models hold `held` bytes of it.

        Raises:
            BudgetError: the budget is too small; the message states the smallest that works.
            CheckpointError: the numbers in config.json are inconsistent.
        """
        try:
            needs = layer_needs(self.layers, self.model_config)
            footprint = footprint_of(self.whole, self.modules, self.model_config, self.item_bytes)
            if self.stage is not None:  # only its own layers have a KV cache
                footprint = footprint.of_layers(self.stage.start, self.stage.end)
            return divide(self.sizes, needs, self.model_config, config, footprint, held)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as e:
            if isinstance(e, StreamError):
                raise
            raise CheckpointError(
                f"{self.shards[0].parent / 'config.json'}: its numbers make no sense: {e!r}"
            ) from e


def discover(
    folder: Path,
    config: StreamConfig,
    arguments: dict[str, Any],
    as_converted: bool = False,
    part: Part | None = None,
    in_shards: bool = False,
) -> DiscoveredModel:
    """Check the checkpoint, build the model without evaluating it, and find its experts.

    Args:
        folder: the model folder.
        config: names the packed store to read, if any, and the library that loads the model.
        arguments: arguments of that library's `load_model`.
        as_converted: plan as if the checkpoint were converted: tables that mlx-lm computes while
            loading have no place on disk, and the size that a conversion would give them. Models
            of mlx-vlm are not converted.
        part: keep only the layers of this rank. Shards that hold only other ranks' layers may be
            missing.
        in_shards: locate experts in the shards even if they have moved into a packed store.

    Raises:
        CheckpointError: the files are damaged or incomplete.
        UnsupportedModelError: neither routed experts nor tables that stream, or a layout that
            cannot be streamed.
        StreamError: `part` does not suit the model, the process may open too few files, or mlx-vlm
            is needed and not installed.
    """
    check_model_folder(folder)
    is_vlm = library(folder, config) == MLX_VLM
    checkpoint = Checkpoint(folder, {}) if is_vlm else read_checkpoint(folder)
    if is_vlm and part is not None:
        raise UnsupportedModelError(alone_message(folder))
    if part is not None and checkpoint.absent:
        arguments = {**arguments, "strict": False}
    load = vlm.load_recorded if is_vlm else load_recorded
    model, model_config, record = load(folder, arguments)
    checkpoint = record.checkpoint or checkpoint  # mlx-vlm finds its files in other ways
    language = model if record.language is None else record.language
    whole = language if part is None else copied(model)
    names = [name for name, x in model.named_modules() if isinstance(x, record.switches)]
    stage = None if part is None else cut(model, part)
    if stage is not None:
        _check_whole(model, stage, checkpoint, record)
    unplaced = as_converted and not is_vlm and config.store is None
    layers = _find_layers(model, checkpoint, record, unplaced)
    rows = Rows()
    if stage is None:
        rows = stream_tables(model, checkpoint, record, config, unplaced)
    if not layers and stage is not None:
        raise UnsupportedModelError(
            f"{folder}: {stage}: none of these has routed experts; use fewer machines or another "
            "--split"
        )
    if not layers and not rows.tables:
        raise UnsupportedModelError(no_experts_message(folder, model, model_config))
    if not layers and (config.store is not None or config.hot_set is not None):
        refuse_without_experts(layers, "A packed store and a hot set hold experts")
    moved = None if in_shards else read_moved(folder)
    if moved is not None:
        check_not_written(folder, "loading it")
        use_moved(
            layers,
            moved,
            None if config.store is None else Path(config.store),
            config.verify_reads,
            in_part=stage is not None,
            planning=as_converted,
            names=names,
        )
    elif config.store is not None:
        use_store(
            layers,
            Path(config.store),
            config.verify_reads,
            in_part=stage is not None,
            planning=as_converted,
        )
    store = config.store or (moved.store if moved is not None else None)
    if config.mirrors and store is not None and not as_converted:
        check_mirrors(Path(store), config.mirrors)
    expert_bytes = sum(x.experts * x.expert_bytes for x in layers)
    parameters = [array for _, array in flatten(model)]
    small = sum(t.rows.nbytes for x in layers for t in x.slots.small.values())
    copies = vlm.decode_copies(model) if is_vlm else 0
    sizes = Sizes(
        # Also what slots have of `small`, and weights that the model keeps twice.
        trunk=sum(a.nbytes for a in parameters) - expert_bytes + small + copies,
        looked_up=_embedding_bytes(model, model_config) + copies,
        disk=checkpoint.nbytes if stage is None else _needed_bytes(checkpoint, stage),
        conversion=sum(a.nbytes for a in parameters) + rows.nbytes if unwritten(layers) else 0,
        tables=rows.nbytes,
        row_cache=rows.cache_bytes,
    )
    shards = sorted({t.file for t in checkpoint.tensors.values()})
    modules = expert_modules(whole, record.switches, record.projections)
    return DiscoveredModel(
        model,
        model_config,
        layers,
        sizes,
        item_bytes_of(model),
        shards,
        whole,
        language,
        modules,
        stage,
        record.library,
        rows,
    )


_footprints: dict[str, Footprint] = {}


def footprint_of(
    model: nn.Module,
    modules: list[tuple[nn.Module, int]],
    model_config: dict[str, Any],
    item_bytes: int,
) -> Footprint:
    """The footprint of a model's passes; cached, since planning again (`tune`) is common.

    Args:
        model: the part whose calls are passes, with all its layers; nothing of it is evaluated.
        modules: its expert modules, as `expert_modules` finds them.
        model_config: the checkpoint's config.json.
        item_bytes: bytes of one activation.
    """
    key = json.dumps([model_config, str(mx.default_device())], sort_keys=True, default=str)
    if key not in _footprints:
        _footprints[key] = measure(model, modules, text_config(model_config))
    heads = text_config(model_config).get("num_attention_heads") or 1
    return replace(
        _footprints[key],
        scores=_SCORE_COPIES * heads * item_bytes,
        unfinished=unfinished_bytes(item_bytes),
    )


def item_bytes_of(model: nn.Module) -> int:
    """Bytes of one activation."""
    return max(a.dtype.size for _, a in flatten(model) if mx.issubdtype(a.dtype, mx.floating))


def expert_modules(
    model: nn.Module,
    switches: tuple[type[nn.Module], ...] = SWITCHES,
    projections: tuple[type[nn.Module], ...] = PROJECTIONS,
) -> list[tuple[nn.Module, int]]:
    """A model's expert modules, each with the width of an expert's hidden layer.

    Args:
        model: the model.
        switches, projections: as in `LoadRecord`.
    """
    found: list[tuple[nn.Module, int]] = []
    for module in model.modules():
        if isinstance(module, switches):
            tables = [p.weight for p in module.children().values() if isinstance(p, projections)]
            width = max((t.shape[1] for t in tables[:-1]), default=1)  # the last one projects back
            found.append((module, width))
    return found


def _check_whole(
    model: nn.Module, stage: Stage, checkpoint: Checkpoint, record: LoadRecord
) -> None:
    """Check that the present shards hold everything that a rank's layers need."""
    lacking = next((name for name, _ in flatten(model) if name not in record.filled), None)
    if lacking is None:
        return
    for tensor, shard in checkpoint.absent.items():
        if stage.needs(tensor) and not (checkpoint.folder / shard).exists():
            raise CheckpointError(
                f"{checkpoint.folder / shard} is missing: {stage}, needs its tensor {tensor}"
            )
    raise CheckpointError(
        f"{checkpoint.folder}: {stage}: no shard in this folder has the tensors of {lacking}"
    )


def _needed_bytes(checkpoint: Checkpoint, stage: Stage) -> int:
    return sum(t.nbytes for name, t in checkpoint.tensors.items() if stage.needs(name))


def _find_layers(
    model: nn.Module, checkpoint: Checkpoint, record: LoadRecord, as_converted: bool
) -> list[ExpertLayer]:
    """Every expert layer with the places of its tables on disk, in model order."""
    entries = {id(array): checkpoint.tensors[name] for name, array in record.stored.items()}
    layers = []
    for path, switch in model.named_modules():
        owned = [c for c in switch.children().values() if isinstance(c, record.projections)]
        if len(owned) < 2:  # one alone is no expert: DeepSeek V4.1's attention has such
            continue
        if type(switch) not in record.switches:
            raise UnsupportedModelError(_unknown_owner(checkpoint.folder, path, switch))
        tensors, small, traits = {}, {}, record.traits(switch)
        for name in traits.own_tables:
            small[name] = _small_table(switch, name, switch[name])
        for part, projection in switch.children().items():
            if not isinstance(projection, record.projections):
                continue
            for attribute, table in flatten(projection):
                name = f"{part}.{attribute}"
                if attribute in _SCALES:
                    if table.ndim:  # otherwise one for all experts
                        small[name] = _small_table(projection, attribute, table)
                    continue
                stored = _stored_parts(f"{path}.{name}", table, entries, record, checkpoint)
                if not stored and not as_converted:
                    raise UnsupportedModelError(_rewritten(f"{path}.{name}", record, checkpoint))
                if not stored:
                    stored = [ExpertTable.nowhere(table.nbytes, table.shape[0])]
                slot = SlotTensor(projection, attribute, tuple(table.shape[1:]), table.dtype)
                begin = 0
                for number, part_of_it in enumerate(stored, 1):
                    key = name if number == 1 else f"{name} ({number})"
                    tensors[key] = ExpertTensor(slot, part_of_it, begin)
                    begin += part_of_it.row_bytes
        counts = {t.stored.experts: t.stored for t in tensors.values()}
        if len(counts) != 1:
            (a, first), (b, second), *_ = counts.items()
            raise CheckpointError(
                f"{path}: {first.names[0]} in {first.files[0]} has {a} experts, but "
                f"{second.names[0]} in {second.files[0]} has {b}"
            )
        experts = next(iter(counts))
        for name, one in small.items():
            if one.rows.shape[0] != experts:
                raise CheckpointError(
                    f"{checkpoint.folder}: {path}.{name} is {list(one.rows.shape)}, but the layer "
                    f"has {experts} experts"
                )
        layers.append(ExpertLayer(path, switch, tensors, experts, small, traits))
    return sorted(layers, key=lambda x: [int(p) if p.isdigit() else -1 for p in x.name.split(".")])


def _small_table(module: nn.Module, attribute: str, table: mx.array) -> SmallTable:
    return SmallTable(SlotTensor(module, attribute, tuple(table.shape[1:]), table.dtype), table)


def _stored_parts(
    where: str,
    table: mx.array,
    entries: dict[int, TensorEntry],
    record: LoadRecord,
    checkpoint: Checkpoint,
) -> list[ExpertTable]:
    """The places of a table's parts on disk; none if its library computes it while loading.

    Args:
        where: the table's name in the model.
        table: the array that the model holds.
        entries: stored tensors, by the `id` of the array that was loaded from each.
        record: where the model's arrays come from.
        checkpoint: the files.
    """
    rows = record.traced.get(where)
    if record.traced and rows is None:  # `a *= 2` computes, and `a` is the same object after it
        return []
    _, parts = record.stacks.get(id(table), (table, []))
    if entry := entries.get(id(table)):
        _check_table(where, table, entry, entry.shape, entry.nbytes, record)
        return [ExpertTable.stacked(entry)]
    if parts and all(id(p) in entries for p in parts):
        stored = ExpertTable.separate([entries[id(p)] for p in parts])
        entry, count = entries[id(parts[0])], len(parts)
        _check_table(where, table, entry, (count, *entry.shape), count * entry.nbytes, record)
        return [stored]
    return [] if rows is None else _cut_tables(where, table, rows, record, checkpoint)


def _cut_tables(
    where: str, table: mx.array, stored: Stored, record: LoadRecord, checkpoint: Checkpoint
) -> list[ExpertTable]:
    """The places of a table whose experts are parts of stored tensors: half of their rows, say.

    Empty if one expert is cut in another way than the others.
    """
    first = checkpoint.tensors[stored.ranges[0][0]]
    _check_table(where, table, first, stored.shape, stored.nbytes, record)
    rows = stored.rows()
    if len({tuple(nbytes for *_, nbytes in row) for row in rows}) > 1 or len(rows[0]) > _PARTS:
        return []
    tables = []
    for part in zip(*rows, strict=True):  # of every expert
        entries = [checkpoint.tensors[name] for name, *_ in part]
        tables.append(
            ExpertTable(
                entries[0].dtype,
                part[0][2],
                tuple(str(e.file) for e in entries),
                tuple(e.offset + skip for e, (_, skip, _) in zip(entries, part, strict=True)),
                tuple(e.name for e in entries),
            )
        )
    return tables


def _unknown_owner(folder: Path, path: str, switch: nn.Module) -> str:
    """The message for an expert module of no known class."""
    return (
        f"{folder}: {path} is a {type(switch).__name__}, and experts of that kind cannot be "
        "streamed: only modules that are called with tokens and the indices of their experts can. "
        "If the model fits into memory, load it without streaming"
    )


def _check_table(
    where: str,
    table: mx.array,
    stored: TensorEntry,
    shape: tuple[int, ...],
    nbytes: int,
    record: LoadRecord,
) -> None:
    """Check that a table in the model has the shape and size of its stored bytes."""
    if tuple(table.shape) != shape or table.nbytes != nbytes or not shape or not table.size:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} is {stored.dtype} {list(stored.shape)}, but "
            f"{record.library} reads it as {table.dtype} {list(table.shape)} for {where}"
        )


def _rewritten(where: str, record: LoadRecord, checkpoint: Checkpoint) -> str:
    """The message for a table that its library computes while loading."""
    layer = where[: where.find(".", where.find("layers.") + len("layers.")) + 1]
    alike = sorted(n for n in record.stored if ".experts." in n and layer in n)
    example = f" (it holds {alike[0]}, for example)" if alike else ""
    if record.library == MLX_VLM:
        way_out = (
            "Use an MLX conversion (mlx-community), or write one with mlx_vlm.convert on a machine "
            "that holds the model"
        )
    else:
        way_out = (
            "Convert the checkpoint once, in little memory: python -m mlx_streamexperts.convert "
            f"--model {checkpoint.folder} --out <new folder>"
        )
    return (
        f"{checkpoint.folder} stores {where} neither as one table nor expert by expert as it is "
        f"used{example}; {record.library} computes it while loading, with all experts in memory. "
        f"{way_out}"
    )


def alone_message(folder: Path) -> str:
    """The message for a model of mlx-vlm that several machines were to share."""
    return f"{folder}: several machines share models of mlx-lm only, not of mlx-vlm"


def no_experts_message(folder: Path, model: nn.Module, model_config: dict[str, Any]) -> str:
    """The message for a model without SwitchGLU and SwitchMLP modules."""
    kinds = sorted(
        {type(m).__name__ for path, m in model.named_modules() if "expert" in path.split(".")[-1]}
    )
    kind = model_config.get("model_type")
    if kinds:
        found = f"its experts are {', '.join(kinds)} modules, a layout not supported yet"
    else:
        found = "it has no routed experts; load it without streaming"
    return (
        f"{folder} ({kind}) cannot be streamed: no SwitchGLU or SwitchMLP module in the model; "
        + found
    )


def _embedding_bytes(model: nn.Module, model_config: dict[str, Any]) -> int:
    """Bytes of input embeddings; 0 if they are tied, since the output matrix needs them whole."""
    if text_config(model_config).get("tie_word_embeddings"):
        return 0
    return sum(
        array.nbytes
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
        for _, array in flatten(module)
    )


def has_expert_tensors(folder: Path) -> bool:
    """Does a folder name any tensor after experts, or after the modules that hold them?"""
    shards = [file for file in folder.iterdir() if is_weights(file.name)]  # of either library
    names = (entry.name for file in shards for entry in read_header(file))
    return any("expert" in name or "switch_" in name for name in names)
