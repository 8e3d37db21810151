"""Methods of `nn.Module` that a streamed model refuses, because they would leave its experts out.

The experts are not parameters (`layer.py`), so `nn.Module`'s own methods would silently save, cast
or copy everything else. Each module with streamed experts anywhere below it therefore gets a class
of its own, whose methods look for experts first. Methods that only read parameters, or do not touch
them (`freeze`, `train`, `eval`), stay as they are, and so does everything about other parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .._errors import UnsupportedModelError

SAVE = (
    "The experts of a streamed model are not in memory, so they would not be saved. To change a "
    "checkpoint's quantization in little memory use python -m mlx_streamexperts.convert; otherwise "
    "load the model without streaming."
)
TRAIN = (
    "A streamed model cannot be trained: the backward pass would need the step's experts again. "
    "Train adapters of the trunk without streaming, on a machine that holds the model; streamed "
    "models take them with --adapter-path."
)
_CHANGE = (
    "The experts of a streamed model are not in memory: they would stay as they are in the "
    "checkpoint. Convert the checkpoint (python -m mlx_streamexperts.convert, with --dtype or "
    "--quantize) and stream that, or load the model without streaming."
)
_LOAD = (
    "The experts of a streamed model stay in the checkpoint: they cannot be replaced by others. "
    "Write a checkpoint that has the new ones and load that. Other weights can be loaded with "
    "strict=False."
)
_COPY = (
    "A streamed model cannot be copied or pickled: its experts are in files that it has open. Load "
    "it again instead; the experts of both need room."
)
_TRANSFORM = (
    "A streamed model cannot run inside mx.compile, mx.vmap or a gradient: its layers read experts "
    "while they run. Call it as it is; mlx-lm compiles what it can by itself. "
)


class Guarded(nn.Module):
    """Base class put before the class of a module that holds streamed experts."""

    def save_weights(self, file: str) -> NoReturn:
        """Refused."""
        raise UnsupportedModelError(f"save_weights: {SAVE}")

    def set_dtype(self, dtype: mx.Dtype, predicate: Any = None) -> NoReturn:
        """Refused."""
        raise UnsupportedModelError(f"set_dtype: {_CHANGE}")

    def load_weights(
        self, file_or_weights: str | list[tuple[str, mx.array]], strict: bool = True
    ) -> Self:
        """As of `nn.Module`; refused if experts are among the weights."""
        weights: Any = file_or_weights
        if isinstance(weights, str):
            weights = list(cast(dict[str, mx.array], mx.load(weights)).items())
        if (name := _expert_in(self, tree_unflatten(weights))) is not None:
            raise UnsupportedModelError(f"load_weights, {name}: {_LOAD}")
        super().load_weights(weights, strict)
        return self

    def update(  # type: ignore[override]  # of dict's, as in nn.Module
        self, parameters: dict[str, Any], strict: bool = True
    ) -> Self:
        """As of `nn.Module`; refused if experts are among the parameters, or for a gradient.

        `nn.value_and_grad` puts its tracers in place of the parameters, and leaves them there when
        the function that it calls raises: the model could not be used any more.
        """
        arrays: Any = tree_flatten(parameters)
        try:
            mx.async_eval([a for _, a in arrays[:1] if isinstance(a, mx.array)])
        except ValueError as e:
            refuse_transforms(e)
            raise
        if (name := _expert_in(self, parameters)) is not None:
            raise UnsupportedModelError(f"update, {name}: {_LOAD}")
        super().update(parameters, strict)
        return self

    def apply(
        self,
        map_fn: Callable[[mx.array], mx.array],
        filter_fn: Callable[[nn.Module, str, Any], bool] | None = None,
    ) -> Self:
        """As of `nn.Module`; refused if the filter selects experts."""
        chosen = filter_fn or self.valid_parameter_filter
        reached: Any = self.filter_and_map(chosen, is_leaf_fn=_ends_at_experts)
        below: Any = tree_flatten(reached, is_leaf=_is_experts)
        for experts in (self, *(x for _, x in below)):
            if isinstance(experts, Experts) and experts.selects(chosen):
                raise UnsupportedModelError(f"apply: {_CHANGE}")
        super().apply(map_fn, filter_fn)
        return self

    def leaf_modules(self) -> Any:
        """As of `nn.Module`; a layer's streamed experts are one leaf."""
        return self.filter_and_map(self.valid_child_filter, is_leaf_fn=_is_leaf_module)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UnsupportedModelError(_COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedModelError(_COPY)


class Experts(Guarded):
    """Stands in for a module whose expert tables are streamed.

    Attributes:
        tables: that module. Its other arrays and modules are children of this one too.
    """

    tables: nn.Module

    def selects(self, chosen: Callable[[nn.Module, str, Any], bool]) -> bool:
        """Does a filter of `apply` select expert tables?"""

        def hidden(module: nn.Module, key: str, value: Any) -> bool:
            return not (module is self.tables and key in self) and chosen(module, key, value)

        return bool(tree_flatten(self.tables.filter_and_map(hidden)))

    def leaf_modules(self) -> NoReturn:
        """Refused; `nn.quantize` of these experts alone calls this."""
        self.to_quantized()

    def to_quantized(self, **options: Any) -> NoReturn:
        """Refused; `nn.quantize` calls this."""
        raise UnsupportedModelError(f"nn.quantize: {_CHANGE}")


def guard(model: nn.Module) -> None:
    """Let every module with streamed experts refuse methods that would leave them out."""
    _guard(model, {})


def refuse_transforms(error: ValueError) -> None:
    """Raise our own error if MLX has refused to evaluate inside a transformation.

    Raises:
        UnsupportedModelError: it has.
    """
    if "graph transformation" in str(error) or "function transformations" in str(error):
        raise UnsupportedModelError(_TRANSFORM + TRAIN) from error


def _guard(node: Any, made: dict[type, type]) -> bool:
    """Returns whether there are experts below."""
    if isinstance(node, Experts):
        return True
    children = node.values() if isinstance(node, dict) else node
    holds = any([_guard(x, made) for x in children if isinstance(x, (dict, list, tuple))])
    if holds and isinstance(node, nn.Module):
        kind = type(node)
        if kind not in made:
            made[kind] = type(kind.__name__, (Guarded, kind), {"__module__": kind.__module__})
        node.__class__ = made[kind]
    return holds


def _expert_in(node: Any, parameters: Any, path: str = "") -> str | None:
    """The path of the first parameter that belongs to an expert; None if none does."""
    pairs: Any = ()
    if isinstance(parameters, dict) and isinstance(node, dict):
        if isinstance(node, Experts) and (hidden := parameters.keys() - node.keys()):
            return path + min(hidden)
        pairs = ((k, node[k], p) for k, p in parameters.items() if k in node)
    elif isinstance(parameters, list) and isinstance(node, list):
        pairs = ((i, n, p) for i, (n, p) in enumerate(zip(node, parameters, strict=False)))
    found = (_expert_in(n, p, f"{path}{key}.") for key, n, p in pairs)
    return next((name for name in found if name is not None), None)


def _is_experts(value: Any) -> bool:
    return isinstance(value, Experts)


def _ends_at_experts(module: nn.Module, key: str, value: Any) -> bool:
    return _is_experts(value) or not isinstance(value, (nn.Module, dict, list))


def _is_leaf_module(module: nn.Module, key: str, value: Any) -> bool:
    if _is_experts(value):
        return True
    return isinstance(value, nn.Module) and not tree_flatten(value.children())
