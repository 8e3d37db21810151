"""Write the JSON schema of reports and its page: `python docs/make_report_schema.py`.

Both follow from the dataclasses of `mlx_streamexperts.report`: their types, and the comments that
start with `#:`. A test compares the files with them.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import mlx_streamexperts
from mlx_streamexperts.report._report import PARTS, Repeats, Report, hints

PAGE = Path(__file__).parent / "report-schema.md"
SCHEMA = Path(mlx_streamexperts.__file__).parent / "data" / "report-schema.json"
_HEAD = """# The report's JSON

`python -m mlx_streamexperts.report` writes `report.json` beside its page; this table explains its
fields. The [JSON schema](../mlx_streamexperts/data/report-schema.json) says the same to programs.
[make_report_schema.py](make_report_schema.py) writes both from the dataclasses in
[_report.py](../mlx_streamexperts/report/_report.py). Sizes are bytes, times seconds, shares 0 to 1.
`version` rises when a field goes or changes its meaning; new fields may come without a new version.
*Repeats* are `median`, `low`, `high` and `values`, each repeat in order. The JSON names no user,
path or host.

| field | type | meaning |
|---|---|---|
"""
_TAIL = """
Reports made with this version are in [report/](report/README.md).
"""
_KINDS = {float: "number", int: "integer", str: "string", bool: "boolean"}


def schema() -> dict[str, Any]:
    """The JSON schema. Only a whole report has to have every part."""
    parts: dict[str, Any] = {}
    for name, field in hints(Report).items():
        kind = _inner(field)
        if kind in PARTS:
            parts[name] = {"required": [f.name for f in fields(kind)]}
    later = [f.name for f in fields(Report) if f.default is None]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Report of mlx_streamexperts.report",
        "$defs": {"repeats": _object(Repeats)},
        **_object(Report),
        "if": {"properties": {"unfinished": {"const": ""}}},
        "then": {"required": later, "properties": parts},
    }


def page() -> str:
    """The page."""
    return _HEAD + "".join(_rows(Report, "")) + _TAIL


def _comments(kind: type) -> dict[str, str]:
    """Each field's comment: behind it, or in the lines above it."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            field = re.match(r"    (\w+): [^#]*(?:#: (.*))?$", line)
            if comment := re.match(r"    #: (.*)", line):
                above.append(comment[1])
            elif field:
                found[field[1]] = " ".join([*above, field[2] or ""]).strip()
                above = []
    return found


def _object(kind: type) -> dict[str, Any]:
    comments, properties = _comments(kind), {}
    for name, hint in hints(kind).items():
        hint = _inner(hint) if kind in PARTS else hint
        text = {"description": comments[name]} if comments[name] else {}
        properties[name] = {**_schema(hint), **text}
    required = [f.name for f in fields(kind) if f.default is MISSING]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _schema(hint: Any) -> dict[str, Any]:
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Repeats:
        return {"$ref": "#/$defs/repeats"}
    if is_dataclass(hint):
        return _object(hint)  # type: ignore[arg-type]
    if origin is Annotated:
        return {"type": "number", "minimum": 0, "maximum": 1}
    if origin is Literal:
        return {"const": inside[0]} if len(inside) == 1 else {"enum": list(inside)}
    if origin in (UnionType, Union):
        return {"anyOf": [_schema(x) for x in inside]}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema(inside[0])}
    if origin is dict:
        more = {} if inside[1] is Any else {"additionalProperties": _schema(inside[1])}
        return {"type": "object", **more}
    return {"type": "null" if hint is type(None) else _KINDS[hint]}


def _inner(hint: Any) -> Any:
    """A hint without its None."""
    some = [x for x in get_args(hint) if x is not type(None)]
    return some[0] if get_origin(hint) in (UnionType, Union) and len(some) == 1 else hint


def _rows(kind: type, path: str) -> Iterator[str]:
    comments = _comments(kind)
    for name, hint in hints(kind).items():
        hint = _inner(hint) if kind in PARTS else hint
        text = comments[name].replace("|", "&#124;")
        yield f"| `{path}{name}` | {_name(hint)} | {text} |\n"
        inner, here = _inner(hint), f"{path}{name}."
        if get_origin(inner) is list:
            inner, here = get_args(inner)[0], f"{path}{name}[]."
        if is_dataclass(inner) and inner is not Repeats:
            yield from _rows(inner, here)  # type: ignore[arg-type]


def _name(hint: Any) -> str:
    """A type, in words."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Repeats:
        return "repeats"
    if origin is Literal:
        texts = [x if len(inside) > 1 else json.dumps(x) for x in inside]
        return " or ".join(f"`{x}`" for x in texts)
    if origin in (UnionType, Union):
        return " or ".join(map(_name, inside))
    if origin in (list, tuple):
        return f"list of {_name(inside[0])}"
    return str(_schema(hint)["type"])


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=1) + "\n")
    PAGE.write_text(page())
