"""Anthropic's API through its own client: the same replies in its words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import pytest
from serving import Running, call, chatting, dictated, prompts, serving

from mlx_streamexperts._structured import constraint

TOOL: Any = {
    "name": "weather",
    "description": "Tells it.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ASKED: Any = {
    "model": "default_model",
    "max_tokens": 300,
    "messages": [{"role": "user", "content": "Weather?"}],
}
NOT_THINKING: Any = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def running(checkpoint: Callable[..., Path]) -> Iterator[Running]:
    mx.disable_compile()
    folder = chatting(checkpoint("qwen3_moe", seed=7))
    options = ["--cache", "4MB", "--context-tokens", "4096", "--api-key", "secret"]
    with serving("--model", str(folder), *options) as running:
        yield running
    mx.enable_compile()


@pytest.fixture(scope="module")
def client(running: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=running.url, api_key="secret", max_retries=0, timeout=60)


def prompt_tokens(usage: Any) -> int:
    return usage.input_tokens + usage.cache_read_input_tokens


def message(client: anthropic.Anthropic, **options: Any) -> anthropic.types.Message:
    """A reply; streamed it must be the same."""
    whole = client.messages.create(**ASKED | options)
    with client.messages.stream(**ASKED | options) as stream:
        streamed = stream.get_final_message()
    for block in (*whole.content, *streamed.content):
        if block.type == "tool_use":
            assert block.id
            block.id = "same"
    told = {"content", "stop_reason", "stop_sequence", "model", "role", "type"}
    assert streamed.model_dump(include=told) == whole.model_dump(include=told)
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert prompt_tokens(whole.usage) == prompt_tokens(streamed.usage) > 0
    return whole


def test_text_is_that_of_a_chat(running: Running, client: anthropic.Anthropic) -> None:
    said = message(client, max_tokens=12, system="Be brief.", **NOT_THINKING)
    body = {
        "messages": [{"role": "system", "content": "Be brief."}, *ASKED["messages"]],
        "max_tokens": 12, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    raw = json.dumps(body).encode()
    path = "/v1/chat/completions"
    _, _, answer = running.request("POST", path, raw, Authorization="Bearer secret")
    expected = json.loads(answer)["choices"][0]["message"]["content"]
    assert [(b.type, b.text) for b in said.content] == [("text", expected)]
    assert (said.stop_reason, said.usage.output_tokens) == ("max_tokens", 12)


def test_thinking_text_and_calls_in_order(
    client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = call("weather", city="Oslo"), call("weather", city="Rome")
    dictated(monkeypatch, f"<think>Two.</think>\n\nI look.\n{first}\n{second}")
    said = message(client, tools=[TOOL])
    assert [b.type for b in said.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert said.content[0].thinking == "Two."
    assert said.content[1].text.strip() == "I look."
    assert [b.input for b in said.content[2:]] == [{"city": "Oslo"}, {"city": "Rome"}]
    assert said.stop_reason == "tool_use"
    hidden = {"type": "adaptive", "display": "omitted"}
    shown = message(client, tools=[TOOL], thinking=hidden).content
    assert [b.type for b in shown] == [b.type for b in said.content]
    assert shown[0].thinking == ""
    one = {"type": "auto", "disable_parallel_tool_use": True}
    said = message(client, tools=[TOOL], tool_choice=one)
    assert [b.type for b in said.content] == ["thinking", "text", "tool_use"]


def test_events_come_in_anthropics_order(
    running: Running, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(monkeypatch, f"<think>T</think>{call('weather', city='Oslo')}")
    body = {**ASKED, "tools": [TOOL], "stream": True}
    events = running.events(body, "/v1/messages", Authorization="Bearer secret")
    names = [name for name, _ in events]
    assert all(data["type"] == name for name, data in events)
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert names == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert [d["index"] for n, d in events if n in block] == [0] * 3 + [1] * 3
    assert events[0][1]["message"]["content"] == []
    assert events[4][1]["content_block"]["input"] == {}
    assert json.loads(events[5][1]["delta"]["partial_json"]) == {"city": "Oslo"}
    assert events[7][1]["usage"]["output_tokens"] > 0


def test_a_conversation_with_tools_goes_on(
    running: Running, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(monkeypatch, f"<think>Hm.</think>{call('weather', city='Oslo')}")
    said = client.messages.create(**ASKED, tools=[TOOL])
    dictated(monkeypatch, "Sun.")
    seen = prompts(running, monkeypatch)
    result = {"type": "tool_result", "tool_use_id": said.content[-1].id, "content": "sunny"}
    wrong = {**result, "is_error": True, "content": [{"type": "text", "text": "no"}]}
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ]
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": said.content},
        {"role": "user", "content": [result, wrong, {"type": "text", "text": "So?"}]},
    ]
    answer = message(client, messages=messages, system=system, tools=[TOOL])
    assert answer.content[0].text == "Sun."
    assert answer.stop_reason == "end_turn"
    assert seen[0].startswith("<|im_start|>system\nBe brief.\n")
    assert '"description": "Tells it."' in seen[0]
    assert "<think>\nHm.\n</think>" in seen[0]
    assert call("weather", city="Oslo") in seen[0]
    after = seen[0].partition("</think>")[2]
    places = [after.index(x) for x in ("\nsunny\n", "\nError: no\n", "user\nSo?<|im_end|>")]
    assert places == sorted(places)
    counted = client.messages.count_tokens(
        model="default_model", messages=messages, system=system, tools=[TOOL]
    )
    assert counted.input_tokens == prompt_tokens(answer.usage)


def test_turns_of_the_user_in_a_row_are_one(
    running: Running, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Anthropic's; there are templates that refuse two."""
    seen = prompts(running, monkeypatch)
    blocks = [{"type": "text", "text": "In "}, {"type": "text", "text": "Oslo."}]
    answered = {"role": "assistant", "content": "Where?"}
    turns = [
        *ASKED["messages"],
        answered,
        *({"role": "user", "content": c} for c in ("Hm.", blocks)),
    ]
    client.messages.create(**ASKED | {"messages": turns, "max_tokens": 1})
    assert seen[0].count("<|im_start|>user\n") == 2
    assert "<|im_start|>user\nHm.\n\nIn Oslo.<|im_end|>" in seen[0]


