"""Measure how a streamed model runs here, and write a page and a JSON file about it.

python -m mlx_streamexperts.report --out report
python -m mlx_streamexperts.report --model ./my-model --memory 24GB --sustained 10 --out report

Method, drive, locality, power and quality, each with figures and the sentence that answers its
question. The page is one file that loads nothing; docs/report-schema.md describes the JSON.
Quick by default on the embedded model, thorough otherwise: --quick and --full say which. Ctrl-C
ends it with a page of what was measured. Needs the extra `report`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._cli.options import failed, make_parser, stream_settings
from .._errors import StreamError
from ._caveats import limits_of
from ._page import UNFINISHED, check_libraries, write_data, write_page
from ._study import FULL, QUICK, SCHEMA, VERSION, Settings, make_report


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of `report`, and those of streaming."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder (default: report)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="minutes; default without --model")
    how.add_argument("--full", action="store_true", help="default with --model")
    parser.add_argument("--sustained", type=float, metavar="MINUTES", help="of decoding on and on")
    parser.add_argument("--prompts", type=int, help="of the shipped prompts (default: all)")
    parser.add_argument("--prompt-tokens", type=int, help="a prompt's tokens at most")
    parser.add_argument("--tokens", type=int, help="generated after each prompt")
    parser.add_argument("--repeats", type=int, help="of everything that is timed")
    parser.add_argument("--seconds", type=float, help="of the drive at each size and depth")
    parser.add_argument("--points", type=int, help="throttled drives, by rate and by latency")
    parser.add_argument("--items", type=int, help="of the bundled task (default: all)")
    parser.add_argument("--note", default="", help="what readers should know, shown on the page")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="only write the page of this report again"
    )
    return make_parser(parser, "python -m mlx_streamexperts.report", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        check_libraries()
        if args.render is not None:
            report = _read(args.render)
            try:
                page = write_page(report, args.out)
            except (LookupError, TypeError, ValueError, AttributeError) as e:
                raise StreamError(f"{args.render}: not a whole report: {e!r}") from e
        else:
            page = _measured(args)
    except _Unfinished as e:
        return e.status
    except StreamError as e:
        return failed(e)
    print(f"Wrote {page} and {page.with_suffix('.json').name}")
    return 0


class _Unfinished(Exception):  # noqa: N818, what there is was written
    def __init__(self, status: int) -> None:
        self.status = status


def _measured(args: argparse.Namespace) -> Path:
    """Measure, and write the page; of a run that ends before its end, a page of what there is."""
    config, model = stream_settings(args)
    assert model is not None
    settings = _settings(args)
    local = args.model is None or Path(args.model).exists()
    name = Path(model).resolve().name if local else args.model  # no path of a user
    kept: dict[str, Any] | None = None

    def keep(found: dict[str, Any]) -> None:
        nonlocal kept
        kept = found  # itself: parts that come later are in it too
        write_data(found, args.out, UNFINISHED)  # lasts, whatever ends this process

    try:
        report = make_report(model, config, settings, name, args.note, keep)
    except BaseException as e:
        if kept is None:
            raise
        page = write_page({**kept, "limits": limits_of(kept)}, args.out, UNFINISHED)
        print(f"Ended while at: {kept['unfinished']}. What was measured: {page}", file=sys.stderr)
        if isinstance(e, KeyboardInterrupt):
            raise _Unfinished(130) from e
        raise
    write_data(report, args.out, "report")  # first: whatever becomes of the page
    page = write_page(report, args.out)
    for suffix in (".json", ".html"):
        (args.out / UNFINISHED).with_suffix(suffix).unlink(missing_ok=True)
    return page


def _settings(args: argparse.Namespace) -> Settings:
    full = args.full or (args.model is not None and not args.quick)
    names = ("prompts", "prompt_tokens", "tokens", "repeats", "seconds", "points", "sustained")
    stated = {n: v for n in (*names, "items") if (v := getattr(args, n)) is not None}
    if wrong := [n for n, v in stated.items() if not v > 0]:
        raise StreamError(f"--{wrong[0].replace('_', '-')} must be above 0")
    settings = replace(FULL if full else QUICK, **stated)
    # A short run still has windows enough to see a drift in.
    return replace(settings, window=min(settings.window, settings.sustained * 60 / 12))


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text())
        if (report["schema"], report["version"]) != (SCHEMA, VERSION):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StreamError(f"{file}: not a report of version {VERSION}") from e
    return dict(report)
