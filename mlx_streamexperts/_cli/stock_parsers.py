"""Builds the parsers of mlx-lm's programs without importing mlx-lm, which takes a second.

A program's parser is made by one function, which needs argparse and a few constants and functions.
Those alone are taken from its source and run. If that fails, because a new release does it another
way, mlx-lm is imported.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import functools
import importlib
import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_STANDARD = sys.stdlib_module_names


def stock_parser(module: str, function: str = "setup_arg_parser") -> argparse.ArgumentParser:
    """The parser of a program of mlx-lm.

    Args:
        module: the program's module, such as `mlx_lm.chat`.
        function: the function that makes the parser, or makes it and parses with it at once.
    """
    try:
        return _made_by(_namespace(module, function)[function])
    except Exception:  # whatever a newer source may contain
        namespace = vars(importlib.import_module(module))
        original = namespace["argparse"]
        try:
            return _made_by(namespace[function])
        finally:
            namespace["argparse"] = original


def stock_constants(module: str, names: tuple[str, ...]) -> list[Any]:
    """Values of constants of a module of mlx-lm."""
    namespace = _namespace(module, *names)
    if not all(n in namespace for n in names):
        namespace = vars(importlib.import_module(module))
    return [namespace[n] for n in names]


def _namespace(module: str, *names: str) -> dict[str, Any]:
    """Functions and constants of a module of mlx-lm, and what they need, from the sources."""
    found: dict[str, Any] = {}
    for name in names:
        _define(name, module, found)
    return found


@functools.cache
def _source(module: str) -> list[ast.stmt]:
    package, _, name = module.partition(".")
    spec = importlib.util.find_spec(package)  # imports nothing, unlike that of a submodule
    folder = Path(next(iter((spec and spec.submodule_search_locations) or ())))
    return ast.parse(folder.joinpath(*name.split(".")).with_suffix(".py").read_text()).body


def _define(name: str, module: str, found: dict[str, Any]) -> None:
    """Add a name of a module to `found`, and the names that it uses; nothing if it is unknown."""
    if name in found or hasattr(builtins, name):
        return
    for node in _source(module):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            with suppress(ValueError):
                found[name] = ast.literal_eval(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            with suppress(NameError):  # of a default, say; what comes after parsing is not needed
                exec(compile(ast.Module([node], []), module, "exec"), found)
            for used in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
                _define(used, module, found)
        elif isinstance(node, ast.ImportFrom) and any(a.name == name for a in node.names):
            other = f"mlx_lm.{node.module}" if node.level else str(node.module)
            if other.startswith("mlx_lm."):
                _define(name, other, found)
        elif isinstance(node, ast.Import) and name in {a.name for a in node.names} & _STANDARD:
            found[name] = importlib.import_module(name)


class _BuiltError(Exception):
    """Ends a function when it would parse."""


def _made_by(function: Any) -> argparse.ArgumentParser:
    """The parser that a function returns, or else parses with."""
    built: list[argparse.ArgumentParser] = []

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *args: Any, **options: Any) -> Any:
            if not built:
                built.append(self)
                raise _BuiltError
            return super().parse_args(*args, **options)

    function.__globals__["argparse"] = SimpleNamespace(
        **{**vars(argparse), "ArgumentParser": Parser}
    )
    with suppress(_BuiltError):
        built.append(function())
    return built[0]
