"""OpenAI's responses through its own client: the same replies, and nothing kept between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import openai
import pytest
from serving import QWEN_TEMPLATE, Running, call, chatting, dictated, prompts, serving

from mlx_streamexperts.server._replies import Piece, Reply

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
OSLO, ROME = (call("weather", city=city) for city in ("Oslo", "Rome"))


@pytest.fixture(scope="module")
def running(checkpoint: Callable[..., Path]) -> Iterator[Running]:
    mx.disable_compile()
    folder = chatting(checkpoint("qwen3_moe", seed=7))
    options = '{"enable_thinking": false}'
    with serving(
        "--cache", "4MB", "--model", str(folder), "--chat-template-args", options
    ) as running:
        yield running
    mx.enable_compile()


def response(running: Running, **options: Any) -> Any:
    """A response; the last event of a stream must have the same, and its deltas make it up."""
    options = {"model": "default_model", "input": "Weather?", **options}
    client = running.client()
    whole = client.responses.create(**options)
    items: dict[int, str] = {}
    statuses: list[str] = []
    last: Any = None
    for number, event in enumerate(client.responses.create(**options, stream=True)):
        assert event.sequence_number == number
        if event.type.endswith(".delta"):
            items[event.output_index] = items.get(event.output_index, "") + event.delta
        if event.type == "response.output_item.done":
            statuses.append(event.item.status)
        last = event
    assert last.type == f"response.{whole.status}"
    streamed = last.response

    def said(items: Any) -> list[Any]:
        return [i.model_dump(exclude={"id", "call_id"}) for i in items]

    assert said(streamed.output) == said(whole.output)
    assert statuses == [i.status for i in whole.output]
    assert [items[n] for n in sorted(items)] == [
        i.arguments if i.type == "function_call" else i.content[0].text for i in whole.output
    ]
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    return whole


def test_text_is_that_of_a_chat(running: Running) -> None:
    said = response(running, instructions="Be brief.", max_output_tokens=9, temperature=0)
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}
    ]  # fmt: skip
    body = {"messages": messages, "max_tokens": 9}
    expected = running.post(body, "/v1/chat/completions")[1]
    assert said.output_text == expected["choices"][0]["message"]["content"]
    assert (said.status, said.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert said.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert said.usage.output_tokens == 9


def test_reasoning_text_and_calls(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    dictated(monkeypatch, f"<think>Two.</think>I look.\n{OSLO}\n{ROME}")
    said = response(running, tools=[TOOL])
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [i.type for i in said.output] == kinds
    assert said.output[0].content[0].text == "Two."
    assert said.output_text.strip() == "I look."
    assert [json.loads(i.arguments)["city"] for i in said.output[2:]] == ["Oslo", "Rome"]
    assert said.usage.output_tokens_details.reasoning_tokens > 0
    assert said.status == "completed"
    assert len(response(running, tools=[TOOL], parallel_tool_calls=False).output) == 3


def test_only_the_item_that_is_cut_is_incomplete(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(monkeypatch, f"I look.{OSLO}" + "\n" * 200)
    whole = response(running, tools=[TOOL], max_output_tokens=150)
    assert whole.status == "incomplete"
    assert [i.status for i in whole.output] == ["completed", "completed"]
    cut = response(running, tools=[TOOL], max_output_tokens=4)
    assert [i.status for i in cut.output] == ["incomplete"]


def test_events_come_in_order(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    dictated(monkeypatch, f"<think>T</think>a{OSLO}")
    events = running.events({"input": "?", "tools": [TOOL], "stream": True}, "/v1/responses")
    assert all(name == data["type"] for name, data in events)
    item, part = "output_item", "content_part"
    assert [name.removeprefix("response.") for name, _ in events] == [
        "created", "in_progress",
        f"{item}.added", f"{part}.added", "reasoning_text.delta", "reasoning_text.done",
        f"{part}.done", f"{item}.done",
        f"{item}.added", f"{part}.added", "output_text.delta", "output_text.done",
        f"{part}.done", f"{item}.done",
        f"{item}.added", "function_call_arguments.delta", "function_call_arguments.done",
        f"{item}.done",
        "completed",
    ]  # fmt: skip


def test_a_conversation_with_tools_goes_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(monkeypatch, f"<think>Hm.</think>I look.{OSLO}")
    first = response(running, tools=[TOOL])
    dictated(monkeypatch, "Sun.")
    seen = prompts(running, monkeypatch)
    called = first.output[-1].call_id
    given = [
        {"role": "developer", "content": [{"type": "input_text", "text": "In English."}]},
        {"role": "user", "content": "Weather?"},
        *(i.model_dump(exclude_none=True) for i in first.output),
        {"type": "function_call_output", "call_id": called, "output": "sunny"},
    ]
    answer = response(running, input=given, instructions="Be brief.", tools=[TOOL])
    assert answer.output_text == "Sun."
    assert seen[0].startswith("<|im_start|>system\nBe brief.\n\nIn English.\n")
    assert f"<think>\nHm.\n</think>\n\nI look.\n{OSLO}<|im_end|>" in seen[0]
    assert "<tool_response>\nsunny\n</tool_response>" in seen[0]


def test_a_stream_that_fails_ends_as_a_failed_response(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients wait for the end of a response, and only note an event "error"."""
    original = Reply.pieces

    def pieces(self: Reply, responses: Any) -> Iterator[Piece]:
        for i, piece in enumerate(original(self, responses)):
            if i == 3:
                raise OSError("of the drive")
            yield piece

    monkeypatch.setattr(Reply, "pieces", pieces)
    dictated(monkeypatch, "Sunny")
    with running.client().responses.stream(model="default_model", input="Weather?") as stream:
        *_, error, last = stream
    assert (error.type, last.type, last.response.status) == ("error", "response.failed", "failed")
    assert "OSError" in error.message
    assert last.response.error.message == error.message
    assert [(i.status, i.content[0].text) for i in last.response.output] == [("incomplete", "Sun")]


