"""Loads models with their expert layers streamed: `load`, `plan` and `patch`.

discover.py finds the experts, patching.py replaces functions of mlx-lm and mlx-vlm. This
module puts the streamed layers into the model and loads everything else. It evaluates nothing
before the plan is accepted.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from .._cache.lossy import Ways
from .._config import StreamConfig, as_config, parse_size
from .._distributed.pipeline import wait_on_host
from .._distributed.ranks import Ranks
from .._distributed.watch import Watch
from .._errors import RankError, StreamError, UnsupportedModelError
from .._experts.layer import StreamedSwitch
from .._experts.lossy import LossyRun, first_line, refuse_lossy
from .._experts.prefetch import connect
from .._experts.refusals import guard
from .._experts.store_gain import WORTH, how_to_pack, store_gain
from .._experts.stream import ExpertStream, attach, flatten, stream
from .._io.checkpoint import check_tokenizer
from .._io.hub import fetching, headers_only
from .._memory.budget import Plan, check_device
from .._memory.hardware import named_machine
from .._memory.passes import Passes
from .._memory.process_memory import check_address_space, held_bytes, is_registered
from .._osinfo import apple_budget, apple_limit, device_limit
from .._progress import progress_bar
from . import patching, vlm
from .combinations import PassCheck, token_rows
from .discover import DiscoveredModel, alone_message, discover, has_expert_tensors
from .drafts import bound_drafts
from .early_rows import reading_early
from .lazy_load import MLX_LM, MLX_VLM, original_load_model
from .libraries import library
from .on_ranks import discover_on_ranks, part_of_repository
from .pictures import planning_pictures
from .tables import set_module
from .tuned_for import warn_if_elsewhere

_log = logging.getLogger(__name__)

_TRUNK_STEP_BYTES = 256 << 20


def load(
    path_or_hf_repo: str,
    *args: Any,
    memory: float | str | None = None,
    cache: float | str | None = None,
    config: StreamConfig | dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Load a Mixture-of-Experts model whose experts are streamed from disk.

    mlx-lm loads it if it has the model's family, otherwise mlx-vlm; `config.loader` overrides that.

    Args:
        path_or_hf_repo: model folder or Hugging Face repository, as `mlx_lm.load` takes it.
        memory: bound for all of MLX's memory: bytes, or a string such as "96GB".
        cache: bound for the expert cache alone: bytes, or a string.
        config: further options, as a `StreamConfig` or a dict of them; `memory` and `cache`
            override its own.
        *args, **kwargs: any other arguments of `mlx_lm.load`, or of `mlx_vlm.load`.

    Returns:
        Model and tokenizer, as `mlx_lm.load` returns them (and config with `return_config=True`),
        or model and processor, as `mlx_vlm.load` does.

    Raises:
        BudgetError: the memory is too small (the message states the smallest that works), or more
            than this device can hold.
        CheckpointError: the files are damaged or incomplete.
        UnsupportedModelError: no routed experts, or a layout that cannot be streamed.
        ExpertReadError: reading a layer that fits whole, or a hot set, failed.
        StreamError: an option or a size is invalid, or mlx-vlm is needed and not installed.
    """
    patched = patch(memory, cache, config)
    trust = kwargs.get("trust_remote_code", False)
    folder = local_folder(path_or_hf_repo, patched.config, kwargs.get("revision"), trust)
    loads_vlm = library(folder, patched.config) == MLX_VLM
    if not loads_vlm:
        stated = kwargs.get("tokenizer_config") or (args[0] if args else None) or {}
        check_tokenizer(folder, bool(stated.get("trust_remote_code")))
    loaded_by = vlm.require(folder) if loads_vlm else mlx_lm.utils
    with patching.for_this_thread(patched):
        result: tuple[Any, ...] = loaded_by.load(str(folder), *args, **kwargs)
        return result


