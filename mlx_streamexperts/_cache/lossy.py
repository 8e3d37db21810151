"""What a lossy run leaves out: levels, their ways, and the choice for one call of a layer.

Nothing here runs unless the user states a level or a way; exact is the default. The choice depends
on which experts are resident, so results of a lossy run depend on the cache's state. Pure Python
and NumPy: no MLX and no I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._errors import StreamError

LEVELS = {1: "skip=0.03", 2: "skip=0.05", 3: "skip=0.08"}
"""What each level stands for; level 0 is exact. docs/lossy.md has their prices on the embedded
model."""

MOST_SHARE = 0.5
"""A way that may touch more than half of a token's router mass is refused as a slip."""

_HELP = (
    "give a level from 0 (exact) to 3, or ways: skip=SHARE, prefer=SHARE, top=COUNT or "
    "top=COUNT@FIRST-LAST, for example 'skip=0.05,top=6@4-47'"
)


@dataclass(frozen=True)
class LayerWays:
    """The ways of one expert layer; see `Ways`. `top` is 0 if all chosen experts stay."""

    skip: float = 0.0
    prefer: float = 0.0
    top: int = 0


@dataclass(frozen=True)
class Ways:
    """Ways to leave out experts. Shares are of a token's router mass: the weights of its experts.

    Attributes:
        skip: leave out an expert that is not resident and has less than this share.
        prefer: exchange experts that are not resident, the weakest first, for the resident ones
            that the router ranks next, while they have at most this share together.
        top: experts that a token keeps, the strongest ones, with the first and the last expert
            layer (from 0) that this holds for. The last entry that covers a layer counts.
        text: as it was stated.
        level: that it is; None for ways by name.
    """

    skip: float = 0.0
    prefer: float = 0.0
    top: tuple[tuple[int, int, int], ...] = ()
    text: str = ""
    level: int | None = None

    @classmethod
    def parse(cls, stated: int | str | None) -> Ways | None:
        """The ways of a level or a text; None for level 0, or if nothing is stated.

        Args:
            stated: a level from 0 to 3, or ways such as "skip=0.05,top=6".

        Raises:
            StreamError: it is neither.
        """
        if stated is None:
            return None
        if isinstance(stated, bool) or not isinstance(stated, int | str):
            raise StreamError(f"lossy={stated!r}: {_HELP}")
        if re.fullmatch(r"\s*\d+\s*", str(stated)):
            level = int(stated)
            if level == 0:
                return None
            if level not in LEVELS:
                raise StreamError(f"lossy={stated!r}: {_HELP}")
            ways = cls.parse(LEVELS[level])
            assert ways is not None
            return cls(ways.skip, ways.prefer, ways.top, f"level {level} ({LEVELS[level]})", level)
        shares = {"skip": 0.0, "prefer": 0.0}
        top = []
        for part in str(stated).replace(" ", "").split(","):
            name, _, value = part.partition("=")
            if name in shares:
                if (share := _share(value)) is None:
                    raise StreamError(
                        f"lossy={stated!r}: {part!r} is out of range: {name} takes a share above 0 "
                        f"and at most {MOST_SHARE}, for example {name}=0.05"
                    )
                shares[name] = share
            elif name == "top" and (match := re.fullmatch(r"(\d+)(?:@(\d+)-(\d+))?", value)):
                count, first, last = (int(x) if x else None for x in match.groups())
                if not count:
                    raise StreamError(f"lossy={stated!r}: a token needs at least one expert")
                top.append((count, first or 0, 1 << 30 if last is None else last))
            else:
                raise StreamError(f"lossy={stated!r}: {part!r} is not understood; {_HELP}")
        return cls(shares["skip"], shares["prefer"], tuple(top), str(stated))

    def allows(self, level: int) -> bool:
        """Is this level exact, or no more lossy than these ways? Ways by name allow only 0."""
        return level == 0 or (self.level is not None and 0 < level <= self.level)

    def of(self, layer: int) -> LayerWays:
        """The ways of one expert layer, counted from 0."""
        top = [count for count, first, last in self.top if first <= layer <= last]
        return LayerWays(self.skip, self.prefer, top[-1] if top else 0)

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class LossyStats:
    """What lossy calls left out, summed over tokens and layers.

    Attributes:
        chosen: experts that routers chose, each token's counted.
        left_out: of those, experts that were not used.
        exchanged: of those left out, experts that a resident one stood in for.
        tokens: tokens, once for each layer.
        mass: router mass of the experts left out; 1 is all of one token's in one layer.
    """

    chosen: int = 0
    left_out: int = 0
    exchanged: int = 0
    tokens: int = 0
    mass: float = 0.0

    @property
    def share_left_out(self) -> float:
        """Share of the chosen experts that were left out."""
        return self.left_out / self.chosen if self.chosen else 0.0

    @property
    def mass_left_out(self) -> float:
        """Share of the router mass that was left out."""
        return self.mass / self.tokens if self.tokens else 0.0

    def add(self, other: LossyStats) -> None:
        """Add another layer's counts to these.

        Args:
            other: the counts to add.
        """
        self.chosen += other.chosen
        self.left_out += other.left_out
        self.exchanged += other.exchanged
        self.tokens += other.tokens
        self.mass += other.mass


