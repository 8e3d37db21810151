"""Anthropic's messages: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from .._field_checks import (
    Check,
    a_flag,
    a_list,
    a_text,
    an_object,
    check_fields,
    integer,
    number,
    objects,
    one_of,
    text_of,
    unless,
    wrong,
)
from .._refusals import Refused
from .._replies import Piece
from .blocks import Block, Blocks, Step, blocks_of
from .form import Form, Usage, added, check_last, event

_ANY: Check = lambda value: None  # noqa: E731, checked where it is translated

FIELDS: dict[str, Check] = {
    "cache_control": an_object,  # no effect: every prompt is remembered
    "context_management": _ANY,
    "max_tokens": integer(1),
    "messages": a_list,
    "metadata": an_object,
    "model": a_text,
    "output_config": an_object,
    "service_tier": one_of("auto", "standard_only"),
    "speed": one_of("standard"),
    "stop_sequences": a_list,
    "stream": a_flag,
    "system": _ANY,
    "temperature": number(0),
    "thinking": an_object,
    "tool_choice": an_object,
    "tools": a_list,
    "top_k": integer(),
    "top_p": number(0, 1),
}
"""Fields of a request."""

_TOOL_FIELDS: dict[str, Check] = {
    "allowed_callers": unless(lambda v: v == ["direct"], "must be ['direct']"),
    "cache_control": an_object,
    "defer_loading": one_of(False),
    "description": a_text,
    "eager_input_streaming": a_flag,
    "input_schema": an_object,
    "name": a_text,
    "strict": a_flag,
    "type": one_of("custom"),
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_BILLING = "x-anthropic-billing-header:"
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class MessagesForm(Form):
    """/v1/messages."""

    names: ClassVar = {"response_format": "output_config.format", "stop": "stop_sequences"}
    needed: tuple[str, ...] = ("messages", "max_tokens")

    def __init__(self, fingerprint: str) -> None:
        super().__init__(fingerprint)
        self._id, self._model = f"msg_{uuid.uuid4().hex}", "default_model"
        self._blocks, self._last = Blocks(), Piece()
        self._omits = False  # the text of reasoning; its block comes all the same

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        given = check_fields(body, FIELDS)
        for key in self.needed:
            if key not in given:
                raise wrong(key, "is required")
        self._model = given.get("model", self._model)
        chat: dict[str, Any] = {"messages": _system(given.get("system"))}
        for i, message in enumerate(objects(given["messages"], "messages")):
            for said in _messages(message, f"messages[{i}]"):
                _say(chat["messages"], said)
        if self.count(0) is None:  # a reply is wanted
            check_last(chat["messages"])
        for key in ("max_tokens", "model", "stream", "temperature", "top_k", "top_p"):
            if key in given:
                chat[key] = given[key]
        if given.get("stop_sequences"):
            chat["stop"] = given["stop_sequences"]
        if "tools" in given:
            chat["tools"] = [_tool(t, f"tools[{i}]") for i, t in enumerate(given["tools"])]
        if "tool_choice" in given:
            chat |= _tool_choice(given["tool_choice"])
        settings = _thinking(given.get("thinking"))
        self._omits = given.get("thinking", {}).get("display") == "omitted"
        config = check_fields(
            given.get("output_config", {}),
            {"effort": one_of(*_EFFORTS), "format": an_object},
            "output_config",
        )
        if "effort" in config:
            settings["reasoning_effort"] = _EFFORTS[config["effort"]]
        if "format" in config:
            chat["response_format"] = _format(config["format"])
        _check_context_management(given.get("context_management"))
        if settings:
            chat["chat_template_kwargs"] = settings
        return chat

    def begin(self, usage: Usage) -> bytes:
        message = self._message([], None, usage)
        return event({"type": "message_start", "message": message}, "message_start")

    def piece(self, choice: int, piece: Piece) -> bytes:
        self._last = piece
        steps = self._blocks.add(piece)
        return b"".join(_event(*s) for s in steps if not self._hides(s))

    def end(self, usage: Usage) -> bytes:
        closed = b"".join(_event(*step) for step in self._blocks.close())
        delta = {"type": "message_delta", "delta": _ending(self._last), "usage": _usage(usage)}
        last = event(delta, "message_delta") + event({"type": "message_stop"}, "message_stop")
        return closed + last

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        blocks = blocks_of(choices[0])
        for block in blocks:
            if self._hides(("more", block, "")):
                block.text = ""
        content = [_content(block) for block in blocks]
        return self._message(content, added(choices[0]), usage)

    def _hides(self, step: Step) -> bool:
        """Is this text of reasoning that the client does not want to see?"""
        return self._omits and step[0] == "more" and step[1].kind == "reasoning"

    def _message(
        self, content: list[dict[str, Any]], last: Piece | None, usage: Usage
    ) -> dict[str, Any]:
        ending = {"stop_reason": None, "stop_sequence": None} if last is None else _ending(last)
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **ending,
            "usage": _usage(usage),
        }

    def error(self, refused: Refused) -> dict[str, Any]:
        kind = "api_error" if refused.status >= 500 else "invalid_request_error"
        kind = _ERRORS.get(refused.status, kind)
        return {"type": "error", "error": {"type": kind, "message": refused.message}}

    def error_event(self, refused: Refused) -> bytes:
        return event(self.error(refused), "error")


class CountForm(MessagesForm):
    """/v1/messages/count_tokens."""

    needed = ("messages",)

    def count(self, tokens: int) -> dict[str, Any] | None:
        return {"input_tokens": tokens}


def _system(value: Any) -> list[dict[str, Any]]:
    """The system prompt as messages: one, or none."""
    if value is None:
        return []
    parts = [value] if isinstance(value, str) else _texts(value, "system")
    # Claude Code puts this line first, for Anthropic's accounts. It differs in every request, and
    # no prompt after it could be found in the prompt cache.
    parts = [p for p in parts if not p.startswith(_BILLING)]
    return [{"role": "system", "content": "\n\n".join(parts)}] if parts else []


def _texts(value: Any, where: str) -> list[str]:
    """The texts of a list of blocks of text."""
    texts = []
    for i, block in enumerate(objects(value, where)):
        if block.get("type") != "text":
            raise _unknown_block(block, f"{where}[{i}]")
        texts.append(text_of(block.get("text"), f"{where}[{i}].text"))
    return texts


def _unknown_block(block: dict[str, Any], where: str) -> Refused:
    return wrong(where, f"has type {block.get('type')!r}, which this server does not know here")


def _messages(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message of theirs as messages of a chat: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise wrong(f"{where}.role", "must be 'user', 'assistant' or 'system'")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = objects(content, f"{where}.content")
    if role == "assistant":
        return [_assistant(blocks, f"{where}.content")]
    found: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        place = f"{where}.content[{i}]"
        kind = block.get("type")
        if kind == "text":
            parts.append({"type": "text", "text": text_of(block.get("text"), f"{place}.text")})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image(block, place)}})
        elif kind == "tool_result":
            if parts:
                found.append({"role": role, "content": parts})
                parts = []
            found.append(_result(block, place))
        else:
            raise _unknown_block(block, place)
    if parts:
        found.append({"role": role, "content": parts})
    return found


def _say(messages: list[dict[str, Any]], said: dict[str, Any]) -> None:
    """Add a message. A user's turns in a row are one: templates refuse two (Gemma, Mistral)."""
    last = messages[-1] if messages else {}
    if not last.get("role") == said["role"] == "user":
        messages.append(said)
        return
    both = [
        [{"type": "text", "text": content}] if isinstance(content, str) else content
        for content in (last["content"], said["content"])
    ]
    last["content"] = [*both[0], {"type": "text", "text": "\n\n"}, *both[1]]


