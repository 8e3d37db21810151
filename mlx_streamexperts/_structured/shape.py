"""What a reply must look like, and the grammar that says so.

Only text is made here: no tokenizer, no model. Tool calls are written as mlx-lm's parsers read
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._errors import StreamError

Marker = Callable[[str], str]
"""Turns a marker such as `<tool_call>` into the grammar's name of it."""

# White space between JSON's tokens: a space, or a line's end and the next one's indentation. Left
# unbounded, a model that has lost its way writes nothing else until its reply is cut.
_WHITE = r"\x20|\x0A[\x20\x09]{0,40}"


class ShapeError(StreamError):
    """A shape for which there is no grammar.

    Attributes:
        param: the request's field that asks for it.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Shape:
    """What a reply must be. With a schema and tools it may be either.

    Attributes:
        schema: JSON schema of the reply's text; None if it may be no text.
        tools: OpenAI's tools, one of which the reply calls; none if empty.
        many: may it call several?
        param: the request's field that asks for this.
    """

    schema: dict[str, Any] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    many: bool = True
    param: str = "response_format"


def grammar(shape: Shape, parser: str | None, template: str, marker: Marker) -> str:
    """The shape in llguidance's dialect of Lark.

    Args:
        shape: the shape.
        parser: name of mlx-lm's tool parser for the model; None if it has none.
        template: the model's chat template.
        marker: names markers of tool calls.

    Raises:
        ShapeError: this model's tool calls cannot be forced.
    """
    rules, starts = [], []
    if shape.schema is not None:
        rules.append(f"answer: %json {json.dumps(_bounded(shape.schema))}")
        starts.append("answer")
    if shape.tools:
        write = _WRITERS.get(parser or "")
        if write is None:
            raise ShapeError(
                f"is not available for this model: {_no_grammar(parser)}; use tool_choice 'auto', "
                "without a response_format",
                shape.param,
            )
        rules += write([t["function"] for t in shape.tools], shape.many, template, marker)
        starts.append("calls")
    lead = r"LEAD: /[ \n]{1,4}/"  # what models write between their reasoning and the answer
    return "\n".join([f"start: LEAD? ({' | '.join(starts)})", lead, *rules])


def _no_grammar(parser: str | None) -> str:
    if parser is None:
        return "mlx-lm has no parser for tool calls of its template"
    return f"this server has no grammar for tool calls of the form {parser!r}"


def _bounded(schema: Any) -> Any:
    """The schema, with a bound on white space unless it states a rule for that itself."""
    if isinstance(schema, dict) and "x-guidance" not in schema:
        return {**schema, "x-guidance": {"whitespace_pattern": _WHITE}}
    return schema


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: always an object."""
    schema = function.get("parameters") or {}
    if "type" in schema or "$ref" in schema or "anyOf" in schema or "oneOf" in schema:
        return schema
    return {**schema, "type": "object"}


def _alternatives(name: str, count: int) -> str:
    return " | ".join(f"{name}{i}" for i in range(count))


def _json_arguments(functions: list[dict[str, Any]]) -> list[str]:
    """Rules `args0`, `args1`, ...: each function's arguments as JSON."""
    return [
        f"args{i}: %json {json.dumps(_bounded(_parameters(f)))}" for i, f in enumerate(functions)
    ]


def _json_object(i: int, function: dict[str, Any]) -> str:
    """`{"name": "f", "arguments": {...}}`, spaced as templates show it."""
    head = f'{{"name": {json.dumps(function["name"])}, "arguments": '
    return f'{_quoted(head)} args{i} "}}"'


def _json_tools(
    functions: list[dict[str, Any]], many: bool, template: str, marker: Marker
) -> list[str]:
    begin, end = marker("<tool_call>"), marker("</tool_call>")
    calls = [
        rf'call{i}: {begin} "\n" {_json_object(i, f)} "\n" {end}' for i, f in enumerate(functions)
    ]
    more = r'("\n" call)*' if many else ""
    any_call = f"call: {_alternatives('call', len(functions))}"
    return [f"calls: call {more}", any_call, *calls, *_json_arguments(functions)]


def _kimi_k2(
    functions: list[dict[str, Any]], many: bool, template: str, marker: Marker
) -> list[str]:
    begin, end = marker("<|tool_calls_section_begin|>"), marker("<|tool_calls_section_end|>")
    one, of, done = map(
        marker, ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
    )
    heads = [_quoted("functions." + f["name"] + ":") for f in functions]
    calls = [f"call{i}: {one} {head} NUMBER {of} args{i} {done}" for i, head in enumerate(heads)]
    return [
        f"calls: {begin} call{'+' if many else ''} {end}",
        f"call: {_alternatives('call', len(functions))}",
        "NUMBER: /[0-9]{1,4}/",
        *calls,
        *_json_arguments(functions),
    ]


