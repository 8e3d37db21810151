"""A ledger of trials: JSON lines, each on the drive before the next trial begins.

The first line says what the trials are about; a run that resumes a ledger must be about the same.
If a run is cut off, even by a power failure, only the line being written is lost.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .._errors import StreamError
from .._io.output import sync_folder

_FORMAT = 2


class Ledger:
    """A file of trials.

    Args:
        file: created if it does not exist.
        subject: the first line, as plain JSON values.
        resume: continue the file.
        overwrite: discard the file.

    Attributes:
        records: every line after the first, in order.
        torn: the last line was incomplete and has been dropped.

    Raises:
        StreamError: the file exists, is about something else, or is no ledger.
        OSError: the file cannot be written.
    """

    def __init__(
        self, file: Path, subject: dict[str, Any], resume: bool = False, overwrite: bool = False
    ) -> None:
        self._file, self.records = file, list[dict[str, Any]]()
        first = json.loads(json.dumps({"ledger": _FORMAT, **subject}))
        content = file.read_bytes() if file.exists() and not overwrite else b""
        if content and not resume:
            raise StreamError(
                f"{file} is the ledger of an earlier run: --resume goes on with it, --overwrite "
                "begins anew"
            )
        torn = content.rpartition(b"\n")[2]
        self.torn = bool(torn)
        if content:
            self.records = _records(file, content.removesuffix(torn), first)
            os.truncate(file, len(content) - len(torn))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._write(first, "wb")
            sync_folder(file.parent)

    def append(self, record: dict[str, Any]) -> None:
        """Write a trial durably."""
        self._write(record, "ab")
        self.records.append(record)

    def _write(self, record: dict[str, Any], mode: str) -> None:
        with self._file.open(mode) as f:
            f.write(json.dumps(record).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())


def _records(file: Path, content: bytes, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials in whole lines, whose first one must equal `mine`."""
    try:
        known, *records = [dict(json.loads(line)) for line in content.splitlines()]
    except (ValueError, TypeError):  # no JSON, no objects, or nothing at all
        known, records = {}, []
    if known.get("ledger") != _FORMAT:
        raise StreamError(f"{file}: not a ledger of trials that this version reads")
    for key in {**known, **mine}:
        if known.get(key) != mine.get(key):
            raise StreamError(
                f"{file} has trials of something else: {key} was {known.get(key)!r}, now it is "
                f"{mine.get(key)!r}. State the same, or --overwrite to begin anew, or another "
                "--ledger"
            )
    return records
