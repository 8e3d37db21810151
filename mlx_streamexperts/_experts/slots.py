"""The slots of one expert layer and what is on its way into them.

Ties the map (cache.py), the memory (bank.py) and the reads (reader.py) together: an expert is named
in the map only while its bytes are in its slot, or on their way under the layer's lock, which all
calls here need. Where Ctrl-C ends a change of these half-way, none of them is believed any more:
the layer starts over with empty slots at its next use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._cache.expert_map import ExpertCache
from .._errors import ExpertReadError, OtherThreadError
from .._io.checkpoint import ExpertTable
from .._io.ranges import ByteRange
from .._io.reader import PREFETCH, ExpertReader, Ticket
from .bank import Bank, SlotTensor, total_bytes


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One tensor of a layer's experts: where its slots are used and where its bytes are stored."""

    slot: SlotTensor
    stored: ExpertTable


@dataclass(slots=True)
class PrefetchStats:
    """What became of experts read before they were asked for. See also `CacheStats`.

    Attributes:
        issued: experts queued to be read.
        late: asked for while their read was under way: it was hidden in part.
        cancelled: taken back before their read began.
        failed: could not be read; no error, since nobody had asked for them.
    """

    issued: int = 0
    late: int = 0
    cancelled: int = 0
    failed: int = 0


class Arrivals:
    """Experts on their way into slots for one call.

    Attributes:
        left: those that have not arrived.
    """

    def __init__(self, slots: ExpertSlots, parts: list[tuple[Ticket, list[int]]]) -> None:
        self._slots, self._parts = slots, parts
        self.left = [e for _, experts in parts for e in experts]

    def some(self) -> list[int]:
        """Wait until at least one more is in its slot; returns those that are.

        Raises:
            ExpertReadError: an expert's bytes could not be read. Nothing is on its way any more.
        """
        ticket, experts = self._parts[0]
        try:
            if not self._slots.bank.in_place:
                ticket.wait()  # staged bytes are made visible together
            got = ticket.wait_for_any(experts)
            self._slots.check(got)
            self._slots.bank.commit()
        except Exception:
            self.abandon()
            raise
        experts[:] = [e for e in experts if e not in got]
        self.left = [e for e in self.left if e not in got]
        if not experts:
            del self._parts[0]
        return got

    def all(self) -> list[int]:
        """Wait for all that are left; returns those. Raises like `some`."""
        waited_for = self.left
        while self.left:
            self.some()
        return waited_for

    def abandon(self) -> None:
        """Leave no slot that claims an expert whose bytes are not all there."""
        for ticket, experts in self._parts:
            self._slots.give_up(ticket, experts)
        self._parts, self.left = [], []


