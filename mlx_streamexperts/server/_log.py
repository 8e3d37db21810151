"""The server's log: one line for each request, as text or as JSON."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

FORMATS = ("text", "json")
_TEXT = "%(asctime)s - %(levelname)s - %(message)s"
_QUIET_FILE = "mlx_lm/server.py"  # three lines of its own for each request


@dataclass
class Answered:
    """A request that is over.

    Attributes:
        client: its address.
        method: HTTP's.
        path: of the request.
        status: HTTP's, of the reply.
        outcome: one of `OUTCOMES`; empty if it asked for no text.
        prompt_tokens: of its prompts; `cached_tokens` of them were in a cache.
        tokens: of its replies.
        first_token_seconds: from its arrival to the first token; None without one.
        seconds: from its arrival to its end.
    """

    client: str
    method: str
    path: str
    status: int = 0
    outcome: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        line = f"{self.client} {self.method} {self.path!r} {self.status}"
        if not self.outcome:
            return line
        line += f" {self.outcome} in {self.seconds:.2f} s"
        if self.prompt_tokens:
            line += f": prompt {self.prompt_tokens:,} tokens ({self.cached_tokens:,} cached)"
            line += f", reply {self.tokens:,} tokens"
        if self.first_token_seconds is not None:
            line += f", the first after {self.first_token_seconds:.2f} s"
        return line


def log(answered: Answered) -> None:
    """Write the line of a request."""
    logging.info(str(answered), extra={"answered": answered})


def configure(level: str, form: str) -> None:
    """Send the process's log to stderr, as `logging.basicConfig` does: unless it has a handler.

    Args:
        level: the least that is written.
        form: one of `FORMATS`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if form == "json" else logging.Formatter(_TEXT))
    handler.addFilter(_is_ours)
    logging.basicConfig(level=level, handlers=[handler])


def _is_ours(record: logging.LogRecord) -> bool:
    """Leave out what mlx-lm's server says of each request; its warnings stay."""
    of_stock = record.pathname.replace("\\", "/").endswith(_QUIET_FILE)
    return not (of_stock and record.levelno == logging.INFO)


class _Json(logging.Formatter):
    """A line of JSON for each record; that of a request has the fields of `Answered`."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "message": record.getMessage(),
        }
        if (answered := getattr(record, "answered", None)) is not None:
            line |= asdict(answered)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)
