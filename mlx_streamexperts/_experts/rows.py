"""Embedding tables that stay on the drive: a token looks up a few of their rows.

`StreamedRows` stands where the model has an `nn.Embedding` or `nn.QuantizedEmbedding` of which it
only looks up rows (n-grams, per-layer embeddings). A call takes these steps (`RowTable.look_up`):

    rows = numbers(ids)               int [...] on the host; waits for the ids alone
    needed = np.unique(rows)          the distinct rows [U]
    stored = table.fetch(needed)      their bytes [U, row_bytes], from the row cache or the drive
    embedding(positions)              [..., D]: the stock module, over a table of these rows alone

The stock module dequantizes each row on its own, so a shorter table changes no bit. The rows of a
call are copied out of the cache: nothing that is built and not yet evaluated reads the cache, which
may therefore change at any time. A table is never an MLX array here, and never a parameter.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._errors import ExpertReadError, StreamError, TokenError
from .._io.ranges import ByteRange
from .._io.reader import DEMAND, ExpertReader, Ticket
from .bank import numbers
from .refusals import Experts, refuse_transforms

ENTRY_BYTES = 300
"""Memory that the map takes for each row in the cache (CPython 3.11: 243 bytes, 300 at times)."""

DEFAULT_CACHE = 128 << 20
"""Bytes of the row cache if none are stated."""

LEAST_BYTES = 256 << 20
"""Tables that are smaller together stay in memory, unless they are asked to stream."""

_EARLY_SHARE = 2  # early reads take at most this part of the slots
_FORKED = "this process was forked after the model was loaded"


@dataclass(slots=True)
class RowStats:
    """What became of the rows that calls looked up; each distinct row of a call counts once.

    Attributes:
        hits: rows that were in the cache.
        early: rows that had been read, or were being read, before the call.
        misses: rows that the call read and waited for.
        bytes: bytes read, early reads that nobody used included.
    """

    hits: int = 0
    early: int = 0
    misses: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Consecutive rows of a table that lie side by side in a file.

    Attributes:
        file: path of the shard.
        offset: position of the first byte.
        first: number of the first row.
        tensor: name of the stored tensor.
    """

    file: str
    offset: int
    first: int
    tensor: str


@dataclass(frozen=True, slots=True)
class RowTensor:
    """One of the tensors that make up a table.

    Attributes:
        attribute: its name in the embedding: `weight`, `scales` or `biases`.
        dtype: MLX element type.
        row_bytes: bytes of a row.
        places: where its rows are; the places of all tensors of a table begin at the same rows.
            Empty if they are in no file, because the checkpoint must be converted first.
    """

    attribute: str
    dtype: mx.Dtype
    row_bytes: int
    places: tuple[RowPlace, ...]


