"""How a request ends without a reply, and how it leaves mlx-lm's handler.

`Refused` and `Asked` are no `Exception`s on purpose: mlx-lm's handlers catch those and would
answer in their own form.
"""

from __future__ import annotations

import logging
from typing import Any

from .._errors import StreamError


class Refused(BaseException):
    """Ends a request with an error reply.

    Attributes:
        status: of HTTP.
        message: what was wrong and what to do.
        code: its short name in OpenAI's API.
        param: the field at fault, if it is one field.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


class Asked(BaseException):
    """Carries a request out of mlx-lm's handler, which would drop parts of the reply.

    Attributes:
        arguments: mlx-lm's `GenerationArguments`.
    """

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments


class ClientGone(ConnectionError):  # noqa: N818, it is no error of ours
    """The client has closed its connection."""


class BadRequestError(StreamError):
    """The request can never be answered as it is.

    Attributes:
        param: the field at fault, if it is one field.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def generation_failed(error: Exception) -> Refused:
    """The reply to a request that failed on our side. Only the log gets paths and traces."""
    if isinstance(error, StreamError):
        logging.error(str(error))
    return Refused(
        500, f"generation failed with {type(error).__name__}; see the server's log", "failed"
    )
