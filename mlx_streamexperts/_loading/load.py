"""Load models through mlx-lm with their expert layers streamed, and patch mlx-lm to do so.

What is streamed is found in locate.py; this module puts the streamed layers in their place, loads
the rest, and leaves mlx-lm as it was found.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.utils
import mlx_lm.utils

from .._config import StreamConfig
from .._distributed.pipeline import wait_on_host
from .._distributed.ranks import Ranks
from .._distributed.watch import Watch
from .._errors import RankError, UnsupportedModelError
from .._experts.foreign_modules import Strangers
from .._experts.layer import StreamedSwitch
from .._experts.prefetch import link
from .._experts.refusals import guard
from .._experts.stream import ExpertStream, attach, flatten, is_streamed, stream
from .._io.checkpoint import read_header
from .._io.hub import had, headers_only
from .._memory.budget import Plan, check_device
from .._memory.hardware import named_machine
from .._memory.passes import Passes
from .._memory.process_memory import alive, check_address_space, held
from .._osinfo import apple_limit, apple_working_set, device_limit
from .._progress import progress_bar
from .combinations import PassCheck, token_rows
from .discover import Located, locate, mentions_experts, original_load_model
from .guards import GUARDS
from .on_ranks import meet, part_of_repository
from .tuned_for import warn_if_elsewhere

_original_load_adapters = mlx_lm.tuner.utils.load_adapters  # mlx_lm.utils' own calls it
_original_sharded_load = mlx_lm.utils.sharded_load
_SIGNATURE = inspect.signature(original_load_model)
_TRUNK_STEP_BYTES = 256 << 20


def load(
    path_or_hf_repo: str,
    *args: Any,
    memory: int | str | None = None,
    cache: int | str | None = None,
    config: StreamConfig | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Load a Mixture-of-Experts model whose experts are streamed from disk.

    Args:
        path_or_hf_repo: model folder or Hugging Face repository, as `mlx_lm.load` takes it.
        memory: bound for all of MLX's memory: bytes, or a string such as "96GB".
        cache: bound for the expert cache alone: bytes, or a string.
        config: further options; `memory` and `cache` override its own.
        *args, **kwargs: everything else `mlx_lm.load` takes.

    Returns:
        What `mlx_lm.load` returns: model and tokenizer (and config with `return_config=True`).

    Raises:
        BudgetError: the memory is too small, and the message says the smallest that works; or it is
            more than this device can hold.
        CheckpointError: the files are damaged or incomplete.
        UnsupportedModelError: no routed experts, or a layout that cannot be streamed.
        ExpertReadError: a layer that fits whole, or a hot set, could not be read in.
        StreamError: an option or a size is not understood.
    """
    patched = patch(memory, cache, config)
    trust = kwargs.get("trust_remote_code", False)
    folder = local_folder(path_or_hf_repo, patched.config, kwargs.get("revision"), trust)
    with patched._for_this_thread():
        return mlx_lm.utils.load(str(folder), *args, **kwargs)


def plan(
    path_or_hf_repo: str,
    memory: int | str | None = None,
    cache: int | str | None = None,
    config: StreamConfig | None = None,
    trust_remote_code: bool = False,
    machine: str | None = None,
) -> Plan:
    """What `load` would come to, from headers alone: no weight is read, nothing allocated.

    Of a Hub repository only the headers are fetched. An original checkpoint that has to be
    converted first is planned as it will be then; `conversion` of the plan says so.

    Args:
        path_or_hf_repo: model folder or Hugging Face repository.
        memory, cache, config: as for `load`.
        trust_remote_code: run the model code that the checkpoint brings, if it does.
        machine: the name of a machine to plan for, as `doctor --machine` takes it; default: this
            one.

    Returns:
        The plan; as text it is one line.

    Raises:
        BudgetError: the memory is too small, and the message says the smallest that works; or it is
            more than the machine can hold.
        CheckpointError: the files are damaged or incomplete, or there is no such model.
        UnsupportedModelError: no routed experts, or a layout that neither streams nor converts.
        StreamError: an option or a size is not understood.
    """
    with headers_only(str(path_or_hf_repo)) as (folder, _):
        merged = _merged(memory, cache, config)
        trust = {"trust_remote_code": trust_remote_code}
        located = locate(folder, merged, trust, as_converted=True)
        if machine is None:
            planned = located.plan(merged)
            limit = device_limit(planned.bound)
        else:
            memory_bytes = named_machine(machine).memory
            if merged.memory is None and merged.cache is None:
                merged = replace(merged, memory=apple_working_set(memory_bytes))
            planned = located.plan(merged)
            limit = apple_limit(memory_bytes, planned.bound)
        check_device(planned, limit, merged.oversubscribe)
        return planned


