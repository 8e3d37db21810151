"""A report's page and JSON file. The page loads nothing: styles and figures are in it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._analysis.plots import pyplot
from .._config import format_size
from .._errors import StreamError
from .._io.output import whole, write_json
from ._panels import COLOURS, PANELS, STYLE, NotMeasured, Panel
from ._report import Report

_TEMPLATE = Path(__file__).parent.parent / "data" / "report.html"
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
    _template()


def write_page(report: Report, folder: Path, name: str = "report") -> Path:
    """Write `NAME.html` into a folder, whole or not at all; returns its path.

    Raises:
        StreamError: the folder cannot be written, or a library is missing.
    """
    text = render(report)
    page = folder / f"{name}.html"
    with _into(folder), whole(page) as partial, partial.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    return page


def write_data(found: dict[str, Any], folder: Path, name: str = "report") -> None:
    """Write `NAME.json`, whole or not at all; raises as `write_page`."""
    with _into(folder):
        write_json(folder / f"{name}.json", found, indent=1)


@contextmanager
def _into(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise StreamError(f"{folder}: cannot write the report: {e.strerror}") from e


def render(report: Report) -> str:
    """The page's HTML."""
    panels = [(p, *draw(p, report)) for p in PANELS]
    return str(
        _template().render(report=report, sections=SECTIONS, panels=panels, size=format_size)
    )


def draw(panel: Panel, report: Report) -> tuple[str, str]:
    """A panel's sentence and its SVG, which is empty if there is nothing to draw."""
    with pyplot().rc_context(STYLE):  # until it is saved: that makes ticks and texts
        figure, axes = pyplot().subplots(figsize=(4.5, panel.height), layout="constrained")
        try:
            sentence = panel.answer(report, axes)
        except NotMeasured:
            sentence = "Not measured: the run ended before."
        if axes.get_legend_handles_labels()[0]:  # above the axes, where it hides no point
            axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
        drawn = svg(figure, panel.key, sentence) if axes.has_data() else ""
    pyplot().close(figure)
    return sentence, drawn


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


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as e:
        raise StreamError("pages need jinja2: pip install 'mlx-streamexperts[report]'") from e
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["g"] = lambda x, digits=3: f"{x:.{digits}g}"
    return environment.from_string(_TEMPLATE.read_text())
