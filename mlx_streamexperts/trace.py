"""Recording of which experts a model's routers choose, for study and replay.

A trace is JSON lines. The first describes the model: `{"layers": [names], "experts": [counts],
"expert_bytes": [bytes]}`. Each further line is one call of one layer, in the order of calls:
`{"layer": i, "experts": [[...], ...]}`, one list of chosen experts per token.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np

from .layer import ExpertLayer


class Trace:
    """A recording under way; a context manager, or call `close`.

    The file appears under its name only when the recording is complete.
    """

    def __init__(self, path: str | os.PathLike[str], layers: list[ExpertLayer]) -> None:
        self._path, self._layers = Path(path), layers
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._lock = threading.Lock()
        self._file: TextIO | None = self._partial.open("w")
        head = {
            "layers": [x.name for x in layers],
            "experts": [x.experts for x in layers],
            "expert_bytes": [x.expert_bytes for x in layers],
        }
        self._file.write(json.dumps(head) + "\n")
        for number, layer in enumerate(layers):
            layer.record = self._recorder(number)

    def close(self) -> None:
        """End the recording and put the file in place."""
        with self._lock:
            if self._file is None:
                return
            for layer in self._layers:
                layer.record = None
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self._partial.replace(self._path)

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _recorder(self, number: int) -> Callable[[np.ndarray], None]:
        def record(experts: np.ndarray) -> None:
            rows = experts.reshape(-1, experts.shape[-1]).tolist()  # [T, K]
            with self._lock:
                if self._file is not None:
                    self._file.write(json.dumps({"layer": number, "experts": rows}) + "\n")

        return record
