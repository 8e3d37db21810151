"""The exceptions that this package raises on purpose.

All derive from `StreamError`, so that a host program can catch one type. A message says what is
wrong, where (file, tensor, layer, expert) and what to do about it.
"""

from __future__ import annotations

import os
from pathlib import Path


class StreamError(Exception):
    """Base class of all errors of mlx-streamexperts.

    Raised as such if no subclass says more: an option or a size is not understood, a stream is
    closed, another process is writing to a folder, a library is missing.
    """


class CheckpointError(StreamError, ValueError):
    """The files on disk are wrong.

    A checkpoint is missing, damaged or incomplete, or a packed store or hot set belongs to another
    checkpoint. Raised before anything is loaded; the message names the file and the tensor.
    """


class UnsupportedModelError(StreamError, ValueError):
    """The model has no routed experts, or stores them in a layout that cannot be streamed.

    Nothing was loaded. The message names the table at fault and says whether `convert` helps.
    """


class BudgetError(StreamError):
    """The memory or cache budget is too small, or larger than the device can hold.

    Attributes:
        needed_bytes: the smallest budget of the same kind that works, in bytes.
    """

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class TokenError(StreamError, ValueError):
    """A prompt contains a token that the model has no embedding for. Nothing was computed."""


class ExpertReadError(StreamError):
    """An expert, or a row of a streamed table, could not be read. Its slot is empty; the model
    stays usable.

    Attributes:
        layer: module path of the expert layer, for example `model.layers.3.mlp.switch_mlp`, or of
            the table.
        expert: index of the expert in that layer, or of the row in the table.
        tensor: name of the tensor in the checkpoint.
        file: the shard.
        offset: first byte that could not be read.
        errno: the operating system's error number. None if it reported no error, for example at
            an unexpected end of the file.
        reason: what went wrong, in a few words.
    """

    def __init__(
        self,
        layer: str,
        expert: int,
        tensor: str,
        file: Path,
        offset: int,
        errno: int | None,
        reason: str = "unexpected end of file",
        what: str = "expert",
    ) -> None:
        self.reason = reason = reason if errno is None else os.strerror(errno)
        super().__init__(
            f"cannot read {what} {expert} of {layer}: {reason} at byte {offset} of {file} "
            f"(tensor {tensor}). The {what}'s slot was left empty; the model can be used "
            "again once the file can be read."
        )
        self.layer, self.expert, self.tensor = layer, expert, tensor
        self.file, self.offset, self.errno = file, offset, errno

    def of_a_row(self) -> ExpertReadError:
        """The same error, of a row of a table that is looked up by token."""
        return ExpertReadError(
            self.layer, self.expert, self.tensor, self.file, self.offset, self.errno, self.reason,
            what="row",
        )  # fmt: skip


class OtherThreadError(StreamError):
    """Another thread has built a forward pass through the model and has not evaluated it.

    Only that thread can evaluate it. Until then this thread must not change the expert cache;
    nothing has changed.
    """


class RankError(StreamError):
    """Another rank of a distributed run failed, or was lost, or disagrees with this one.

    Attributes:
        rank: the rank at fault; -1 if MLX does not say which was lost.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class PassStoppedError(StreamError):
    """A forward pass was ended because whoever follows it asked for that.

    The KV caches are as they were before the pass, and the model can be used again.
    """
