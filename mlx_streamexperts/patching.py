"""Load models through mlx-lm with their expert layers streamed, and patch mlx-lm to do so.

A module's weights are tied to bytes on disk by identity, not by name: the arrays that mlx-lm hands
to the model's `sanitize` are remembered, and an expert table is streamed only if the array that
ends up in the module is one of them, untouched. A table that mlx-lm computes from others (stacked,
split, scaled) is refused rather than guessed at.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)
from tqdm import tqdm

from .bank import SlotTensor
from .checkpoint import Checkpoint, TensorEntry, read_checkpoint, read_header
from .config import StreamConfig
from .errors import CheckpointError, UnsupportedModelError
from .hub import headers_only
from .layer import ExpertLayer, ExpertTensor, StreamedSwitch
from .planner import Plan, Sizes, divide, text_config
from .stream import ExpertStream, attach, flatten, is_streamed, layer_needs, stream

_original_load_model = mlx_lm.utils.load_model
_original_load_adapters = mlx_lm.utils.load_adapters
_SIGNATURE = inspect.signature(_original_load_model)
_SWITCHES = (SwitchGLU, SwitchMLP)
_PROJECTIONS = (SwitchLinear, QuantizedSwitchLinear)
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
        memory: bound for all of MLX's memory, bytes or a string such as "96GB".
        cache: bound for the expert cache alone.
        config: further options; `memory` and `cache` override its own.
        *args, **kwargs: everything else `mlx_lm.load` takes.

    Returns:
        What `mlx_lm.load` returns: model and tokenizer (and config with `return_config=True`).

    Raises:
        BudgetError: the memory is too small; says the smallest that works.
        CheckpointError: the files are damaged or incomplete.
        UnsupportedModelError: no routed experts, or a layout that cannot be streamed.
    """
    folder = resolve(path_or_hf_repo, kwargs.get("revision"))
    with patch(memory, cache, config)._for_this_thread():
        return mlx_lm.utils.load(str(folder), *args, **kwargs)


