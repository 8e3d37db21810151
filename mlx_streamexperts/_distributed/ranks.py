"""Lets the ranks of a distributed run exchange and compare small JSON statements.

Every rank takes part in every exchange, even after a failure: then all ranks raise with the reason
of the one that failed, and none is left waiting. Messages name each rank with its host. mlx-lm
sends the hidden states, never this module.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from .._errors import RankError, StreamError

_T = TypeVar("_T")


class Ranks:
    """The processes of one distributed run.

    Attributes:
        rank: rank of this process.
        size: number of ranks.
        names: name of each rank in messages, for example `rank 1 (mini.local)`.
        on_this_host: number of ranks on this machine, which share its memory.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self.names = [f"rank {r}" for r in range(self.size)]
        hosts = self.exchange(socket.gethostname())
        self.names = [f"rank {r} ({host})" for r, host in enumerate(hosts)]
        self.on_this_host = hosts.count(hosts[self.rank])

    def exchange(self, statement: Any) -> list[Any]:
        """Send a JSON value to all ranks; returns every rank's value, in rank order.

        Raises:
            RankError: a rank was lost during the exchange.
        """
        data = np.frombuffer(json.dumps(statement).encode(), np.uint8)  # [bytes]
        lengths = self._gather(np.array([data.size], np.int32))  # [ranks]
        padded = np.zeros((1, int(lengths.max())), np.uint8)
        padded[0, : data.size] = data
        rows = self._gather(padded)  # [ranks, longest]
        return [
            json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)
        ]

    def all_or_none(self, work: Callable[[], _T]) -> _T:
        """Do this rank's share of a step; if one rank fails, all do.

        Raises:
            RankError: another rank failed; the message has its reason.
            StreamError: this rank failed.
        """
        error: StreamError | None = None
        result: list[_T] = []
        try:
            result.append(work())
        except StreamError as e:
            error = e
        reasons = self.exchange(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise RankError(f"{self.names[rank]}: {reason}", rank)
        return result[0]

    def agree(self, statements: Mapping[str, Any]) -> None:
        """Check that all ranks have equal values.

        Args:
            statements: values to compare, by their names in messages. Of values that are mappings,
                only the keys that two ranks share are compared.

        Raises:
            RankError: two ranks differ; the message has both values.
        """
        theirs = self.exchange(dict(statements))
        for rank in range(1, self.size):
            for name, first in theirs[0].items():
                other = theirs[rank].get(name)
                if isinstance(first, dict) and isinstance(other, dict):
                    shared = sorted(first.keys() & other.keys())
                    unlike = next((k for k in shared if first[k] != other[k]), None)
                    if unlike is None:
                        continue
                    name, first, other = f"{name} {unlike}", first[unlike], other[unlike]
                if first != other:
                    raise RankError(
                        f"the ranks disagree: {name} is {first!r} on {self.names[0]} and {other!r} "
                        f"on {self.names[rank]}. All machines need the same checkpoint, the same "
                        "versions and the same options.",
                        rank,
                    )

    def share_random_state(self) -> None:
        """Let all ranks draw the same random numbers, since each samples the next token itself.

        With different seeds, each rank would feed a different text to its own layers.
        """
        state: Any = mx.random.state
        states = self.exchange([np.array(s).tolist() for s in state])
        seed = self.exchange(secrets.randbits(63))[0]
        if any(s != states[0] for s in states):
            mx.random.seed(seed)

    def _gather(self, row: np.ndarray) -> np.ndarray:
        """Gather one row from each rank, [1, ...] -> [ranks, ...]."""
        try:
            # On the CPU's stream, because a GPU must not wait for a network.
            gathered = mx.distributed.all_gather(mx.array(row), group=self._group, stream=mx.cpu)
            mx.eval(gathered)
        except RuntimeError as e:
            raise RankError(f"the connection to another rank was lost: {e}", -1) from e
        return np.array(gathered)


def libraries() -> dict[str, str]:
    """The versions that all ranks must share."""
    return {name: version(name) for name in ("mlx", "mlx-lm", "mlx-streamexperts")}
