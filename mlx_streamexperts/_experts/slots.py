"""The slots of one expert layer, and the reads on their way into them.

This ties together the map (`expert_map.py`), the memory (`bank.py`) and the reads (`reader.py`). An
expert is in the map only while its bytes are in its slot or on their way there. All calls need the
layer's lock.

A change of these three that an exception ends half-way (Ctrl-C, `MemoryError`, an error of the
device) is never repaired. The layer starts over with empty slots at its next use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from .._cache.expert_map import ExpertCache
from .._errors import ExpertReadError, OtherThreadError
from .._io.checkpoint import ExpertTable
from .._io.ranges import ByteRange
from .._io.reader import DEMAND, PREFETCH, ExpertReader, Ticket
from .._listeners import Listeners
from .bank import Bank, SlotTensor, numbers, total_bytes


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One tensor of a layer's experts, or a part of one: where it is used and where it is stored.

    Attributes:
        slot: where its slots are used.
        stored: where its bytes are stored.
        begin: where the part begins in an expert's tensor, in bytes; parts follow each other.
    """

    slot: SlotTensor
    stored: ExpertTable
    begin: int = 0


@dataclass(frozen=True, slots=True)
class SmallTable:
    """A few bytes of each expert, such as one scale. The table stays in memory, in whole.

    A read of a few bytes would take as long as one of many, and mlx-vlm computes some of them.

    Attributes:
        slot: where its slots are used.
        rows: [experts, ...], not evaluated until the layer opens, and given back then.
    """

    slot: SlotTensor
    rows: mx.array


@dataclass(slots=True)
class PrefetchStats:
    """What became of prefetched experts. See also `CacheStats`.

    Attributes:
        issued: experts queued to be read.
        late: needed while their reads were in flight, which hid only a part of the reads.
        cancelled: taken back before their reads began.
        failed: could not be read. This is no error, because no call had asked for them.
    """

    issued: int = 0
    late: int = 0
    cancelled: int = 0
    failed: int = 0


class Arrivals:
    """Experts on their way into slots for one call.

    Attributes:
        left: those that have not arrived, with the tickets of their reads.
    """

    def __init__(self, slots: ExpertSlots, left: dict[int, Ticket]) -> None:
        self._slots, self.left = slots, left

    def some(self) -> list[int]:
        """Wait until at least one more is in its slot; returns those that are.

        Raises:
            ExpertReadError: an expert's bytes could not be read. Nothing is on its way any more.
        """
        slots, ticket = self._slots, next(iter(self.left.values()))
        try:
            for listener in slots.on_call.now:
                listener(False)
            if not slots.bank.in_place:
                ticket.wait()  # staged bytes become visible all at once
            arrived = ticket.wait_for_any([e for e, t in self.left.items() if t is ticket])
            if slots.as_packed is not None:
                slots.check(arrived)
            if not slots.bank.in_place:
                slots.bank.commit()
        except Exception:
            self.abandon()
            raise
        for expert in arrived:
            del self.left[expert]
        return arrived

    def all(self) -> list[int]:
        """Wait for all that are left; returns those. Raises like `some`."""
        waited_for = list(self.left)
        while self.left:
            self.some()
        return waited_for

    def abandon(self) -> None:
        """Stop the reads. Experts whose bytes have not all arrived lose their slots."""
        for ticket in dict.fromkeys(self.left.values()):
            self._slots.give_up(ticket, [e for e, t in self.left.items() if t is ticket])
        self.left.clear()