def plan(
    path_or_hf_repo: str,
    memory: int | str | None = None,
    cache: int | str | None = None,
    config: StreamConfig | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What `load` would come to, from headers alone: no weight is read, nothing allocated.

    Of a Hub repository only the headers are fetched.

    Raises: as `load`.
    """
    with headers_only(str(path_or_hf_repo)) as (folder, _):
        merged = _merged(memory, cache, config)
        return prepare(folder, merged, {"trust_remote_code": trust_remote_code}).plan


def resolve(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded from the Hub where it is not one already.

    Raises:
        CheckpointError: it is neither a folder nor a repository that can be had.
    """
    try:
        return mlx_lm.utils._download(str(path_or_hf_repo), revision=revision)
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise CheckpointError(
            f"{path_or_hf_repo} is neither a model folder nor a repository that can be "
            f"downloaded: {reason}"
        ) from e


class patch:  # noqa: N801 - used like a function, as unittest.mock.patch is
    """Make `mlx_lm.load` stream experts, wherever it was imported.

    A context manager; or call `install` and later `remove`, which leaves mlx-lm exactly as it was
    found. Models loaded meanwhile stay streamed. The first model must have routed experts; after
    it, models without any (a draft model, say) load as usual.

    Args:
        memory, cache, config: as for `load`.

    Attributes:
        streams: the `ExpertStream` of every model loaded through this patch.
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
        """Patch mlx-lm from now on, for all threads."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        try:
            prepared = prepare(folder, self.config, arguments)
        except UnsupportedModelError:
            if self.streams and not _mentions_experts(folder):
                return _original_load_model(folder, lazy, **arguments)
            raise
        for layer in prepared.layers:
            _replace(prepared.model, layer.name, StreamedSwitch(layer))
        if not lazy:
            _load_trunk(prepared.model, self.config.progress)
        expert_stream = ExpertStream(
            prepared.layers, prepared.plan, self.config, prepared.model_config
        )
        attach(prepared.model, expert_stream)
        self.streams.append(expert_stream)
        return prepared.model, prepared.model_config


_lock = threading.Lock()
_local = threading.local()  # .patch: the one that this thread's `load` is using
_installed: list[patch] = []
_scoped = 0  # `load` calls under way


def _active() -> patch | None:
    return getattr(_local, "patch", None) or (_installed[-1] if _installed else None)


@functools.wraps(_original_load_model)
def _patched_load_model(*args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    active = _active()
    if active is None:
        return _original_load_model(*args, **kwargs)
    return active._load_model(dict(_SIGNATURE.bind(*args, **kwargs).arguments))


@functools.wraps(_original_load_adapters)
def _patched_load_adapters(model: nn.Module, adapter_path: str) -> nn.Module:
    """Refuse adapters on streamed experts: mlx-lm would drop their weights without a word."""
    if is_streamed(model):
        for entry in read_header(Path(adapter_path) / "adapters.safetensors"):
            for layer in stream(model).layers:
                if entry.name.startswith(layer.name + "."):
                    raise UnsupportedModelError(
                        f"{entry.file}: adapter {entry.name} belongs to the streamed experts "
                        f"{layer.name}; only adapters outside the experts work. Fuse this one into "
                        "the checkpoint first (mlx_lm.fuse)."
                    )
    return _original_load_adapters(model, adapter_path)


def _bind() -> None:
    """Put the right functions into every module that has imported them."""
    # `mlx_lm.load` looks these up in its module at each call, so that they cover every way to load
    # a model, however the caller imported `load`.
    patched = bool(_installed or _scoped)
    for original, ours in (
        (_original_load_model, _patched_load_model),
        (_original_load_adapters, _patched_load_adapters),
    ):
        name = original.__name__
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            if names.get(name) is original or names.get(name) is ours:
                names[name] = ours if patched else original


@dataclass(frozen=True)
class Prepared:
    """A lazily loaded model, nothing evaluated, and what streaming it needs."""

    model: nn.Module
    model_config: dict[str, Any]
    layers: list[ExpertLayer]
    plan: Plan


def prepare(folder: Path, config: StreamConfig, arguments: dict[str, Any]) -> Prepared:
    """Check the checkpoint, build the model without evaluating it, and divide the budget."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'} is missing: not a model folder")
    checkpoint = read_checkpoint(folder)
    as_stored: dict[str, mx.array] = {}
    arguments = dict(arguments)
    get_classes = arguments.pop("get_model_classes", mlx_lm.utils._get_classes)
    arguments["get_model_classes"] = lambda config: _remembering(get_classes(config), as_stored)
    try:
        overrides, custom = _custom_classes(folder, arguments)
        if custom is not None:
            arguments["model_config"] = overrides
            arguments["get_model_classes"] = lambda config: _remembering(custom, as_stored)
        model, model_config = _original_load_model(folder, True, **arguments)
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder}: mlx-lm cannot load this checkpoint: {e}") from e
    layers = _find_layers(model, checkpoint, as_stored)
    if not layers:
        raise UnsupportedModelError(_nothing_found(folder, model, model_config))
    expert_bytes = sum(x.experts * x.expert_bytes for x in layers)
    parameters = [array for _, array in flatten(model)]
    sizes = Sizes(
        trunk=sum(a.nbytes for a in parameters) - expert_bytes,
        looked_up=_embedding_bytes(model, model_config),
        disk=checkpoint.nbytes,
    )
    item_bytes = max(a.dtype.size for a in parameters if mx.issubdtype(a.dtype, mx.floating))
    needs = layer_needs(layers, model_config)
    return Prepared(
        model, model_config, layers, divide(sizes, needs, item_bytes, model_config, config)
    )


def _remembering(
    classes: tuple[Callable[..., nn.Module], type], as_stored: dict[str, mx.array]
) -> tuple[Callable[..., nn.Module], type]:
    """Model classes whose model copies the loaded weights into `as_stored` before sanitizing."""
    model_class, arguments_class = classes

    def build(arguments: Any) -> nn.Module:
        model = model_class(arguments)
        sanitize = getattr(model, "sanitize", None)

        def remember(weights: dict[str, mx.array]) -> dict[str, mx.array]:
            as_stored.update(weights)
            object.__delattr__(model, "sanitize")
            return sanitize(weights) if sanitize is not None else weights

        object.__setattr__(model, "sanitize", remember)
        return model

    return build, arguments_class


def _custom_classes(
    folder: Path, arguments: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Callable[..., nn.Module], type] | None]:
    """A checkpoint's own model file, which mlx-lm would import past `get_model_classes`.

    Only with `trust_remote_code`; without it mlx-lm refuses such a checkpoint itself.
    """
    overrides = dict(arguments.get("model_config") or {})
    model_file = {**mlx_lm.utils.load_config(folder), **overrides}.get("model_file")
    if model_file is None or not arguments.get("trust_remote_code"):
        return overrides, None
    spec = importlib.util.spec_from_file_location("custom_model", folder / model_file)
    if spec is None or spec.loader is None:
        raise CheckpointError(f"{folder / model_file}: not a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {**overrides, "model_file": None}, (module.Model, module.ModelArgs)


def _find_layers(
    model: nn.Module, checkpoint: Checkpoint, as_stored: dict[str, mx.array]
) -> list[ExpertLayer]:
    """Every expert module of the model with its tables' places on disk, in model order."""
    names = {id(array): name for name, array in as_stored.items()}
    layers = []
    for path, switch in model.named_modules():
        if not isinstance(switch, _SWITCHES):
            continue
        tensors = {}
        for part, projection in switch.children().items():
            if not isinstance(projection, _PROJECTIONS):
                continue
            for attribute, table in flatten(projection):
                where = f"{path}.{part}.{attribute}"
                if id(table) not in names:
                    raise UnsupportedModelError(_rewritten(where, as_stored, checkpoint))
                stored = checkpoint.tensors[names[id(table)]]
                _check_table(where, table, stored)
                slot = SlotTensor(projection, attribute, tuple(table.shape[1:]), table.dtype)
                tensors[f"{part}.{attribute}"] = ExpertTensor(slot, stored)
        counts = {t.stored.shape[0]: t.stored for t in tensors.values()}
        if len(counts) != 1:
            (a, first), (b, second), *_ = counts.items()
            raise CheckpointError(
                f"{path}: {first.name} in {first.file} has {a} experts, but {second.name} in "
                f"{second.file} has {b}"
            )
        layers.append(ExpertLayer(path, switch, tensors, next(iter(counts))))
    return sorted(layers, key=lambda x: [int(p) if p.isdigit() else -1 for p in x.name.split(".")])


def _check_table(where: str, table: mx.array, stored: TensorEntry) -> None:
    if tuple(table.shape) != stored.shape or table.nbytes != stored.nbytes or table.ndim < 1:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} is {stored.dtype} {list(stored.shape)}, but "
            f"mlx-lm reads it as {table.dtype} {list(table.shape)} for {where}"
        )