def _mistral(
    functions: list[dict[str, Any]], many: bool, template: str, marker: Marker
) -> list[str]:
    begin = marker("[TOOL_CALLS]")
    rules = [f"call: {_alternatives('call', len(functions))}", *_json_arguments(functions)]
    if "[ARGS]" in template:
        of = marker("[ARGS]")
        calls = [
            f"call{i}: {begin} {_quoted(f['name'])} {of} args{i}" for i, f in enumerate(functions)
        ]
        return [f"calls: call{'+' if many else ''}", *rules, *calls]
    calls = [f"call{i}: {_json_object(i, f)}" for i, f in enumerate(functions)]
    more = '(", " call)*' if many else ""
    return [f'calls: {begin} "[" call {more} "]"', *rules, *calls]


def _qwen3_coder(
    functions: list[dict[str, Any]], many: bool, template: str, marker: Marker
) -> list[str]:
    begin, end = marker("<tool_call>"), marker("</tool_call>")
    calls = _by_argument(
        functions,
        lambda name: f"{begin} " + _quoted(f"\n<function={name}>\n"),
        lambda argument: _quoted(f"<parameter={argument}>\n"),
        ("\n", _quoted("</parameter>\n")),
        rf'"</function>\n" {end}',
    )
    more = r'("\n" call)*' if many else ""
    return [f"calls: call {more}", *calls]


def _glm47(functions: list[dict[str, Any]], many: bool, template: str, marker: Marker) -> list[str]:
    begin, end = marker("<tool_call>"), marker("</tool_call>")
    key, of, value, close = map(marker, ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))
    calls = _by_argument(
        functions,
        lambda name: f"{begin} {_quoted(name)}",
        lambda argument: f"LINE? {key} {_quoted(argument)} {of} LINE? {value}",
        ("", close),
        f"LINE? {end}",
    )
    return [f"calls: call {'(LINE? call)*' if many else ''}", r'LINE: "\n"', *calls]


def _minimax_m2(
    functions: list[dict[str, Any]], many: bool, template: str, marker: Marker
) -> list[str]:
    begin, end = marker("<minimax:tool_call>"), marker("</minimax:tool_call>")
    calls = _by_argument(
        functions,
        lambda name: _quoted(f'<invoke name="{name}">\n'),
        lambda argument: _quoted(f'<parameter name="{argument}">'),
        ("", _quoted("</parameter>\n")),
        r'"</invoke>\n"',
    )
    return [rf'calls: {begin} "\n" call{"+" if many else ""} {end}', *calls]


def _by_argument(
    functions: list[dict[str, Any]],
    begin: Callable[[str], str],
    head: Callable[[str], str],
    tail: tuple[str, str],
    end: str,
) -> list[str]:
    """Rules of calls whose arguments stand one by one. All but `tail[0]` are the grammar's words.

    Args:
        functions: their descriptions.
        begin: what stands before the arguments, by the function's name.
        head: what stands before a value, by the argument's name.
        tail: text between a value and what ends it, and that.
        end: what ends a call.
    """
    rules = [f"call: {_alternatives('call', len(functions))}"]
    for i, f in enumerate(functions):
        fields, values = _fields(i, f, head, *tail)
        rules += [f"call{i}: {begin(f['name'])} {fields} {end}", *values]
    return rules


def _fields(
    of: int, function: dict[str, Any], head: Callable[[str], str], before: str, close: str
) -> tuple[str, list[str]]:
    """A function's arguments one by one: text as it is, everything else as JSON.

    Args:
        of: number of the function.
        function: its description.
        head: what stands before a value, by the argument's name, in the grammar's words.
        before: text between a value and `close`.
        close: what ends a value, in the grammar's words.

    Returns:
        what stands for them in the function's rule, and further rules.
    """
    schema = _parameters(function)
    shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    required = schema.get("required") or []
    parts, rules = [], []
    for j, (name, value) in enumerate((schema.get("properties") or {}).items()):
        rule = f"value{of}_{j}"
        is_text = isinstance(value, dict) and value.get("type") == "string"
        if is_text and not ("enum" in value or "const" in value):
            if close.startswith("<["):  # a token, which is no text
                rules.append(f"{rule}: /(?s:.*)/")
                ended = f"{rule} {close}"
            else:
                rules.append(f"{rule}[suffix={close}]: /(?s:.*)/")
                ended = rule
        else:
            if is_text:
                words = value.get("enum") or [value["const"]]
                rules.append(f"{rule}: {' | '.join(_quoted(str(w)) for w in words)}")
            else:
                whole = {**value, **shared} if isinstance(value, dict) else value
                rules.append(f"{rule}: %json {json.dumps(_bounded(whole))}")
            ended = f"{rule} {_quoted(before)} {close}" if before else f"{rule} {close}"
        field = f"{head(name)} {ended}"
        parts.append(field if name in required else f"({field})?")
    return " ".join(parts), rules


# By the name of mlx-lm's tool parser.
_WRITERS = {
    "glm47": _glm47,
    "json_tools": _json_tools,
    "kimi_k2": _kimi_k2,
    "minimax_m2": _minimax_m2,
    "mistral": _mistral,
    "qwen3_coder": _qwen3_coder,
}
