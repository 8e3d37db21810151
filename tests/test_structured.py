"""Grammars let through what mlx-lm's tool parsers read, and nothing else; `generate` uses them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer
from transformers import AddedToken

from mlx_streamexperts import demo_model, generate
from mlx_streamexperts._structured.constraint import Constraint, Vocabulary
from mlx_streamexperts._structured.shape import _WRITERS, Shape, ShapeError, tools_for_parser

PROPERTIES = {
    "count": {"type": "integer"},
    "text": {"type": "string"},
    "kind": {"type": "string", "enum": ["x", "y"]},
    "rows": {"type": "array", "items": {"$ref": "#/$defs/Row"}},
}
PARAMETERS = {
    "type": "object",
    "properties": PROPERTIES,
    "required": ["count", "text"],
    "$defs": {"Row": {"type": "integer"}},
}
TOOLS = (
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "g"}},
)
F = {"count": 12, "text": "a <b>\n</c>", "kind": "x", "rows": [1, 2]}
BODY = json.dumps(F)
WRITTEN = {
    "glm47": "<tool_call>f\n<arg_key>count</arg_key>\n<arg_value>12</arg_value>\n"
    "<arg_key>text</arg_key><arg_value>a <b>\n</c></arg_value><arg_key>kind</arg_key>\n"
    "<arg_value>x</arg_value>\n<arg_key>rows</arg_key>\n<arg_value>[1, 2]</arg_value>\n"
    "</tool_call>",
    "json_tools": '<tool_call>\n{"name": "f", "arguments": ' + BODY + "}\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    "<|tool_call_argument_begin|>" + BODY + "<|tool_call_end|><|tool_calls_section_end|>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="count">12</parameter>\n'
    '<parameter name="text">a <b>\n</c></parameter>\n<parameter name="kind">x</parameter>\n'
    '<parameter name="rows">[1, 2]</parameter>\n</invoke>\n</minimax:tool_call>',
    "mistral": "[TOOL_CALLS]f[ARGS]" + BODY,
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=count>\n12\n</parameter>\n"
    "<parameter=text>\na <b>\n</c>\n</parameter>\n<parameter=kind>\nx\n</parameter>\n"
    "<parameter=rows>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
}
TEMPLATES = {"mistral": "[TOOL_CALLS] [ARGS]"}


def vocabulary(parser: str, special: bool) -> Vocabulary:
    """The demo model's, with this parser; its markers are tokens of their own, or text."""
    tokenizer = load_tokenizer(demo_model())
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    if special:
        markers = [module.tool_call_start, module.tool_call_end, "[ARGS]", "<|tool_call_begin|>"]
        markers += ["<|tool_call_argument_begin|>", "<|tool_call_end|>"]
        markers += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
        tokenizer._tokenizer.add_tokens([AddedToken(m, normalized=False) for m in markers if m])
    tokenizer._tool_parser = module.parse_tool_call
    tokenizer._tool_call_start, tokenizer._tool_call_end = (
        module.tool_call_start, module.tool_call_end
    )  # fmt: skip
    tokenizer._tokenizer.chat_template = TEMPLATES.get(parser, "")
    return Vocabulary(tokenizer)


def taken(constraint: Constraint, text: str) -> tuple[str, bool]:
    """How much of a text the grammar lets through, and whether it may end there."""
    tokenizer = constraint.vocabulary.tokenizer
    matcher = constraint._matcher.deep_copy()
    ids = tokenizer.encode(text, add_special_tokens=False)
    count = matcher.try_consume_tokens(ids)
    return tokenizer.decode(ids[:count]), matcher.is_accepting()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("parser", sorted(_WRITERS))