def _image(block: dict[str, Any], where: str) -> str:
    source = block.get("source")
    if isinstance(source, dict) and source.get("type") == "url":
        return text_of(source.get("url"), f"{where}.source.url")
    if isinstance(source, dict) and source.get("type") == "base64":
        kind = text_of(source.get("media_type"), f"{where}.source.media_type")
        data = text_of(source.get("data"), f"{where}.source.data")
        return f"data:{kind};base64,{data}"
    raise wrong(f"{where}.source", "must be of type 'base64' or 'url'")


def _result(block: dict[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    if not isinstance(content, str):
        texts = [] if content is None else _texts(content, f"{where}.content")
        content = "\n".join(texts)
    error = block.get("is_error")
    if error is not None and (must := a_flag(error)) is not None:
        raise wrong(f"{where}.is_error", must)
    if error:
        content = f"Error: {content}"
    called = text_of(block.get("tool_use_id"), f"{where}.tool_use_id")
    return {"role": "tool", "tool_call_id": called, "content": content}


def _assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for i, block in enumerate(blocks):
        kind, place = block.get("type"), f"{where}[{i}]"
        if kind == "text":
            message["content"] += text_of(block.get("text"), f"{place}.text")
        elif kind == "thinking":
            before = message.get("reasoning_content", "")
            said = text_of(block.get("thinking"), f"{place}.thinking")
            message["reasoning_content"] = before + said
        elif kind == "tool_use":
            if not isinstance(block.get("input"), dict):
                raise wrong(f"{place}.input", "must be an object")
            name = text_of(block.get("name"), f"{place}.name")
            function = {"name": name, "arguments": json.dumps(block["input"])}
            called = text_of(block.get("id"), f"{place}.id")
            calls.append({"id": called, "type": "function", "function": function})
        else:
            raise _unknown_block(block, place)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong(where, "must be an object")
    if isinstance(kind := tool.get("type"), str) and kind != "custom":
        raise wrong(f"{where}.type", f"is {kind!r}: this server runs no tools of its own")
    given = check_fields(tool, _TOOL_FIELDS, where)
    function = {"name": text_of(given.get("name"), f"{where}.name")}
    if "description" in given:
        function["description"] = given["description"]
    function["parameters"] = given.get("input_schema", {"type": "object"})
    return {"type": "function", "function": function}


def _tool_choice(value: dict[str, Any]) -> dict[str, Any]:
    given = check_fields(
        value,
        {"type": one_of(*_CHOICES, "tool"), "name": a_text, "disable_parallel_tool_use": a_flag},
        "tool_choice",
    )
    kind = given.get("type")
    chat: dict[str, Any] = {"parallel_tool_calls": not given.get("disable_parallel_tool_use")}
    if kind == "tool":
        name = text_of(given.get("name"), "tool_choice.name")
        return {**chat, "tool_choice": {"type": "function", "function": {"name": name}}}
    if kind is None:
        raise wrong("tool_choice.type", "is required")
    return {**chat, "tool_choice": _CHOICES[kind]}


def _thinking(value: dict[str, Any] | None) -> dict[str, Any]:
    """For templates that can turn reasoning off. How long it may be, no template says."""
    if value is None:
        return {}
    kinds = one_of("enabled", "adaptive", "disabled")
    shown = one_of("summarized", "omitted")
    fields = {"type": kinds, "budget_tokens": integer(), "display": shown}
    given = check_fields(value, fields, "thinking")
    if "type" not in given:
        raise wrong("thinking.type", "is required")
    return {"enable_thinking": given["type"] != "disabled"}


def _format(value: dict[str, Any]) -> dict[str, Any]:
    given = check_fields(
        value, {"type": one_of("json_schema"), "schema": an_object}, "output_config.format"
    )
    if "schema" not in given:
        raise wrong("output_config.format.schema", "is required")
    stated = {"name": "output", "schema": given["schema"]}
    return {"type": "json_schema", "json_schema": stated}


def _check_context_management(value: Any) -> None:
    """Only what changes nothing: to keep all reasoning."""
    kept = {"type": "clear_thinking_20251015", "keep": "all"}
    if value not in (None, {}, {"edits": []}, {"edits": [kept]}):
        raise wrong("context_management", "can only keep all reasoning; leave it out")


def _content(block: Block) -> dict[str, Any]:
    """A block of a whole reply."""
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.call is None:
        return {"type": "text", "text": block.text}
    arguments = json.loads(block.text)
    inputs = arguments if isinstance(arguments, dict) else {"arguments": arguments}
    return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": inputs}


_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _event(what: str, block: Block, text: str) -> bytes:
    """What happens to a block, as an event."""
    data: dict[str, Any]
    if what == "begin":
        begun = Block(block.kind, block.number, "{}" if block.call else "", block.call)
        data = {"type": "content_block_start", "content_block": _content(begun)}
    elif what == "more":
        kind, field = _DELTAS[block.kind]
        data = {"type": "content_block_delta", "delta": {"type": kind, field: text}}
    else:
        data = {"type": "content_block_stop"}
    return event({**data, "index": block.number}, data["type"])


def _ending(last: Piece) -> dict[str, Any]:
    reason = _REASONS[last.finish_reason or "stop"]
    if last.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": last.stop}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }
