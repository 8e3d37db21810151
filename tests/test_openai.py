"""Stop strings, logprobs and what else OpenAI's API promises: whole, streamed, by its client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import openai
import pytest
from conftest import demo_texts, until
from serving import Running, serving

from mlx_streamexperts import demo_model
from mlx_streamexperts.server._generation import stock

pytestmark = pytest.mark.usefixtures("compiled")  # so random states reach samplers as for users

PROMPT = demo_texts()[0]
LENGTH = 12
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def original() -> tuple[Any, Any]:
    return mlx_lm.load(str(demo_model()))[:2]


@pytest.fixture(scope="module")
def text(original: tuple[Any, Any]) -> str:
    """The reply of stock mlx-lm."""
    return mlx_lm.generate(*original, PROMPT, max_tokens=LENGTH)


@pytest.fixture(scope="module")
def running(text: str) -> Iterator[Running]:
    with serving("--cache", "30MB", "--chat-template", TEMPLATE) as running:
        yield running


def said(names: list[str] | None) -> str:
    """The text of tokens; mlx-lm leaves out the space before a reply."""
    return "".join(names or []).removeprefix(" ")


def events(running: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stream sends, as it lies on the wire."""
    raw = json.dumps({**body, "stream": True}).encode()
    status, headers, answer = running.request("POST", path, raw)
    assert status == 200, answer
    assert headers["content-type"] == "text/event-stream"
    lines = [x for x in answer.decode().split("\n\n") if x and not x.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def replies(running: Running, **options: Any) -> list[tuple[str, str, list[str] | None]]:
    """Text, finish reason and named tokens: both paths, whole and streamed."""
    found = []
    for path, said, field in (
        ("/v1/completions", {"prompt": PROMPT}, "text"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}, "content"),
    ):
        body = {**said, "max_tokens": LENGTH, **options}
        status, answer = running.post(body, path)
        assert status == 200, answer
        choice = answer["choices"][0]
        text = choice["text"] if field == "text" else choice["message"]["content"] or ""
        names = (
            [t["token"] for t in choice["logprobs"]["content"]] if "logprobs" in choice else None
        )
        found.append((text, choice["finish_reason"], names))
        choices = [e["choices"][0] for e in events(running, path, body)]
        text = "".join(
            c["text"] if field == "text" else c["delta"].get("content") or "" for c in choices
        )
        assert {c["finish_reason"] for c in choices[:-1]} <= {None}
        named = [t["token"] for c in choices if "logprobs" in c for t in c["logprobs"]["content"]]
        found.append((text, choices[-1]["finish_reason"], named if names is not None else None))
    return found


@pytest.mark.parametrize("alone", [{}, {"seed": 1}])
def test_stop_strings_end_a_reply_wherever_tokens_are_cut(
    running: Running, text: str, original: tuple[Any, Any], alone: dict[str, int]
) -> None:
    tokenizer = original[1]
    in_tokens, tried = 0, [(5, 9), (11, 14), (20, 21), (0, 3), (len(text) - 3, len(text))]
    for begin, end in tried:
        stop = text[begin:end]
        cut = text[: text.find(stop)]
        got = replies(running, stop=[stop, "\x00"], logprobs=True, **alone)
        assert [g[:2] for g in got] == [(cut, "stop")] * 4, stop
        for _, _, names in got:
            assert said(names).startswith(cut)  # the last token may go on into the stop string
            assert not cut or len(said((names or [])[:-1])) < len(cut)
            assert cut or not names
        whole = tokenizer.encode(text, add_special_tokens=False)
        ids = tokenizer.encode(stop, add_special_tokens=False)
        in_tokens += any(whole[i : i + len(ids)] == ids for i in range(len(whole)))
    assert in_tokens < len(tried)  # mlx-lm, which looks among tokens, does not find the others


def test_stop_strings_that_do_not_come_take_nothing_away(running: Running, text: str) -> None:
    for stop in ("\x00", text[-2:] + "\x00", [text[i:] + "\x00" for i in range(0, len(text), 5)]):
        assert {g[:2] for g in replies(running, stop=stop)} == {(text, "length")}


def test_a_reply_that_a_stop_string_ended_can_be_gone_on_with(running: Running, text: str) -> None:
    """Its KV cache is kept, as mlx-lm's own ends are."""
    prompt = "Some other words. " + PROMPT
    whole = running.text(prompt, 8)
    stop = whole[-3:]
    status, answer = running.post({"prompt": prompt, "max_tokens": 9, "stop": stop})
    assert status == 200
    reply = answer["choices"][0]["text"]
    until(lambda: not running.generator.admission.running)
    status, answer = running.post({"prompt": prompt + reply + " And", "max_tokens": 1})
    tokens = len(running.generator.model_provider.tokenizer.encode(prompt))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= tokens


