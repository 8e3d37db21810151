"""Lets Ctrl-C end one reply of a chat: the conversation goes on from a sound KV cache.

The handler only notes the request. Expert layers look at it, so that the pass under way ends
between two steps, not in the middle of one.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .._errors import PassStoppedError
from .._experts.stream import ExpertStream
from .._memory.process_memory import bytes_over_bound
from .._memory.rewind import Rewind


class Interrupts:
    """Ctrl-C while a reply is under way: the first ends it, the next is a KeyboardInterrupt.

    Attributes:
        asked: the reply shall end.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note Ctrl-C within the block. Only a main thread can receive signals."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, signum: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@dataclass
class Ending:
    """How a reply ends.

    Attributes:
        begun: its first token has come.
    """

    interrupts: Interrupts | None
    begun: bool = False

    def asked(self) -> bool:
        """Shall it end now?"""
        return self.interrupts is not None and self.interrupts.asked


@contextmanager
def ending(
    interrupts: Interrupts | None, expert_stream: ExpertStream, caches: Sequence[Any] | None
) -> Iterator[Ending]:
    """End a reply at Ctrl-C, within a pass too.

    A reply that ends before its first token takes the caches back to before the prompt, if memory
    for that is free; else the part that was read stays in the conversation.

    Args:
        interrupts: notes Ctrl-C; None if that shall end the program.
        expert_stream: the model's.
        caches: the conversation's.
    """
    reply = Ending(interrupts)
    if interrupts is None:
        yield reply
        return
    rewind = Rewind(caches, tokens=2)  # the prompt's passes and tokens come after it
    room = -bytes_over_bound(mx.get_active_memory()) - expert_stream.plan.work
    if rewind.kept_bytes > max(0, room):
        rewind.drop()
    with ExitStack() as stack:
        stack.enter_context(interrupts.caught())
        stack.enter_context(expert_stream.follow(stop=reply.asked))
        with suppress(PassStoppedError):
            yield reply
        if reply.asked():
            if not reply.begun:
                rewind.undo()
                rewind.settle()
            print("\n(stopped; Ctrl-C again ends the chat)", file=sys.stderr)
