"""Keeps the GPU's clocks up while a token waits for reads, and for a while between requests.

An Apple GPU that has nothing to do lowers its clocks, and matmuls after a wait run slowly. Other
projects report: gmlx 2.51 -> 3.64 tokens/s (GLM-5.2) and 4.01 -> 5.29 (Hunyuan 3) from a small
matmul every 0.5 ms during waits; vmlx 0.65 to 1.25 s lost after 1.5 s without work. No figure of
ours exists for a Mac, so a trial while working decides whether beats during waits pay.

One thread makes all beats, on a stream of its own. No array crosses threads, and an error ends the
beats, never a call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import mlx.core as mx

from .autotune import AutoTuner

_AFTER_SECONDS = 300e-6  # shorter waits leave the clocks up, and waking the thread takes 50 us
_BETWEEN_BEATS = 500e-6
_POWER_SECONDS = 10.0  # between questions about battery and heat, which start a process on macOS
_IDLE_BEAT, _IDLE_SECONDS = 0.5, 60.0  # between requests: one beat every _IDLE_BEAT, for so long
_LONGEST_WAIT = 30.0  # a wait that an exception ended between two lines must not beat for ever
_WIDTH = 256
_GAIN = 0.03  # the least share of a step's time that beats must save to stay

_log = logging.getLogger(__name__)


def small_matmul() -> Callable[[], None]:
    """Make one beat's work: a 256 x 256 matmul on a new stream, for the calling thread only."""
    device = mx.default_device()
    own = mx.new_stream(device)
    a = mx.ones((_WIDTH, _WIDTH), mx.float16 if device == mx.gpu else mx.float32)
    mx.eval(a)
    return lambda: mx.eval(mx.matmul(a, a, stream=own))


class KeepAwake:
    """Beats while callers wait for reads, while that is measured to pay, and between requests.

    Args:
        layers: expert layers of the model; a turn of the trial is two tokens long.
        always: beat during every wait, whatever is measured.
        scarce: tells whether the machine runs on battery or is hot; then there are no beats. It is
            asked every ten seconds at most.
        make_beat: called in the thread; returns the work of one beat.

    Attributes:
        tuner: decides by the times of steps whether beats during waits pay.
        beats: how many were made.
        failed: why there are no more beats; None while all is well.
    """

    def __init__(
        self,
        layers: int,
        always: bool,
        scarce: Callable[[], bool],
        make_beat: Callable[[], Callable[[], None]] = small_matmul,
    ) -> None:
        choices = (True,) if always else (False, True)
        self.tuner = AutoTuner(choices, choices[0], turn=2 * layers, least_gain=_GAIN)
        self.beats = 0
        self.failed: str | None = None
        self._scarce, self._make_beat = scarce, make_beat
        self._waiting: dict[int, float] = {}  # since when, by thread
        self._used = 0.0  # when the last wait ended
        self._may, self._asked = False, -_POWER_SECONDS  # what `scarce` answered, and when
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="keep-awake", daemon=True)
        self._thread.start()

    @contextmanager
    def during_wait(self) -> Iterator[None]:
        """The calling thread waits for reads within this block."""
        me = threading.get_ident()
        self._waiting[me] = time.perf_counter()
        self._wake.put(None)
        try:
            yield
        finally:
            self._waiting.pop(me, None)
            self._used = time.perf_counter()

    def close(self) -> None:
        """End the thread. A second call does nothing."""
        self._closed = True
        self._wake.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            beat = self._make_beat()
            while not self._closed:
                if self._await_wait():
                    time.sleep(_AFTER_SECONDS)
                    while self.tuner.choice and self._in_wait() and self._may_beat():
                        self._beat(beat)
                        time.sleep(_BETWEEN_BEATS)
                elif self._may_beat():
                    self._beat(beat)
        except (
            Exception
        ) as e:  # of the device: calls meet it themselves, and this must not end them
            self.failed = f"{type(e).__name__}: {e}"
            _log.warning(f"the GPU is not kept awake any more: {self.failed}")

    def _await_wait(self) -> bool:
        """Sleep until a caller waits, or until it is time for a beat between requests (False)."""
        idle = time.perf_counter() - self._used > _IDLE_SECONDS
        try:
            self._wake.get(timeout=None if idle else _IDLE_BEAT)
        except Empty:
            return False
        while not self._wake.empty():  # one thread serves all waits
            self._wake.get()
        return True

    def _in_wait(self) -> bool:
        oldest = time.perf_counter() - _LONGEST_WAIT
        return any(since > oldest for since in list(self._waiting.values()))

    def _may_beat(self) -> bool:
        now = time.perf_counter()
        if now - self._asked > _POWER_SECONDS:
            self._may, self._asked = not self._scarce(), now
        return self._may and not self._closed

    def _beat(self, beat: Callable[[], None]) -> None:
        beat()
        self.beats += 1