def test_a_call_that_the_grammar_lets_through_is_parsed(parser: str, special: bool) -> None:
    words = vocabulary(parser, special)
    one = Constraint(words, Shape(tools=TOOLS, many=False), [])
    text = WRITTEN[parser]
    assert taken(one, text) == (text, True)
    tokenizer = words.tokenizer
    body = text.removeprefix(tokenizer.tool_call_start)
    if tokenizer.tool_call_end:
        body = body.removesuffix(tokenizer.tool_call_end)
    parsed: Any = tokenizer.tool_parser(body, list(TOOLS))
    [call] = parsed if isinstance(parsed, list) else [parsed]
    assert (call["name"], call["arguments"]) == ("f", F)
    for wrong in (text.replace("12", "1.5"), text.replace("f", "h", 1), "Hello " + text):
        assert len(taken(one, wrong)[0]) < len(wrong), wrong
    twice = text + ("\n" if parser in ("json_tools", "qwen3_coder") else "") + text
    assert taken(one, twice)[0] != twice
    if parser not in ("kimi_k2", "minimax_m2"):  # theirs stand within one pair of markers
        assert taken(Constraint(words, Shape(tools=TOOLS), []), twice) == (twice, True)


def one_argument(value: Any, **parameters: Any) -> tuple[dict[str, Any], ...]:
    """A tool with one argument, `a`, of this schema."""
    stated = {"type": "object", "properties": {"a": value}, "required": ["a"], **parameters}
    return ({"type": "function", "function": {"name": "f", "parameters": stated}},)


def either(*types: str) -> dict[str, Any]:
    return {"anyOf": [{"type": t} for t in types]}


ONE = {  # a call with one argument
    "glm47": "<tool_call>f<arg_key>a</arg_key><arg_value>{}</arg_value></tool_call>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">{}</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n"
    "</tool_call>",
}
DEFS = {"$defs": {"City": {"type": "string", "enum": ["Oslo"]}, "Count": {"type": "integer"}}}


def parsed(words: Vocabulary, text: str, tools: Any, held: bool) -> Any:
    tokenizer = words.tokenizer
    body = text.removeprefix(tokenizer.tool_call_start).removesuffix(tokenizer.tool_call_end)
    return tokenizer.tool_parser(body, tools_for_parser(tools, held))["arguments"]


@pytest.mark.parametrize("parser", sorted(ONE))
def test_an_argument_of_any_schema_is_read_as_it_was_written(parser: str) -> None:
    words = vocabulary(parser, True)
    held: tuple[tuple[Any, str, Any], ...] = (
        (either("string", "null"), '"Oslo"', "Oslo"), (either("string", "null"), "null", None),
        ({"type": ["string", "null"]}, '"12"', "12"), ({"enum": ["Oslo", 3]}, '"Oslo"', "Oslo"),
        ({"const": "Oslo"}, '"Oslo"', "Oslo"), ({"$ref": "#/$defs/City"}, '"Oslo"', "Oslo"),
        (either("integer", "null"), "3", 3), (either("boolean", "null"), "true", True),
        ({"type": "integer"}, str(2**53 + 1), 2**53 + 1), ({"$ref": "#/$defs/Count"}, "3", 3),
        ({"type": "string"}, "12", "12"), ({"type": "string", "enum": ["x", None]}, "x", "x"),
    )  # fmt: skip
    for schema, written, value in held:
        tools = one_argument(schema, **DEFS)
        text = ONE[parser].format(written)
        assert taken(Constraint(words, Shape(tools=tools), []), text) == (text, True), schema
        assert parsed(words, text, tools, held=True) == {"a": value}, schema
    free: tuple[tuple[Any, str, Any], ...] = (
        (either("string", "null"), "Oslo", "Oslo"), (either("integer", "null"), "3", 3),
        (either("boolean", "null"), "true", True), ({"$ref": "#/$defs/Count"}, "3", 3),
        ({"$ref": "#/$defs/City"}, "12", "12"), (True, "Oslo", "Oslo"),
    )  # fmt: skip
    for schema, written, value in free:
        tools = one_argument(schema, **DEFS)
        assert parsed(words, ONE[parser].format(written), tools, held=False) == {"a": value}, schema


