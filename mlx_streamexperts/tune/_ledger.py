"""A ledger of trials: JSON lines, each whole on the drive before the next trial begins.

The first line says what the trials are of; a run that goes on with a ledger must be about the same.
Whatever ends a run, a power failure included, costs at most the line that was being written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .._closing import Closing
from .._errors import StreamError
from .._io.output import sync_folder

FORMAT = 1


class Ledger(Closing):
    """One file of trials, open for more. A context manager.

    Args:
        file: is made where it is not there.
        subject: what the trials are of, as plain JSON values; the first line.
        resume: go on with what is there.
        overwrite: discard what is there.

    Attributes:
        records: every line after the first, in order.
        torn: the last line had not been written to its end, and was dropped.

    Raises:
        StreamError: there is one already, it is about something else, or no ledger.
        OSError: the file cannot be written.
    """

    def __init__(
        self, file: Path, subject: dict[str, Any], resume: bool = False, overwrite: bool = False
    ) -> None:
        self.file, self.records, self.torn = file, list[dict[str, Any]](), False
        first = {"ledger": FORMAT, **subject}
        there = file.exists() and file.stat().st_size > 0 and not overwrite
        if there and not resume:
            raise StreamError(
                f"{file} is the ledger of an earlier run: --resume goes on with it, --overwrite "
                "begins anew"
            )
        if there:
            (known, *self.records), whole_bytes, self.torn = read(file)
            _same(file, known, first)
        else:
            whole_bytes = 0
        file.parent.mkdir(parents=True, exist_ok=True)
        self._fd: int | None = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._fd, whole_bytes)
        os.lseek(self._fd, whole_bytes, os.SEEK_SET)
        if not there:
            self._write(first)
            sync_folder(file.parent)

    def append(self, record: dict[str, Any]) -> None:
        """Write a trial, so that it lasts."""
        self._write(record)
        self.records.append(record)

    def close(self) -> None:
        """Close the file; nothing is left to be written."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, record: dict[str, Any]) -> None:
        if self._fd is None:
            raise StreamError(f"{self.file}: this ledger is closed")
        line = memoryview((json.dumps(record) + "\n").encode())
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)


def read(file: Path) -> tuple[list[dict[str, Any]], int, bool]:
    """A ledger's lines, the first one included.

    Returns:
        The whole lines, their length in bytes, and whether there was a torn one behind them.

    Raises:
        StreamError: a line before the last one is not whole, or there is no first one.
        OSError: the file cannot be read.
    """
    records: list[dict[str, Any]] = []
    whole_bytes = 0
    lines = file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not line.endswith(b"\n"):
            if number < len(lines):
                raise StreamError(
                    f"{file}: line {number} is no JSON object: not a ledger of trials"
                )
            break
        records.append(record)
        whole_bytes += len(line)
    if not records or records[0].get("ledger") != FORMAT:
        raise StreamError(f"{file}: not a ledger of trials that this version reads")
    return records, whole_bytes, len(records) < len(lines)


def _same(file: Path, known: dict[str, Any], mine: dict[str, Any]) -> None:
    mine = json.loads(json.dumps(mine))
    for key in {**known, **mine}:
        if known.get(key) != mine.get(key):
            raise StreamError(
                f"{file} has trials of something else: {key} was {known.get(key)!r}, now it is "
                f"{mine.get(key)!r}. State the same, or --overwrite to begin anew, or another "
                "--ledger"
            )
