"""Tool calls in the words of mlx-lm's parsers: whole ones are calls, and nothing else is."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.generate import TextStateMachine
from mlx_lm.tool_parsers import json_tools

from mlx_streamexperts.server._replies import Piece, Reply

PROPERTIES = {"path": {"type": "string"}, "content": {"type": "string"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["path", "content"]}
TOOLS = [{"type": "function", "function": {"name": "write", "parameters": PARAMETERS}}]
JSON = '{"path": "/x", "content": "CONTENT"}'
WRITTEN = {
    "function_gemma": "<start_function_call>call:write{path:<escape>/x<escape>,"
    "content:<escape>CONTENT<escape>}<end_function_call>",
    "gemma4": '<|tool_call>call:write{path:<|"|>/x<|"|>,content:<|"|>CONTENT<|"|>}<tool_call|>',
    "glm47": "<tool_call>write<arg_key>path</arg_key><arg_value>/x</arg_value>"
    "<arg_key>content</arg_key><arg_value>CONTENT</arg_value></tool_call>",
    "json_tools": '<tool_call>\n{"name": "write", "arguments": ' + JSON + "}\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.write:0"
    "<|tool_call_argument_begin|>" + JSON + "<|tool_call_end|><|tool_calls_section_end|>",
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="write" index="1"<|sep|>'
    '<|open|>argument key="path" type="string"<|sep|>/x<|close|>argument<|sep|>'
    '<|open|>argument key="content" type="string"<|sep|>CONTENT<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|>",
    "longcat": "<longcat_tool_call>write\n<longcat_arg_key>path</longcat_arg_key>\n"
    "<longcat_arg_value>/x</longcat_arg_value>\n<longcat_arg_key>content</longcat_arg_key>\n"
    "<longcat_arg_value>CONTENT</longcat_arg_value>\n</longcat_tool_call>",
    "minicpm5": '<function name="write"><param name="path">/x</param>'
    '<param name="content">CONTENT</param></function>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="write">\n'
    '<parameter name="path">/x</parameter>\n<parameter name="content">CONTENT</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "mistral": "[TOOL_CALLS]write[ARGS]" + JSON,
    "muse_spark": '<atem:function_calls>\n<atem:invoke name="write">\n'
    '<atem:parameter name="path">/x</atem:parameter>\n'
    '<atem:parameter name="content">CONTENT</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls>",
    "pythonic": '<|tool_call_start|>[write(path="/x", content="CONTENT")]<|tool_call_end|>',
    "qwen3_coder": "<tool_call>\n<function=write>\n<parameter=path>\n/x\n</parameter>\n"
    "<parameter=content>\nCONTENT\n</parameter>\n</function>\n</tool_call>",
}
WRITTEN["laguna"] = WRITTEN["glm47"]


def states(parser: str) -> TextStateMachine:
    """mlx-lm's, for a model that thinks and has this parser."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    begin, end = module.tool_call_start, module.tool_call_end
    return TextStateMachine(
        {
            "normal": [("<think>", "reasoning"), (begin, "tool")],
            "reasoning": [("</think>", "normal"), (begin, "tool")],
            "tool": [(end, "normal")] if end else [],
        }
    )