class ExpertSlots:
    """One layer's slots.

    Args:
        name: the layer's.
        tensors: every expert tensor of the layer, by name within it.
        experts: routed experts in the layer.

    Attributes:
        cache: the expert -> slot map.
        bank: the memory.
        as_packed: asked after each read whether an expert's parts are right; None trusts reads.
    """

    def __init__(self, name: str, tensors: dict[str, ExpertTensor], experts: int) -> None:
        self.name, self.tensors, self.experts = name, tensors, experts
        self.expert_bytes = total_bytes([t.slot for t in tensors.values()])
        self.cache = ExpertCache(experts, 0)
        self.bank = Bank({}, 0, in_place=True)
        self.prefetch_stats = PrefetchStats()
        self.as_packed: Callable[[int, Sequence[memoryview]], bool] | None = None
        self._reader: ExpertReader  # set by open
        self._in_flight: dict[int, Ticket] = {}  # read ahead, not known to have arrived
        self._begun: Arrivals | None = None  # what the last call waits for
        self._changing = False  # still true at the next use: the change was interrupted

    def open(self, slots: int, reader: ExpertReader, policy: str, in_place: bool) -> None:
        """Allocate `slots` slots, all empty, in place of those there were."""
        self._empty()  # before the new ones are allocated: the budget holds throughout
        self._reader = reader
        self.cache = ExpertCache(self.experts, slots, policy)
        slot_tensors = {name: t.slot for name, t in self.tensors.items()}
        before, self.bank = self.bank, Bank(slot_tensors, self.cache.slots, in_place)
        self.bank.inherit_readers(before)  # run-ahead's tables, which those may read, stay

    def close(self) -> None:
        """Free the memory, once nothing writes it."""
        self._empty()
        self.bank = Bank({}, 0, in_place=True)

    def _empty(self) -> None:
        self._mend()
        if self._begun is not None:
            self._begun.abandon()
        self.drain()
        self.bank.free()

    def begin(self, needed: Sequence[int], keep: Sequence[int] = ()) -> Arrivals:
        """Give the needed experts slots and start reading those that are missing.

        Args:
            needed: distinct experts, with `keep` no more than there are slots.
            keep: resident experts that must stay although this call does not need them.
        """
        self._mend()
        if self._begun is not None:
            self._begun.abandon()  # left over only where that call was interrupted
        self._changing = True
        parts = self._claim(needed) if self._in_flight else []
        try:
            if self._in_flight and len({*needed, *keep, *self._in_flight}) > self.cache.slots:
                self.drain()
            missing = self.cache.place(needed, [*keep, *self._in_flight])
            if missing:
                parts.append((self._submit(missing), missing))
        except Exception:
            for ticket, experts in parts:
                self.give_up(ticket, experts)
            self._changing = False
            raise
        self._begun = Arrivals(self, parts)
        self._changing = False
        return self._begun

    def prefetch(self, candidates: Sequence[int], distance: int = 1) -> None:
        """Start reading experts that may be needed soon, the likeliest first, into spare slots.

        Does nothing where it would have to wait, or to copy.

        Args:
            candidates: distinct experts.
            distance: layers until they may be needed; nearer ones are read first.
        """
        if not self.bank.in_place:
            return
        self._mend()
        if self._in_flight:
            self._note_arrived()
        self._changing = True
        left = self._begun.left if self._begun is not None else []  # of a call that is not over
        placed = self.cache.place_prefetched(candidates, {*self._in_flight, *left})
        try:
            if placed:
                ticket = self._submit(placed, PREFETCH + distance - 1)
                self.prefetch_stats.issued += len(placed)
                self._in_flight.update(dict.fromkeys(placed, ticket))
        except OtherThreadError:  # its graph reads the bank: not now
            pass
        except Exception:
            self._changing = False
            raise
        self._changing = False

    def arrived(self) -> np.ndarray:
        """Which experts are in their slots, bool [experts]: not those on their way."""
        self._mend()
        if self._in_flight:
            self._note_arrived()
        here = self.cache.slot_of >= 0
        here[[*self._in_flight, *(self._begun.left if self._begun is not None else ())]] = False
        return here

    def await_prefetched(self) -> None:
        """Wait for everything that was read ahead."""
        self._mend()
        for expert, ticket in self._in_flight.items():
            with suppress(ExpertReadError):  # `_note_arrived` drops it
                ticket.wait_for_any([expert])
        if self._in_flight:
            self._note_arrived()

    def drain(self) -> None:
        """Take back what was read ahead and is queued; wait for what is under way."""
        before, self._changing = self._changing, True
        for expert, ticket in list(self._in_flight.items()):
            if self._withdraw(expert, ticket):
                continue
            with suppress(ExpertReadError):  # `_note_arrived` drops it
                ticket.wait_for_any([expert])
        self._note_arrived()
        self._changing = before

    def check(self, arrived: Sequence[int]) -> None:
        """Compare what was read with what was packed.

        Raises:
            ExpertReadError: an expert differs; it and all after it have lost their slots.
        """
        if self.as_packed is None:
            return
        for expert in arrived:
            if not self._is_right(expert):
                stored = next(iter(self.tensors.values())).stored
                raise ExpertReadError(
                    self.name, expert, stored.names[expert], Path(stored.files[expert]),
                    stored.offsets[expert], None, "its checksum is not that of the bytes packed",
                )  # fmt: skip

    def give_up(self, ticket: Ticket, experts: Collection[int]) -> None:
        """Stop a ticket's reads; its experts lose their slots unless they have arrived."""
        before, self._changing = self._changing, True
        arrived = {
            e for e in experts
            if ticket.ended(e) and e not in ticket.errors and self._is_right(e)
        }  # fmt: skip
        self._reader.cancel(ticket)
        self.bank.commit()
        for expert in experts:
            if expert not in arrived:
                self.cache.drop(expert)
        for expert in [e for e, t in self._in_flight.items() if t is ticket]:
            del self._in_flight[expert]
            self.cache.drop(expert)
        self._changing = before

    def _mend(self) -> None:
        """Start over with empty slots if a change was interrupted half-way, or spoiled the bank."""
        if self._changing or self.bank.spoiled:
            self._reader.stop(self.name)
            self._in_flight.clear()
            self._begun = None
            self.bank.discard()
            self.cache.clear()
            self._changing = False

    def _claim(self, needed: Sequence[int]) -> list[tuple[Ticket, list[int]]]:
        """Of what was read ahead: take what is needed and take back what is not."""
        self._note_arrived()
        late: dict[int, tuple[Ticket, list[int]]] = {}
        for expert, ticket in list(self._in_flight.items()):
            if expert in needed:
                del self._in_flight[expert]
                self._reader.promote(ticket, expert)
                late.setdefault(id(ticket), (ticket, []))[1].append(expert)
                self.prefetch_stats.late += 1
            else:
                self._withdraw(expert, ticket)
        return list(late.values())

    def _withdraw(self, expert: int, ticket: Ticket) -> bool:
        if not self._reader.withdraw(ticket, expert):
            return False
        del self._in_flight[expert]
        self.cache.drop(expert)
        self.prefetch_stats.cancelled += 1
        return True

    def _note_arrived(self) -> None:
        before, self._changing = self._changing, True
        for expert in [e for e, ticket in self._in_flight.items() if ticket.ended(e)]:
            ticket = self._in_flight.pop(expert)
            if expert in ticket.errors or not self._is_right(expert):
                self.cache.drop(expert)
                self.prefetch_stats.failed += 1
        self._changing = before

    def _is_right(self, expert: int) -> bool:
        if self.as_packed is None:
            return True
        slot = int(self.cache.slot_of[expert])
        return self.as_packed(expert, [self.bank.delivered(n, slot) for n in self.tensors])

    def _submit(self, placed: list[int], priority: int = 0) -> Ticket:
        """Start reading experts that have just got slots."""
        try:
            self.bank.flush_readers()
            return self._reader.submit(list(self._ranges(placed)), priority)
        except Exception:
            for expert in placed:
                self.cache.drop(expert)
            raise

    def _ranges(self, experts: Sequence[int]) -> Iterator[ByteRange]:
        for expert in experts:
            slot = int(self.cache.slot_of[expert])
            for name, t in self.tensors.items():
                files, offsets, names = t.stored.files, t.stored.offsets, t.stored.names
                into = self.bank.destination(name, slot)
                yield ByteRange(
                    files[expert], offsets[expert], into, self.name, expert, names[expert]
                )
