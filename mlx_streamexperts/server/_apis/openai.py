"""OpenAI's chat completions and completions, the server's own form."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from .._refusals import Refused
from .._replies import Call, Piece, completion_logprobs
from .form import Form, Usage, added, event


class OpenAIForm(Form):
    """What both have in common."""

    object = event_object = ""
    prefix = ""

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        self._id = f"{self.prefix}-{uuid.uuid4()}"
        self._model = body.get("model") or "default_model"
        options = body.get("stream_options")
        self._tells_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return body

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self.created,
            "model": self._model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        nothing: dict[str, Any] = {"usage": None} if self._tells_usage else {}
        return event({**self._head(self.event_object, [choice]), **nothing})

    def end(self, usage: Usage) -> bytes:
        last = b""
        if self._tells_usage:
            last = event({**self._head(self.event_object, []), "usage": _usage(usage)})
        return last + b"data: [DONE]\n\n"

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        written = [self._choice(i, added(pieces)) for i, pieces in enumerate(choices)]
        return {**self._head(self.object, written), "usage": _usage(usage)}

    def _choice(self, choice: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def error(self, refused: Refused) -> dict[str, Any]:
        return openai_error(refused)


class ChatForm(OpenAIForm):
    """/v1/chat/completions."""

    object, event_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, fingerprint: str) -> None:
        super().__init__(fingerprint)
        self._calls: dict[int, int] = {}  # tool calls sent so far, by choice

    def piece(self, choice: int, piece: Piece) -> bytes:
        delta: dict[str, Any] = {}
        if choice not in self._calls:
            self._calls[choice], delta["role"] = 0, "assistant"
        if piece.text:
            delta["content"] = piece.text
        delta |= _reasoning(piece)
        if piece.calls:
            first = self._calls[choice]
            delta["tool_calls"] = [
                {"index": first + i, **_call(c)} for i, c in enumerate(piece.calls)
            ]
            self._calls[choice] += len(piece.calls)
        written = {"index": choice, "delta": delta, "finish_reason": piece.finish_reason}
        return self._chunk(written | _logprobs(piece))

    def _choice(self, choice: int, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": piece.text or (None if piece.calls else ""),
            **_reasoning(piece),
        }
        if piece.calls:
            message["tool_calls"] = [_call(c) for c in piece.calls]
        written = {"index": choice, "message": message, "finish_reason": piece.finish_reason}
        return written | _logprobs(piece)


class TextForm(OpenAIForm):
    """/v1/completions."""

    chat = False
    object = event_object = "text_completion"
    prefix = "cmpl"

    def piece(self, choice: int, piece: Piece) -> bytes:
        return self._chunk(self._choice(choice, piece))

    def _choice(self, choice: int, piece: Piece) -> dict[str, Any]:
        written = {"index": choice, "text": piece.text, "finish_reason": piece.finish_reason}
        if piece.logprobs is not None:
            written["logprobs"] = completion_logprobs(piece.logprobs)
        return written


def openai_error(refused: Refused) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    return {
        "error": {
            "message": refused.message,
            "type": kind,
            "param": refused.param,
            "code": refused.code,
        }
    }


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _reasoning(piece: Piece) -> dict[str, str]:
    """Under both names in use: mlx-lm's, and the one that most clients know."""
    if not piece.reasoning:
        return {}
    return {"reasoning": piece.reasoning, "reasoning_content": piece.reasoning}


def _logprobs(piece: Piece) -> dict[str, Any]:
    return {} if piece.logprobs is None else {"logprobs": {"content": piece.logprobs}}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
