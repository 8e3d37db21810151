"""Generate text with streamed experts: `mlx_lm.generate` with all of its options and ours.

python -m mlx_streamexperts.generate --prompt "Then said Jesus unto his disciples,"
python -m mlx_streamexperts.generate --model mlx-community/Kimi-K2.5 --memory 96GB -p "hello"
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli.options import (
    add_media_arguments,
    check_prefix_arguments,
    ended,
    failed,
    interrupted,
    program_parser,
    with_our_options,
)
from ._errors import StreamError

if TYPE_CHECKING:
    from ._experts.stream import ExpertStream

_INSTEAD = "Write --model in full, or add --loader mlx-vlm"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    parser = program_parser("mlx_lm.generate", "generate", __doc__)
    add_media_arguments(parser)
    parser.add_argument(
        "--json-schema",
        metavar="FILE",
        help="hold the reply to the JSON schema in this file (extra `structured`). A model that "
        "reasons does so first",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words) and not any("mlx-vlm" in w for w in words):
        setup_arg_parser().parse_args(argv)  # at once: what follows takes a second
    from ._cli.mlx_lm_program import program
    from ._cli.mlx_vlm_program import check_generate_options, generate_program, needs_mlx_vlm
    from ._cli.settings import join_ranks, only_rank_0_prints, stream_settings
    from ._loading.demo import DEMO_PROMPT, demo_model
    from ._loading.lazy_load import MLX_VLM

    # Not `import mlx_lm.generate`: the package binds that name to a function.
    stock = importlib.import_module("mlx_lm.generate")
    try:
        ran, parser = stock, setup_arg_parser()
        if is_vlm := needs_mlx_vlm(argv):
            ran = generate_program()
            parser = with_our_options(ran.setup_arg_parser(), "generate", __doc__)
    except StreamError as e:
        return failed(e)
    args = parser.parse_args(argv)
    streams: list[ExpertStream] = []
    try:
        check_prefix_arguments(args)
        group = join_ranks()
        if is_vlm:
            args.loader = MLX_VLM
            if "--json-schema" in (sys.argv if argv is None else argv):
                raise StreamError("--json-schema works with mlx-lm alone, not with mlx-vlm")
            check_generate_options(args)
        if group.size() > 1:
            _for_several(args)
        with only_rank_0_prints(group):
            config, model = stream_settings(args, None if is_vlm else _INSTEAD)
            parser.set_defaults(model=model)
            if model == str(demo_model()):
                parser.set_defaults(prompt=DEMO_PROMPT)  # it cannot answer mlx-lm's "hello"
            shown = args.verbose
            with (
                program(ran, parser, argv, args, config, shows_text=shown) as session,
                _held_to(getattr(args, "json_schema", None)),
            ):
                streams = session.patched.streams
                ran.main()
            if args.verbose:
                session.print_summary()
    except StreamError as e:
        return failed(e, streams)
    except RuntimeError as e:
        if not any(s.ranks for s in streams):
            raise
        return failed(e, streams)
    except KeyboardInterrupt:
        return interrupted()
    return 0


@contextmanager
def _held_to(file: str | None) -> Iterator[None]:
    """Hold mlx-lm's replies to the JSON schema in a file, if there is one, within the block.

    Raises:
        StreamError: the file is no schema, or one that no grammar can follow.
    """
    if file is None:
        yield
        return
    from ._hooks import swapped
    from ._io.checkpoint import read_json_object
    from ._structured.constraint import Constraint, Vocabulary
    from ._structured.shape import Shape, ShapeError

    stock = importlib.import_module("mlx_lm.generate")
    schema, original = read_json_object(Path(file), "a JSON schema"), stock.generate

    def generate(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> Any:
        if options.get("draft_model") is not None:
            raise StreamError("--json-schema does not work with --draft-model")
        try:
            shape = Shape(schema, param="--json-schema")
            constraint = Constraint(Vocabulary(tokenizer), shape, prompt)
        except ShapeError as e:
            raise StreamError(f"{e.param} {file} {e}") from e
        text = original(
            model, tokenizer, prompt, logits_processors=[constraint.processor()], **options
        )
        if constraint.error is not None:
            raise StreamError(f"the reply could not be held to {file}: {constraint.error}")
        return text

    with swapped(stock, generate=generate):
        yield


def _for_several(args: argparse.Namespace) -> None:
    """Prepare the options to share the model with other ranks.

    Raises:
        StreamError: mlx-lm does not support an option on several machines.
    """
    args.pipeline = True
    for option in ("draft_model", "adapter_path", "prompt_cache_file", "prefix_cache"):
        if getattr(args, option) is not None:
            flag = "--" + option.replace("_", "-")
            raise StreamError(f"{flag} does not work with several machines; run without it")
    import mlx.core as mx

    rank = str(mx.distributed.init().rank())
    for option in ("timeline", "trace"):
        if (file := getattr(args, option)) is not None:
            setattr(args, option, file.replace("{rank}", rank))


if __name__ == "__main__":
    sys.exit(ended(main))