def _rewritten(where: str, as_stored: dict[str, mx.array], checkpoint: Checkpoint) -> str:
    """Why a table that is not stored as such cannot be streamed, and what to do."""
    layer = where[: where.find(".", where.find("layers.") + len("layers.")) + 1]
    alike = sorted(n for n in as_stored if "expert" in n and layer in n)
    seen = f" (it holds {alike[0]}, for example)" if alike else ""
    return (
        f"{checkpoint.folder} does not store {where} as one table of experts{seen}; mlx-lm "
        "computes it while loading, which would need all experts in memory. Convert the "
        "checkpoint once: mlx_lm.convert --hf-path <this checkpoint> -q"
    )


def _nothing_found(folder: Path, model: nn.Module, model_config: dict[str, Any]) -> str:
    """What was found instead of SwitchGLU and SwitchMLP modules."""
    kinds = sorted(
        {type(m).__name__ for path, m in model.named_modules() if "expert" in path.split(".")[-1]}
    )
    kind = model_config.get("model_type")
    if kinds:
        found = f"its experts are {', '.join(kinds)} modules, a layout not supported yet"
    else:
        found = "it has no routed experts, and loads with mlx_lm.load as it is"
    return (
        f"{folder} ({kind}) cannot be streamed: no SwitchGLU or SwitchMLP module in the model; "
        + found
    )


def _embedding_bytes(model: nn.Module, model_config: dict[str, Any]) -> int:
    """Bytes of embeddings that only look up; a tied one is the output matrix too."""
    if text_config(model_config).get("tie_word_embeddings"):
        return 0
    return sum(
        array.nbytes
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
        for _, array in flatten(module)
    )


def _mentions_experts(folder: Path) -> bool:
    return any("expert" in name for name in read_checkpoint(folder).tensors)


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
    with tqdm(
        total=total, desc="Loading trunk", unit="B", unit_scale=True, disable=not progress
    ) as bar:
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
    """`config` with the budgets that the caller stated beside it."""
    stated = {k: v for k, v in (("memory", memory), ("cache", cache)) if v is not None}
    return replace(config or StreamConfig(), **stated)  # type: ignore[arg-type]