def plan(
    path_or_hf_repo: str,
    memory: float | str | None = None,
    cache: float | str | None = None,
    config: StreamConfig | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    machine: str | None = None,
) -> Plan:
    """Plan a load from file headers alone: no weight is read, nothing is allocated.

    From a Hub repository only the headers are downloaded. An original checkpoint that must be
    converted first is planned in its converted form; the plan's `conversion` is then not 0.

    Args:
        path_or_hf_repo: model folder or Hugging Face repository.
        memory, cache, config: as for `load`.
        trust_remote_code: run the model code that the checkpoint brings, if it does.
        machine: name of the machine to plan for, as in `doctor --machine` ("m4 max 128"); default:
            this one. Without a budget it gets the largest that such a machine can hold.

    Returns:
        The plan; `str(plan)` is one line.

    Raises:
        BudgetError: the memory is too small (the message states the smallest that works), or more
            than the machine can hold.
        CheckpointError: the files are damaged or incomplete, or there is no such model.
        UnsupportedModelError: no routed experts, or a layout that neither streams nor converts.
        StreamError: an option or a size is invalid, or mlx-vlm is needed and not installed.
    """
    with headers_only(str(path_or_hf_repo)) as (folder, _):
        merged = _merged(memory, cache, config)
        trust = {"trust_remote_code": trust_remote_code}
        found = discover(folder, merged, trust, as_converted=True)
        if machine is None:
            planned = found.plan(merged)
            limit = device_limit(planned.bound)
        else:
            memory_bytes = named_machine(machine).memory
            if merged.memory is None and merged.cache is None:
                merged = replace(merged, memory=apple_budget(memory_bytes))
            planned = found.plan(merged)
            limit = apple_limit(memory_bytes, planned.bound)
        check_device(planned, limit, merged.oversubscribe)
        return planned


def local_folder(
    path_or_hf_repo: str, config: StreamConfig, revision: str | None = None, trust: bool = False
) -> Path:
    """The local folder of a model, or of this rank's part of it. Raises what `resolve` raises."""
    if (group := patching.group_of(config)) is not None:
        return part_of_repository(path_or_hf_repo, config, group, trust)
    return resolve(path_or_hf_repo, revision, config)


def resolve(
    path_or_hf_repo: str | Path, revision: str | None = None, config: StreamConfig | None = None
) -> Path:
    """The local folder of a model; a Hub repository is downloaded first.

    Args:
        path_or_hf_repo: a model folder, or a repository.
        revision: of the repository.
        config: names the library that loads the model, if it is not the one that can.

    Raises:
        CheckpointError: there is no such folder, and no such repository can be downloaded.
    """
    with fetching(
        path_or_hf_repo, "is neither a model folder nor a repository that can be fetched"
    ):
        folder: Path = mlx_lm.utils._download(str(path_or_hf_repo), revision=revision)
        if Path(path_or_hf_repo).exists() or library(folder, config or StreamConfig()) == MLX_LM:
            return folder
        # mlx-vlm reads files that mlx-lm does not download: shards of any name, for example.
        downloaded: Path = vlm.require(folder).get_model_path(str(path_or_hf_repo), revision)
        return downloaded


def library_of(path_or_hf_repo: str | Path, config: StreamConfig) -> str:
    """The library that loads a model; of a Hub repository only the headers are downloaded.

    Raises:
        CheckpointError: there is no such model, or its files are damaged or incomplete.
    """
    with headers_only(str(path_or_hf_repo)) as (folder, _):
        return library(folder, config)


