"""Replacement policies: which resident expert makes room for another.

A policy orders the resident experts of one layer; it knows nothing of slots. To add one, write a
class with the methods of `Policy` and enter it in `POLICIES`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np


class Policy(Protocol):
    """Orders the resident experts of one layer and chooses which one to evict."""

    def prompt(self, chosen: np.ndarray) -> None:
        """A call of several tokens will use these experts.

        Args:
            chosen: int [N], token after token, with repeats. Afterwards each expert is touched or
                inserted once.
        """

    def touch(self, expert: int) -> None:
        """A resident expert was used."""

    def touch_all(self, experts: np.ndarray) -> None:
        """Resident experts, int [N], were used one after another, some more than once."""

    def insert(self, expert: int) -> None:
        """An expert became resident and is used."""

    def admit(self, expert: int) -> None:
        """A prefetched expert became resident; it has not been used yet."""

    def evict(self, keep: Collection[int]) -> int:
        """Remove and return a resident expert that is not in `keep`; there is always one."""

    def remove(self, expert: int) -> None:
        """A resident expert was dropped for another reason; its read failed, for example."""


class _OneByOne:
    """A policy to which many uses at once are the same as one after another."""

    def touch(self, expert: int) -> None:
        raise NotImplementedError

    def touch_all(self, experts: np.ndarray) -> None:
        for expert in experts.tolist():
            self.touch(expert)


class LRU(_OneByOne):
    """Evicts the expert that was not used for the longest time."""

    def __init__(self, experts: int, slots: int) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()  # oldest first

    def prompt(self, chosen: np.ndarray) -> None:
        """Ignored: the number of uses within a call makes no difference."""

    def touch(self, expert: int) -> None:
        self._order.move_to_end(expert)

    def insert(self, expert: int) -> None:
        self._order[expert] = None

    admit = insert

    def evict(self, keep: Collection[int]) -> int:
        victim = next(e for e in self._order if e not in keep)
        del self._order[victim]
        return victim

    def remove(self, expert: int) -> None:
        del self._order[expert]


class S3FIFO(_OneByOne):
    """Three FIFO queues; experts that are used only once leave early, through a small queue.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. The small
    queue has a tenth of the slots. The ghost queue remembers as many evicted experts as the main
    queue holds. Use counts saturate at 3.
    """

    def __init__(self, experts: int, slots: int) -> None:
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: deque[int] = deque(maxlen=max(1, slots - slots // 10))
        self._uses: dict[int, int] = {}
        self._small_slots = max(1, slots // 10)

    def prompt(self, chosen: np.ndarray) -> None:
        """Ignored: the number of uses within a call makes no difference."""

    def touch(self, expert: int) -> None:
        self._uses[expert] = min(3, self._uses[expert] + 1)

    def insert(self, expert: int) -> None:
        (self._main if expert in self._ghosts else self._small)[expert] = None
        self._uses[expert] = 0

    admit = insert

    def evict(self, keep: Collection[int]) -> int:
        from_small = len(self._small) >= self._small_slots or not self._main
        if from_small and (victim := self._evict_small(keep)) is not None:
            return victim
        if (victim := self._evict_main(keep)) is not None:
            return victim
        # All experts in the main queue must stay.
        victim = self._evict_small(keep)
        if victim is None:  # the small queue has just promoted all that it could
            victim = self._evict_main(keep)
        assert victim is not None
        return victim

    def remove(self, expert: int) -> None:
        del self._uses[expert]
        (self._small if expert in self._small else self._main).pop(expert)

    def _evict_small(self, keep: Collection[int]) -> int | None:
        """Promote experts that were used more than once, and evict the first other one."""
        for expert in [e for e in self._small if e not in keep]:
            del self._small[expert]
            if self._uses[expert] <= 1:
                del self._uses[expert]
                self._ghosts.append(expert)
                return expert
            self._uses[expert] = 0
            self._main[expert] = None
        return None

    def _evict_main(self, keep: Collection[int]) -> int | None:
        """Put used experts back with one use less, until an expert without uses is found."""
        movable = deque(e for e in self._main if e not in keep)
        while movable:
            expert = movable.popleft()
            del self._main[expert]
            if self._uses[expert] == 0:
                del self._uses[expert]
                return expert
            self._uses[expert] -= 1
            self._main[expert] = None
            movable.append(expert)
        return None


class LRFU:
    """Evicts the expert that was used least; the weight of a use halves over time.

    Source: Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and
    least frequently used policies", IEEE Transactions on Computers 50 (12), 2001. A layer has few
    experts, so the counts of evicted ones are kept too. A prompt counts as if its tokens had come
    one by one; counting each of its experts once caused up to 8 % more misses.

    Args:
        half_life: number of uses, per expert of the layer, after which a use counts half; infinity
            is plain LFU.
    """

    _LARGEST = 2.0**500

    def __init__(self, experts: int, slots: int, half_life: float = 2.0) -> None:
        # Instead of shrinking every count at each use, let the weight of a new use grow.
        self._halving = 1 / (half_life * experts)
        self._growth = 2.0**self._halving
        self._weight = 1.0
        self._count = [0.0] * experts
        self._counted: set[int] = set()  # whose next use `prompt` has counted already
        # An entry for each resident expert, with its count when the entry was made. Counts only
        # grow, so the smallest entry that is up to date has the smallest count.
        self._heap: list[tuple[float, int]] = []

    def prompt(self, chosen: np.ndarray) -> None:
        age = np.arange(len(chosen) - 1, -1, -1) * self._halving  # [N], in half-lives
        uses = np.bincount(chosen, np.exp2(-age))
        self._grow(len(chosen) * self._halving)
        for expert in np.unique(chosen).tolist():
            self._count[expert] += self._weight / self._growth * float(uses[expert])
            self._counted.add(expert)

    def touch(self, expert: int) -> None:
        if self._counted and expert in self._counted:
            self._counted.discard(expert)
            return
        self._count[expert] += self._weight
        self._weight *= self._growth
        if self._weight > self._LARGEST:
            self._rescale()

    def touch_all(self, experts: np.ndarray) -> None:
        if self._counted or len(experts) * self._halving > 400:  # rare; 2.0**400 does not overflow
            for expert in experts.tolist():
                self.touch(expert)
            return
        # The same products and sums in the same order as one by one: the same floats.
        weights = np.full(len(experts) + 1, self._growth)
        weights[0] = self._weight
        weights = np.multiply.accumulate(weights)
        count = np.array(self._count)
        np.add.at(count, experts, weights[:-1])
        self._count = count.tolist()
        self._weight = float(weights[-1])
        if self._weight > self._LARGEST:
            self._rescale()

    def insert(self, expert: int) -> None:
        self.touch(expert)
        self.admit(expert)

    def admit(self, expert: int) -> None:
        heapq.heappush(self._heap, (self._count[expert], expert))

    def evict(self, keep: Collection[int]) -> int:
        heap, count = self._heap, self._count
        passed: list[tuple[float, int]] = []
        while True:
            noted, expert = heap[0]
            if noted != count[expert]:
                heapq.heapreplace(heap, (count[expert], expert))
                continue
            heapq.heappop(heap)
            if expert not in keep:
                break
            passed.append((noted, expert))
        for entry in passed:
            heapq.heappush(heap, entry)
        return expert

    def remove(self, expert: int) -> None:
        self._heap = [entry for entry in self._heap if entry[1] != expert]
        heapq.heapify(self._heap)

    def _grow(self, half_lives: float) -> None:
        """Let time pass, in steps: a float cannot hold the growth over a long prompt."""
        self._counted.clear()
        while half_lives > 0:
            step = min(half_lives, 400.0)
            self._weight *= 2.0**step
            half_lives -= step
            if self._weight > self._LARGEST:
                self._rescale()

    def _rescale(self) -> None:
        """Keep numbers finite; dividing by a power of two keeps their order."""
        self._weight /= self._LARGEST
        self._count = [c / self._LARGEST for c in self._count]
        self._heap = [(c / self._LARGEST, e) for c, e in self._heap]
        heapq.heapify(self._heap)  # underflow may have made entries equal


PolicyMaker = Callable[[int, int], Policy]
"""Makes a policy from a layer's numbers of experts and slots."""

POLICIES: dict[str, PolicyMaker] = {"lru": LRU, "s3fifo": S3FIFO, "lrfu": LRFU}
"""Replacement policies by their names in `StreamConfig.policy`."""
