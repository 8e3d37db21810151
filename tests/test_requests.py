"""Each field of a request with bad values: status 400 names the field, other requests go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from conftest import until
from serving import Running, serving

from mlx_streamexperts.server._generation import restore_random_state, stock
from mlx_streamexperts.server._request_checks import CHAT_FIELDS, NO_EFFECT, TEXT_FIELDS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
pytestmark = pytest.mark.usefixtures("compiled")  # so random states reach samplers as for users

GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    TEXT: {"prompt": "a", "max_tokens": 2},
}
SAMPLED = {"prompt": "In the beginning", "max_tokens": 2, "temperature": 0.8}

HALF = "\ud800"
STRANGE: tuple[Any, ...] = ({}, {"a": 1}, [], [1], [None], [[]])
NOT_NUMBERS: tuple[Any, ...] = (True, False, "1", "", *STRANGE)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TOO_LARGE = (2**63, -(2**63) - 1, 10**400)
INTEGERS = (*NOT_NUMBERS, *NOT_FINITE, *TOO_LARGE, 0.5, 1.0, -2)
FLOATS = (*NOT_NUMBERS, *NOT_FINITE, 1e31, -1e31, 10**400)
TEXTS = (True, 0, 1.5, HALF, *STRANGE)
FLAGS = (0, 1, "true", 2**63, *STRANGE)
OBJECTS = (True, 0, 1.5, 2**63, "a", [], [1])

DEEP: dict[str, Any] = {}
for _ in range(600):
    DEEP = {"a": DEEP}
BAD: dict[str, tuple[Any, ...]] = {
    "adapters": TEXTS,
    "best_of": (2, 0, True, 1.0, "1", 2**63),
    "chat_template_kwargs": (*OBJECTS, {"chat_template": "a"}, {"a": HALF}, {"a": NOT_FINITE[0]}),
    "draft_model": TEXTS,
    "echo": (True, 1, "false"),
    "frequency_context_size": INTEGERS,
    "frequency_penalty": FLOATS,
    "logit_bias": (
        True, 1, "a", [], {"a": 1}, {"1": "a"}, {"1": "1"}, {"1": True}, {"1": None}, {"1": []},
        {"1": NOT_FINITE[0]}, {"1": NOT_FINITE[1]}, {"1": 1e31}, {"1": 10**400}, {"1.0": 1},
        {" 1": 1}, {"-1": 1}, {"99999999": 1}, {str(2**63): 1}, {"9" * 5000: 1}, {HALF: 1},
    ),
    "logprobs": (-1, 12, 2**63, 1.0, "1", *NOT_FINITE, *STRANGE),
    "lossy": (*INTEGERS, 1, 4),
    "max_completion_tokens": (*INTEGERS, 0),
    "max_tokens": (*INTEGERS, 0),
    "messages": (
        True, 1, "a", {}, [], [1], [{}], [{"role": 1, "content": "a"}], [{"content": "a"}],
        [{"role": HALF, "content": "a"}], [{"role": "user", "content": HALF}],
        [{"role": "user", "content": 1}], [{"role": "user", "content": True}],
        [{"role": "user", "content": [1]}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": HALF}]}],
        [{"role": "user", "content": [{"type": 1, "text": "a"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]}],
        [{"role": "user", "content": "a", "name": 1}],
        *([{"role": "assistant", "content": "a", k: 1}, {"role": "user", "content": "a"}]
          for k in ("reasoning", "reasoning_content", "tool_call_id")),
        [{"role": "assistant", "content": "a", "tool_calls": 1}],
        [{"role": "assistant", "content": "a", "tool_calls": [1]}],
        [{"role": "assistant", "content": "a", "tool_calls": [{"function": 1}]}],
        [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": 1}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "a"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[" * 99}}]}],
        [{"role": "user", "content": ""}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": DEEP}}]}],
    ),
    "metadata": (*OBJECTS, {"a": HALF}),
    "min_p": (*FLOATS, -0.1, 1.1),
    "modalities": ("text", ["audio"], ["text", "audio"], 1, True),
    "model": TEXTS,
    "n": (17, 0, -1, True, 1.0, "1", *TOO_LARGE, *NOT_FINITE),
    "num_draft_tokens": (*INTEGERS, 65),
    "parallel_tool_calls": (0, 1, "true"),
    "presence_context_size": INTEGERS,
    "presence_penalty": FLOATS,
    "prompt": (
        True, 1, 1.5, HALF, "a" + HALF, "", {}, [], [""], [[]], ["a", 1], [[1], 1], [HALF], [-1],
        [[-1]], [10**9], ["a"] * 17,
    ),
    "prompt_cache_key": TEXTS,
    "prompt_cache_retention": TEXTS,
    "reasoning_effort": ("low", 1),  # of a template that does not have it
    "repetition_context_size": INTEGERS,
    "repetition_penalty": (*FLOATS, -0.1),
    "response_format": (
        "text", {}, {"type": "xml"}, {"type": "json_schema"}, 1, True,
        *({"type": "json_schema", "json_schema": s} for s in ({}, {"schema": {"type": "foo"}})),
    ),
    "role_mapping": (*OBJECTS, {"user": 1}, {"user": HALF}),
    "safety_identifier": TEXTS,
    "seed": INTEGERS,
    "service_tier": ("priority", 1),
    "stop": (True, 1, 1.5, {}, [1], [None], [""], "", [True], HALF, [HALF], ["a"] * 65),
    "store": (True, 0, "false"),
    "stream": FLAGS,
    "stream_options": (*OBJECTS, {"include_usage": 1}, {"other": True}),
    "suffix": ("a", 1, True),
    "temperature": (*FLOATS, -0.1, 1e-300),
    "tool_choice": ("required", {"type": "function", "function": {"name": "f"}}, 1, True, ""),
    "tools": (True, 1, "a", {}, [1], [{}], [{"function": 1}], [{"function": {"name": 1}}],
        [{"function": {"name": "f", "parameters": 5}}],
        [{"function": {"name": "f", "description": ["a"]}}],
        [{"function": {"name": "f", "strict": "a"}}],
        [{"type": "custom", "function": {"name": "f"}}],
              [{"function": {"name": HALF}}]),
    "top_k": (*INTEGERS, 10**9),
    "top_logprobs": (*INTEGERS, 12),
    "top_p": (*FLOATS, -0.1, 1.1),
    "user": TEXTS,
    "xtc_probability": (*FLOATS, -0.1, 1.1),
    "xtc_threshold": (*FLOATS, -0.1, 1.1),
}  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving("--cache", "10MB", "--chat-template", "{{ messages[0].content }}") as running:
        yield running


def fields(path: str) -> dict[str, Any]:
    return CHAT_FIELDS if path == CHAT else TEXT_FIELDS


def test_there_are_bad_values_of_every_field() -> None:
    assert BAD.keys() == CHAT_FIELDS.keys() | TEXT_FIELDS.keys()


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("field", sorted(BAD))
def test_bad_values(running: Running, field: str, path: str) -> None:
    for value in BAD[field]:
        if field == "logprobs" and path == CHAT and isinstance(value, bool):
            continue
        status, answer = running.post({**GOOD[path], field: value}, path)
        assert status == 400, (value, answer)
        error = answer["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == field, (value, error)
    # And nobody else notices: a sampler's state is everybody's.
    status, answer = running.post(SAMPLED)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_that_nobody_knows_are_refused(running: Running, path: str) -> None:
    other = (BAD.keys() - fields(path).keys()) | {"audio", "functions", "prediction", "typo"}
    for field in sorted(other):
        status, answer = running.post({**GOOD[path], field: 1}, path)
        assert (status, answer["error"]["param"]) == (400, field)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_without_effect_are_accepted(running: Running, path: str) -> None:
    good = {
        "metadata": {"a": "b"}, "prompt_cache_key": "a", "prompt_cache_retention": "24h",
        "safety_identifier": "a", "service_tier": "auto", "store": False, "user": "a",
    }  # fmt: skip
    assert good.keys() == NO_EFFECT.keys()
    if path == CHAT:
        good |= {
            "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"],
            "parallel_tool_calls": True,
        }  # fmt: skip
    else:
        good |= {"best_of": 1, "echo": False, "suffix": ""}
    status, answer = running.post({**GOOD[path], **good, "n": 1}, path)
    assert status == 200, answer
    assert len(answer["choices"]) == 1


def test_all_sampling_fields_work_together(running: Running) -> None:
    fields = {
        "temperature": 2, "top_p": 0.9, "top_k": 5, "min_p": 0, "xtc_probability": 1,
        "xtc_threshold": 0.1, "repetition_penalty": 1.1, "repetition_context_size": 4,
        "presence_penalty": -1, "presence_context_size": 0, "frequency_penalty": 1e9,
        "frequency_context_size": 2**31 - 1, "logit_bias": {"5": -100, "7": 1.5},
    }  # fmt: skip
    for seed in ({}, {"seed": 2**63 - 1}):
        status, answer = running.post({**GOOD[TEXT], **fields, **seed})
        assert status == 200, answer


@pytest.mark.parametrize(
    "field", ["temperature", "frequency_penalty", "presence_penalty", "repetition_penalty"]
)
def test_a_whole_number_may_be_as_large_as_a_fraction(running: Running, field: str) -> None:
    """MLX takes no integers above 64 bits."""
    status, answer = running.post({"prompt": "a", "max_tokens": 2, field: 10**29})
    assert status == 200, answer


@pytest.mark.parametrize("value", [HALF, float("nan"), DEEP])
@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/messages", "/v1/responses", "/api/chat"])
def test_what_no_field_of_any_api_can_have(running: Running, path: str, value: Any) -> None:
    """Nor one that has no effect, or a part of a message that nobody knows."""
    asked = {
        CHAT: GOOD[CHAT], TEXT: GOOD[TEXT], "/v1/messages": GOOD[CHAT],
        "/v1/responses": {"input": GOOD[CHAT]["messages"]},
        "/api/chat": {"model": "default_model", "messages": GOOD[CHAT]["messages"]},
    }[path]  # fmt: skip
    fields = ["metadata"] if path != "/api/chat" else []
    fields += [f for f in ("messages", "input") if f in asked]
    for field in fields:
        inner = {"a": value}
        given = inner if field == "metadata" else [{**asked[field][0], **inner}]
        status, answer = running.post({**asked, field: given}, path)
        assert status == 400, field
        assert field in str(answer["error"])


def test_what_no_table_can_have(running: Running) -> None:
    deep = b"[" * 800 + b"]" * 800
    for raw, status in (
        (b'{"prompt": "a", "max_tokens": 1, "metadata": {"a": ' + deep + b"}}", None),
        (b'{"prompt": "a", "max_tokens": ' + b"1" * 5000 + b"}", 400),
        (b'{"prompt": "a", "max_tokens": -Infinity}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}', 200),  # two halves are a whole
        (b'{"\\ud83d": "a"}', 400),
    ):
        got, answer = running.post(raw)
        assert got == status or (status is None and got in (200, 400)), answer
    assert running.post(SAMPLED)[0] == 200


def broken(*_: Any) -> Any:
    raise RuntimeError("it does not work")


@pytest.mark.parametrize("what", ["_make_sampler", "_make_logits_processors"])
@pytest.mark.parametrize("alone", [{}, {"seed": 1}])
@pytest.mark.parametrize("when", ["made", "used"])
def test_what_cannot_be_made_for_one_request_fails_that_one_alone(
    running: Running,
    what: str,
    when: str,
    alone: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = running.text("In the beginning", 40)
    original = getattr(stock, what)

    def make(args: Any, *rest: Any) -> Any:
        if args.sampling.top_k != 7:
            return original(args, *rest)
        if when == "made":
            broken()
        return broken if what == "_make_sampler" else [broken]

    others: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(stock, what, make)
        before = running.figures()["traffic"]["tokens"]
        thread = threading.Thread(
            target=lambda: others.append(running.text("In the beginning", 40))
        )
        thread.start()
        until(lambda: running.figures()["traffic"]["tokens"] > before)
        status, answer = running.post({**SAMPLED, "top_k": 7, **alone})
        thread.join(60)
    assert status == 400, answer
    assert others == [text]
    assert running.post(SAMPLED)[0] == 200


def test_after_a_failed_batch_random_numbers_are_there_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = mx.compile(
        lambda x: x[{}],
        inputs=mx.random.state,
        outputs=mx.random.state,  # it fails while traced
    )
    original = stock._make_sampler
    for alone in ({}, {"seed": 1}):
        uses: list[int] = []

        def make(args: Any, *rest: Any, uses: list[int] = uses) -> Any:
            def sampler(logprobs: mx.array) -> mx.array:
                uses.append(1)
                if len(uses) > 2:  # it has been tried, and has worked
                    compiled(mx.random.uniform(shape=(2,)))
                return mx.argmax(logprobs, axis=-1)

            return sampler if args.sampling.top_k == 7 else original(args, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(stock, "_make_sampler", make)
            status, answer = running.post({**SAMPLED, "max_tokens": 9, "top_k": 7, **alone})
        assert status == 500, answer
        for _ in range(2):
            assert running.post(SAMPLED)[0] == 200


def test_a_restore_random_state_is_left_as_it_is() -> None:
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    restore_random_state()
    assert mx.random.uniform(shape=(4,)).tolist() == expected
