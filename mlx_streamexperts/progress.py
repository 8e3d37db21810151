"""The bars that long work shows."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(what: str, shown: bool, total: int | None = None) -> tqdm:
    """A bar that counts bytes."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not shown)


def trial_bar(what: str, shown: bool, total: int | None = None) -> tqdm:
    """A bar that counts trials."""
    return tqdm(total=total, desc=what, unit=" trials", disable=not shown)
