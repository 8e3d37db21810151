"""Every exception that this package raises on purpose.

All derive from `StreamError`, so that a host program can catch one type. A message says what was
found, where (file, tensor, layer, expert) and what to do about it.
"""

from __future__ import annotations

import os
from pathlib import Path


class StreamError(Exception):
    """Base of all errors raised by mlx-streamexperts.

    Raised itself where none of the others says more: an option or a size that is not understood, a
    stream that is closed, a folder that another process is writing, a library that is missing.
    """


class CheckpointError(StreamError, ValueError):
    """The files on disk are not what they must be.

    A checkpoint that is missing, damaged or incomplete, or a store or a hot set of another one.
    Found before anything is loaded; the message names file and tensor.
    """


class UnsupportedModelError(StreamError, ValueError):
    """The model has no routed experts, or holds them in a layout that cannot be streamed.

    Nothing was loaded. The message says which table it is, and whether `convert` makes it stream.
    """


class BudgetError(StreamError):
    """The stated memory cannot hold the model.

    Attributes:
        needed_bytes: the smallest budget of the same kind that works, in bytes.
    """

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class TokenError(StreamError, ValueError):
    """A prompt has a token for which the model has no row; nothing was computed."""


class ExpertReadError(StreamError):
    """An expert's bytes could not be read; its slot is empty and the model stays usable.

    Attributes:
        layer: module path of the expert layer, for example `model.layers.3.mlp.switch_mlp`.
        expert: index of the expert in that layer.
        tensor: name of the tensor in the checkpoint.
        file: the shard.
        offset: first byte that could not be read.
        errno: the operating system's error number, or None where it reported none: at an
            unexpected end of file, or where `reason` says more.
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
    ) -> None:
        reason = reason if errno is None else os.strerror(errno)
        super().__init__(
            f"cannot read expert {expert} of {layer}: {reason} at byte {offset} of {file} "
            f"(tensor {tensor}). The expert's slot was left empty; the model can be used again "
            "once the file is readable."
        )
        self.layer, self.expert, self.tensor = layer, expert, tensor
        self.file, self.offset, self.errno = file, offset, errno


class OtherThreadError(StreamError):
    """Another thread has built a forward pass through the model and not evaluated it.

    Only that thread can; until it has, this one must not change the cache. Nothing has changed.
    """


class RankError(StreamError):
    """Something is wrong on another machine of a distributed run, or between two of them.

    Attributes:
        rank: the rank that it is about; -1 where MLX does not say which was lost.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank
