"""Replaces functions of mlx-lm and mlx-vlm while a `patch` is active, and puts them back exactly.

mlx-lm looks its loading functions up in their modules at each call, and other programs import them
by name. So every module that holds one under its own name gets the replacement. This module decides
which patch counts for a call; how a model is loaded is in load.py.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.utils
import mlx_lm.utils

from .._config import StreamConfig
from .._errors import UnsupportedModelError
from .._experts.stream import is_streamed, stream
from .._io.checkpoint import read_header
from . import vlm
from .guards import GUARDS, vlm_guard
from .lazy_load import original_load_model
from .on_ranks import part_of_repository

_original_load_adapters = mlx_lm.tuner.utils.load_adapters  # mlx_lm.utils' own calls it
_original_sharded_load = mlx_lm.utils.sharded_load
_SIGNATURE = inspect.signature(original_load_model)


class Loader(Protocol):
    """A patch."""

    config: StreamConfig

    def _load_model(self, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """`mlx_lm.utils.load_model` with these arguments and streamed experts."""

    def _load_vlm(self, arguments: dict[str, Any]) -> nn.Module:
        """`mlx_vlm.utils.load_model` with these arguments and streamed experts."""


_VLM = "mlx_vlm.utils"
_lock = threading.RLock()  # an import within may come back here
# .loader: whose `load` this thread is in; .group: the ranks that it divides a model over
_local = threading.local()
_installed: list[Loader] = []
_scoped = 0  # `for_this_thread` blocks under way


def install(loader: Loader) -> None:
    """Let all threads load through `loader`; the last one installed counts.

    Installed again, it becomes the last one and is still undone by one `remove`.
    """
    _await_vlm()
    with _lock:
        if loader in _installed:
            _installed.remove(loader)
        _installed.append(loader)
        _replace_functions()


def is_installed(loader: Loader) -> bool:
    """Is it installed, and not removed yet?"""
    return loader in _installed


def remove(loader: Loader) -> None:
    """Undo `install`; do nothing if it is not installed."""
    with _lock:
        if loader in _installed:
            _installed.remove(loader)
            _replace_functions()


@contextmanager
def for_this_thread(loader: Loader) -> Iterator[None]:
    """Let this thread load through `loader`; other threads are not affected."""
    global _scoped
    before = getattr(_local, "loader", None)
    _await_vlm()
    try:
        with _lock:
            _scoped += 1
            _replace_functions()
        _local.loader = loader
        yield
    finally:
        _local.loader = before
        with _lock:
            _scoped -= 1
            _replace_functions()


def group_of(config: StreamConfig) -> mx.distributed.Group | None:
    """The ranks to divide a model over; None on a single machine."""
    group = getattr(_local, "group", None)
    if group is None and config.pipeline:
        group = mx.distributed.init()
    return group if group is not None and group.size() > 1 else None


def _active() -> Loader | None:
    return getattr(_local, "loader", None) or (_installed[-1] if _installed else None)


@functools.wraps(original_load_model)
def _load_model(*args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    active = _active()
    if active is None:
        return original_load_model(*args, **kwargs)
    return active._load_model(dict(_SIGNATURE.bind(*args, **kwargs).arguments))


def _await_vlm() -> None:
    """Wait until another thread that is importing mlx-vlm has done so.

    Never call this with `_lock`: the import takes it at its end.
    """
    if _VLM in sys.modules:
        with suppress(ImportError):
            importlib.import_module(_VLM)


class _AfterImport(MetaPathFinder):
    """Replaces functions of mlx-vlm right after its import, if that comes after `install`.

    A program may patch first and import mlx-vlm later. Nothing here imports it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _VLM:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            with _lock:
                _replace_functions()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@functools.cache
def _vlm_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """mlx-vlm's `load_model`, and ours. It must be imported: an import here could wait for ever."""
    original = vlm.original_load_model()
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_model(*args: Any, **kwargs: Any) -> nn.Module:
        active = _active()
        if active is None:
            return original(*args, **kwargs)
        return active._load_vlm(dict(signature.bind(*args, **kwargs).arguments))

    return original, load_model


@functools.cache
def _vlm_weights() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """mlx-vlm's `load_model_weights`, and ours. A draft model out of its target's own checkpoint is
    loaded by this function alone.
    """
    original = sys.modules[_VLM].load_model_weights

    @functools.wraps(original)
    def load_model_weights(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if _active() is not None:
            vlm.refuse_drafters(model)
        return cast(nn.Module, original(model, *args, **kwargs))

    return original, load_model_weights


@functools.wraps(_original_load_adapters)
def _load_adapters(model: nn.Module, adapter_path: str) -> nn.Module:
    """Refuse adapters on streamed experts: mlx-lm would silently drop their weights."""
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
def _sharded_load(
    repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    return_config: bool = False,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, ...]:
    """Load a rank's part of a model; mlx-lm's chat and server load this way."""
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
            f"{repo}: with tensor parallelism every machine would read a piece of every expert. "
            "Streamed models are divided by layers: use pipeline=True (--pipeline)"
        )
    group = pipeline_group or tensor_group or mx.distributed.init()
    folder = part_of_repository(repo, active.config, group, trust_remote_code)
    _local.group = group
    try:
        return mlx_lm.utils.load(
            str(folder),
            tokenizer_config or {"trust_remote_code": trust_remote_code},  # stock always trusts
            return_config=return_config,
            trust_remote_code=trust_remote_code,
        )
    finally:
        _local.group = None


_after_import = _AfterImport()


def _vlm_is_there() -> bool:
    """Are mlx-vlm's functions defined? Another thread may be importing it."""
    utils = sys.modules.get(_VLM)
    return all(hasattr(utils, n) for n in ("load_model", "load_model_weights", "save_weights"))


def _replace_functions() -> None:
    """Put our functions, or the original ones, into every module that has imported them."""
    patched = bool(_installed or _scoped)
    if patched and _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
    elif not patched and _after_import in sys.meta_path:
        sys.meta_path.remove(_after_import)
    for original, ours in (
        *([_vlm_functions(), _vlm_weights(), vlm_guard()] if _vlm_is_there() else []),
        (original_load_model, _load_model),
        (_original_load_adapters, _load_adapters),
        *GUARDS,
        (_original_sharded_load, _sharded_load),
    ):
        name = original.__name__
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            if names.get(name) is original or names.get(name) is ours:
                names[name] = ours if patched else original
