"""The command `report`, once its options are understood."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

from .._cli.options import failed
from .._cli.settings import stream_settings
from .._errors import StreamError
from .._experts.lossy import refuse_lossy
from ._page import UNFINISHED, check_libraries, write_data, write_page
from ._report import SCHEMA, VERSION, Report, from_json
from ._study import FULL, QUICK, Settings, measure

_INSTEAD = "Use python -m mlx_streamexperts.generate, which prints tokens per second and hit rates"


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
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
    except OSError as e:
        raise StreamError(f"{file}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise StreamError(f"{file}: not a report of version {VERSION}") from e
    try:
        report = from_json(Report, found)
        page = write_page(report, out)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise StreamError(f"{file}: not a whole report: {e!r}") from e
    write_data(report, out)
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
        for report in measure(model, config, settings, name, args.note, args.trust_remote_code):
            write_data(report, args.out, UNFINISHED)  # lasts, however this process ends
    except BaseException as e:
        if report is None:
            raise
        write_data(report, args.out, UNFINISHED)  # it may have got a part since
        page = write_page(report, args.out, UNFINISHED)
        print(f"Ended while at: {report.unfinished}. What was measured: {page}", file=sys.stderr)
        if isinstance(e, KeyboardInterrupt):
            return None
        raise
    assert report is not None
    write_data(report, args.out)  # first: the page may fail
    page = write_page(report, args.out)
    for suffix in (".json", ".html"):
        (args.out / UNFINISHED).with_suffix(suffix).unlink(missing_ok=True)
    return page


def _settings(args: argparse.Namespace) -> Settings:
    full = args.full or (args.model is not None and not args.quick)
    names = [f.name for f in fields(Settings)]
    stated = {n: v for n in names if (v := getattr(args, n, None)) is not None}
    if wrong := [n for n, v in stated.items() if not v > 0]:
        raise StreamError(f"--{wrong[0].replace('_', '-')} must be above 0")
    settings = replace(FULL if full else QUICK, **stated)
    # A short run still has enough windows to see a drift in.
    return replace(settings, window=min(settings.window, settings.sustained * 60 / 12))
