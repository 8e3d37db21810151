"""The options of expert streaming, documented once for scripts and command lines."""

from __future__ import annotations

import argparse
import math
import numbers
import operator
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ._cache.expert_map import POLICIES
from ._errors import StreamError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(size: float | str) -> int:
    """Bytes from a number, or a string such as "96GB", "24GiB", "500 MB" or "1.5g".

    Raises:
        StreamError: the size is not understood, or not positive.
    """
    if isinstance(size, numbers.Real) and not isinstance(size, bool):
        if not math.isfinite(size):
            raise StreamError(f"a size must be a number of bytes, got {size}")
        value = int(size)
    elif not isinstance(size, str):
        raise StreamError(
            f"{size!r} is not a size: give bytes as a number, or a string such as '24GB'"
        )
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", size.lower())
        units = _UNITS | _BINARY_UNITS
        if match is None or match[2] not in units:
            raise StreamError(f"{size!r} is not a size: write for example 24GB, 24GiB or 512MB")
        value = int(float(match[1]) * units[match[2]])
    if value <= 0:
        raise StreamError(f"a size must be positive, got {size!r}")
    return value


def format_size(nbytes: float) -> str:
    """Bytes in decimal units with three significant digits, for example `23.4 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.4g} TB"


DEFAULT_CONTEXT = 4096


class _Unstated:
    """Marks a default: an option that has one was not stated, even if it equals what was."""


class _UnstatedInt(_Unstated, int):
    pass


class _UnstatedStr(_Unstated, str):
    pass


def _option(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


def _tuned(default: int | str, help: str, **extra: Any) -> Any:
    """An option that a profile may set where it was not stated. No result may depend on it."""
    marked = _UnstatedInt(default) if isinstance(default, int) else _UnstatedStr(default)
    return _option(marked, help, tuned=True, **extra)


@dataclass(frozen=True)
class StreamConfig:
    """How experts are streamed. Sizes are bytes, or strings such as "24GB" or "24GiB".

    Frozen: `dataclasses.replace` makes a changed one. Command lines take the same options, `memory`
    as `--memory` and so on. None of them changes a result. A value that is given, even if it is the
    default's, is stated: no profile changes it.

    Raises:
        StreamError: a value is not understood, or options contradict each other.
    """

    memory: float | str | None = _option(
        None,
        "bound for all of MLX's memory: trunk, expert cache, KV cache and work space, for example "
        "96GB. Default: what the device recommends.",
    )
    cache: float | str | None = _option(
        None,
        "bound for the expert cache alone, for example 24GB; overrides what --memory would leave.",
    )
    policy: str = _tuned(
        "lrfu",
        "which expert makes room: least used of late (lrfu), least recently used (lru), or S3-FIFO",
        choices=tuple(POLICIES),
    )
    threads: int = _tuned(8, "reads in flight at once")
    read_size: int | str = _tuned("4MiB", "longest single read; longer ones are shared out")
    bypass_page_cache: str = _tuned(
        "auto",
        "read past the system's page cache. auto: when the page cache could not hold the experts "
        "anyway; on is an error where the file system cannot",
        choices=("auto", "on", "off"),
    )
    overlap: str = _tuned(
        "auto",
        "run experts while others are read: those that are there (on: and each lot as it arrives). "
        "auto: whatever is measured to be fastest",
        choices=("auto", "on", "off"),
    )
    prefetch: str = _tuned(
        "auto",
        "ask the next layers' routers early and read what they would choose into spare slots. "
        "auto: in each layer only while its steps are measured to be faster for it",
        choices=("auto", "on", "off"),
    )
    prefetch_depth: int = _tuned(1, "how many expert layers ahead --prefetch asks")
    run_ahead: str = _tuned(
        "auto",
        "map experts to slots on the device and check afterwards, instead of waiting for each "
        "layer's router. auto: on a GPU, in each layer while it is measured to pay; on: always",
        choices=("auto", "on", "off"),
    )
    cores: int | None = _option(
        None,
        "processor cores that a call's experts are computed on, on MLX's CPU backend. Default: all "
        "that this process may use. A GPU shares its work out itself",
        type=int,
    )
    context_tokens: int | None = _option(
        None,
        "tokens of KV cache that --memory leaves room for (prompt and reply together); a longer "
        f"context takes its room from the expert cache. Default: {DEFAULT_CONTEXT}",
        type=int,
    )
    prefill_tokens: int | None = _option(
        None,
        "the most prompt tokens of a forward pass. A pass reads each expert once, so that longer "
        "ones read less; they are shortened where their work space would take more than a tenth of "
        "what trunk and KV cache leave, which grows with the context. Default: no other limit",
        type=int,
    )
    oversubscribe: bool = _option(
        False, "load although the budget is more than this device can hold (also: --force)"
    )
    wired: str = _option(
        "auto",
        "on Metal, keep slots and trunk wired as long as the model is loaded, so that macOS does "
        "not compress or swap them between requests",
        choices=("auto", "off"),
    )
    reserve: float | str | None = _option(
        None, "part of --memory kept free for other models in this process, for example 4GB"
    )
    store: str | None = _option(
        None,
        "folder made by mlx_streamexperts.pack: experts are read from it, each in one read up to "
        "--read-size",
    )
    verify_reads: bool = _option(
        False, "compare the checksum of each expert read from --store; a difference is an error"
    )
    hot_set: str | None = _option(
        None,
        "file of ExpertStream.save_hot_set: its experts are read at load, before the first prompt",
    )
    pipeline: bool = _option(
        False,
        "share the model with the other processes of mlx.launch: each has some of the layers, and "
        "streams only their experts. --memory and --cache are for each process",
    )
    split: str | None = _option(
        None,
        "with --pipeline: how many layers each rank has, rank 0 (the last layers) first, for "
        "example 31,30. Default: evenly",
    )
    in_place: str = _option(
        "auto",
        "read straight into MLX's memory. auto: when the start-up check on this device passes; "
        "off: copy (slow, for diagnosis)",
        choices=("auto", "off"),
    )
    progress: bool = _option(True, "show progress bars while loading")
    profile: str = _option(
        "auto",
        "settings that mlx_streamexperts.tune found. auto: those for this model, machine and "
        "budget, if there are any; off; or a profile's file. Stated options count more",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value not in choices:
                raise StreamError(f"{f.name}={value!r}: choose one of {', '.join(choices)}")
        if self.verify_reads and self.store is None:
            raise StreamError("verify_reads needs a store: a checkpoint has no checksums")
        for name in ("threads", "prefetch_depth", "cores", "context_tokens", "prefill_tokens"):
            if (count := getattr(self, name)) is None:
                continue
            try:
                whole = operator.index(count)
            except TypeError as e:
                raise StreamError(f"{name} must be a whole number, got {count!r}") from e
            if isinstance(count, bool) or whole < 1:
                raise StreamError(f"{name} must be at least 1, got {count!r}")
            if not isinstance(count, int):  # NumPy's, say; an unstated default stays one
                object.__setattr__(self, name, whole)
        for name in ("memory", "cache", "read_size", "reserve"):
            value = getattr(self, name)
            for size in value.split(",") if isinstance(value, str) else [value]:
                if size is not None:
                    parse_size(size)

    def stated(self, option: str) -> bool:
        """Was this option given, or is its value a default that nobody wrote?

        Args:
            option: the name of one that can be tuned; of any other, whether it differs from its
                default.
        """
        value, default = getattr(self, option), type(self).__dataclass_fields__[option].default
        return not isinstance(value, _Unstated) if option in TUNED else value != default

    def for_rank(self, rank: int, ranks: int) -> StreamConfig:
        """What one rank of several goes by.

        A budget may be stated for each rank ("96GB,64GB"), and `{rank}` in the name of a file is
        its number.

        Raises:
            StreamError: another number of budgets than ranks.
        """
        own: dict[str, Any] = {}
        for name in ("memory", "cache"):
            value = getattr(self, name)
            if isinstance(value, str) and "," in value:
                sizes = value.split(",")
                if len(sizes) != ranks:
                    raise StreamError(f"{name}={value!r}: {len(sizes)} sizes for {ranks} ranks")
                own[name] = sizes[rank]
        for name in ("store", "hot_set"):
            if (value := getattr(self, name)) is not None:
                own[name] = value.replace("{rank}", str(rank))
        return replace(self, **own)


TUNED = tuple(f.name for f in fields(StreamConfig) if f.metadata.get("tuned"))
"""Options that a profile may set: how bytes come to memory, never what is computed from them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every `StreamConfig` option to a command line."""
    group = parser.add_argument_group("expert streaming")
    for f in fields(StreamConfig):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        if f.default is not None and not isinstance(f.default, bool):
            text += f" (default: {f.default})"
        number = isinstance(f.default, int) or "type" in f.metadata
        # No type for text: argparse would make a plain string of the default, a stated one.
        kind: dict[str, Any] = {"type": int} if number else {}
        if f.name == "progress":
            flag, kind = "--no-progress", {"action": "store_false", "dest": "progress"}
            text = "show no progress bars"
        elif f.default is False:
            kind = {"action": "store_true"}
        if "choices" in f.metadata:
            kind["choices"] = f.metadata["choices"]
        if flag not in parser._option_string_actions:  # mlx-lm has it, and means the same
            flags = [flag, "--force"] if f.name == "oversubscribe" else [flag]
            group.add_argument(*flags, default=f.default, help=text, **kind)
        if f.name == "profile":
            group.add_argument(
                "--no-profile", action="store_const", const="off", dest="profile",
                help="the same as --profile off",
            )  # fmt: skip


def from_arguments(args: argparse.Namespace) -> StreamConfig:
    """The `StreamConfig` that a parsed command line asks for."""
    return StreamConfig(**{f.name: getattr(args, f.name) for f in fields(StreamConfig)})
