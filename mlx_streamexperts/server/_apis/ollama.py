"""Ollama's API as far as chats go: /api/chat, /api/tags, /api/show and /api/version."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
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
    text_of,
    unless,
    wrong,
)
from .._refusals import Refused
from .._replies import Call, Piece
from .form import Form, Usage, added, check_last

VERSION = "0.12.0"
"""The version of Ollama whose API this is; clients ask for it."""

FIELDS: dict[str, Check] = {
    "format": unless(
        lambda v: v in ("", "json") or isinstance(v, dict), "must be 'json' or a schema"
    ),
    "keep_alive": unless(lambda v: isinstance(v, str | int | float), "must be a duration"),
    "messages": a_list,
    "model": a_text,
    "options": an_object,
    "stream": a_flag,
    "think": unless(lambda v: isinstance(v, str | bool), "must be true, false or an effort"),
    "tools": a_list,
}
"""Fields of a chat."""

_NO_EFFECT = ("num_batch", "num_ctx", "num_gpu", "num_keep", "num_thread", "use_mmap", "main_gpu")
_NAMES = {
    "frequency_penalty": "frequency_penalty",
    "min_p": "min_p",
    "num_predict": "max_tokens",
    "presence_penalty": "presence_penalty",
    "repeat_last_n": "repetition_context_size",
    "repeat_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
_OPTIONS: dict[str, Check] = {
    **dict.fromkeys(_NAMES, number()),
    **dict.fromkeys(_NO_EFFECT, unless(lambda v: isinstance(v, int), "must be an integer")),
    "num_predict": integer(-2),
    "repeat_last_n": integer(),
    "seed": integer(),
    "stop": unless(lambda v: isinstance(v, str | list), "must be a string or a list"),
    "top_k": integer(),
}
_UNLIMITED = (1 << 31) - 1  # num_predict below 0; the server cuts it to what its memory holds


class OllamaForm(Form):
    """/api/chat: lines of JSON, streamed unless a request says otherwise."""

    names: ClassVar = {
        **{name: f"options.{own}" for own, name in _NAMES.items()},
        "reasoning_effort": "think",
        "response_format": "format",
    }
    content_type = "application/x-ndjson"
    keeps_alive = False  # clients take every line for JSON

    def __init__(self, fingerprint: str) -> None:
        super().__init__(fingerprint)
        self._model, self._last = "default_model", Piece()
        self._begun = time.monotonic_ns()
        self._first = 0  # when the first piece came

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        given = check_fields(body, FIELDS)
        for key in ("model", "messages"):
            if key not in given:
                raise wrong(key, "is required")
        self._model = given["model"]
        chat: dict[str, Any] = {
            "model": self._model.removesuffix(":latest"),
            "messages": [
                _message(m, f"messages[{i}]")
                for i, m in enumerate(objects(given["messages"], "messages"))
            ],
            "stream": given.get("stream", True),
        }
        check_last(chat["messages"])
        if given.get("tools"):
            chat["tools"] = given["tools"]
        for key, value in check_fields(given.get("options", {}), _OPTIONS, "options").items():
            if key in _NAMES:
                chat[_NAMES[key]] = value
        if chat.get("max_tokens", 1) < 1:
            chat["max_tokens"] = _UNLIMITED
        if chat.get("stop") == []:
            del chat["stop"]
        if form := given.get("format"):
            schema = {"type": "object"} if form == "json" else form
            stated = {"name": "format", "schema": schema}
            chat["response_format"] = {"type": "json_schema", "json_schema": stated}
        think = given.get("think")
        if isinstance(think, str):
            chat["reasoning_effort"] = think
        elif think is not None:
            chat["chat_template_kwargs"] = {"enable_thinking": think}
        return chat

    def piece(self, choice: int, piece: Piece) -> bytes:
        self._first = self._first or time.monotonic_ns()
        self._last = piece
        if not (piece.text or piece.reasoning or piece.calls):
            return b""
        return _line({**self._head(), "message": _said(piece), "done": False})

    def end(self, usage: Usage) -> bytes:
        return _line({**self._head(), "message": _said(Piece()), **self._done(self._last, usage)})

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        piece = added(choices[0])
        return {**self._head(), "message": _said(piece), **self._done(piece, usage)}

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": _now()}

    def _done(self, last: Piece, usage: Usage) -> dict[str, Any]:
        now = time.monotonic_ns()
        first = self._first or self._begun  # of a whole reply only its end is known
        return {
            "done": True,
            "done_reason": "length" if last.finish_reason == "length" else "stop",
            "total_duration": now - self._begun,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": first - self._begun,
            "eval_count": usage.completion,
            "eval_duration": now - first,
        }

    def error(self, refused: Refused) -> dict[str, Any]:
        return {"error": refused.message}

    def error_event(self, refused: Refused) -> bytes:
        return _line(self.error(refused))


def tags(served: dict[str, str]) -> dict[str, Any]:
    """The answer of /api/tags: the models that the server may load.

    Args:
        served: folder by name.
    """
    return {"models": [_tag(name, Path(folder)) for name, folder in served.items()]}


def show(folder: str, tokenizer: Any | None) -> dict[str, Any]:
    """The answer of /api/show.

    Args:
        folder: of the model.
        tokenizer: mlx-lm's; None if the model is not loaded.
    """
    kind = _config(Path(folder)).get("model_type", "")
    able = ["completion"]
    if tokenizer is not None:
        able += ["tools"] if tokenizer.has_tool_calling else []
        able += ["thinking"] if tokenizer.has_thinking else []
    template = getattr(tokenizer, "chat_template", None)
    return {
        "modelfile": "",
        "parameters": "",
        "template": template if isinstance(template, str) else "",
        "details": _details(Path(folder)),
        "model_info": {"general.architecture": kind},
        "capabilities": able,
    }


def _tag(name: str, folder: Path) -> dict[str, Any]:
    changed = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
    return {
        "name": name,
        "model": name,
        "modified_at": changed.isoformat(),
        "size": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        "digest": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "details": _details(folder),
    }


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def _details(folder: Path) -> dict[str, Any]:
    config = _config(folder)
    kind = str(config.get("model_type", ""))
    bits = config.get("quantization", {}).get("bits")
    return {
        "parent_model": "",
        "format": "mlx",
        "family": kind,
        "families": [kind],
        "parameter_size": "",
        "quantization_level": "" if bits is None else f"{bits} bits",
    }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _said(piece: Piece) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": piece.text}
    if piece.reasoning:
        message["thinking"] = piece.reasoning
    if piece.calls:
        message["tool_calls"] = [_call(c) for c in piece.calls]
    return message


def _call(call: Call) -> dict[str, Any]:
    arguments = json.loads(call.arguments)
    return {"id": call.id, "function": {"name": call.name, "arguments": arguments}}


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message of theirs in a chat's words."""
    given = check_fields(
        message,
        {
            "role": a_text, "content": a_text, "thinking": a_text, "images": a_list,
            "tool_calls": a_list, "tool_name": a_text, "tool_call_id": a_text,
        },
        where,
    )  # fmt: skip
    chat = {
        "role": text_of(given.get("role"), f"{where}.role"),
        "content": given.get("content", ""),
    }
    if given.get("images"):
        parts: list[dict[str, Any]] = [{"type": "text", "text": chat["content"]}]
        for i, image in enumerate(given["images"]):
            data = text_of(image, f"{where}.images[{i}]")
            parts.append({"type": "image_url", "image_url": {"url": f"data:;base64,{data}"}})
        chat["content"] = parts
    if "thinking" in given:
        chat["reasoning_content"] = given["thinking"]
    if "tool_name" in given:
        chat["name"] = given["tool_name"]
    if "tool_call_id" in given:
        chat["tool_call_id"] = given["tool_call_id"]
    if given.get("tool_calls"):
        chat["tool_calls"] = []
        for i, call in enumerate(objects(given["tool_calls"], f"{where}.tool_calls")):
            called = {"id": call.get("id") or f"call_{i}", "type": "function"}
            chat["tool_calls"].append({**called, "function": call.get("function")})
    return chat
