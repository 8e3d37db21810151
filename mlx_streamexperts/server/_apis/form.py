"""What an API is to the server: it makes a chat request of a request, and writes replies.

A form belongs to one request. It never generates and never touches the connection.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .._field_checks import wrong
from .._refusals import Refused
from .._replies import Piece


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt: of the prompt; `cached` of them were in the prompt cache.
        completion: generated; `reasoning` of them belong to reasoning.
    """

    prompt: int
    cached: int
    completion: int = 0
    reasoning: int = 0


class Form:
    """How one API writes its replies and errors.

    Args:
        fingerprint: of the software.

    Attributes:
        names: this API's words for fields of a chat that it calls otherwise.
        chat: whether `request` makes a chat completion, or a completion.
        content_type: of a streamed reply.
        keeps_alive: may comments stand between its events?
    """

    names: ClassVar[dict[str, str]] = {}
    chat = True
    content_type = "text/event-stream"
    keeps_alive = True

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint, self.created = fingerprint, int(time.time())

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request in OpenAI's form of a chat, with its fields checked as far as they differ.

        Raises:
            Refused: names the field that is wrong, or that this server cannot do.
        """
        raise NotImplementedError

    def begin(self, usage: Usage) -> bytes:
        """The events before the first piece; `usage` has the prompt."""
        return b""

    def piece(self, choice: int, piece: Piece) -> bytes:
        """The events of a new part of the reply of this number."""
        raise NotImplementedError

    def end(self, usage: Usage) -> bytes:
        """The events after the last piece."""
        return b""

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        """A reply that is not streamed."""
        raise NotImplementedError

    def count(self, tokens: int) -> dict[str, Any] | None:
        """The answer where only the prompt is to be counted; None where a reply is wanted."""
        return None

    def named(self, refused: Refused) -> Refused:
        """The same error, with the field's name in this API."""
        field = refused.param or ""
        if field not in self.names:
            return refused
        message = re.sub(rf"\b{field}\b", self.names[field], refused.message, count=1)
        return Refused(refused.status, message, refused.code, self.names[field])

    def error(self, refused: Refused) -> dict[str, Any]:
        """An error in the place of a reply."""
        raise NotImplementedError

    def error_event(self, refused: Refused) -> bytes:
        """An error after a streamed reply has begun."""
        return event(self.error(refused))


def check_last(messages: Sequence[dict[str, Any]]) -> None:
    """Refuse a chat that ends with the beginning of a reply.

    The APIs that have this go on with that text. mlx-lm's templates would begin another turn.
    """
    if messages and messages[-1]["role"] == "assistant":
        raise wrong(
            "messages",
            "end with one of the assistant: this server does not go on with a reply that is begun; "
            "end with one of the user, and say there how the reply is to begin",
        )


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event of a stream of server-sent events."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def added(pieces: Sequence[Piece]) -> Piece:
    """All pieces as one."""
    total = Piece()
    for piece in pieces:
        total += piece
    return total
