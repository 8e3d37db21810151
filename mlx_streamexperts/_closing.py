"""A base for context managers that close at the end of a `with` block."""

from __future__ import annotations

from typing import Self


class Closing:
    """A context manager that calls its `close` at the end."""

    def close(self) -> None:
        """Close it. A second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
