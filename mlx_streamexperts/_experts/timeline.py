"""Where the time of a step goes: spans of the layers and of the reader's threads.

A timeline is a file in Chrome's trace-event format, for Perfetto (ui.perfetto.dev) or
chrome://tracing. Recording appends spans to a list (1 us each); closing it writes the file.

A layer's phases, one after another:
    sync    waits for the router's indices, while the device runs the graph built so far
    map     maps experts to slots, queues reads, probes the next layers' routers
    wait    waits for reads
    build   builds the graph of the expert matmuls
The time between two layers' spans is the model's own Python.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .._closing import Closing
from .._errors import StreamError
from .._io.output import UNWRITTEN, claim, release, write_json
from .._io.ranges import ByteRange
from .._io.reader import DEMAND, ExpertReader
from .layer import PHASES, ExpertLayer


class _Read(NamedTuple):
    """One thread's read, labelled by its first range. Times are those of `perf_counter`.

    `drives` has the bytes by drive, if there are several.
    """

    thread: str
    layer: str
    expert: int
    tensor: str
    nbytes: int
    priority: int
    queued: float
    begin: float
    end: float
    drives: dict[str, int]


class Timeline(Closing):
    """A recording under way. Use it as a context manager, or call `close`.

    The file gets its name only when the recording is complete.

    Attributes:
        closed: the recording is over.
    """

    def __init__(
        self, path: str | os.PathLike[str], layers: Sequence[ExpertLayer], reader: ExpertReader
    ) -> None:
        self._path, self._layers, self._reader = Path(path), layers, reader
        partial = claim(self._path)
        try:
            partial.touch()  # fail now if it cannot be written
        except BaseException:
            release(self._path)
            raise
        self._start = time.perf_counter()
        self._spans: list[tuple[str, str, float, float]] = []
        self._reads: list[_Read] = []
        self.closed = False
        for layer in layers:
            layer.on_phase.add(self._phase)
        reader.on_read.add(self._read)

    def summary(self) -> dict[str, float]:
        """Seconds by phase so far.

        Returns:
            `sync`, `map`, `wait`, `build`, `between` (outside of expert layers) and `elapsed`.
        """
        seconds = dict.fromkeys(PHASES, 0.0)
        first, last = self._start, self._start
        for phase, _, begin, end in self._spans:
            seconds[phase] += end - begin
            last = max(last, end)
        elapsed = last - first
        return {**seconds, "between": elapsed - sum(seconds.values()), "elapsed": elapsed}

    def close(self) -> None:
        """End the recording and write the file.

        Raises:
            StreamError: the file cannot be written.
        """
        if self.closed:
            return
        self.closed = True
        for layer in self._layers:
            layer.on_phase.remove(self._phase)
        self._reader.on_read.remove(self._read)
        content = {"traceEvents": self._events(), "displayTimeUnit": "ms"}
        try:
            write_json(self._path, content, indent=None)
        except OSError as e:
            raise StreamError(f"{self._path}: {UNWRITTEN.format(e.strerror)}") from e
        finally:
            release(self._path)

    def _phase(self, phase: str, layer: str, begin: float, end: float) -> None:
        self._spans.append((phase, layer, begin, end))

    def _read(
        self, ranges: Sequence[ByteRange], priority: int, queued: float, begin: float, end: float
    ) -> None:
        first = ranges[0]  # not kept: its view would keep a bank's memory alive
        drives: dict[str, int] = {}
        for r in ranges if self._reader.mirrors is not None else ():
            folder = os.path.dirname(r.file)
            drives[folder] = drives.get(folder, 0) + len(r.into)
        self._reads.append(
            _Read(
                threading.current_thread().name, first.layer, first.expert, first.tensor,
                sum(len(r.into) for r in ranges), priority, queued, begin, end, drives,
            )
        )  # fmt: skip

    def _events(self) -> list[dict[str, object]]:
        """Complete events ("X") in microseconds; every reader thread has its own row."""
        rows = {"layers": 0}
        events: list[dict[str, object]] = []

        def add(row: str, name: str, begin: float, end: float, **details: object) -> None:
            number = rows.setdefault(row, len(rows))
            events.append(
                {
                    "name": name, "ph": "X", "pid": 1, "tid": number,
                    "ts": 1e6 * (begin - self._start), "dur": 1e6 * (end - begin), "args": details,
                }
            )  # fmt: skip

        for phase, layer, begin, end in self._spans:
            add("layers", phase, begin, end, layer=layer)
        for r in self._reads:
            add(
                r.thread, "read" if r.priority == DEMAND else "prefetch", r.begin, r.end,
                layer=r.layer, expert=r.expert, tensor=r.tensor, bytes=r.nbytes,
                queued_us=1e6 * (r.begin - r.queued), **({"drives": r.drives} if r.drives else {}),
            )  # fmt: skip
        names: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": row}}
            for row, number in rows.items()
        ]
        return names + events