def test_white_space_alone_is_no_reasoning_and_no_part_of_the_answer(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3 writes an empty thought where it is told not to think."""
    for said, kinds in (
        ("<think>\n\n</think>\n\nSunny", {"message": "\n\nSunny"}),
        ("\n<think>Hm</think>Sunny", {"reasoning": "Hm", "message": "Sunny"}),
        ("\n\nSunny", {"message": "\n\nSunny"}),
    ):
        dictated(monkeypatch, said)
        items = response(running).output
        assert {i.type: i.content[0].text for i in items} == kinds


def test_a_call_or_a_format_can_be_required(running: Running) -> None:
    for choice in ("required", {"type": "function", "name": "weather"}):
        said = response(running, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
        assert [(i.type, i.name) for i in said.output] == [("function_call", "weather")]
        assert json.loads(said.output[0].arguments)["city"] in ("Oslo", "Rome")
    form = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    assert json.loads(response(running, text=form).output_text)["city"] in ("Oslo", "Rome")


def test_effort_and_what_it_refuses(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = prompts(running, monkeypatch)
    response(running, reasoning={"effort": "low"}, max_output_tokens=1)
    assert "low effort" in seen[0]
    tokenizer = running.generator.model_provider.tokenizer
    silent = QWEN_TEMPLATE.replace("reasoning_effort", "nothing")
    with monkeypatch.context() as patched:  # Codex sends it to every model
        patched.setattr(tokenizer._tokenizer, "chat_template", silent)
        response(running, reasoning={"effort": "low"}, max_output_tokens=1)
    assert "low effort" not in seen[-1]
    wrong: tuple[tuple[str, Any], ...] = (
        ("previous_response_id", "resp_1"), ("store", True), ("background", True),
        ("conversation", "a"), ("include", ["file_search_call.results"]), ("truncation", "auto"),
        ("tools", [{"type": "web_search"}]), ("tools", [1]), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("tool_choice", {"type": "web_search"}), ("input", 1),
        ("input", [1]), ("input", [{"type": "item_reference", "id": "a"}]), ("input", []),
        ("input", [{"role": "user", "content": [{"type": "input_file"}]}]),
        ("input", [{"type": "function_call"}]), ("input", [{"role": "tool", "content": "a"}]),
        ("input", [{"type": "reasoning", "content": ""}]),
        ("text", {"format": {"type": "xml"}}),
        ("text", {"format": {"type": "json_schema", "name": "a", "schema": {"type": "other"}}}),
        ("input", [{"type": "function_call", "name": "a", "call_id": "b", "arguments": "{"}]),
        ("text", {"verbosity": "low"}), ("reasoning", 1),
    )  # fmt: skip
    for field, value in wrong:
        with pytest.raises(openai.BadRequestError) as e:
            running.client().responses.create(model="default_model", **{"input": "a", field: value})
        assert str(e.value.param).partition(".")[0] == field
        assert field in e.value.message
