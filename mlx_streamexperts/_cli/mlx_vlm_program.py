"""Gives mlx-vlm's `generate` the form of a program of mlx-lm, which mlx_lm_program.py can run.

mlx-vlm is optional: this module imports it only in functions.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

from .._config import StreamConfig
from .._errors import StreamError, UnsupportedModelError
from .._hooks import swapped
from .._loading.demo import demo_model
from .._loading.lazy_load import MLX_LM, MLX_VLM
from .._loading.load import library_of

_MEDIA = {
    "image": "picture that the prompt is about: file or URL. It may be repeated, and takes several",
    "audio": "sound that the prompt is about: file or URL",
    "video": "film that the prompt is about: file or URL",
}
# Options of mlx-vlm's generate that load another model beside, or write no text.
_NOT_STREAMED = {
    "draft_model": "drafts have not been compared with mlx-vlm's own results",
    "adapter_path": "adapters have not been compared with mlx-vlm's own results",
    "prefix_cache": "prompts are remembered for models of mlx-lm only",
    "expert_cache_gb": "it is the cache of mlx-vlm's own offloading; --cache is ours",
}


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose mlx-vlm to a parser of mlx-lm's, for its `--help`."""
    group = parser.add_argument_group(
        "pictures, sound and film",
        "With one of these, or a model that only mlx-vlm has, mlx-vlm's generate runs, with its "
        "options: --loader mlx-vlm --help shows them",
        conflict_handler="resolve",  # mlx-lm has --image, for one family
    )
    _add_media(group)


def needs_mlx_vlm(argv: list[str] | None) -> bool:
    """Does a command line ask for mlx-vlm's `generate`: by its model, or by pictures?

    Raises:
        CheckpointError: there is no such model.
        StreamError: it asks for pictures and for mlx-lm.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_media_arguments(parser)
    parser.add_argument("--model")
    parser.add_argument("--loader", default="auto")
    args, _ = parser.parse_known_args(argv)
    if seen := [name for name in _MEDIA if getattr(args, name)]:
        if args.loader == MLX_LM and seen != ["image"]:  # mlx-lm has one family that sees
            raise StreamError(f"--{seen[-1]} needs mlx-vlm: run without --loader mlx-lm")
        return args.loader != MLX_LM
    if args.loader not in ("auto", MLX_LM, MLX_VLM):
        return False  # the parser will name the choices
    config = StreamConfig(loader=args.loader)
    model = args.model or ("" if "--prompt-cache-file" in (argv or sys.argv) else demo_model())
    return library_of(model, config) == MLX_VLM if model else False


def generate_program() -> ModuleType:
    """mlx-vlm's `generate`, with the names that a program of mlx-lm has.

    Raises:
        StreamError: mlx-vlm is not installed.
    """
    try:
        dispatch: Any = importlib.import_module("mlx_vlm.generate.dispatch")
    except ModuleNotFoundError as e:
        raise StreamError(
            "pictures, and models that only mlx-vlm has, need mlx-vlm: "
            "pip install 'mlx-streamexperts[vlm]'"
        ) from e
    program: Any = ModuleType("mlx_vlm.generate")

    def setup_arg_parser() -> argparse.ArgumentParser:
        parser = _unparsed(dispatch)
        _add_media(parser)
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
            dispatch.main()

    original = dispatch.stream_generate

    def stream_generate(*args: Any, **options: Any) -> Iterator[Any]:
        try:
            for response in original(*args, **options):
                response.from_draft = False  # mlx-vlm does not tell
                yield response
        except ValueError as e:  # a sound for a model without ears, say
            if isinstance(e, StreamError):
                raise
            raise StreamError(f"mlx-vlm cannot answer this prompt: {e}") from e

    program.setup_arg_parser, program.main = setup_arg_parser, main
    program.stream_generate = stream_generate
    return program


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


def _add_media(parser: argparse._ActionsContainer) -> None:
    for name, text in _MEDIA.items():
        parser.add_argument(
            f"--{name}", nargs="+", action="extend", metavar="FILE", default=None, help=text
        )


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
