"""Counts a server's requests, tokens and times to the first token.

The threads that answer requests write; anyone may read. Counting knows neither MLX nor HTTP, and
costs a token no more than a lock.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field, replace

FIRST_TOKEN_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histogram of times to the first token, in seconds."""

OUTCOMES = ("completed", "cancelled", "refused", "failed")
"""How a request ends: answered; its client left; the client's fault; our fault."""

RATE_SECONDS = 10.0
"""Time over which `tokens_per_second` is taken."""


@dataclass
class RequestStats:
    """Counters since the server started.

    Attributes:
        requests: finished requests by outcome.
        active: requests being answered or waiting.
        prompt_tokens: tokens of all prompts; `cached_tokens` of them were in the prompt cache.
        tokens: tokens generated.
        tokens_per_second: over the last ten seconds, all clients together.
        first_token: requests by bucket of `FIRST_TOKEN_BOUNDS`; the last bucket has no bound.
        first_token_seconds: sum over all requests.
        uptime: seconds.
    """

    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    active: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    first_token: list[int] = field(default_factory=lambda: [0] * (len(FIRST_TOKEN_BOUNDS) + 1))
    first_token_seconds: float = 0.0
    uptime: float = 0.0


class RequestCounters:
    """The counters of one server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = RequestStats()
        self._replies = 0  # under way
        self._recent: deque[float] = deque()  # when tokens of the last seconds came
        self._start = time.monotonic()

    def begin(self, limit: int, replies: int = 1) -> bool:
        """Count a new request; False, and nothing counted, if there would be too many replies.

        Args:
            limit: replies of all requests that may be under way.
            replies: those that this request asks for.
        """
        with self._lock:
            if self._replies + replies > limit:
                return False
            self._replies += replies
            self._now.active += 1
            return True

    def end(self, outcome: str, replies: int = 1) -> None:
        """Count the end of a request that `begin` counted."""
        with self._lock:
            self._replies -= replies
            self._now.active -= 1
            self._now.requests[outcome] += 1

    def refused(self) -> None:
        """Count a request that was turned away before `begin`."""
        with self._lock:
            self._now.requests["refused"] += 1

    def prompt(self, tokens: int, cached: int, seconds: float) -> None:
        """Count a prompt whose first token came after `seconds`."""
        with self._lock:
            self._now.prompt_tokens += tokens
            self._now.cached_tokens += cached
            self._now.first_token[bisect_left(FIRST_TOKEN_BOUNDS, seconds)] += 1
            self._now.first_token_seconds += seconds

    def token(self) -> None:
        """Count a generated token."""
        now = time.monotonic()
        with self._lock:
            self._now.tokens += 1
            self._recent.append(now)
            self._drop_old(now)

    def stats(self) -> RequestStats:
        """A copy of the counters as they stand."""
        now = time.monotonic()
        with self._lock:
            self._drop_old(now)
            uptime = now - self._start
            return replace(
                self._now,
                requests=dict(self._now.requests),
                first_token=list(self._now.first_token),
                tokens_per_second=len(self._recent) / min(RATE_SECONDS, max(uptime, 1e-9)),
                uptime=uptime,
            )

    def _drop_old(self, now: float) -> None:
        while self._recent and self._recent[0] < now - RATE_SECONDS:
            self._recent.popleft()
