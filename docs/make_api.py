"""Write docs/api.md from the package's docstrings: `python docs/make_api.py`.

What is public is what `mlx_streamexperts.__all__` names; types that those return are appended. A
test compares the page with the docstrings, and nothing is taken from elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe

import mlx_streamexperts

PAGE = Path(__file__).parent / "api.md"
_PACKAGE = "mlx_streamexperts"
_HEAD = f"""# API reference

Everything that `from {_PACKAGE} import ...` offers. This page is written by
[make_api.py](make_api.py) from the docstrings: change those, not the page. How the parts are used
is in the [guide](guide.md) and the [recipes](recipes.md).
"""
_SECTIONS = {"parameters": "Arguments", "attributes": "Attributes", "raises": "Raises"}


def page() -> str:
    """The whole page."""
    package = griffe.load(
        _PACKAGE, docstring_parser="google", docstring_options={"warnings": False}
    )
    assert isinstance(package, griffe.Module)
    public = [_defined(package, n) for n in sorted(mlx_streamexperts.__all__, key=str.lower)]
    errors = [x for x in public if x.is_class and x.name.endswith("Error")]
    others = [x for x in public if x not in errors]
    groups = {
        "Functions": [x for x in others if x.is_function or x.name[0].islower()],
        "Classes": [x for x in others if x.is_class and x.name[0].isupper()],
        "Errors": errors,
    }
    groups["Types that these return"] = list(_returned(public))
    lines, anchors = [_HEAD], Counter[str]()
    for title, members in groups.items():
        links = []
        for x in members:  # the second of a name is numbered: plan, Plan
            anchor = x.name.lower()
            seen = anchors[anchor]
            links.append(f"[{x.name}](#{anchor}{f'-{seen}' if seen else ''})")
            anchors[anchor] += 1
        lines.append(f"- **{title}**: {', '.join(links)}")
    lines.append("")
    for title, members in groups.items():
        lines += [f"## {title}", ""]
        for member in members:
            lines += _described(member)
    return "\n".join(lines).rstrip() + "\n"


def _defined(package: griffe.Module, name: str) -> Any:
    """Where a public name is defined: `stream` is a function and the module that it comes from."""
    it = getattr(mlx_streamexperts, name)
    return package[f"{it.__module__}.{it.__qualname__}".removeprefix(f"{_PACKAGE}.")]


def _described(x: Any) -> Iterator[str]:
    """The lines of one public function or class."""
    yield from (f"### {x.name}", "")
    if x.is_function:
        yield from _called(x, x.name)
        return
    if x.bases and x.name.endswith("Error"):  # whoever catches errors wants to know; no base else
        yield from (f"*A kind of {' and '.join(f'`{b}`' for b in x.bases)}.*", "")
    if x.name[0].islower():  # called like a function; the others are made by the package
        yield from _signature(x.members["__init__"], x.name)
    yield from _prose(x)
    if x.name == "StreamConfig":
        yield from _options()
    for member in x.members.values():
        if not _public(member):
            continue
        if member.is_function:
            yield from (f"#### `{x.name}.{member.name}`", "")
            yield from _called(member, f"{x.name}.{member.name}")
        elif "property" in member.labels and member.name not in _named(x, "attributes"):
            yield from (f"#### `{x.name}.{member.name}` → `{member.annotation}`", "")
            yield from _prose(member)


def _named(x: Any, kind: str) -> set[str]:
    """What a section of a docstring describes; several names may share a line."""
    parsed = x.docstring.parsed if x.docstring else []
    items = [i for s in parsed if s.kind.value == kind for i in s.value]
    return {name.lstrip("*") for i in items for name in i.name.split(", ")}


def _public(x: Any) -> bool:
    return not x.name.startswith("_") and not x.is_module


def _called(x: Any, name: str) -> Iterator[str]:
    missing = {p.name for p in x.parameters} - _named(x, "parameters") - {"self", "cls"}
    if missing:
        raise SystemExit(f"{x.path}: its docstring says nothing of {', '.join(sorted(missing))}")
    yield from _signature(x, name)
    yield from _prose(x)


def _signature(x: Any, name: str) -> Iterator[str]:
    """A fence that no test runs: `signature` says so."""
    parts, starred = [], False
    for p in x.parameters:
        if p.name in ("self", "cls"):
            continue
        mark = {"variadic positional": "*", "variadic keyword": "**"}.get(p.kind.value, "")
        if p.kind.value == "keyword-only" and not starred:
            parts.append("*")
        starred = starred or p.kind.value in ("keyword-only", "variadic positional")
        text = f"{mark}{p.name}" + (f": {p.annotation}" if p.annotation is not None else "")
        parts.append(text if p.default is None or mark else f"{text} = {p.default}")
    end = "" if x.name == "__init__" or x.returns is None else f" -> {x.returns}"
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) > 96:
        line = f"{name}(\n" + "".join(f"    {p},\n" for p in parts) + f"){end}"
    yield from ("```python signature", line, "```", "")


def _prose(x: Any) -> Iterator[str]:
    """A docstring's text and sections."""
    if x.docstring is None:
        raise SystemExit(f"{x.path} is public and has no docstring")
    for section in x.docstring.parsed:
        kind = section.kind.value
        if kind == "text":
            yield from (section.value, "")
        elif kind in _SECTIONS:
            yield from (f"*{_SECTIONS[kind]}*", "")
            for item in section.value:
                name = getattr(item, "name", None) or str(item.annotation)
                known = x.members.get(name) if kind == "attributes" else None
                kept = f" (`{known.annotation}`)" if known and known.annotation else ""
                yield f"- `{name}`{kept}: {_joined(item.description)}"
            yield ""
        elif kind in ("returns", "yields"):
            text = " ".join(_joined(item.description) for item in section.value)
            yield from (f"*{kind.capitalize()}* {text}", "")
        else:
            raise SystemExit(f"{x.path}: a section of kind {kind!r} that this script does not know")


def _joined(text: str) -> str:
    return " ".join(text.split())


def _options() -> Iterator[str]:
    """The table of `StreamConfig`: help texts live in its fields, for the command lines too."""
    yield from ("| option | type | default | |", "|---|---|---|---|")
    for f in fields(mlx_streamexperts.StreamConfig):
        choices = f.metadata.get("choices")
        kind = " or ".join(f'"{c}"' for c in choices) if choices else str(f.type)
        kind, text = (s.replace("|", "\\|") for s in (kind, f.metadata["help"]))
        text = text[0].upper() + text[1:]
        yield f"| `{f.name}` | {kind} | `{f.metadata['default']!r}` | {text} |"
    yield ""


def _returned(public: Iterable[Any]) -> Iterator[Any]:
    """Classes of the package that public methods return and public data classes hold."""
    names = {x.name for x in public}
    queue = list(public)
    while queue:
        x = queue.pop(0)
        said = [m.returns for m in x.members.values() if m.is_function and _public(m)]
        said += [
            m.annotation for m in x.members.values() if m.is_attribute and "dataclass" in x.labels
        ]
        for name in sorted({n for a in said if a is not None for n in re.findall(r"\w+", str(a))}):
            found = x.module.members.get(name)
            if found is None or name in names:
                continue
            if found.is_alias:
                if not found.target_path.startswith(_PACKAGE):
                    continue
                found = found.final_target
            if found.is_class:
                names.add(name)
                queue.append(found)
                yield found


if __name__ == "__main__":
    PAGE.write_text(page())
