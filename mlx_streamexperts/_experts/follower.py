"""Follows a model's passes layer by layer, tells how far a prompt is, and ends a pass on request.

A prompt's pass takes seconds to minutes, and mlx-lm reports between two passes only. Every expert
layer calls here at its beginning and while it waits for reads. Nothing here touches an array; while
nobody follows, a layer's call costs one look at an empty list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .._closing import Closing
from .._errors import PassStoppedError
from .._listeners import Listeners
from .._memory.passes import PassListener
from .._memory.rewind import Rewind
from .._progress import Progress
from .layer import ExpertLayer

_LISTEN_SECONDS, _ASK_SECONDS = 0.25, 0.1


class Follower(Closing):
    """The result of `ExpertStream.follow`, whose arguments it takes.

    Args:
        layers: the model's expert layers.
        on_pass: tells of its passes.
        read_bytes: returns the bytes read so far.
        listener, prompt_tokens, stop: see `ExpertStream.follow`.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        on_pass: Listeners[PassListener],
        read_bytes: Callable[[], int],
        listener: Callable[[Progress], None] | None,
        prompt_tokens: int | None,
        stop: Callable[[], bool] | None,
    ) -> None:
        self._layers, self._on_pass, self._read_bytes = layers, on_pass, read_bytes
        self._listener, self._stop = listener, stop
        self._rewind: Rewind | None = None  # of the pass under way
        self._entered = self._pass_tokens = 0  # its layers so far, and its tokens
        self._next_listen = self._next_ask = 0.0
        self.begin_prompt(prompt_tokens)
        on_pass.add(self)
        for layer in layers:
            layer.on_call.add(self._in_call)

    def begin_prompt(self, tokens: int | None = None) -> None:
        """Begin to count anew.

        Args:
            tokens: of the prompt; None if that is not known.
        """
        self._done, self._total = 0, tokens
        self._start, self._before = time.perf_counter(), self._read_bytes()

    def now(self) -> Progress:
        """How far the prompt is. Any thread may ask."""
        count = len(self._layers)
        layer = min(self._entered, count)  # a run-ahead step calls layers more than once
        done = self._done + self.pass_tokens_done()[0]
        if self._total is not None:
            done = min(done, self._total)  # the reply's passes are no part of the prompt
        read = max(0, self._read_bytes() - self._before)  # `reset` sets the counter to zero
        seconds = time.perf_counter() - self._start
        return Progress(done, self._total, layer, count, read, seconds)

    def pass_tokens_done(self) -> tuple[int, int]:
        """Tokens of the pass under way that are done, by its layers, and all of its tokens."""
        count, tokens = max(1, len(self._layers)), self._pass_tokens
        return tokens * max(0, min(self._entered, count) - 1) // count, tokens

    def begin_pass(self, tokens: int, rewind: Rewind) -> None:
        """A pass begins; the model's passes call this.

        Args:
            tokens: of all its sequences together.
            rewind: tells whether it may be ended early.
        """
        self._rewind, self._entered, self._pass_tokens = rewind, 0, tokens
        self._heed(time.perf_counter())

    def end_pass(self) -> None:
        """The pass has ended; the model's passes call this."""
        self._done += self._pass_tokens
        self._rewind, self._entered, self._pass_tokens = None, 0, 0
        if self._listener is not None:
            self._listener(self.now())

    def close(self) -> None:
        """Stop following. A second call does nothing."""
        self._on_pass.remove(self)
        for layer in self._layers:
            layer.on_call.remove(self._in_call)

    def _in_call(self, begins: bool) -> None:
        """Hear of a layer's call (see `ExpertLayer.on_call`)."""
        if self._rewind is None:
            return  # reads of a load or a resize, or a call outside of any pass
        self._entered += begins
        now = time.perf_counter()
        if self._listener is not None and now >= self._next_listen:
            self._next_listen = now + _LISTEN_SECONDS
            self._listener(self.now())
        self._heed(now)

    def _heed(self, now: float) -> None:
        """End the pass if that is wished, and possible."""
        rewind = self._rewind
        if self._stop is None or rewind is None or now < self._next_ask:
            return
        self._next_ask = now + _ASK_SECONDS
        if rewind.possible and self._stop():
            self._rewind, self._entered, self._pass_tokens = None, 0, 0
            raise PassStoppedError("the pass was ended on request; the KV caches are as before it")
