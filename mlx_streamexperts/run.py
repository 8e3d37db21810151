"""Run any other program that uses mlx-lm with its model streamed, unchanged.

python -m mlx_streamexperts.run --memory 24GB mlx_lm.perplexity --model ./my-model
python -m mlx_streamexperts.run --cache 8GB my_script.py --whatever it takes

Our options come before the program; everything after it belongs to the program. A program is one
of mlx-lm's or mlx-vlm's, any module that `python -m` runs, or a file. The first model that it loads
must have routed experts. The program decides how many tokens it runs at once: --prefill-tokens
plans memory for that many (default: the program's --prefill-step-size, else mlx-lm's own 2048), and
--reserve keeps more memory free. The summary goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli.commands import COMMANDS
from ._cli.options import add_report_arguments, as_called, describe, ended, failed
from ._config import StreamConfig, add_arguments, from_arguments
from ._errors import StreamError
from ._hooks import swapped
from ._loading.programs import REFUSED_PROGRAMS, check_program

if TYPE_CHECKING:
    from ._cli.mlx_lm_program import Session
    from ._experts.stream import ExpertStream

_NO_MODEL = ("mlx_lm.manage", "mlx_lm.share", "mlx_lm.upload")
_OURS = {
    "mlx_lm.benchmark": "bench", "mlx_lm.chat": "chat", "mlx_lm.generate": "generate",
    "mlx_lm.server": "server",
}  # fmt: skip


def setup_arg_parser() -> argparse.ArgumentParser:
    """Our options, a program, and its arguments."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] PROGRAM [arguments of the program]",
        epilog=as_called(_known()),
        allow_abbrev=False,
    )
    describe(parser, "run", __doc__)
    parser.add_argument("program", metavar="PROGRAM", help="module or file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    add_arguments(parser)
    add_report_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the program's exit status, 1 if it was refused."""
    args = setup_arg_parser().parse_args(argv)
    from ._cli.mlx_lm_program import Session  # here: this takes a second

    try:
        module, run = find_program(args.program, args.arguments)
        check_program(module, args.arguments)
        patched = _recorded_patch(_config(args))
        session = patched.session = Session(args, patched)
        command = swapped(sys, argv=[module, *args.arguments])
        with patched, session.recordings, command:
            try:
                run()
                status = 0
            except SystemExit as e:
                status = _status(e)
            session.note_phases()
        session.print_summary(sys.stderr)
        return status
    except StreamError as e:
        return failed(e)


def programs() -> dict[str, str]:
    """Programs of the installed mlx-lm: module by name on the command line."""
    try:
        scripts = distribution("mlx-lm").entry_points.select(group="console_scripts")
    except PackageNotFoundError:  # mlx-lm from a folder on the path
        return {}
    return {s.name: s.module for s in scripts if s.name.startswith("mlx_lm.")}


def find_program(name: str, arguments: list[str]) -> tuple[str, Callable[[], Any]]:
    """Find a program; returns its name and a function that runs it with the present `sys.argv`.

    Args:
        name: a module, one of mlx-lm's programs, or a file.
        arguments: the program's arguments; the subcommand of `mlx_lm` is removed from them.

    Raises:
        StreamError: there is no such program, or the module is not a program.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise StreamError(f"{name}: no such file")
        return name, lambda: _run_file(Path(name))
    known = programs()
    if name == "mlx_lm" and arguments and f"mlx_lm.{arguments[0]}" in known:
        name = f"mlx_lm.{arguments.pop(0)}"
    if f"mlx_lm.{name}" in known:
        name = f"mlx_lm.{name}"
    module = known.get(name, name)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise StreamError(
            f"there is no module or program {name!r}. mlx-lm's programs: {', '.join(known)}"
        )
    if module in known.values():  # some of these do nothing if run as __main__
        return module, lambda: _import(module).main()
    if not _is_program(spec):
        raise StreamError(
            f"{module} is a module but not a program: python -m {module} would do nothing. "
            f"mlx-lm's programs: {', '.join(known)}"
        )
    return module, lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_file(file: Path) -> None:
    """Run a file as `python file` does: it can import modules from its folder."""
    with swapped(sys, path=[str(file.resolve().parent), *sys.path]):
        runpy.run_path(str(file), run_name="__main__")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("mlx_lm"):
            raise
        raise StreamError(f"{module} needs {e.name}, which is not installed") from e


def _is_program(spec: ModuleSpec) -> bool:
    """Does `python -m` run this module?"""
    if spec.submodule_search_locations is not None:
        return importlib.util.find_spec(f"{spec.name}.__main__") is not None
    source = getattr(spec.loader, "get_source", lambda name: None)(spec.name)
    return source is not None and "__main__" in source


def _config(args: argparse.Namespace) -> StreamConfig:
    """Our options, with the settings that the program's own options imply."""
    from ._cli.settings import check_draft_fits, following_stock_options
    from ._loading.combinations import Options, check_options
    from ._loading.load import resolve

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prefill-step-size", type=int)
    parser.add_argument("--max-kv-size", type=int)
    parser.add_argument("--draft-model")
    parser.add_argument("--kv-bits", type=_bits)
    parser.add_argument("--kv-group-size", type=int, default=Options.kv_group_size)
    parser.add_argument("--model")
    program_options, _ = parser.parse_known_args(args.arguments)
    stated = from_arguments(args)
    config = following_stock_options(stated, program_options, args)
    options = Options.of(program_options)
    if program_options.model is not None and options != Options():
        check_options(resolve(program_options.model), config, options)
    if config.prefill_tokens is None:
        stock = importlib.import_module("mlx_lm.generate")
        config = replace(config, prefill_tokens=stock.DEFAULT_PREFILL_STEP_SIZE)
    if program_options.model is not None and stated.reserve is None:
        check_draft_fits(program_options, program_options.model, config)
    return config


def _bits(text: str) -> float:
    """Bits of a KV cache: whole ones for mlx-lm, any for mlx-vlm."""
    return float(text) if "." in text else int(text)


def _recorded_patch(config: StreamConfig) -> Any:
    """A patch that starts recording once the first streamed model is loaded."""
    from ._loading.load import patch

    class RecordedPatch(patch):
        session: Session | None = None

        def _stream_experts(self, *args: Any) -> ExpertStream:
            expert_stream = super()._stream_experts(*args)
            if self.session is not None:
                self.session.record(expert_stream)
            return expert_stream

    return RecordedPatch(config=config)


def _status(end: SystemExit) -> int:
    """The exit status of a program that raised `SystemExit`."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _known() -> str:
    """mlx-lm's programs and whether each runs streamed, for --help."""
    lines = ["mlx-lm's programs:"]
    for name, module in programs().items():
        if _OURS.get(name) in COMMANDS:
            note = (
                f"runs; python -m mlx_streamexperts.{_OURS[name]} has its options and ours together"
            )
        elif name in _NO_MODEL:
            note = "loads no model, so nothing is streamed"
        elif module == "mlx_lm.quant.dwq":
            note = "with --targets-only"
        elif module in REFUSED_PROGRAMS:
            note = "refused: writes a model, which needs all experts in memory"
        elif name == "mlx_lm.lora":
            note = "with --test; training is refused"
        else:
            note = "runs"
        lines.append(f"  {name:22} {note}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(ended(main))
