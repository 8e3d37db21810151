"""Traces: recorded routing, for study and replay.

A trace is a file of JSON lines. The first describes the model: `{"layers": [names], "experts":
[counts], "expert_bytes": [bytes], "model": {...}}`; `model` has the other sizes that a prediction
of speed needs (`_SIZES`). Each further line is one call of one layer, in the order of calls:
`{"layer": i, "experts": [[...], ...]}`, with one list of chosen experts per token.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from .._closing import Closing
from .._errors import StreamError
from .._io.output import UNWRITTEN, claim, release, whole
from .._memory.budget import Plan

if TYPE_CHECKING:
    from .layer import ExpertLayer

_SIZES = ("model_type", "trunk", "active_bytes_per_token", "top_k")


class Trace(Closing):
    """A recording under way. Use it as a context manager, or call `close`.

    The file gets its name only when the recording is complete. If a write fails (a full disk), the
    recording ends and generation goes on.
    """

    def __init__(
        self, path: str | os.PathLike[str], layers: list[ExpertLayer], plan: Plan | None = None
    ) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._error: OSError | None = None
        self._partial = claim(self._path)
        try:
            self._file: TextIO | None = self._partial.open("w")
        except BaseException:
            release(self._path)
            raise
        self._recorders = [(x, self._recorder(number)) for number, x in enumerate(layers)]
        head: dict[str, Any] = {
            "layers": [x.name for x in layers],
            "experts": [x.experts for x in layers],
            "expert_bytes": [x.expert_bytes for x in layers],
        }
        if plan is not None:
            head["model"] = {name: getattr(plan, name) for name in _SIZES}
        self._write(head)
        for layer, recorder in self._recorders:
            layer.on_routing.add(recorder)

    def close(self) -> None:
        """End the recording and put the file in place.

        Raises:
            StreamError: a write has failed; there is no file.
        """
        with self._lock:
            file, self._file = self._file, None
            if file is None:
                return
            for layer, recorder in self._recorders:
                layer.on_routing.remove(recorder)
            try:
                with whole(self._path), file:
                    if self._error is not None:
                        raise self._error
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as e:
                raise StreamError(f"{self._path}: {UNWRITTEN.format(e.strerror)}") from e
            finally:
                release(self._path)

    @property
    def closed(self) -> bool:
        """Is the recording over?"""
        return self._file is None

    def _recorder(self, number: int) -> Callable[[np.ndarray], None]:
        def record(experts: np.ndarray) -> None:
            rows = experts.reshape(-1, experts.shape[-1]).tolist()  # [T, K]
            self._write({"layer": number, "experts": rows})

        return record

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            if self._file is not None and self._error is None:
                try:
                    self._file.write(json.dumps(line) + "\n")
                except OSError as e:
                    self._error = e


@dataclass(frozen=True)
class Routing:
    """The content of a trace.

    Attributes:
        name: of the file, for reports.
        experts: number of routed experts, by layer.
        expert_bytes: bytes of one expert, by layer; empty if the trace does not have them.
        layers: each layer's calls in order, int [T, K] each: the choices of T tokens.
        model: `model_type`, `trunk`, `active_bytes_per_token` and `top_k`, or nothing.
    """

    name: str
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    layers: tuple[list[np.ndarray], ...]
    model: dict[str, Any] = field(default_factory=dict)


def read_trace(path: Path) -> Routing:
    """Read a recording of `ExpertStream.trace`.

    Args:
        path: the file.

    Returns:
        Each layer's calls, as arrays of expert indices [T, K].

    Raises:
        StreamError: the file cannot be read or is not a trace; the message names the line.
    """
    lines = _lines(path)
    head = next(lines, {})
    try:
        experts = tuple(int(n) for n in head["experts"])
        expert_bytes = tuple(int(n) for n in head.get("expert_bytes", ()))
        if expert_bytes and len(expert_bytes) != len(experts):
            raise ValueError
        model = {k: head["model"][k] for k in _SIZES} if "model" in head else {}
    except (KeyError, OverflowError, TypeError, ValueError) as e:
        raise StreamError(f"{path}: not a trace of ExpertStream.trace: no layers named") from e
    layers: tuple[list[np.ndarray], ...] = tuple([] for _ in experts)
    for number, line in enumerate(lines, 2):
        try:
            layer = line["layer"]
            if type(layer) is not int or layer < 0:
                raise ValueError("no number of a layer")
            rows = np.array(line["experts"])  # [T, K]
            if rows.ndim != 2 or rows.dtype.kind != "i" or not rows.size:
                raise ValueError("no list of experts for each token")
            if rows.min() < 0 or rows.max() >= experts[layer]:
                raise ValueError("no such expert")
            layers[layer].append(rows)
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise StreamError(f"{path}, line {number}: not a call of a layer: {e}") from e
    return Routing(path.stem, experts, expert_bytes, layers, model)


def _lines(trace: Path) -> Iterator[dict[str, Any]]:
    try:
        with trace.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise StreamError(f"{trace}, line {number}: not JSON") from e
                if not isinstance(value, dict):
                    raise StreamError(f"{trace}, line {number}: not a JSON object")
                yield value
    except (OSError, UnicodeDecodeError) as e:
        raise StreamError(f"{trace}: cannot read the trace: {e}") from e