def test_stop_sequences(client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch) -> None:
    dictated(monkeypatch, "one two three")
    said = message(client, stop_sequences=["xyz", " tw"])
    assert said.content[0].text == "one"
    assert (said.stop_reason, said.stop_sequence) == ("stop_sequence", " tw")


def test_a_call_or_a_format_can_be_required(client: anthropic.Anthropic) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        said = message(
            client, tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True},
            **NOT_THINKING,
        )  # fmt: skip
        assert [(b.type, b.name) for b in said.content] == [("tool_use", "weather")]
        assert said.content[0].input["city"] in ("Oslo", "Rome")
    form: Any = {"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}
    said = message(client, output_config=form, **NOT_THINKING)
    assert json.loads(said.content[0].text)["city"] in ("Oslo", "Rome")


def test_an_error_in_a_stream_is_its_last_event(
    client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = constraint.Processor._allowed

    def fails(self: Any, count: int) -> Any:
        self._constraint.error = "broken"
        return original(self, count)

    monkeypatch.setattr(constraint.Processor, "_allowed", fails)
    asked = {**ASKED, "tools": [TOOL], "tool_choice": {"type": "any"}}
    with pytest.raises(anthropic.APIStatusError, match="broken"):
        list(client.messages.create(**asked, stream=True))
    with pytest.raises(anthropic.BadRequestError, match="broken"):
        client.messages.create(**asked)


def test_a_reply_that_is_begun_is_refused_but_counted(client: anthropic.Anthropic) -> None:
    messages: Any = [*ASKED["messages"], {"role": "assistant", "content": '{"x":'}]
    with pytest.raises(anthropic.BadRequestError, match="messages end with one of the assistant"):
        client.messages.create(**ASKED | {"messages": messages})
    counted = client.messages.count_tokens(model="default_model", messages=messages)
    assert counted.input_tokens > 0


def test_errors_have_anthropics_form(running: Running, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as e:
        client.messages.create(**ASKED, container="a")
    assert e.value.body["type"] == "error"
    assert e.value.body["error"]["type"] == "invalid_request_error"
    assert "container" in e.value.body["error"]["message"]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**ASKED | {"model": "claude"})
    with pytest.raises(anthropic.AuthenticationError) as denied:
        client.with_options(api_key="other").messages.create(**ASKED)
    assert denied.value.body["error"]["type"] == "authentication_error"
    long = {"role": "user", "content": "a " * 4000}
    with pytest.raises(anthropic.BadRequestError, match="tokens"):
        client.messages.create(**ASKED | {"messages": [long]})
    key = {"Authorization": "Bearer secret"}
    wrong: tuple[Any, ...] = (
        {"messages": 1}, {"messages": [1]}, {"messages": []}, {"messages": [{"role": "tool"}]},
        {"messages": [{"role": "user", "content": 1}]}, {"system": 1}, {"system": [1]},
        {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": 1}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": {}},
        ]}]},
        {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": "b", "is_error": "false"},
        ]}]},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "other"}}}},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": 1}]}]},
        {"tools": [1]}, {"tools": [{"name": 1}]}, {"tools": [{"type": "web_search_20250305"}]},
        {"tools": [TOOL], "tool_choice": {"type": "some"}}, {"tool_choice": {"type": "any"}},
        {"thinking": {"type": "between_tools"}}, {"output_config": {"format": {"type": "a"}}},
        {"stop_sequences": [1]}, {"max_tokens": 0}, {"temperature": "a"}, {"context_management": 1},
    )  # fmt: skip
    for fields in wrong:
        raw = json.dumps({**ASKED, **fields}).encode()
        status, _, answer = running.request("POST", "/v1/messages", raw, **key)
        assert status == 400, (fields, answer)
        assert json.loads(answer)["error"]["type"] == "invalid_request_error"
        assert list(fields)[-1] in json.loads(answer)["error"]["message"]