class patch:  # noqa: N801 - called like a function
    """Make `mlx_lm.load` and `mlx_vlm.load` stream experts, wherever they were imported.

    Use it as a context manager, or call `install` and later `remove`. Removing restores mlx-lm
    exactly; models loaded in between stay streamed. The first model must have routed experts.
    Later ones without any load as usual; the prompt of one that drafts for a streamed model runs in
    passes that fit into that model's budget.

    Args:
        memory, cache, config: as for `load`.

    Attributes:
        config: the options, `memory` and `cache` included.
        streams: the `ExpertStream` of every model loaded through this patch, in order.

    Raises:
        StreamError: an option or a size is invalid, or `with` is used on a patch that is installed.
            Loading raises what `load` raises.
    """

    def __init__(
        self,
        memory: float | str | None = None,
        cache: float | str | None = None,
        config: StreamConfig | dict[str, Any] | None = None,
    ) -> None:
        self.config = _merged(memory, cache, config)
        self.streams: list[ExpertStream] = []

    def install(self) -> patch:
        """Patch mlx-lm for all threads until `remove`. The last patch installed counts.

        Install it again to make it the last one; one `remove` still undoes it.

        Returns:
            The patch itself.
        """
        patching.install(self)
        return self

    def remove(self) -> None:
        """Undo `install`; do nothing if it is not installed."""
        patching.remove(self)

    def __enter__(self) -> patch:
        if patching.is_installed(self):  # the end of an inner block would undo the outer one
            raise StreamError("this patch is installed already: make another one for this block")
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _load_model(self, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """`mlx_lm.utils.load_model` with the expert layers streamed."""
        folder = Path(arguments.pop("model_path"))
        lazy = arguments.pop("lazy", False)
        group = patching.group_of(self.config)
        if group is not None:
            return self._load_part(Ranks(group), folder, lazy, arguments)
        try:
            found = self._load(folder, lazy, arguments, MLX_LM)
        except UnsupportedModelError:
            if self._loads_whole(folder):
                model, model_config = original_load_model(folder, lazy, **arguments)
                bound_drafts(model, model_config, self.streams[-1])
                return model, model_config
            raise
        return found.model, found.model_config

    def _loads_whole(self, folder: Path) -> bool:
        """Does this model load as usual? It has no experts and is not the first, a draft model."""
        return bool(self.streams) and not has_expert_tensors(folder)

    def _load(
        self, folder: Path, lazy: bool, arguments: dict[str, Any], library: str
    ) -> DiscoveredModel:
        """Discover, plan, and put streamed layers in place.

        Args:
            folder: the model folder.
            lazy: leave the trunk unevaluated.
            arguments: arguments of the library's `load_model`.
            library: the one whose `load_model` was called.
        """
        found = discover(folder, replace(self.config, loader=library), arguments)
        # `reserve` is for other models. Once one of them is loaded, its real size counts instead.
        others, config = held_bytes(), self.config
        foreign = max(0, mx.get_active_memory() - others)
        if any(is_registered(s) for s in self.streams):
            config = replace(config, reserve=None)
        if library == MLX_VLM:  # its caches are not known to go back exactly
            if config.run_ahead == "on":
                _log.warning("run_ahead does not work with mlx-vlm: each layer's router is awaited")
            config = replace(config, run_ahead="off")
        plan = found.plan(config, others)  # before anything is evaluated
        check_device(plan, device_limit(plan.bound), config.oversubscribe)
        plan = replace(plan, others=foreign)
        warn_if_elsewhere(found.layers, self.config)
        expert_stream = self._stream_experts(found, plan, config, lazy)
        expert_stream.folder = folder
        if config.progress:
            _tell_of_store(expert_stream, folder)
        return found

    def _load_vlm(self, arguments: dict[str, Any]) -> nn.Module:
        """`mlx_vlm.utils.load_model` with the expert layers streamed."""
        folder, lazy = Path(arguments.pop("model_path")), arguments.pop("lazy", False)
        arguments = {**arguments.pop("kwargs", {}), **arguments}
        if patching.group_of(self.config) is not None:
            raise UnsupportedModelError(alone_message(folder))
        try:
            model = self._load(folder, lazy, arguments, MLX_VLM).model
        except UnsupportedModelError:
            if self._loads_whole(folder):
                return vlm.original_load_model()(folder, lazy=lazy, **arguments)
            raise
        planning_pictures(model, stream(model))
        return model

    def _load_part(
        self, ranks: Ranks, folder: Path, lazy: bool, arguments: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Load one rank's part: every step succeeds on all ranks or on none."""
        refuse_lossy(self.config.lossy, "a model that several machines share")
        watch = Watch(ranks)
        try:
            found, plan, config = discover_on_ranks(ranks, folder, self.config, arguments)
            expert_stream = ranks.all_or_none(
                lambda: self._stream_experts(found, plan, config, lazy)
            )
            ranks.share_random_state()
        except RankError as e:
            lost = watch.why() if e.rank < 0 else None  # MLX does not name the rank
            watch.close(lost or str(e))
            raise RankError(lost, e.rank) if lost else e from e.__cause__
        except BaseException as e:
            watch.close(str(e))
            raise
        expert_stream.accompany(ranks, watch)
        return found.model, found.model_config

    def _stream_experts(
        self,
        found: DiscoveredModel,
        plan: Plan,
        config: StreamConfig,
        lazy: bool,
    ) -> ExpertStream:
        """Put streamed layers in place of the experts, and load the trunk."""
        drives = 1 + len(config.mirrors or ())
        check_address_space(plan, config.threads * drives)
        model = found.model
        language = found.language
        rows = token_rows(language) if found.stage is None else None
        ways = Ways.parse(config.lossy)
        lossy = None if ways is None else LossyRun(ways)
        for layer in found.layers:
            set_module(model, layer.name, lossy.wrap(layer) if lossy else StreamedSwitch(layer))
        guard(model)
        if not lazy:
            _load_trunk(model, config.progress)
        if config.prefetch != "off":
            connect(model, found.layers, config.prefetch_depth, config.prefetch == "on")
        expert_stream = ExpertStream(found.layers, plan, config, found.model_config, found.rows)
        if found.stage is not None:
            wait_on_host(model, found.stage)
            expert_stream.stage = found.stage
        attach(model, expert_stream, language)
        if lossy is not None:
            expert_stream.lossy = lossy
            try:
                lossy.try_out(model, language)
            except BaseException:
                expert_stream.close()
                raise
            _log.warning(first_line(lossy.stated))
        run_ahead = expert_stream.run_ahead
        if run_ahead is not None:
            run_ahead.watch(model)
        run = run_ahead.step if run_ahead else None
        step = reading_early(found.rows, language, run)
        passes = Passes(expert_stream, step, expert_stream.on_pass)
        passes.install(language, PassCheck(language, rows, pads=found.library == MLX_VLM))
        expert_stream.token_rows = rows
        self.streams.append(expert_stream)
        return expert_stream


def _tell_of_store(expert_stream: ExpertStream, folder: Path) -> None:
    """Say that a packed store would help, if reads go to the drive and it would."""
    streamed = [x for x in expert_stream.layers if not x.resident]
    if not streamed or not expert_stream.bypasses_page_cache:
        return
    gain = store_gain(streamed, parse_size(expert_stream.config.read_size))
    share = gain.saved / gain.seconds
    if share > WORTH:
        print(
            f"A packed store would save about {share:.0%} of the time of reads: an expert takes "
            f"{gain.reads:.0f} reads here. {how_to_pack(folder)}",
            file=sys.stderr,
        )


def _load_trunk(model: nn.Module, progress: bool) -> None:
    """Evaluate the trunk, a step at a time for the progress bar."""
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
    memory: float | str | None,
    cache: float | str | None,
    config: StreamConfig | dict[str, Any] | None,
) -> StreamConfig:
    """`config` with the caller's `memory` and `cache`, and with all defaults."""
    stated = {k: v for k, v in (("memory", memory), ("cache", cache)) if v is not None}
    merged = replace(as_config(config), **stated)  # type: ignore[arg-type]
    return merged.with_defaults()