def replied(
    parser: str,
    text: str,
    *,
    reason: str = "stop",
    stops: tuple[str, ...] = (),
    tools: Any = TOOLS,
    **options: Any,
) -> Piece:
    """What this text becomes, whole and streamed."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    end = module.tool_call_end
    context = SimpleNamespace(
        text_sm=states(parser), initial_state="normal", tool_parser=module.parse_tool_call
    )
    found = []
    for texts in (list(text), [text]):  # streamed in single characters, and at once
        responses = [SimpleNamespace(text=t, token=1, finish_reason=None) for t in texts]
        responses.append(SimpleNamespace(text="", token=0, finish_reason=reason))
        total = Piece()
        reply = Reply(context, stops, None, tools, end, think_end="</think>", **options)
        for piece in reply.pieces(responses):
            total += piece
        found.append(total)
    one, other = found
    assert (one.text, one.reasoning, called(one)) == (other.text, other.reasoning, called(other))
    return one


def called(piece: Piece) -> list[tuple[str, Any]]:
    return [(c.name, json.loads(c.arguments)) for c in piece.calls]


def write(content: str) -> tuple[str, Any]:
    return "write", {"path": "/x", "content": content}


@pytest.mark.parametrize("parser", sorted(WRITTEN))
def test_a_call_that_is_cut_is_text(parser: str) -> None:
    """By `max_tokens` or a stop string, wherever; some parsers take half a call for a whole one."""
    text = WRITTEN[parser].replace("CONTENT", "half STOP of it")
    whole = replied(parser, text)
    assert (called(whole), whole.text) == ([write("half STOP of it")], "")
    assert whole.finish_reason == "tool_calls"
    for at in range(1, len(text), 2):
        cut = replied(parser, text[:at], reason="length")
        assert (called(cut), cut.text, cut.finish_reason) == ([], text[:at], "length")
    cut = replied(parser, text, stops=("STOP",))
    assert (called(cut), cut.text, cut.finish_reason) == ([], text[: text.index("STOP")], "stop")


PROSE = "Qwen3 writes <think> before it reasons, and </think> after it."


@pytest.mark.parametrize("parser", sorted(WRITTEN))
def test_text_about_markers_is_text(parser: str) -> None:
    """Reasoning begins only at the start of a reply, and a call is whole."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    begin, end = module.tool_call_start, module.tool_call_end
    call = WRITTEN[parser].replace("CONTENT", "it")
    told = replied(parser, PROSE)
    assert (told.text, told.reasoning) == (PROSE, "")
    full = replied(parser, f"\n<think>Hm, {begin} it?</think>{PROSE}\n{call}")
    assert (full.reasoning, full.text) == (f"Hm, {begin} it?", f"\n{PROSE}\n")
    assert called(full) == [write("it")]
    if end:  # else a call goes on to the reply's end
        full = replied(parser, f"<think>Hm.</think>{call}\n{call} <think>")
        assert (full.reasoning, full.text) == ("Hm.", "\n <think>")
        assert called(full) == [write("it")] * 2
        for other in ("?", "<", "(" + end):
            full = replied(parser, f"{begin} {other}{end}\n{call}")
            assert full.text == f"{begin} {other}{end}\n"
            assert called(full) == [write("it")]


@pytest.mark.parametrize("parser", sorted(set(WRITTEN) - {"mistral"}))
def test_an_argument_may_contain_the_markers_of_calls(parser: str) -> None:
    """Mistral's calls end with the reply."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    begin, end = module.tool_call_start, module.tool_call_end
    for content in (f"a {end} b", f"{begin} a {end} b {end} c", f"<think>a</think> {end}"):
        text = WRITTEN[parser].replace("CONTENT", content)
        full = replied(parser, f"Now: {text} Done")
        if parser == "minicpm5":  # mlx-lm's parser takes it for the end
            assert (full.calls, full.text) == ([], f"Now: {text} Done")
        else:
            assert (called(full), full.text) == ([write(content)], "Now:  Done")


@pytest.mark.parametrize("parser", sorted(WRITTEN))
def test_without_tools_there_are_no_calls(parser: str) -> None:
    text = WRITTEN[parser].replace("CONTENT", "it") + " <think>"
    for reason in ("stop", "length"):
        said = replied(parser, f"<think>{text}</think>{text}", tools=None, reason=reason)
        assert (said.reasoning, said.text, said.calls) == (text, text, [])
        assert said.finish_reason == reason


def test_an_answer_in_a_format_is_as_it_is() -> None:
    """Tokens end its reasoning, and no marker in it counts once it has begun."""
    call = WRITTEN["json_tools"].replace("CONTENT", "it")
    answer = '{"x": "<think>a</think> ' + call + '"}'
    texts = "<think>", "It writes </think> and " + call, "</think>", "\n" + answer, ""
    context = SimpleNamespace(
        text_sm=states("json_tools"), initial_state="normal", tool_parser=json_tools.parse_tool_call
    )
    reply = Reply(
        context, (), None, TOOLS, "</tool_call>", answer=True, closing=(2,), think_end="</think>"
    )
    total = Piece()
    for i, text in enumerate(texts):
        end = "stop" if i + 1 == len(texts) else None
        for piece in reply.pieces([SimpleNamespace(text=text, token=i, finish_reason=end)]):
            total += piece
    assert (total.reasoning, total.text, total.calls) == (texts[1], texts[3], [])
    assert reply.reasoning_tokens == 2


def test_a_completion_is_text() -> None:
    text = "<think>a</think>" + WRITTEN["json_tools"]
    assert replied("json_tools", text, plain=True).text == text


ANY = [{"type": "function", "function": {"name": "write", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("parser", ["glm47", "json_tools", "kimi_k2", "longcat", "mistral"])
@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400", "[1e400]"])
def test_a_call_with_a_number_that_json_has_not_is_text(parser: str, number: str) -> None:
    text = WRITTEN[parser].replace('"CONTENT"', number).replace("CONTENT", number)
    said = replied(parser, text, tools=ANY)
    assert (said.text, said.calls, said.finish_reason) == (text, [], "stop")
