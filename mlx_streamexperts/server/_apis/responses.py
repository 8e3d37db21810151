"""OpenAI's responses, without state: /v1/responses. Nothing is kept between requests."""

from __future__ import annotations

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
from .form import Form, Usage, added, event
from .openai import openai_error

FIELDS: dict[str, Check] = {
    "background": one_of(False),
    "include": unless(
        lambda v: v in ([], ["reasoning.encrypted_content"]),
        "can only be ['reasoning.encrypted_content'], and reasoning comes as plain text",
    ),
    "input": unless(lambda v: isinstance(v, str | list), "must be a string or a list"),
    "instructions": a_text,
    "max_output_tokens": integer(1),
    "metadata": an_object,
    "model": a_text,
    "parallel_tool_calls": a_flag,
    "previous_response_id": unless(
        lambda v: False, "cannot be used: this server keeps no responses; send the whole input"
    ),
    "prompt_cache_key": a_text,
    "prompt_cache_retention": a_text,
    "reasoning": an_object,
    "safety_identifier": a_text,
    "service_tier": one_of("auto", "default"),
    "store": one_of(False),
    "stream": a_flag,
    "stream_options": an_object,
    "temperature": number(0),
    "text": an_object,
    "tool_choice": unless(lambda v: isinstance(v, str | dict), "must be a string or an object"),
    "tools": a_list,
    "top_p": number(0, 1),
    "truncation": one_of("disabled"),
    "user": a_text,
}
"""Fields of a request."""

_TOOL_FIELDS: dict[str, Check] = {
    "description": a_text,
    "name": a_text,
    "parameters": an_object,
    "strict": a_flag,
    "type": one_of("function"),
}
_TEXTS = ("input_text", "output_text", "text")


