"""Progress bars for long work."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(what: str, shown: bool, total: int | None = None, unit: str = "B") -> tqdm:
    """A progress bar that counts bytes, or steps of another unit. Nothing unless `shown`."""
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=not shown)
