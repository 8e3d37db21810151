"""Hot sets: the resident experts of one session, saved and read in at the next load.

Measured on recorded routing (docs/policies.md): at 25 % resident the first prompt finds a third of
the experts that it would have read, at 50 % more than half, whatever topic the set comes from. The
reads happen before the prompt, and there are more of them than it saves. A hot set changes speed,
never a result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from .._errors import CheckpointError
from .._io.checkpoint import read_json_object
from .._io.output import write_json
from .._progress import progress_bar
from .layer import ExpertLayer

_FORMAT = 1
_SAMPLE_BYTES = 4096


def save_hot_set(layers: Sequence[ExpertLayer], file: Path) -> None:
    """Write the experts that are resident now.

    Raises:
        CheckpointError: the checkpoint's files cannot be read.
    """
    saved = [{"name": x.name, "experts": x.cache.resident} for x in layers]
    write_json(file, {"format": _FORMAT, "checkpoint": identity(layers), "layers": saved})


def read_hot_set(layers: Sequence[ExpertLayer], file: Path) -> list[list[int]]:
    """The experts of each layer that a hot set names.

    Raises:
        CheckpointError: the file is not a hot set, or was saved from another checkpoint.
    """
    content = read_json_object(file, "a hot set")
    if content.get("format") != _FORMAT or not isinstance(content.get("layers"), list):
        raise CheckpointError(f"{file}: not a hot set that this version reads: save it again")
    mine, theirs = identity(layers), content.get("checkpoint")
    if theirs != mine or len(content["layers"]) != len(layers):
        raise CheckpointError(
            f"{file}: this hot set was saved from another checkpoint (its mark is {theirs!r}, this "
            f"one's {mine!r}): load without hot_set, then save one with save_hot_set"
        )
    hot = []
    for layer, saved in zip(layers, content["layers"], strict=True):
        experts = saved.get("experts") if isinstance(saved, dict) else None
        if not _are_distinct(experts, layer.experts) or saved.get("name") != layer.name:
            raise CheckpointError(
                f"{file}: its entry for {layer.name} is damaged: save the hot set again"
            )
        hot.append(experts)
    return hot


def read_in(layers: Sequence[ExpertLayer], hot: Sequence[Sequence[int]], progress: bool) -> None:
    """Read hot experts into empty slots, as many as fit. Skip layers that are wholly resident.

    Raises:
        ExpertReadError: an expert's bytes could not be read.
    """
    wanted = [
        (x, experts[: x.cache.movable])
        for x, experts in zip(layers, hot, strict=True)
        if not x.resident
    ]
    total = sum(len(experts) * x.expert_bytes for x, experts in wanted)
    with progress_bar("Loading hot experts", bool(progress and total), total) as bar:
        for layer, experts in wanted:
            for nbytes in layer.fill(experts):
                bar.update(nbytes)


def identity(layers: Sequence[ExpertLayer]) -> str:
    """An identity of a checkpoint's experts, the same for a packed store of it.

    It is a digest of every tensor's kind and of the first bytes of each layer's first expert.
    Fine-tunes that did not change the experts have the same one.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(f"{layer.name} {layer.experts}\n".encode())
        for name, t in sorted(layer.tensors.items()):
            digest.update(f"{name} {t.stored.dtype} {t.slot.shape}\n".encode())
            digest.update(_first_bytes(t.stored.files[0], t.stored.offsets[0], t.stored.row_bytes))
    return digest.hexdigest()


def _first_bytes(file: str, offset: int, row_bytes: int) -> bytes:
    try:
        with open(file, "rb", buffering=0) as f:
            return os.pread(f.fileno(), min(_SAMPLE_BYTES, row_bytes), offset)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e


def _are_distinct(experts: Any, count: int) -> TypeGuard[list[int]]:
    return (
        isinstance(experts, list)
        and all(type(e) is int and 0 <= e < count for e in experts)
        and len(set(experts)) == len(experts)
    )