class ResponsesForm(Form):
    """/v1/responses."""

    names: ClassVar = {"messages": "input", "response_format": "text.format"}

    def __init__(self, fingerprint: str) -> None:
        super().__init__(fingerprint)
        self._id, self._number = f"resp_{uuid.uuid4().hex}", 0
        self._given: dict[str, Any] = {}
        self._blocks, self._last = Blocks(), Piece()
        self._items: dict[int, str] = {}  # ids by number of the block

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        self._given = given = check_fields(body, FIELDS)
        if "input" not in given:
            raise wrong("input", "is required")
        chat: dict[str, Any] = {"messages": _messages(given["input"], given.get("instructions"))}
        for key in ("model", "parallel_tool_calls", "stream", "temperature", "top_p"):
            if key in given:
                chat[key] = given[key]
        if "max_output_tokens" in given:
            chat["max_tokens"] = given["max_output_tokens"]
        if "tools" in given:
            chat["tools"] = [_tool(t, f"tools[{i}]") for i, t in enumerate(given["tools"])]
        choice = given.get("tool_choice")
        if isinstance(choice, dict):
            named = check_fields(
                choice, {"type": one_of("function"), "name": a_text}, "tool_choice"
            )
            choice = {"type": "function", "function": {"name": named.get("name")}}
        if choice is not None:
            chat["tool_choice"] = choice
        chat |= _text_options(given.get("text", {}))
        thinks = check_fields(
            given.get("reasoning", {}),
            {"effort": a_text, "summary": one_of("auto", "concise", "detailed")},
            "reasoning",
        )
        if "effort" in thinks:
            chat["chat_template_kwargs"] = {"reasoning_effort": thinks["effort"]}
        check_fields(
            given.get("stream_options", {}), {"include_obfuscation": a_flag}, "stream_options"
        )
        return chat

    def begin(self, usage: Usage) -> bytes:
        begun = {"response": self._response("in_progress", [], None, None)}
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def piece(self, choice: int, piece: Piece) -> bytes:
        self._last = piece
        return b"".join(self._step(step) for step in self._blocks.add(piece))

    def end(self, usage: Usage) -> bytes:
        cut = self._last.finish_reason == "length"
        closed = b"".join(self._step(step) for step in self._blocks.close(cut))
        response = self._finished(self._blocks.all, self._last, usage)
        return closed + self._event(f"response.{response['status']}", {"response": response})

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        return self._finished(blocks_of(choices[0]), added(choices[0]), usage)

    def error(self, refused: Refused) -> dict[str, Any]:
        return openai_error(refused)

    def error_event(self, refused: Refused) -> bytes:
        told = {"code": refused.code, "message": refused.message, "param": refused.param}
        code = "server_error" if refused.status >= 500 else "invalid_prompt"
        for _ in self._blocks.close(cut=True):
            pass
        output = [self._item(block, _status(block)) for block in self._blocks.all]
        error = {"code": code, "message": refused.message}
        failed = {"response": self._response("failed", output, None, None) | {"error": error}}
        return self._event("error", told) + self._event("response.failed", failed)

    def _event(self, kind: str, data: dict[str, Any]) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **data}, kind)

    def _step(self, step: Step) -> bytes:
        """What happens to a block, as events of its item."""
        what, block, text = step
        at: dict[str, Any] = {"output_index": block.number}
        if what != "more":
            status = "in_progress" if what == "begin" else _status(block)
            begun = Block(block.kind, block.number, "", block.call) if what == "begin" else block
            item = {**at, "item": self._item(begun, status)}
        at["item_id"] = self._item_id(block)
        if block.call is not None:
            if what == "begin":
                return self._event("response.output_item.added", item)
            if what == "more":
                kind = "response.function_call_arguments.delta"
                return self._event(kind, {**at, "delta": text})
            said = {**at, "arguments": block.text, "name": block.call.name}
            done = self._event("response.function_call_arguments.done", said)
            return done + self._event("response.output_item.done", item)
        at["content_index"] = 0
        name = "response.reasoning_text" if block.kind == "reasoning" else "response.output_text"
        extra: dict[str, Any] = {} if block.kind == "reasoning" else {"logprobs": []}
        if what == "begin":
            part = {**at, "part": _part(begun)}
            added_ = self._event("response.output_item.added", item)
            return added_ + self._event("response.content_part.added", part)
        if what == "more":
            return self._event(f"{name}.delta", {**at, "delta": text, **extra})
        done = self._event(f"{name}.done", {**at, "text": block.text, **extra})
        done += self._event("response.content_part.done", {**at, "part": _part(block)})
        return done + self._event("response.output_item.done", item)

    def _item_id(self, block: Block) -> str:
        prefix = {"reasoning": "rs", "text": "msg", "call": "fc"}[block.kind]
        return self._items.setdefault(block.number, f"{prefix}_{uuid.uuid4().hex}")

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        """An item of the output."""
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.call is not None:
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": block.text}
            return {"type": "function_call", **item, **call}
        content = [] if status == "in_progress" else [_part(block)]
        if block.kind == "reasoning":
            return {"type": "reasoning", **item, "summary": [], "content": content}
        return {"type": "message", **item, "role": "assistant", "content": content}

    def _finished(self, blocks: list[Block], last: Piece, usage: Usage) -> dict[str, Any]:
        cut = last.finish_reason == "length"
        output = [self._item(block, _status(block)) for block in blocks]
        reason = {"reason": "max_output_tokens"} if cut else None
        return self._response("incomplete" if cut else "completed", output, usage, reason)

    def _response(
        self,
        status: str,
        output: list[dict[str, Any]],
        usage: Usage | None,
        incomplete: dict[str, Any] | None,
    ) -> dict[str, Any]:
        given = self._given
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": given.get("instructions"),
            "max_output_tokens": given.get("max_output_tokens"),
            "metadata": given.get("metadata", {}),
            "model": given.get("model", "default_model"),
            "output": output,
            "parallel_tool_calls": given.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": given.get("reasoning", {}),
            "store": False,
            "temperature": given.get("temperature"),
            "text": given.get("text", {"format": {"type": "text"}}),
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_p": given.get("top_p"),
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": given.get("user"),
        }


