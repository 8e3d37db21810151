"""Measure how a streamed model runs here, and write a page and a JSON file about it.

python -m mlx_streamexperts.report --out report
python -m mlx_streamexperts.report --model ./my-model --memory 24GB --sustained 10 --out report

Method, drive, locality, power and quality, each with figures and the sentence that answers its
question. The page is one file that loads nothing; docs/report-schema.md describes the JSON.
Quick by default on the embedded model, thorough otherwise: --quick and --full choose. Ctrl-C
ends it with a page of what was measured. Needs the extra `report`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from .._cli.options import failed, make_parser, stream_settings
from .._errors import StreamError
from .._experts.lossy import refuse_lossy
from ._page import UNFINISHED, check_libraries, limits, write_data, write_page
from ._report import SCHEMA, VERSION, Report, as_json, from_json
from ._study import FULL, QUICK, Settings, measure

_INSTEAD = "Use python -m mlx_streamexperts.generate, which prints tokens per second and hit rates"
_NUMBERS: dict[str, tuple[type, str]] = {
    "sustained": (float, "minutes of decoding on and on"),
    "prompts": (int, "of the shipped prompts (default: all)"),
    "prompt_tokens": (int, "a prompt's tokens at most"),
    "tokens": (int, "generated after each prompt"),
    "repeats": (int, "of everything that is timed"),
    "seconds": (float, "of the drive at each size and depth"),
    "points": (int, "throttled drives, by rate and by latency"),
    "items": (int, "of the bundled task (default: all)"),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of `report`, and those of streaming."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder (default: report)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="minutes; default without --model")
    how.add_argument("--full", action="store_true", help="default with --model")
    for name, (kind, text) in _NUMBERS.items():
        unit = "MINUTES" if name == "sustained" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=unit, help=text)
    parser.add_argument("--note", default="", help="for readers, shown on the page")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="only write the page of this report again"
    )
    return make_parser(parser, "python -m mlx_streamexperts.report", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        check_libraries()
        page = _measured(args) if args.render is None else _rendered(args.render, args.out)
    except StreamError as e:
        return failed(e)
    if page is None:
        return 130
    print(f"Wrote {page} and {page.with_suffix('.json').name}")
    return 0


def _rendered(file: Path, out: Path) -> Path:
    """The page of a JSON file, written again."""
    try:
        found = json.loads(file.read_text())
        if (found["schema"], found["version"]) != (SCHEMA, VERSION):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StreamError(f"{file}: not a report of version {VERSION}") from e
    try:
        page = write_page(from_json(Report, found), out)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise StreamError(f"{file}: not a whole report: {e!r}") from e
    write_data(found, out)
    return page


def _measured(args: argparse.Namespace) -> Path | None:
    """Measure, and write the page; None after Ctrl-C.

    A run that ends early leaves a page of what was measured.
    """
    refuse_lossy(args.lossy, "a report")
    config, model = stream_settings(args, _INSTEAD)
    assert model is not None
    settings = _settings(args)
    local = args.model is None or Path(args.model).exists()
    name = Path(model).resolve().name if local else args.model  # no path of a user
    report: Report | None = None
    try:
        for report in measure(model, config, settings, name, args.note):
            report.limits = limits(report)
            write_data(as_json(report), args.out, UNFINISHED)  # lasts, however this process ends
    except BaseException as e:
        if report is None:
            raise
        report.limits = limits(report)  # it may have got a part since
        write_data(as_json(report), args.out, UNFINISHED)
        page = write_page(report, args.out, UNFINISHED)
        print(f"Ended while at: {report.unfinished}. What was measured: {page}", file=sys.stderr)
        if isinstance(e, KeyboardInterrupt):
            return None
        raise
    assert report is not None
    write_data(as_json(report), args.out)  # first: the page may fail
    page = write_page(report, args.out)
    for suffix in (".json", ".html"):
        (args.out / UNFINISHED).with_suffix(suffix).unlink(missing_ok=True)
    return page


def _settings(args: argparse.Namespace) -> Settings:
    full = args.full or (args.model is not None and not args.quick)
    stated = {n: v for n in _NUMBERS if (v := getattr(args, n)) is not None}
    if wrong := [n for n, v in stated.items() if not v > 0]:
        raise StreamError(f"--{wrong[0].replace('_', '-')} must be above 0")
    settings = replace(FULL if full else QUICK, **stated)
    # A short run still has enough windows to see a drift in.
    return replace(settings, window=min(settings.window, settings.sustained * 60 / 12))