@pytest.mark.parametrize("parser", sorted(ONE))
def test_a_call_never_loses_arguments_that_its_parameters_hide(parser: str) -> None:
    words = vocabulary(parser, True)
    [tool] = one_argument({"type": "string"})
    within = {"$ref": "#/$defs/A~1B", "$defs": {"A/B": tool["function"]["parameters"]}}
    tools = ({"type": "function", "function": {"name": "f", "parameters": within}},)
    text = ONE[parser].format("12")
    constraint = Constraint(words, Shape(tools=tools), [])
    assert taken(constraint, text) == (text, True)
    assert not taken(constraint, text.replace("12", "").replace("a", "b", 1))[1]
    assert parsed(words, text, tools, held=True) == {"a": "12"}
    for parameters in (
        {"$ref": "https://x/y"}, {"$ref": "#/$ref"}, {"anyOf": [within]}, {"allOf": [within]},
        {"properties": [1]}, {"properties": {}, "required": ["a"]}, {"required": True},
    ):  # fmt: skip
        tools = ({"type": "function", "function": {"name": "f", "parameters": parameters}},)
        assert tools_for_parser(tools, held=False)[0]["function"]["name"] == "f"
        with pytest.raises(ShapeError, match="'f'") as e:
            Constraint(words, Shape(tools=tools, param="tool_choice"), [])
        assert e.value.param == "tools"


def test_other_forms_of_tool_calls_are_refused_by_name() -> None:
    with pytest.raises(ShapeError, match="gemma4"):
        Constraint(vocabulary("gemma4", False), Shape(tools=TOOLS, param="tool_choice"), [])


def test_an_answer_or_a_call() -> None:
    words = vocabulary("json_tools", True)
    either = Constraint(words, Shape({"const": [1]}, TOOLS), [])
    for text in ("[1]", "\n\n[1]", WRITTEN["json_tools"]):
        assert taken(either, text) == (text, True)
    assert taken(either, "[2]")[0] == "["


def test_the_mask_is_the_grammars() -> None:
    """Logits of tokens that may not come are minus infinity, the others as they were."""
    words = vocabulary("json_tools", False)
    processor = Constraint(words, Shape({"enum": ["ab", "ac"]}), []).processor()
    tokenizer = words.tokenizer
    logits = mx.arange(len(tokenizer), dtype=mx.float32)[None] + 1
    tokens, text = mx.array([5]), ""
    while True:
        masked = processor(tokens, logits)
        open_ = [i for i, x in enumerate(masked[0].tolist()) if x > -mx.inf]
        assert masked[0, open_[0]] == logits[0, open_[0]]
        if open_ == sorted(tokenizer.eos_token_ids):
            break
        likely = [i for i in open_ if tokenizer.decode([i]).strip()]
        for i in likely:
            said = (text + tokenizer.decode([i])).strip()
            assert any(w.startswith(said) for w in ('"ab"', '"ac"')), said
        text += tokenizer.decode([likely[0]])
        tokens = mx.concatenate([tokens, mx.array([likely[0]])])
    assert json.loads(text) in ("ab", "ac")


def test_what_went_wrong_is_said_in_short() -> None:
    """llguidance adds the grammar and its own state, 1,000 characters and more."""
    words = vocabulary("json_tools", False)
    constraint = Constraint(words, Shape({"enum": ["ab", "ac"]}), [])
    processor = constraint.processor()
    logits = mx.zeros((1, len(words.tokenizer)))
    [token] = words.tokenizer.encode("z", add_special_tokens=False)
    for _ in range(2):
        processor(mx.array([token]), logits)
    assert constraint.error
    assert len(constraint.error) <= 300
    assert "\n" not in constraint.error


def test_generate_holds_its_reply_to_a_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"enum": [1, 2]}},
                                  "required": ["a"], "additionalProperties": False}))  # fmt: skip
    options = ["--cache", "30MB", "--no-progress", "-m", "60", "--verbose", "false"]
    options += ["-p", "In the", "--json-schema", str(schema)]
    assert generate.main(options) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") : printed.index("}") + 1])["a"] in (1, 2)
    schema.write_text('{"type": "nothing"}')
    assert generate.main(options) == 1
    error = capsys.readouterr().err
    assert "schema.json" in error
    assert "nothing" in error
