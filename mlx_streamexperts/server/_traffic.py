"""Counts what a server does: requests, tokens, times to the first token.

Written by the threads that answer requests, read by whoever asks for figures. It knows neither MLX
nor HTTP and must never cost a request more than a lock.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

FIRST_TOKEN_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets of the time to the first token, in seconds."""

OUTCOMES = ("completed", "cancelled", "refused", "failed")
"""How a request ends: answered; its client left; the client's fault; ours."""

RATE_SECONDS = 10.0
"""The time over which `tokens_per_second` is taken."""


@dataclass(frozen=True)
class TrafficStats:
    """Counters since the server began.

    Attributes:
        requests: by outcome.
        active: requests being answered or waiting.
        prompt_tokens: tokens of all prompts; of those, `cached_tokens` were in the prompt cache.
        tokens: generated.
        tokens_per_second: over the last ten seconds, all clients together.
        first_token: requests by bucket of `FIRST_TOKEN_BOUNDS`, the last one without a bound.
        first_token_seconds: sum over all requests.
        uptime: seconds.
    """

    requests: dict[str, int]
    active: int
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    tokens_per_second: float
    first_token: list[int]
    first_token_seconds: float
    uptime: float


@dataclass
class Traffic:
    """The counters."""

    _requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    _active: int = 0
    _prompt_tokens: int = 0
    _cached_tokens: int = 0
    _tokens: int = 0
    _first_token: list[int] = field(default_factory=lambda: [0] * (len(FIRST_TOKEN_BOUNDS) + 1))
    _first_token_seconds: float = 0.0
    _recent: deque[float] = field(default_factory=deque)  # when tokens came
    _began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, most: int) -> bool:
        """A request has come; False where there are `most` already, and then it is not counted."""
        with self._lock:
            if self._active >= most:
                return False
            self._active += 1
            return True

    def end(self, outcome: str) -> None:
        """A request that `begin` counted is over."""
        with self._lock:
            self._active -= 1
            self._requests[outcome] += 1

    def refused(self) -> None:
        """A request was turned away before it began."""
        with self._lock:
            self._requests["refused"] += 1

    def prompt(self, tokens: int, cached: int, seconds: float) -> None:
        """The first token of a reply came after `seconds`."""
        with self._lock:
            self._prompt_tokens += tokens
            self._cached_tokens += cached
            self._first_token[bisect_left(FIRST_TOKEN_BOUNDS, seconds)] += 1
            self._first_token_seconds += seconds

    def token(self) -> None:
        """A token came."""
        now = time.monotonic()
        with self._lock:
            self._tokens += 1
            self._recent.append(now)
            self._forget(now)

    def stats(self) -> TrafficStats:
        """The counters as they stand."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            uptime = now - self._began
            return TrafficStats(
                requests=dict(self._requests),
                active=self._active,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                tokens=self._tokens,
                tokens_per_second=len(self._recent) / min(RATE_SECONDS, max(uptime, 1e-9)),
                first_token=list(self._first_token),
                first_token_seconds=self._first_token_seconds,
                uptime=uptime,
            )

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0] < now - RATE_SECONDS:
            self._recent.popleft()
