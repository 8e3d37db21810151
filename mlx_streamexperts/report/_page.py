"""A report's page and JSON file. The page loads nothing: styles and figures are in it."""

from __future__ import annotations

import functools
import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

from .._analysis.plots import pyplot
from .._analysis.quality import DATA
from .._analysis.replay import BEST
from .._config import format_size
from .._errors import StreamError
from .._io.output import write_text
from ._panels import COLOURS, PANELS, STYLE, Panel, alike, quarter
from ._power import counted
from ._report import Report, as_json

# Those with panels, and their titles; the method comes before, the limits after.
SECTIONS = {
    "speed": "Speed",
    "ssd": "The drive",
    "locality": "Locality",
    "power": "Power and heat",
    "quality": "Quality",
}
UNFINISHED = "unfinished"  # name of an ended run's files, so that an earlier, whole report is kept


def check_libraries() -> None:
    """Find out before measuring whether a page can be made.

    Raises:
        StreamError: matplotlib or Jinja is missing.
    """
    pyplot()
    _templates()


def write_page(report: Report, folder: Path, name: str = "report") -> Path:
    """Write `NAME.html` into a folder, whole or not at all; returns its path.

    Raises:
        StreamError: the folder cannot be written, or a library is missing.
    """
    return _write(folder / f"{name}.html", render(report))


def write_data(report: Report, folder: Path, name: str = "report") -> None:
    """Write `NAME.json`, its `limits` brought up to date; raises as `write_page`."""
    report.limits = limits(report)
    _write(folder / f"{name}.json", json.dumps(as_json(report), indent=1))


def _write(file: Path, text: str) -> Path:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as e:
        raise StreamError(f"{file.parent}: cannot write the report: {e.strerror}") from e
    return file


def render(report: Report) -> str:
    """The page's HTML."""
    panels = [(p, answer(p, report), draw(p, report, answer(p, report))) for p in PANELS]
    page = _templates().get_template("report.html")
    return str(page.render(report=report, sections=SECTIONS, panels=panels))


def answer(panel: Panel, report: Report) -> str:
    """A panel's sentence, as markup."""
    if (part := panel.part(report)) is None:
        return "Not measured: the run ended before."
    text = getattr(_answers(), panel.key)(part, report)
    return type(text)(" ".join(text.split()))


def limits(report: Report) -> list[str]:
    """What a run, whole or not, could not measure: the last section of its page, as plain text."""
    return [str(x.unescape()) for x in _answers().limits(report).splitlines() if x.strip()]


def draw(panel: Panel, report: Report, label: str = "") -> str:
    """A panel's SVG, described by `label`; empty if there is nothing to draw."""
    if (part := panel.part(report)) is None:
        return ""
    with pyplot().rc_context(STYLE):  # until it is saved: that makes ticks and texts
        figure, axes = pyplot().subplots(figsize=(4.5, panel.height), layout="constrained")
        panel.draw(axes, part, report)
        if axes.get_legend_handles_labels()[0]:  # above the axes, where it hides no point
            axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
        drawn = svg(figure, panel.key, label) if axes.has_data() else ""
    pyplot().close(figure)
    return drawn


def svg(figure: Any, key: str, label: str) -> str:
    """One figure as markup, in the page's colours, with identifiers of its own."""
    from markupsafe import Markup, escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    text = re.sub("|".join(COLOURS), lambda m: COLOURS[m[0]], text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


@functools.cache
def _templates() -> Any:
    """Jinja's environment of the page and of its sentences."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as e:
        raise StreamError("pages need jinja2: pip install jinja2") from e
    found = Environment(
        loader=FileSystemLoader(DATA), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.filters |= {
        "g": lambda x, digits=3: f"{x:.{digits}g}",
        "share": lambda x: f"{100 * x:.0f} %",
        "ms": lambda seconds: f"{1e3 * seconds:.2g}",
        "median": lambda values: statistics.median(values),
        "size": format_size, "quarter": quarter, "alike": alike, "counted": counted,
    }  # fmt: skip
    found.globals |= {"size": format_size, "best": BEST}
    return found


def _answers() -> Any:
    return _templates().get_template("report-answers.html").module