@pytest.mark.parametrize("alone", [{}, {"seed": 1}])
def test_logprobs_name_the_tokens_of_the_text(
    running: Running, text: str, original: tuple[Any, Any], alone: dict[str, int]
) -> None:
    model, tokenizer = original
    ids = tokenizer.encode(PROMPT)
    logits = []
    steps = mlx_lm.generate.__globals__["generate_step"](mx.array(ids), model, max_tokens=LENGTH)
    tokens = []
    for token, row in steps:
        tokens.append(token)
        logits.append(np.array(row.astype(mx.float32)))
    for got in replies(running, logprobs=True, **alone):
        assert got[0] == said(got[2]) == text
    _, answer = running.post(
        {
            "messages": [{"role": "user", "content": PROMPT}], "max_tokens": LENGTH,
            "top_logprobs": 5, "logprobs": True, **alone,
        },
        "/v1/chat/completions",
    )  # fmt: skip
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [e["id"] for e in entries] == tokens
    for entry, row, token in zip(entries, logits, tokens, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        likeliest = entry["top_logprobs"]
        assert len(likeliest) == 5
        values = [t["logprob"] for t in likeliest]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(sorted(row.tolist(), reverse=True)[:5], abs=1e-4)
        assert likeliest[0]["id"] == token  # greedy
        assert likeliest[0]["token"] == entry["token"]
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_a_sampled_token_is_named_though_it_is_not_the_likeliest(running: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 3.0, "seed": 5, "logprobs": 1}
    _, answer = running.post(body)
    logprobs = answer["choices"][0]["logprobs"]
    text = answer["choices"][0]["text"]
    assert said(logprobs["tokens"]) == text
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert text[offset:].startswith(token)
    best = [max(top.values()) for top in logprobs["top_logprobs"]]
    assert any(a < b for a, b in zip(logprobs["token_logprobs"], best, strict=True))
    assert [e["logprob"] for e in logprobs["content"]] == logprobs["token_logprobs"]


def test_without_logprobs_there_are_none(running: Running) -> None:
    for options in ({}, {"logprobs": False}, {"top_logprobs": -1}):
        assert all(got[2] is None for got in replies(running, max_tokens=4, **options))


def test_the_client_gets_what_it_understands(running: Running, text: str) -> None:
    client = running.client()
    stop = text[6:10]
    cut = text[: text.find(stop)]
    whole = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=LENGTH, stop=stop, logprobs=3
    ).choices[0]
    assert (whole.text, whole.finish_reason) == (cut, "stop")
    assert whole.logprobs is not None
    assert said(whole.logprobs.tokens).startswith(cut)
    assert all(len(top) == 3 for top in whole.logprobs.top_logprobs or [])
    offsets = whole.logprobs.text_offset or []
    assert offsets == sorted(offsets)
    messages: Any = [{"role": "user", "content": PROMPT}]
    options = {
        "model": "demo", "messages": messages, "max_tokens": LENGTH, "stop": stop,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    reply = client.chat.completions.create(**options).choices[0]
    assert (reply.message.content, reply.finish_reason) == (cut, "stop")
    assert reply.logprobs is not None
    expected = [(t.token, t.logprob, len(t.top_logprobs)) for t in reply.logprobs.content or []]
    pieces = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == cut
    assert pieces[-2].choices[0].finish_reason == "stop"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens < LENGTH
    assert pieces[-1].object == "chat.completion.chunk"
    got = [
        (t.token, t.logprob, len(t.top_logprobs))
        for p in pieces
        if p.choices and p.choices[0].logprobs
        for t in p.choices[0].logprobs.content or []
    ]
    assert got == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 17),
        ("response_format", {"type": "grammar"}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("store", True),
        ("reasoning_effort", "low"),
        ("modalities", ["audio"]),
        ("prediction", {"type": "content", "content": "a"}),
        ("web_search_options", {}),
    ],
)
def test_what_the_server_cannot_do_it_says(running: Running, field: str, value: Any) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    with pytest.raises(openai.BadRequestError) as e:
        running.client().chat.completions.create(
            model="demo", messages=messages, max_tokens=1, **{field: value}
        )
    assert e.value.param == field
    assert field in e.value.message


def test_no_tools_are_shown_where_none_are_to_be_called(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    make = stock.CompletionRequest

    def noted(kind: str, prompt: str, messages: Any, tools: Any, roles: Any) -> Any:
        asked.append(tools)
        return make(kind, prompt, messages, tools, roles)

    monkeypatch.setattr(stock, "CompletionRequest", noted)
    tool: Any = {"type": "function", "function": {"name": "mkdir", "parameters": {}}}
    messages: Any = [{"role": "user", "content": PROMPT}]
    for choice in ("auto", "none"):
        running.client().chat.completions.create(
            model="demo", messages=messages, tools=[tool], tool_choice=choice, max_tokens=1
        )
    assert asked == [[tool], None]