class Kept(NamedTuple):
    """The experts of a call that stay.

    Attributes:
        experts: int [..., J], at most as many as were chosen. A token that keeps fewer than others
            of its call repeats its strongest one, at weight 0.
        weights: float32 [..., J], their new weights: those of a token have the old sum.
    """

    experts: np.ndarray
    weights: np.ndarray


def keep(
    ways: LayerWays,
    experts: np.ndarray,
    weights: np.ndarray,
    here: np.ndarray,
    scores: np.ndarray | None,
    stats: LossyStats,
) -> Kept | None:
    """Choose what a call of one layer leaves out.

    An expert that is left out for lack of residence is left out for every token of the call, or
    its bytes would be read all the same: its largest share of any token decides. A token's
    strongest expert always stays.

    Args:
        ways: of the layer.
        experts: int [..., K], the router's choices.
        weights: float32 [..., K], what each expert's output is multiplied by.
        here: bool [experts], those that are resident or being read.
        scores: float32 [..., experts], the router's weights of all experts up to a factor of each
            token's; needed for `prefer` only.
        stats: counts what is left out.

    Returns:
        What stays, or None if all do.
    """
    shape = experts.shape
    chosen = experts.reshape(-1, shape[-1])  # [T, K]
    stats.chosen += chosen.size
    stats.tokens += len(chosen)
    absent = ~here[chosen]  # [T, K]
    if not (ways.top or absent.any()):
        return None
    given = weights.reshape(chosen.shape).astype(np.float32)
    total = np.abs(given).sum(-1, keepdims=True)  # [T, 1]
    share = np.abs(given) / np.maximum(total, 1e-30)
    order = np.argsort(-share, axis=-1, kind="stable")  # [T, K], the strongest first
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(shape[-1])[None], -1)
    out = rank >= ways.top if ways.top else np.zeros(chosen.shape, bool)
    stand_ins = np.full(chosen.shape, -1)
    swapped = stand_ins >= 0
    absent &= rank > 0
    if (ways.skip or ways.prefer) and absent.any():
        largest = np.zeros(len(here), np.float32)  # each expert's share of any token that keeps it
        np.maximum.at(largest, chosen, np.where(out, 0, np.where(rank == 0, 1, share)))
        most = largest[chosen]  # [T, K]
        if ways.prefer and scores is not None:
            weak = absent & ~out & (most <= ways.prefer)
            stand_ins = _stand_ins(ways.prefer, chosen, order, share, weak, here, scores)
            swapped = stand_ins >= 0
            flat = scores.reshape(len(chosen), -1)
            theirs = np.take_along_axis(flat, np.where(swapped, stand_ins, chosen), -1)
            own = np.take_along_axis(flat, chosen, -1)
            given = np.where(swapped, given * theirs / np.maximum(own, 1e-30), given)
        if ways.skip:
            out |= absent & ~swapped & (most < ways.skip)
    if not (out.any() or swapped.any()):
        return None
    stats.left_out += int((out | swapped).sum())
    stats.exchanged += int(swapped.sum())
    stats.mass += float(share[out | swapped].sum())
    strongest = np.take_along_axis(chosen, order[:, :1], -1)  # [T, 1]
    kept = np.where(out, strongest, np.where(swapped, stand_ins, chosen))
    given = np.where(out, 0, given)
    given = given * (total / np.maximum(np.abs(given).sum(-1, keepdims=True), 1e-30))
    count = int((~out).sum(-1).max())
    columns = np.argsort(out, axis=-1, kind="stable")[:, :count]  # those that stay, in order
    final = (*shape[:-1], count)
    return Kept(
        np.take_along_axis(kept, columns, -1).reshape(final),
        np.take_along_axis(given, columns, -1).reshape(final).astype(np.float32),
    )


def _stand_ins(
    bound: float,
    chosen: np.ndarray,
    order: np.ndarray,
    share: np.ndarray,
    weak: np.ndarray,
    here: np.ndarray,
    scores: np.ndarray,
) -> np.ndarray:
    """The resident expert that takes the place of each weak one, int [T, K]; -1: it stays."""
    weakest_first = order[:, ::-1]
    moved = np.take_along_axis(np.where(weak, share, 0), weakest_first, -1)
    within = np.empty_like(weak)
    np.put_along_axis(within, weakest_first, np.cumsum(moved, -1) <= bound, -1)
    exchanged = weak & within  # [T, K]
    ranked = np.where(here, scores.reshape(len(chosen), -1), -np.inf)  # [T, experts]
    np.put_along_axis(ranked, chosen, -np.inf, -1)
    best = np.argsort(-ranked, axis=-1)[:, : chosen.shape[1]]
    nth = np.maximum(np.cumsum(exchanged, -1) - 1, 0)  # of its token's exchanges, from 0
    found = np.take_along_axis(best, np.minimum(nth, best.shape[1] - 1), -1)
    exchanged &= np.isfinite(np.take_along_axis(ranked, found, -1)) & (nth < best.shape[1])
    return np.where(exchanged, found, -1)


def _share(value: str) -> float | None:
    try:
        share = float(value)
    except ValueError:
        return None
    return share if 0 < share <= MOST_SHARE else None
