"""What a reply must look like, and the grammar that says so.

Only text is made here: no tokenizer, no model. Tool calls are written as mlx-lm's parsers read
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

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


def tools_for_parser(tools: Any, held: bool) -> Any:
    """A copy of the tools from which mlx-lm's parsers read each argument as it was written.

    They look at the `type` of a property alone: one that states its types another way is text to
    `qwen3_coder`, and one with a `$ref` to `minimax_m2`, too.

    Args:
        tools: OpenAI's tools, checked; None or empty if there are none.
        held: whether a grammar writes the calls. All but plain strings are JSON then.
    """
    return tools and [{**tool, "function": _for_parser(tool["function"], held)} for tool in tools]


def _for_parser(function: dict[str, Any], held: bool) -> dict[str, Any]:
    schema = _parameters(function)
    schema = _resolved(schema, schema)
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return function
    typed = {name: _typed(value, schema, held) for name, value in properties.items()}
    return {**function, "parameters": {**schema, "properties": typed}}


def _typed(value: Any, root: dict[str, Any], held: bool) -> dict[str, Any]:
    """A property for the parsers: what has the type "object" is JSON to all of them."""
    schema: dict[str, Any] = value if isinstance(value, dict) else {}
    plain = schema.get("type")
    if held:
        return schema if plain == "string" else {"type": "object"}
    if isinstance(plain, str):
        return schema
    types = _types(schema, root)
    if types == {"string"}:
        return {"type": "string"}
    # Models write text as it is, and it may look like JSON: where text is allowed, the parser says.
    return {"type": "object"} if types and "string" not in types else schema


_JSON_TYPES = {
    bool: "boolean", dict: "object", float: "number", int: "integer", list: "array", str: "string",
}  # fmt: skip


def _types(schema: dict[str, Any], root: dict[str, Any], depth: int = 4) -> set[str]:
    """The JSON types that a schema allows; none if it does not say."""
    schema = _resolved(schema, root)
    stated = schema.get("type", [])
    if isinstance(stated, str):
        return {stated}
    if isinstance(stated, list) and stated:
        return {str(t) for t in stated}
    if isinstance(schema.get("enum"), list):
        return {_JSON_TYPES.get(type(value), "null") for value in schema["enum"]}
    if "const" in schema:
        return {_JSON_TYPES.get(type(schema["const"]), "null")}
    parts = schema.get("anyOf") or schema.get("oneOf")
    if not isinstance(parts, list) or not depth:
        return set()
    found = [_types(p, root, depth - 1) if isinstance(p, dict) else set() for p in parts]
    return set().union(*found) if all(found) else set()


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """A schema in the place of a reference to it, if that is one within `root`."""
    for _ in range(8):  # references may go in a circle
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        target: Any = root
        for key in reference[2:].split("/"):
            key = unquote(key).replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            break
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        schema = {**target, **rest}
    return schema


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

    Raises:
        ShapeError: it is not known which arguments there are.
    """
    schema = _parameters(function)
    schema = _resolved(schema, schema)
    _check_arguments(function["name"], schema)
    shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    required = schema.get("required") or []
    parts, rules = [], []
    for j, (name, value) in enumerate((schema.get("properties") or {}).items()):
        rule = f"value{of}_{j}"
        is_text = isinstance(value, dict) and value.get("type") == "string"
        listed = is_text and ("enum" in value or "const" in value)
        words = (value.get("enum") or [value.get("const")]) if listed else []
        words = [w for w in words if isinstance(w, str)]
        if is_text and not listed:
            if close.startswith("<["):  # a token, which is no text
                rules.append(f"{rule}: /(?s:.*)/")
                ended = f"{rule} {close}"
            else:
                rules.append(f"{rule}[suffix={close}]: /(?s:.*)/")
                ended = rule
        else:
            if words:
                rules.append(f"{rule}: {' | '.join(map(_quoted, words))}")
            else:
                whole = {**value, **shared} if isinstance(value, dict) else value
                rules.append(f"{rule}: %json {json.dumps(_bounded(whole))}")
            ended = f"{rule} {_quoted(before)} {close}" if before else f"{rule} {close}"
        field = f"{head(name)} {ended}"
        parts.append(field if name in required else f"({field})?")
    return " ".join(parts), rules


def _check_arguments(name: str, schema: dict[str, Any]) -> None:
    """Refuse parameters that would lose arguments: these are written by `properties` alone."""
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ShapeError(f"has a function {name!r} whose parameters are no JSON schema", "tools")
    hidden = [key for key in ("$ref", "anyOf", "oneOf", "allOf") if key in schema]
    if hidden and not properties:
        raise ShapeError(
            f"has a function {name!r} whose parameters say {hidden[0]} instead of properties: this "
            "model's calls cannot be forced for it; state its properties, or use tool_choice "
            "'auto'",
            "tools",
        )
    missing = [r for r in required if r not in properties]
    if missing:
        raise ShapeError(
            f"has a function {name!r} that requires {missing[0]!r}, which is not among its "
            "properties",
            "tools",
        )


# By the name of mlx-lm's tool parser.
_WRITERS = {
    "glm47": _glm47,
    "json_tools": _json_tools,
    "kimi_k2": _kimi_k2,
    "minimax_m2": _minimax_m2,
    "mistral": _mistral,
    "qwen3_coder": _qwen3_coder,
}
