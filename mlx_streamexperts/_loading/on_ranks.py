"""Discovers one model on several ranks and checks that all have the same checkpoint and options.

Each rank discovers and plans its own layers within its own budget; the ranks then compare their
results before anything is evaluated. They exchange digests, so a checkpoint of hundreds of
gigabytes costs a few kilobytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils

from .._config import StreamConfig
from .._distributed.pipeline import Part, cut, parse_split
from .._distributed.ranks import Ranks, libraries
from .._io.checkpoint import (
    INDEX,
    header_identity,
    is_shard,
    read_checkpoint,
    read_index,
    read_model_config,
)
from .._io.hub import SMALL_FILES, fetching
from .._memory.budget import Plan, check_device, default_memory
from .._osinfo import device_limit
from .discover import DiscoveredModel, discover
from .lazy_load import original_load_model

_SAMPLE_BYTES = 4096
_DIGEST_CHARS = 16
_OPTIONS = ("context_tokens", "prefill_tokens", "split")


def discover_on_ranks(
    ranks: Ranks, folder: Path, config: StreamConfig, arguments: dict[str, Any]
) -> tuple[DiscoveredModel, Plan, StreamConfig]:
    """Discover and plan this rank's layers, and check that all ranks load the same model.

    Args:
        ranks: the ranks that share the model.
        folder: this rank's copy of the checkpoint, or of its part.
        config: options of the whole run.
        arguments: arguments of mlx-lm's `load_model`.

    Returns:
        This rank's layers, its plan and its own options.

    Raises:
        RankError: another rank failed, or two disagree.
        StreamError: raised by `discover` or `DiscoveredModel.plan` on this rank.
    """
    options = {name: getattr(config, name) for name in _OPTIONS}

    def prepare() -> tuple[DiscoveredModel, Plan, StreamConfig]:
        own = config.for_rank(ranks.rank, ranks.size)
        if own.memory is None and own.cache is None and ranks.on_this_host > 1:
            own = replace(own, memory=default_memory() // ranks.on_this_host)
        part = Part(ranks.rank, ranks.size, parse_split(config.split, ranks.size))
        found = discover(folder, own, arguments, part=part)
        return found, found.plan(own), own

    ranks.agree({"the version of": libraries(), "the option": options})
    found, plan, own = ranks.all_or_none(prepare)
    ranks.agree({"the digest of": digests(folder)})
    # All ranks divide a prompt into the same chunks: those of the rank with the least room.
    plan = in_chunks(plan, min(ranks.exchange(plan.prefill_tokens)), min(ranks.exchange(plan.work)))
    check_device(plan, device_limit(plan.bound), own.oversubscribe)
    if ranks.rank != 0:
        own = replace(own, progress=False)
    return found, plan, own


def in_chunks(plan: Plan, tokens: int, work: int) -> Plan:
    """A rank's plan, with chunks that every rank can take.

    Args:
        plan: the rank's own.
        tokens, work: the smallest `prefill_tokens` and `work` of all ranks.
    """
    return replace(plan, prefill_tokens=tokens, pass_bytes=work)


def digests(folder: Path) -> dict[str, str]:
    """Digests that identify a checkpoint: of JSON files and shard headers by file, and of the first
    bytes of each tensor that every rank has (embedding, norms, output matrix).
    """
    found = {}
    for name, read in (("config.json", read_model_config), (INDEX, read_index)):
        if (folder / name).is_file():
            found[name] = _digest(json.dumps(read(folder), sort_keys=True).encode())
    checkpoint = read_checkpoint(folder)
    for shard in sorted({t.file for t in checkpoint.tensors.values()}):
        found[shard.name] = header_identity(shard)["header_sha256"][:_DIGEST_CHARS]
    for name, entry in sorted(checkpoint.tensors.items()):
        if ".layers." not in name:
            with entry.file.open("rb") as f:
                f.seek(entry.offset)
                found[f"tensor {name}"] = _digest(f.read(min(_SAMPLE_BYTES, entry.nbytes)))
    return found


def part_of_repository(
    path_or_hf_repo: str, config: StreamConfig, group: mx.distributed.Group, trust: bool
) -> Path:
    """The local folder of a model; from a Hub repository only this rank's shards are downloaded.

    Raises:
        CheckpointError: there is no such folder, and no such repository can be downloaded.
        UnsupportedModelError: the model cannot be divided.
    """
    if Path(path_or_hf_repo).exists():
        return Path(path_or_hf_repo)
    patterns = [f"*{end}" for end in SMALL_FILES]  # the index among them
    with fetching(path_or_hf_repo, "cannot be downloaded"):
        folder: Path = mlx_lm.utils._download(path_or_hf_repo, allow_patterns=patterns)
        if promised := read_index(folder):
            model, _ = original_load_model(folder, True, strict=False, trust_remote_code=trust)
            split = parse_split(config.split, group.size())
            stage = cut(model, Part(group.rank(), group.size(), split))
            files = stage.files({name: f for name, f in promised.items() if is_shard(f)})
            own = Path(mlx_lm.utils._download(path_or_hf_repo, allow_patterns=list(files)))
            if all((own / f).is_file() for f in files):
                return own
            # The index belongs to another conversion and names the wrong files.
        return Path(mlx_lm.utils._download(path_or_hf_repo))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]