class ExpertSlots:
    """One layer's slots.

    Args:
        name: the layer's.
        tensors: every expert tensor of the layer that is read, by name within it.
        experts: routed experts in the layer.
        small: those that are in memory, by name; `tensors` has none of them.
        pinned: experts that every token uses: they stay in their slots.

    Attributes:
        cache: the expert -> slot map.
        bank: the memory.
        prefetch_stats: what became of prefetched experts.
        as_packed: called after each read with the expert and its tensors' bytes: are they right?
            None trusts all reads.
        on_call: called with False before each wait for a read (and by the layer, see there).
    """

    def __init__(
        self,
        name: str,
        tensors: dict[str, ExpertTensor],
        experts: int,
        small: dict[str, SmallTable] | None = None,
        pinned: Sequence[int] = (),
    ) -> None:
        self.name, self.tensors, self.experts = name, tensors, experts
        self.small, self.pinned = small or {}, pinned
        self._small_rows: list[np.ndarray] = []  # uint8 [experts, bytes] of each, set by open
        self.expert_bytes = total_bytes([t.slot for t in tensors.values() if not t.begin])
        self.cache = ExpertCache(experts, 0)
        self.bank = Bank({}, 0, in_place=True)
        self.prefetch_stats = PrefetchStats()
        self.as_packed: Callable[[int, Sequence[memoryview]], bool] | None = None
        self.on_call = Listeners[Callable[[bool], None]]()
        self._reader: ExpertReader  # set by open
        self._in_flight: dict[int, Ticket] = {}  # prefetched, not known to have arrived
        self._awaited = Arrivals(self, {})  # of the last call
        self._changing = False  # true at the next use if an exception ended the change

    @property
    def slot_tensors(self) -> dict[str, SlotTensor]:
        """Where slots are used, by name: first those of `tensors`, in their order."""
        read = {name: t.slot for name, t in self.tensors.items() if not t.begin}
        return read | {name: t.slot for name, t in self.small.items()}

    def relocate(
        self,
        stored: dict[str, ExpertTable],
        as_packed: Callable[[int, Sequence[memoryview]], bool] | None = None,
    ) -> None:
        """Read the experts' bytes from other places from now on.

        Args:
            stored: the place of every tensor.
            as_packed: checks each expert that was read; None trusts reads.
        """
        self.tensors = {n: replace(t, stored=stored[n]) for n, t in self.tensors.items()}
        self.as_packed = as_packed

    def open(
        self, slots: int, reader: ExpertReader, policy: str, in_place: bool, keep: bool = False
    ) -> None:
        """Replace all slots by `slots` empty ones.

        Args:
            slots: experts that fit.
            reader: reads the experts.
            policy: name of the cache's policy.
            in_place: read straight into MLX's arrays.
            keep: move the most useful experts to the new slots. Both are in memory meanwhile.
        """
        old, held = self.cache, list[list[memoryview]]()
        if keep := keep and in_place and self.bank.in_place:
            self._settle()
            held = [self.bank.destinations(slot) for slot in range(self.bank.slots)]
        self._empty()  # before the new ones are allocated: the budget holds throughout
        self._reader = reader
        if len(self._small_rows) < len(self.small):
            self._small_rows = [
                numbers(t.rows.reshape(self.experts, -1).view(mx.uint8))
                for t in self.small.values()
            ]
            nothing = mx.zeros((0,))
            self.small = {name: replace(t, rows=nothing) for name, t in self.small.items()}
        self.cache = ExpertCache(self.experts, slots, policy, self.pinned)
        before, self.bank = self.bank, Bank(self.slot_tensors, self.cache.slots, in_place)
        self.bank.inherit_readers(before)  # they may read run-ahead's tables, which stay
        for expert, slot in self.cache.succeed(old).items() if keep else ():
            into = self.bank.destinations(int(self.cache.slot_of[expert]))
            for memory, bytes_of_it in zip(into, held[slot], strict=True):
                memory[:] = bytes_of_it

    def close(self) -> None:
        """Free the memory, once nothing writes to it."""
        self._empty()
        self.bank = Bank({}, 0, in_place=True)

    def _settle(self) -> None:
        """End all reads: every expert in the map is in its slot then."""
        self._check_whole()
        self._awaited.abandon()
        self.drain()

    def _empty(self) -> None:
        self._settle()
        self.bank.free()

    def begin(self, needed: Sequence[int], keep: Sequence[int] = ()) -> Arrivals:
        """Give the needed experts slots and start reading those that are missing.

        Args:
            needed: distinct experts; with `keep` no more than there are slots.
            keep: resident experts that must stay although this call does not need them.

        Raises:
            OtherThreadError: another thread has to evaluate what it built with these slots first.
        """
        self._check_whole()
        if self._awaited.left:  # only if an exception ended that call
            self._awaited.abandon()
        self._changing = True
        left: dict[int, Ticket] = {}
        if self._in_flight:
            left = self._claim(needed)
            if len({*needed, *keep, *self._in_flight}) > self.cache.slots:
                self._drain()
        missing = self.cache.place(needed, [*keep, *self._in_flight])
        if missing:
            left.update(dict.fromkeys(missing, self._submit(missing, DEMAND)))
        self._awaited = Arrivals(self, left)
        self._changing = False
        return self._awaited

    def prefetch(self, candidates: Sequence[int], distance: int = 1) -> None:
        """Start reading experts that may be needed soon into slots that can be spared.

        Does nothing if it would have to wait or to copy.

        Args:
            candidates: distinct experts, the likeliest first.
            distance: layers until they may be needed; nearer ones are read first.
        """
        if not self.bank.in_place:
            return
        self._check_whole()
        self._changing = True
        self._note_arrived()
        placed = self.cache.place_prefetched(candidates, {*self._in_flight, *self._awaited.left})
        if placed:
            try:
                ticket = self._submit(placed, PREFETCH + distance - 1)
            except OtherThreadError:  # it reads the bank: try again another time
                for expert in placed:
                    self.cache.drop(expert)
            else:
                self.prefetch_stats.issued += len(placed)
                self._in_flight.update(dict.fromkeys(placed, ticket))
        self._changing = False

    def arrived(self) -> np.ndarray:
        """Which experts are in their slots, bool [experts]: not those on their way."""
        self._check_whole()
        self._changing = True
        self._note_arrived()
        self._changing = False
        here = self.cache.slot_of >= 0
        here[[*self._in_flight, *self._awaited.left]] = False
        return here

    def await_prefetched(self) -> None:
        """Wait for everything that was prefetched."""
        self._check_whole()
        self._changing = True
        for expert in self._in_flight:
            self._await_one(expert)
        self._note_arrived()
        self._changing = False

    def drain(self) -> None:
        """Take back queued prefetches and wait for those that are being read."""
        self._check_whole()
        self._changing = True
        self._drain()
        self._changing = False

    def check(self, arrived: Sequence[int]) -> None:
        """Compare what was read with what was packed.

        Raises:
            ExpertReadError: an expert differs.
        """
        for expert in arrived:
            if not self._is_right(expert):
                stored = next(iter(self.tensors.values())).stored
                raise ExpertReadError(
                    self.name, expert, stored.names[expert], Path(stored.files[expert]),
                    stored.offsets[expert], None, "its checksum is not that of the bytes packed",
                )  # fmt: skip

    def give_up(self, ticket: Ticket, experts: Collection[int]) -> None:
        """Stop a ticket's reads. Its experts lose their slots unless they have arrived."""
        self._changing = True
        arrived = {
            e for e in experts
            if e not in ticket.left and e not in ticket.errors and self._is_right(e)
        }  # fmt: skip
        self._reader.cancel(ticket)
        self.bank.commit()
        in_flight = [e for e, t in self._in_flight.items() if t is ticket]
        for expert in in_flight:
            del self._in_flight[expert]
        for expert in [*experts, *in_flight]:
            if expert not in arrived:
                self.cache.drop(expert)
        self._changing = False

    def _check_whole(self) -> None:
        """Start over with empty slots if the last change did not end or the bank is spoiled."""
        if self._changing or self.bank.spoiled:
            self._reader.stop(self.name)
            self._in_flight.clear()
            self._awaited.left.clear()
            self.bank.discard()
            self.cache.clear()
            self._changing = False

    def _claim(self, needed: Sequence[int]) -> dict[int, Ticket]:
        """Of the experts in flight: take those that are needed, and take back the others."""
        self._note_arrived()
        claimed: dict[int, Ticket] = {}
        for expert, ticket in list(self._in_flight.items()):
            if expert in needed:
                del self._in_flight[expert]
                self._reader.promote(ticket, expert)
                claimed[expert] = ticket
                self.prefetch_stats.late += 1
            else:
                self._withdraw(expert, ticket)
        return claimed

    def _drain(self) -> None:
        for expert, ticket in list(self._in_flight.items()):
            if not self._withdraw(expert, ticket):
                self._await_one(expert)
        self._note_arrived()

    def _await_one(self, expert: int) -> None:
        with suppress(ExpertReadError):  # `_note_arrived` drops it
            self._in_flight[expert].wait_for_any([expert])

    def _withdraw(self, expert: int, ticket: Ticket) -> bool:
        if not self._reader.withdraw(ticket, expert):
            return False
        del self._in_flight[expert]
        self.cache.drop(expert)
        self.prefetch_stats.cancelled += 1
        return True

    def _note_arrived(self) -> None:
        for expert, ticket in list(self._in_flight.items()):
            if expert in ticket.left:
                continue
            del self._in_flight[expert]
            if expert in ticket.errors or not self._is_right(expert):
                self.cache.drop(expert)
                self.prefetch_stats.failed += 1

    def _is_right(self, expert: int) -> bool:
        if self.as_packed is None:
            return True
        delivered = self.bank.delivered(int(self.cache.slot_of[expert]))
        return self.as_packed(expert, self._parts(delivered))

    def _parts(self, memory: Sequence[memoryview]) -> list[memoryview]:
        """The part of an expert's memory that each of `tensors` fills."""
        parts, at = [], -1
        for t in self.tensors.values():
            at += not t.begin
            parts.append(memory[at][t.begin : t.begin + t.stored.row_bytes])
        return parts

    def _submit(self, placed: Sequence[int], priority: int) -> Ticket:
        """Start reading experts that have just got slots."""
        self.bank.flush_readers()
        ranges = []
        for expert in placed:
            memory = self.bank.destinations(int(self.cache.slot_of[expert]))
            small = memory[len(memory) - len(self.small) :]
            for rows, into in zip(self._small_rows, small, strict=True):
                into[:] = rows[expert].data
            for t, into in zip(self.tensors.values(), self._parts(memory), strict=True):
                at = t.stored
                ranges.append(
                    ByteRange(
                        at.files[expert], at.offsets[expert], into,
                        self.name, expert, at.names[expert],
                    )
                )  # fmt: skip
        return self._reader.submit(ranges, priority)
