"""Gives mlx-vlm's `generate` the form of a program of mlx-lm, which mlx_lm_program.py can run.

mlx-vlm is optional: this module imports it only in functions.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx_lm.utils

from .._config import StreamConfig
from .._errors import StreamError, UnsupportedModelError
from .._hooks import swapped
from .._io.checkpoint import read_model_config
from .._io.hub import headers_only
from .._loading.demo import demo_model
from .._loading.lazy_load import MLX_LM, MLX_VLM
from .._loading.load import library_of
from .options import MEDIA, add_media_arguments, add_media_options

_MEDIA_KEYS = ("vision", "visual", "image", "audio", "video", "vit", "mm_", "img")
# Options of mlx-vlm's generate that load another model beside, or write no text.
_NOT_STREAMED = {
    "draft_model": "drafts have not been compared with mlx-vlm's own results",
    "adapter_path": "adapters have not been compared with mlx-vlm's own results",
    "prefix_cache": "prompts are remembered for models of mlx-lm only",
    "expert_cache_gb": "it is the cache of mlx-vlm's own offloading; --cache is ours",
}


def needs_mlx_vlm(argv: list[str] | None) -> bool:
    """Does a command line ask for mlx-vlm's `generate`: by its model, or by pictures?

    Raises:
        CheckpointError: there is no such model.
        StreamError: it asks for mlx-lm and for pictures that this does not read, or a file of them
            does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_media_arguments(parser)
    parser.add_argument("--model")
    parser.add_argument("--loader", default="auto")
    args, _ = parser.parse_known_args(argv)
    if seen := [name for name in MEDIA if getattr(args, name)]:
        model, stock = args.model or demo_model(), args.loader == MLX_LM
        if stock and (seen != ["image"] or not _mlx_lm_sees(model)):
            raise StreamError(f"--{seen[-1]} needs mlx-vlm: run without --loader mlx-lm")
        for name in seen:
            _check_exist(name, getattr(args, name))
        if not stock:
            _check_sees(model, seen[-1])
        return not stock
    if args.loader not in ("auto", MLX_LM, MLX_VLM):
        return False  # the parser will name the choices
    config = StreamConfig(loader=args.loader)
    model = args.model or ("" if "--prompt-cache-file" in (argv or sys.argv) else demo_model())
    return library_of(model, config) == MLX_VLM if model else False


def _check_exist(option: str, files: list[str]) -> None:
    """Refuse files that do not exist, before a model is loaded."""
    for file in files:
        remote = "://" in file or file.startswith("data:")
        if not remote and not os.path.exists(file):
            raise StreamError(f"--{option} {file}: there is no such file")


def _mlx_lm_sees(model: str | Path) -> bool:
    """Does mlx-lm read pictures for this model? It has one family that sees."""
    try:
        processors = importlib.import_module("mlx_lm.processors").PROCESSORS
    except ImportError:
        return False
    with headers_only(str(model)) as (folder, _):
        config = read_model_config(folder)
    try:
        kind = mlx_lm.utils._get_classes(config)[0].__module__.rpartition(".")[2]
    except ValueError:  # no such family
        return False
    return bool(config.get("vision_config")) and config.get("processor_type", kind) in processors


def _check_sees(model: str | Path, option: str) -> None:
    """Refuse pictures for a model whose config.json has nothing about them.

    Raises:
        CheckpointError: there is no such model.
        UnsupportedModelError: it has only text.
    """
    with headers_only(str(model)) as (folder, _):
        config = read_model_config(folder)
    if not any(part in key for key in config for part in _MEDIA_KEYS):
        raise UnsupportedModelError(
            f"--{option}: this model, {config.get('model_type')}, takes only text: run without it"
        )


def generate_program() -> ModuleType:
    """mlx-vlm's `generate`, with the names that a program of mlx-lm has.

    Raises:
        StreamError: mlx-vlm is not installed.
    """
    try:
        dispatch: Any = importlib.import_module("mlx_vlm.generate.dispatch")
    except ModuleNotFoundError as e:
        raise StreamError(
            "this needs mlx-vlm, for pictures or because mlx-lm does not have the model's family "
            "(model_type in its config.json): pip install 'mlx-vlm>=0.7.8,<0.8'"
        ) from e
    program: Any = ModuleType("mlx_vlm.generate")

    def setup_arg_parser() -> argparse.ArgumentParser:
        parser = _unparsed(dispatch)
        add_media_options(parser)
        prompt, tokens = parser.get_default("prompt"), parser.get_default("max_tokens")
        parser.add_argument("--prompt", "-p", nargs="+", default=prompt, help="the prompt")
        parser.add_argument(
            "--max-tokens", "-m", type=int, default=tokens, help="the most tokens to generate"
        )
        parser.set_defaults(verbose=True)  # as mlx-lm's generate
        return parser

    def main() -> None:
        def parse_arguments() -> argparse.Namespace:
            args: argparse.Namespace = program.setup_arg_parser().parse_args()
            return args

        with swapped(
            dispatch, parse_arguments=parse_arguments, stream_generate=program.stream_generate
        ):
            try:
                dispatch.main()
            except EOFError:  # Ctrl-D ends a chat (--chat)
                print()

    original = dispatch.stream_generate

    def stream_generate(*args: Any, **options: Any) -> Iterator[Any]:
        try:
            for response in original(*args, **options):
                response.from_draft = False  # mlx-vlm does not tell
                yield response
        except Exception as e:
            if isinstance(e, StreamError) or not _is_about_the_prompt(e):
                raise
            raise StreamError(f"mlx-vlm cannot answer this prompt: {e}") from e

    program.setup_arg_parser, program.main = setup_arg_parser, main
    program.stream_generate = stream_generate
    return program


def _is_about_the_prompt(error: Exception) -> bool:
    """Has mlx-vlm refused a prompt, or a file that belongs to it?

    Such as a sound for a model without ears, a file that is no sound, or a KV cache that cannot be
    quantized.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("ffmpeg"):  # for sounds
        return True
    known = isinstance(error, (ValueError, OSError, NotImplementedError))
    return known or type(error).__module__.partition(".")[0] == "miniaudio"


def check_generate_options(args: argparse.Namespace) -> None:
    """Refuse options of mlx-vlm's generate that do not work with streamed experts.

    Raises:
        UnsupportedModelError: an option does not work; the message names it.
    """
    if args.output_modality != "text":
        raise UnsupportedModelError(
            f"--output-modality {args.output_modality}: streamed models generate text only"
        )
    for name, reason in _NOT_STREAMED.items():
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UnsupportedModelError(f"{flag} does not work with models of mlx-vlm: {reason}")


def _unparsed(dispatch: Any) -> argparse.ArgumentParser:
    """mlx-vlm's parser, from its function that makes one and parses with it at once."""

    def make(**options: Any) -> Any:
        made: Any = argparse.ArgumentParser(conflict_handler="resolve", **options)
        made.parse_args = lambda: made
        return made

    with swapped(dispatch, argparse=SimpleNamespace(**{**vars(argparse), "ArgumentParser": make})):
        parser: argparse.ArgumentParser = dispatch.parse_arguments()
    del parser.parse_args
    return parser