def local_folder(
    path_or_hf_repo: str, config: StreamConfig, revision: str | None = None, trust: bool = False
) -> Path:
    """The local folder of a model, or of one rank's part of it.

    Raises: as `resolve`.
    """
    if (group := _group(config)) is not None:
        return part_of_repository(path_or_hf_repo, config, group, trust)
    return resolve(path_or_hf_repo, revision)


def resolve(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded from the Hub where it is not one already.

    Raises:
        CheckpointError: it is neither a folder nor a repository that can be had.
    """
    with had(path_or_hf_repo, "is neither a model folder nor a repository that can be downloaded"):
        return mlx_lm.utils._download(str(path_or_hf_repo), revision=revision)


class patch:  # noqa: N801 - used like a function, as unittest.mock.patch is
    """Make `mlx_lm.load` stream experts, wherever it was imported.

    A context manager; or call `install` and later `remove`, which leaves mlx-lm exactly as it was
    found. Models loaded meanwhile stay streamed. The first model must have routed experts; after
    it, models without any (a draft model, say) load as usual.

    Args:
        memory, cache, config: as for `load`.

    Attributes:
        config: the options, `memory` and `cache` included.
        streams: the `ExpertStream` of every model loaded through this patch, in order.

    Raises:
        StreamError: an option or a size is not understood. Loading raises what `load` raises.
    """

    def __init__(
        self,
        memory: int | str | None = None,
        cache: int | str | None = None,
        config: StreamConfig | None = None,
    ) -> None:
        self.config = _merged(memory, cache, config)
        self.streams: list[ExpertStream] = []

    def install(self) -> patch:
        """Patch mlx-lm from now on, for all threads. Of several patches the last one counts.

        Returns:
            Itself.
        """
        with _lock:
            _installed.append(self)
            _bind()
        return self

    def remove(self) -> None:
        """Undo `install`; without it, do nothing."""
        with _lock:
            if self in _installed:
                _installed.remove(self)
                _bind()

    def __enter__(self) -> patch:
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @contextmanager
    def _for_this_thread(self) -> Iterator[None]:
        """Like `with self`, but other threads' loads are left alone."""
        global _scoped
        before = getattr(_local, "patch", None)
        with _lock:
            _scoped += 1
            _bind()
        _local.patch = self
        try:
            yield
        finally:
            _local.patch = before
            with _lock:
                _scoped -= 1
                _bind()

    def _load_model(self, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """`mlx_lm.utils.load_model` with the expert layers streamed."""
        folder = Path(arguments.pop("model_path"))
        lazy = arguments.pop("lazy", False)
        group = _group(self.config)
        if group is not None:
            return self._load_part(Ranks(group), folder, lazy, arguments)
        try:
            located = locate(folder, self.config, arguments)
        except UnsupportedModelError:
            if self.streams and not mentions_experts(folder):
                return original_load_model(folder, lazy, **arguments)
            raise
        # What was reserved for other models is theirs to take, these among them.
        others, config = held(), self.config
        strange = max(0, mx.get_active_memory() - others)
        if any(alive(s) for s in self.streams):
            config = replace(config, reserve=None)
        plan = located.plan(config, others)  # before anything is evaluated
        check_device(plan, device_limit(plan.bound), config.oversubscribe)
        plan = replace(plan, others=strange)
        warn_if_elsewhere(located.layers, self.config)
        self._put_in_place(located, plan, config, lazy)
        return located.model, located.model_config

    def _load_part(
        self, ranks: Ranks, folder: Path, lazy: bool, arguments: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The same for one rank of several: every step succeeds on all of them, or on none."""
        watch = Watch(ranks)
        try:
            located, plan, config = meet(ranks, folder, self.config, arguments)
            expert_stream = ranks.all_or_none(
                lambda: self._put_in_place(located, plan, config, lazy)
            )
            ranks.share_random_state()
        except RankError as e:
            lost = watch.why() if e.rank < 0 else None  # MLX does not say which it was
            watch.close(lost or str(e))
            raise RankError(lost, e.rank) if lost else e from e.__cause__
        except BaseException as e:
            watch.close(str(e))
            raise
        expert_stream.accompany(ranks, watch)
        return located.model, located.model_config

    def _put_in_place(
        self, located: Located, plan: Plan, config: StreamConfig, lazy: bool
    ) -> ExpertStream:
        """Load the trunk and stream the experts of a model that was located."""
        check_address_space(plan, config.threads)
        model = located.model
        rows = token_rows(model) if located.stage is None else None
        for layer in located.layers:
            _replace(model, layer.name, StreamedSwitch(layer))
        guard(model)
        if not lazy:
            _load_trunk(model, config.progress)
        if config.prefetch != "off":
            link(model, located.layers, config.prefetch_depth, config.prefetch == "on")
        expert_stream = ExpertStream(located.layers, plan, config, located.model_config)
        if located.stage is not None:
            wait_on_host(model, located.stage)
            expert_stream.stage = located.stage
        attach(model, expert_stream)
        ahead = expert_stream.run_ahead
        if ahead is not None:
            ahead.strangers = Strangers(model)
        passes = Passes(expert_stream, ahead.step if ahead else None)
        passes.install(model, PassCheck(model, rows))
        expert_stream.token_rows = rows
        self.streams.append(expert_stream)
        return expert_stream


_lock = threading.Lock()
# .patch: the one that this thread's `load` is using; .group: the one that it divides a model over
_local = threading.local()
_installed: list[patch] = []
_scoped = 0  # `load` calls under way


def _active() -> patch | None:
    return getattr(_local, "patch", None) or (_installed[-1] if _installed else None)


@functools.wraps(original_load_model)
def _patched_load_model(*args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    active = _active()
    if active is None:
        return original_load_model(*args, **kwargs)
    return active._load_model(dict(_SIGNATURE.bind(*args, **kwargs).arguments))


@functools.wraps(_original_load_adapters)
def _patched_load_adapters(model: nn.Module, adapter_path: str) -> nn.Module:
    """Refuse adapters on streamed experts: mlx-lm would drop their weights without a word."""
    if is_streamed(model):
        if stream(model).stage is not None:
            raise UnsupportedModelError(
                f"{adapter_path}: mlx-lm has no adapters for a model that several machines share; "
                "fuse this one into the checkpoint first (mlx_lm.fuse)"
            )
        for entry in read_header(Path(adapter_path) / "adapters.safetensors"):
            for layer in stream(model).layers:
                if entry.name.startswith(layer.name + "."):
                    raise UnsupportedModelError(
                        f"{entry.file}: adapter {entry.name} belongs to the streamed experts "
                        f"{layer.name}; only adapters outside the experts work. Fuse this one into "
                        "the checkpoint first (mlx_lm.fuse)."
                    )
    return _original_load_adapters(model, adapter_path)


@functools.wraps(_original_sharded_load)
def _patched_sharded_load(
    repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    return_config: bool = False,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, ...]:
    """mlx-lm's way to load a rank's part, which its chat and server use."""
    if (active := _active()) is None:
        return _original_sharded_load(
            repo,
            pipeline_group,
            tensor_group,
            return_config,
            tokenizer_config=tokenizer_config,
            trust_remote_code=trust_remote_code,
        )
    if pipeline_group is None and tensor_group is not None and tensor_group.size() > 1:
        raise UnsupportedModelError(
            f"{repo}: tensor parallelism would have every machine read a piece of every expert; "
            "streamed models are divided by layers: use --pipeline"
        )
    group = pipeline_group or tensor_group or mx.distributed.init()
    folder = part_of_repository(repo, active.config, group, trust_remote_code)
    _local.group = group
    try:
        return mlx_lm.utils.load(
            str(folder),
            tokenizer_config or {"trust_remote_code": True},
            return_config=return_config,
            trust_remote_code=trust_remote_code,
        )
    finally:
        _local.group = None


def _group(config: StreamConfig) -> mx.distributed.Group | None:
    """The ranks that a model is to be divided over, if there are several."""
    group = getattr(_local, "group", None)
    if group is None and config.pipeline:
        group = mx.distributed.init()
    return group if group is not None and group.size() > 1 else None


def _bind() -> None:
    """Put the right functions into every module that has imported them."""
    # `mlx_lm.load` looks these up in its module at each call, so that they cover every way to load
    # a model, however the caller imported `load`.
    patched = bool(_installed or _scoped)
    for original, ours in (
        (original_load_model, _patched_load_model),
        (_original_load_adapters, _patched_load_adapters),
        *GUARDS,
        (_original_sharded_load, _patched_sharded_load),
    ):
        name = original.__name__
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            if names.get(name) is original or names.get(name) is ours:
                names[name] = ours if patched else original


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a path such as `model.layers.3.mlp.switch_mlp`."""
    *parents, last = path.split(".")
    node: Any = model
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = module


def _load_trunk(model: nn.Module, progress: bool) -> None:
    """Evaluate what stays resident, a step at a time for the progress bar."""
    parameters = [array for _, array in flatten(model)]
    total = sum(a.nbytes for a in parameters)
    with progress_bar("Loading trunk", progress, total) as bar:
        batch: list[mx.array] = []
        for array in parameters:
            batch.append(array)
            if sum(a.nbytes for a in batch) >= _TRUNK_STEP_BYTES or array is parameters[-1]:
                mx.eval(batch)
                bar.update(sum(a.nbytes for a in batch))
                batch.clear()


def _merged(
    memory: int | str | None, cache: int | str | None, config: StreamConfig | None
) -> StreamConfig:
    """`config` with the budgets that the caller stated beside it, and every default filled in."""
    stated = {k: v for k, v in (("memory", memory), ("cache", cache)) if v is not None}
    merged = replace(config or StreamConfig(), **stated)  # type: ignore[arg-type]
    return merged.with_defaults()