def _status(block: Block) -> str:
    """Of an item whose block has ended."""
    return "incomplete" if block.cut else "completed"


def _part(block: Block) -> dict[str, Any]:
    """The content of an item of text or reasoning."""
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _messages(given: Any, instructions: str | None) -> list[dict[str, Any]]:
    """The messages of a chat. What the model has said between two others' turns is one message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    open_: dict[str, Any] | None = None  # the model's message that further items belong to
    for i, item in enumerate(objects(items, "input")):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            message = _message(item, where)
            before = messages[-1] if messages else {}
            if message["role"] == "system" == before.get("role"):  # templates take one
                before["content"] = f"{before['content']}\n\n{message['content']}"
            else:
                messages.append(message)
            open_ = None
        elif kind == "function_call_output":
            messages.append(_output(item, where))
            open_ = None
        elif kind in ("message", "reasoning", "function_call"):
            if open_ is None:
                open_ = {"role": "assistant", "content": ""}
                messages.append(open_)
            _add(open_, kind, item, where)
        else:
            raise wrong(f"{where}.type", f"is {kind!r}, which this server does not know")
    return messages


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "system", "developer"):
        raise wrong(f"{where}.role", "must be 'user', 'assistant', 'system' or 'developer'")
    content = item.get("content")
    if role != "user":
        return {"role": "system", "content": _text(content, f"{where}.content")}
    if isinstance(content, str):
        return {"role": role, "content": content}
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(objects(content, f"{where}.content")):
        place = f"{where}.content[{i}]"
        if part.get("type") in _TEXTS:
            parts.append({"type": "text", "text": text_of(part.get("text"), f"{place}.text")})
        elif part.get("type") == "input_image":
            url = text_of(part.get("image_url"), f"{place}.image_url")
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            raise wrong(f"{place}.type", "must be 'input_text' or 'input_image'")
    return {"role": role, "content": parts}


def _text(content: Any, where: str) -> str:
    """Text that may come in parts."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(objects(content, where)):
        if part.get("type") not in _TEXTS:
            raise wrong(f"{where}[{i}].type", f"must be one of {', '.join(_TEXTS)}")
        texts.append(text_of(part.get("text"), f"{where}[{i}].text"))
    return "".join(texts)


def _output(item: dict[str, Any], where: str) -> dict[str, Any]:
    called = text_of(item.get("call_id"), f"{where}.call_id")
    return {
        "role": "tool",
        "tool_call_id": called,
        "content": _text(item.get("output"), f"{where}.output"),
    }


def _add(message: dict[str, Any], kind: str, item: dict[str, Any], where: str) -> None:
    """Add something that the model has said to its message."""
    if kind == "message":
        message["content"] += _text(item.get("content"), f"{where}.content")
    elif kind == "function_call":
        name, arguments, called = (
            text_of(item.get(key), f"{where}.{key}") for key in ("name", "arguments", "call_id")
        )
        function = {"name": name, "arguments": arguments}
        calls = message.setdefault("tool_calls", [])
        calls.append({"id": called, "type": "function", "function": function})
    else:
        said, content = "", item.get("content")
        for part in objects([] if content is None else content, f"{where}.content"):
            said += text_of(part.get("text"), f"{where}.content.text")
        if said:
            message["reasoning_content"] = message.get("reasoning_content", "") + said


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong(where, "must be an object")
    if (kind := tool.get("type")) != "function":
        raise wrong(f"{where}.type", f"is {kind!r}: this server knows functions alone")
    given = check_fields(tool, _TOOL_FIELDS, where)
    function = {key: given[key] for key in ("name", "description", "parameters") if key in given}
    return {"type": "function", "function": function}


def _text_options(value: dict[str, Any]) -> dict[str, Any]:
    given = check_fields(value, {"format": an_object, "verbosity": one_of("medium")}, "text")
    form = given.get("format", {})
    if form.get("type") != "json_schema":
        return {"response_format": form} if form else {}
    stated = {key: value for key, value in form.items() if key != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": stated}}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