class RowTable:
    """One table, its rows in memory, and the reads on their way there.

    Args:
        name: module path in the model.
        embedding: the stock module, of the whole table or of a part of it. It loses its arrays.
        tensors: the table's tensors.
        rows: how many rows the table has.
        joined: the model holds parts of the table and adds their rows into an array of zeros. That
            turns -0.0 into 0.0, and so does this table.

    Attributes:
        row_bytes: bytes of a row, in all tensors.
        nbytes: bytes of the table.
        slots: rows that fit into the cache; 0 until `open`.
        planned: not open yet; calls tell sizes alone.
        stats: counters.
    """

    def __init__(
        self,
        name: str,
        embedding: nn.Module,
        tensors: Sequence[RowTensor],
        rows: int,
        joined: bool = False,
    ) -> None:
        self.name, self.rows, self.tensors = name, rows, tuple(tensors)
        self.row_bytes = sum(t.row_bytes for t in self.tensors)
        self.nbytes = rows * self.row_bytes
        self.slots = 0
        self.stats = RowStats()
        self.embedding = embedding
        self._joined = joined
        for t in self.tensors:  # one row tells width and type of the results
            raw = mx.zeros((1, t.row_bytes), mx.uint8)
            setattr(embedding, t.attribute, raw.view(t.dtype))
        blank = embedding(mx.zeros(1, mx.uint32))
        self._width, self._dtype = blank.shape[-1], blank.dtype
        self._let_go()
        self._firsts = [p.first for p in self.tensors[0].places]
        self.planned = True
        self._closed: str | None = None
        self._lock = threading.Lock()
        self._reader: ExpertReader  # set by open
        self._memory: list[np.ndarray] = []  # uint8 [slots, row_bytes] of each tensor
        self._slot: OrderedDict[int, int] = OrderedDict()  # by row, the last used last
        self._free: list[int] = []
        self._in_flight: dict[int, Ticket] = {}  # rows not known to have arrived
        self._early: set[int] = set()  # rows read early that no call has used
        self._changing = False  # true at the next use if an exception ended the change

    def open(self, slots: int, reader: ExpertReader) -> None:
        """Allocate the cache and accept calls.

        Args:
            slots: rows that fit.
            reader: reads the rows.
        """
        self.slots, self._reader = max(1, min(slots, self.rows)), reader
        self._memory = [np.empty((self.slots, t.row_bytes), np.uint8) for t in self.tensors]
        self._free = list(range(self.slots))
        self.planned = False

    def close(self, why: str) -> None:
        """Let later calls raise `StreamError`, and free the cache."""
        with self._lock:
            self._closed, self.planned = why, False
            self._memory = []
            self._slot.clear()
            self._in_flight.clear()

    def disown(self) -> None:
        """Refuse calls in a forked process, where another thread may have held the lock."""
        self._closed, self.planned, self._lock = _FORKED, False, threading.Lock()

    def __deepcopy__(self, memo: Any) -> RowTable:
        """Itself: a copy of a model that only its sizes are taken from."""
        return self

    def blank(self, ids: mx.array) -> mx.array:
        """An array [..., D] of the size that `look_up` returns, for graphs that nobody runs."""
        # As the stock module does: the graph of such a model cannot be exported.
        if self._joined and self.planned:
            mx.eval(ids)
        like = mx.zeros((*ids.shape, self._width), self._dtype)
        return like + mx.sum(ids).astype(self._dtype)

    def look_up(self, ids: mx.array) -> mx.array:
        """Rows of the table by number: ids [...] -> [..., D].

        Raises:
            ExpertReadError: a row could not be read.
            StreamError: the stream is closed.
            TokenError: the table has no such row.
        """
        wanted = numbers(ids)
        needed, where = np.unique(wanted, return_inverse=True)
        if not len(needed):
            return self.blank(ids)
        if needed[0] < -self.rows or needed[-1] >= self.rows:
            wrong = needed[0] if needed[0] < 0 else needed[-1]
            raise TokenError(f"{self.name} has {self.rows} rows, and no row {wrong}")
        if needed[0] < 0:  # the stock module counts these from the end
            needed, back = np.unique(needed % self.rows, return_inverse=True)
            where = back[where]
        where = where.reshape(wanted.shape).astype(np.uint32)
        with self._lock:
            if self._closed is not None:
                raise StreamError(f"{self.name}: {self._closed}")
            if len(needed) <= self.slots:
                y = self._run(needed, where)  # [..., D]
            else:
                parts = []
                for begin in range(0, len(needed), self.slots):
                    part = needed[begin : begin + self.slots]
                    parts.append(self._run(part, np.arange(len(part), dtype=np.uint32)))
                    mx.eval(parts[-1])  # else all rows as stored would be in memory beside
                y = mx.concatenate(parts)[mx.array(where)]
        return y + mx.zeros_like(y) if self._joined else y

    def read_early(self, ids: np.ndarray) -> None:
        """Start reading rows that a call will look up soon; their number is bounded.

        Does nothing with rows that the table does not have, and if the reads fail.

        Args:
            ids: numbers of rows, of any shape.
        """
        with self._lock:
            if self._closed is not None or self.planned:
                return
            self._check_whole()
            wanted = np.unique(ids)
            wanted = wanted[(wanted >= 0) & (wanted < self.rows)]
            rows = [r for r in wanted.tolist() if r not in self._slot]
            # More than that may be in flight: an interrupted call leaves all that it waited for.
            rows = rows[: max(0, self.slots // _EARLY_SHARE - len(self._in_flight))]
            if not rows:
                return
            self._changing = True
            for row in wanted.tolist():  # those that are there must not be the next to leave
                if row in self._slot:
                    self._slot.move_to_end(row)
            self._early.update(rows)
            self._submit(rows)
            self._changing = False

    def _run(self, needed: np.ndarray, where: np.ndarray) -> mx.array:
        """The stock module over the rows `needed` [U], at positions [...] -> [..., D]."""
        for t, stored in zip(self.tensors, self.fetch(needed.tolist()), strict=True):
            setattr(self.embedding, t.attribute, mx.array(stored).view(t.dtype))
        try:
            y: mx.array = self.embedding(mx.array(where))
        finally:
            self._let_go()
        return y

    def fetch(self, rows: list[int]) -> list[np.ndarray]:
        """The bytes of distinct rows, no more than there are slots: [U, row_bytes] of each tensor.

        Raises:
            ExpertReadError: a row could not be read; it has no slot.
        """
        self._check_whole()
        self._arrive(rows, demand=False)
        self._changing = True
        missing = []
        for row in rows:
            if row in self._slot:
                self._slot.move_to_end(row)
            else:
                missing.append(row)
        early = self._early.intersection(rows)
        self.stats.early += len(early)
        self._early -= early
        self.stats.misses += len(missing)
        self.stats.hits += len(rows) - len(missing) - len(early)
        if missing:
            self._submit(missing)
        self._changing = False
        if missing:
            self._arrive(missing, demand=True)
        slots = [self._slot[row] for row in rows]
        return [memory[slots] for memory in self._memory]

    def _check_whole(self) -> None:
        """Start over with an empty cache if the last change did not end."""
        if self._changing:
            self._reader.stop(self.name)
            self._in_flight.clear()
            self._early.clear()
            self._slot.clear()
            self._free = list(range(self.slots))
            self._changing = False

    def _submit(self, rows: list[int]) -> None:
        """Give rows slots and start reading them."""
        while len(self._free) < len(rows):
            row = next(iter(self._slot))
            self._arrive([row], demand=False)
            self._drop([row])
        ranges = []
        for row in rows:
            slot = self._slot[row] = self._free.pop()
            part = bisect_right(self._firsts, row) - 1
            for t, memory in zip(self.tensors, self._memory, strict=True):
                at = t.places[part]
                offset = at.offset + (row - at.first) * t.row_bytes
                into = memory[slot].data
                ranges.append(ByteRange(at.file, offset, into, self.name, row, at.tensor))
        self.stats.bytes += len(rows) * self.row_bytes
        self._in_flight.update(dict.fromkeys(rows, self._reader.submit(ranges, DEMAND)))

    def _arrive(self, rows: Iterable[int], demand: bool) -> None:
        """Wait for those of the rows that are being read; rows that fail lose their slots.

        Raises:
            ExpertReadError: with `demand`, a row could not be read.
        """
        tickets = dict.fromkeys(t for r in rows if (t := self._in_flight.get(r)) is not None)
        for ticket in tickets:
            failed: ExpertReadError | None = None
            try:
                ticket.wait()
            except ExpertReadError as e:
                failed = e
            before, self._changing = self._changing, True
            ended = [row for row, t in self._in_flight.items() if t is ticket]
            for row in ended:
                del self._in_flight[row]
            self._drop([row for row in ended if row in ticket.errors])
            self._changing = before
            if failed is not None and demand:
                raise failed.of_a_row() from failed

    def _drop(self, rows: Iterable[int]) -> None:
        for row in rows:
            if row in self._slot:
                self._free.append(self._slot.pop(row))
                self._early.discard(row)

    def _let_go(self) -> None:
        for t in self.tensors:
            setattr(self.embedding, t.attribute, mx.zeros((0, 1), t.dtype))


class StreamedRows(Experts):
    """Stands in for one embedding whose rows are read from the drive: `y = table[ids]`."""

    def __init__(self, table: RowTable) -> None:
        super().__init__()
        self.table = table
        object.__setattr__(self, "tables", table.embedding)  # not as a child: no parameters

    def __call__(self, ids: mx.array) -> mx.array:
        """See `RowTable.look_up`."""
        if (noted := _rehearsal.noted) is not None:
            noted.append((self.table, ids))
            return self.table.blank(ids)
        if self.table.planned:
            return self.table.blank(ids)
        try:
            return self.table.look_up(ids)
        except ValueError as e:
            refuse_transforms(e)
            raise

    def __deepcopy__(self, memo: Any) -> StreamedRows:  # type: ignore[override]
        """Itself, as of its table. The model around it refuses copies once it is loaded."""
        return self


class _Rehearsal(threading.local):
    """Row ids that this thread's calls would look up; None unless it only wants to know them."""

    noted: list[tuple[RowTable, mx.array]] | None = None


_rehearsal = _Rehearsal()


@contextmanager
def rehearsal() -> Iterator[list[tuple[RowTable, mx.array]]]:
    """Let this thread's look-ups note their ids and return blanks; yields (table, ids) pairs."""
    noted: list[tuple[RowTable, mx.array]] = []
    before, _rehearsal.noted = _rehearsal.noted, noted
    try:
        yield noted
    finally:
        _rehearsal.noted = before


class Rows:
    """A model's tables that are streamed, and their share of the row cache.

    Args:
        tables: the tables; may be none.
        cache_bytes: the most memory that their cache may take.

    Attributes:
        nbytes: bytes of all tables.
        cache_bytes: memory that the cache takes, its map included.
    """

    def __init__(self, tables: Sequence[RowTable] = (), cache_bytes: int = DEFAULT_CACHE) -> None:
        self.tables = tuple(tables)
        self.nbytes = sum(t.nbytes for t in self.tables)
        whole = sum(t.rows * (t.row_bytes + ENTRY_BYTES) for t in self.tables)
        part = min(1.0, cache_bytes / max(1, whole))
        self._slots = [max(1, int(part * t.rows)) for t in self.tables]
        self.cache_bytes = sum(
            n * (t.row_bytes + ENTRY_BYTES) for n, t in zip(self._slots, self.tables, strict=True)
        )

    @property
    def files(self) -> set[str]:
        """Every file that holds rows."""
        return {p.file for table in self.tables for t in table.tensors for p in t.places}

    def open(self, reader: ExpertReader) -> None:
        """Allocate all caches and accept calls."""
        for table, slots in zip(self.tables, self._slots, strict=True):
            table.open(slots, reader)

    def close(self, why: str) -> None:
        """See `RowTable.close`."""
        for table in self.tables:
            table.close(why)

    def disown(self) -> None:
        """See `RowTable.disown`."""
        for table in self.tables:
            table.disown()

    def stats(self) -> RowStats:
        """The counts of all tables since the last `reset`."""
        names = [f.name for f in fields(RowStats)]
        return RowStats(**{n: sum(getattr(t.stats, n) for t in self.tables) for n in names})

    def reset(self) -> None:
        """Set every counter to zero; rows stay in the cache."""
        for table in self.tables:
            table.stats = RowStats()
