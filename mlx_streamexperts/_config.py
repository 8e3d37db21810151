"""The options of expert streaming: one list for scripts, command lines and settings files.

An option's name, help, choices and default are stated here and nowhere else. No option but `loader`
and `lossy` changes a result; `tune` relies on that for the ones marked as tuned.
"""

from __future__ import annotations

import argparse
import difflib
import json
import numbers
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ._cache.expert_map import POLICIES
from ._cache.lossy import Ways
from ._errors import StreamError
from ._io.checkpoint import read_json_object
from ._io.output import write_json

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_MOST_BYTES = 1 << 62
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(size: float | str) -> int:
    """Bytes from a number, or a string such as "96GB", "24GiB", "500 MB" or "1.5g".

    Raises:
        StreamError: the size is not understood, or not positive.
    """
    if isinstance(size, numbers.Real) and not isinstance(size, bool):
        if not abs(size) <= _MOST_BYTES:  # as NaN is not
            raise StreamError(f"a size must be a number of bytes, got {str(size)[:40]}")
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
        value = int(min(float(match[1]) * units[match[2]], _MOST_BYTES))
        if 0 < float(match[1]) < 1024 and not match[2]:
            raise StreamError(f"{size!r} is a size of {value} bytes: did you mean '{match[1]}GB'?")
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
_MOST_THREADS = 1024  # more than any drive has use for, less than a system gives

_VERSION = 1  # of settings files
_PER_RUN = (
    "oversubscribe", "store", "mirrors", "verify_reads", "hot_set", "pipeline", "split", "loader",
    "lossy",
    "progress",
)  # fmt: skip
"""Options that no settings file holds: they name other files or machines, override a refusal,
change results, or concern one run."""


def _option(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, "default": default, **extra})


def _tuned(default: int | str, help: str, **extra: Any) -> Any:
    """An option that `tune` tries values of. It stays None until it is stated."""
    return field(default=None, metadata={"help": help, "default": default, "tuned": True, **extra})


@dataclass(frozen=True)
class StreamConfig:
    """How experts are streamed. Sizes are bytes, or strings such as "24GB" or "24GiB".

    Frozen: `dataclasses.replace` makes a changed one. Command lines take the same options: `memory`
    as `--memory` and so on. None but `loader` and `lossy` changes a result. The options from
    `policy` to `keep_awake` are None until they are stated, which means the default that the table
    shows; `with_defaults` fills those in.

    Raises:
        StreamError: a value is not understood, or options contradict each other.
    """

    memory: float | str | None = _option(
        None,
        "bound for all of MLX's memory: trunk, expert cache, KV cache and work space, for example "
        "90GB. Default: most of what the device recommends; without --model, a cache of 10MB "
        "instead.",
    )
    cache: float | str | None = _option(
        None,
        "bound for the expert cache alone, for example 24GB; overrides what --memory would leave.",
    )
    # From here to keep_awake: None until stated; the types are those that `with_defaults` leaves.
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
    keep_awake: str = _tuned(
        "auto",
        "let the GPU do small work while a token waits for reads, and up to a minute between "
        "requests, so that its clocks stay up. auto: on Metal, during waits only while that is "
        "measured to pay, and neither on battery nor while the machine is hot",
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
    pressure: str | None = _option(
        None,
        "auto: while the system is short of memory, give expert slots to other programs, layer by "
        "layer, and take them again after a minute of calm. Never fewer than one token's experts. "
        "Default: auto in the server, else off",
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
    mirrors: Sequence[str] | None = _option(
        None,
        "folder on another drive with copies of the files that experts are read from, or of some "
        "of them: the shards, or with --store the store's files. Reads go to the drive that is "
        "expected to finish first. Can be stated several times. streamexperts mirror makes such a "
        "folder",
        flag="--mirror",
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
    loader: str = _option(
        "auto",
        "the library that loads the model, and whose bits the result has. auto: mlx-lm if it can "
        "load the model, else mlx-vlm (extra `vlm`)",
        choices=("auto", "mlx-lm", "mlx-vlm"),
    )
    lossy: int | str | None = _option(
        None,
        "leave experts out to be faster; results then differ from the model's and depend on what "
        "is cached. A level from 0 (exact) to 3, or ways: skip=SHARE leaves out missing experts "
        "below this share of a token's router mass, prefer=SHARE lets resident experts stand in "
        "for missing ones up to this share, top=COUNT[@FIRST-LAST] keeps the COUNT strongest (in "
        "these expert layers). python -m mlx_streamexperts.quality measures the price. "
        "Default: 0",
    )
    rows: str = _option(
        "auto",
        "leave tables that are looked up by token (n-grams, per-layer embeddings) on the drive and "
        "read their rows. auto: if they take 256 MiB or more; on: always",
        choices=("auto", "on", "off"),
    )
    row_cache: float | str | None = _option(
        None,
        "memory for rows of such tables, for example 256MB. Default: 128 MiB, or less if the "
        "tables are smaller",
    )
    in_place: str = _option(
        "auto",
        "read straight into MLX's memory. auto: when the start-up check on this device passes; "
        "off: copy (slow, for diagnosis)",
        choices=("auto", "off"),
    )
    progress: bool = _option(True, "show progress bars while loading, and how far prompts are")
    about: dict[str, Any] | None = field(
        default=None,
        compare=False,
        repr=False,
        metadata={
            "help": "notes that a settings file carries: model, machine and budget that it was "
            "tuned for, and the gain measured. A load warns if it differs from those",
            "default": None,
        },
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            unstated = value is None and f.default is None
            if choices and value not in choices and not unstated:
                raise StreamError(f"{f.name}={value!r}: choose one of {', '.join(choices)}")
        if Ways.parse(self.lossy) is not None and self.pipeline:
            raise StreamError("lossy does not work with several machines; leave pipeline out")
        if self.verify_reads and self.store is None:
            raise StreamError("verify_reads needs a store: a checkpoint has no checksums")
        if isinstance(self.mirrors, str | Path):
            raise StreamError(f"mirrors must be a list of folders, got {self.mirrors!r}")
        if self.mirrors is not None:  # hashable, as all options are
            object.__setattr__(self, "mirrors", tuple(map(str, self.mirrors)) or None)
        for name in ("threads", "prefetch_depth", "cores", "context_tokens", "prefill_tokens"):
            if (count := getattr(self, name)) is None:
                continue
            try:
                whole = operator.index(count)
            except TypeError as e:
                raise StreamError(f"{name} must be a whole number, got {count!r}") from e
            if isinstance(count, bool) or whole < 1:
                raise StreamError(f"{name} must be at least 1, got {count!r}")
            if name == "threads" and whole > _MOST_THREADS:
                raise StreamError(f"threads must be at most {_MOST_THREADS}, got {count!r}")
            if not isinstance(count, int):  # NumPy's, say
                object.__setattr__(self, name, whole)
        for name in ("memory", "cache", "read_size", "reserve", "row_cache"):
            value = getattr(self, name)
            by_rank = isinstance(value, str) and name in ("memory", "cache")
            for size in value.split(",") if by_rank else [value]:
                if size is not None:
                    _check_size(name, size)

    def with_defaults(self) -> StreamConfig:
        """Returns the same options, with the library's default for each one that is not stated."""
        missing = {n: value for n, value in DEFAULTS.items() if getattr(self, n) is None}
        return replace(self, **missing)

    @classmethod
    def load(cls, path: str | Path) -> StreamConfig:
        """Read a settings file, as `save` and `mlx_streamexperts.tune` write it.

        Such a file may hold every option but `oversubscribe`, `store`, `mirrors`, `verify_reads`,
        `hot_set`, `pipeline`, `split`, `loader`, `lossy` and `progress`: it divides memory and
        chooses how experts are read. It cannot change a result, run code, name another file or
        override a refusal.

        Args:
            path: the file.

        Returns:
            The file's options; `about` has its notes.

        Raises:
            StreamError: the file cannot be read, has another version, or has an option or a value
                that is not allowed. The message names the file and the option.
        """
        content: dict[str, Any] = {"settings": None, **read_json_object(Path(path), "settings")}
        unknown = sorted(content.keys() - {"version", "about", "settings"})
        version = content.get("version")
        if type(version) is not int or version != _VERSION or unknown:  # true equals 1
            wrong = f"{unknown[0]!r}" if unknown else f"version {version!r}"
            raise StreamError(
                f"{path}: not a settings file of version {_VERSION} (it has {wrong}): write it "
                "again with python -m mlx_streamexperts.tune or StreamConfig.save"
            )
        settings, about = content["settings"], content.get("about")
        for name, value in (("settings", settings), ("about", {} if about is None else about)):
            if not isinstance(value, dict):
                raise StreamError(f"{path}: {name} must be a JSON object, got {value!r}")
        for name in settings:
            if name not in SAVED:
                raise StreamError(
                    f"{path}: {name!r} is no option that a settings file can hold. Remove it; the "
                    f"options are {', '.join(SAVED)}"
                )
        try:
            return cls(**settings, about=about)
        except StreamError as e:
            raise StreamError(f"{path}: {e}. Correct or remove it") from e

    def save(self, path: str | Path) -> None:
        """Write the stated options to a settings file, for `load` and `--settings`.

        Args:
            path: the file; replaced as a whole if it exists.

        Raises:
            StreamError: an option is stated that a settings file cannot hold (see `load`), or
                `about` has a value that JSON has not.
            OSError: the file cannot be written.
        """
        about = self.about or {}
        for name, value in about.items():
            try:
                json.dumps({name: value}, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as e:
                raise StreamError(
                    f"about[{name!r}] cannot be saved in a settings file ({e}): use text, Python "
                    "numbers, lists and dicts"
                ) from e
        stated = {
            f.name: value
            for f in fields(self)
            if f.name != "about" and (value := getattr(self, f.name)) != f.default
        }
        if lost := [name for name in _PER_RUN if name in stated]:
            raise StreamError(
                f"{lost[0]} cannot be saved in a settings file: state it where the model is loaded"
            )
        for name, value in stated.items():
            if not isinstance(value, int | str):  # a float, or one of NumPy's numbers
                stated[name] = parse_size(value)
        write_json(Path(path), {"version": _VERSION, "about": about, "settings": stated})

    def for_rank(self, rank: int, ranks: int) -> StreamConfig:
        """The options of one rank of several.

        A budget may be stated for each rank ("96GB,64GB"), and `{rank}` in the name of a file is
        its number.

        Args:
            rank: the rank's number.
            ranks: how many there are.

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
        if self.mirrors is not None:
            own["mirrors"] = [m.replace("{rank}", str(rank)) for m in self.mirrors]
        return replace(self, **own)


def as_config(config: StreamConfig | dict[str, Any] | None) -> StreamConfig:
    """The options that a caller gives, which may be a dict of them.

    Raises:
        StreamError: there is no such option, or a value is not understood.
    """
    if config is None or isinstance(config, StreamConfig):
        return config or StreamConfig()
    if not isinstance(config, dict):
        raise StreamError(f"config must be a StreamConfig or a dict of its options, got {config!r}")
    names = [f.name for f in fields(StreamConfig)]
    if unknown := [str(n) for n in config if n not in names]:
        alike = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {alike[0]!r}?" if alike else f"the options are {', '.join(names)}"
        raise StreamError(f"config: there is no option {unknown[0]!r}; {hint}")
    return StreamConfig(**config)


DEFAULTS: dict[str, Any] = {
    f.name: f.metadata["default"] for f in fields(StreamConfig) if "tuned" in f.metadata
}
"""Options that `tune` may set, and their defaults. They change how bytes reach memory, never what
is computed from them."""

SAVED = tuple(f.name for f in fields(StreamConfig) if f.name not in (*_PER_RUN, "about"))
"""Options that a settings file can hold."""


def _check_size(name: str, size: float | str) -> None:
    try:
        nbytes = parse_size(size)
        if nbytes < 1024 and not isinstance(size, str) and name in ("memory", "cache"):
            raise StreamError(f"{size} is a size of {nbytes} bytes: did you mean '{nbytes}GB'?")
    except StreamError as e:
        raise StreamError(f"{name}: {e}") from e


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every `StreamConfig` option and `--settings` to a command line.

    An option that is not on the command line parses to None.
    """
    group = parser.add_argument_group("expert streaming")
    for f in fields(StreamConfig):
        if f.name == "about":
            continue
        flag = f.metadata.get("flag", _flag(f.name))
        text, default = f.metadata["help"], f.metadata["default"]
        if default is not None and not isinstance(default, bool):
            text += f" (default: {default})"
        number = "type" in f.metadata or type(default) is int
        kind: dict[str, Any] = {"type": int} if number else {}
        if f.name == "progress":
            flag, kind = "--no-progress", {"action": "store_false", "dest": "progress"}
            text = "show no progress, neither of loading nor of prompts"
        elif f.name == "mirrors":
            kind = {"action": "append", "metavar": "DIR", "dest": f.name}
        elif default is False:
            kind = {"action": "store_true"}
        if "choices" in f.metadata:
            kind["choices"] = f.metadata["choices"]
        if flag not in parser._option_string_actions:  # mlx-lm has it, and means the same
            flags = [flag, "--force"] if f.name == "oversubscribe" else [flag]
            group.add_argument(*flags, default=None, help=text, **kind)
    group.add_argument(
        "--settings",
        metavar="FILE",
        help="options from a file that mlx_streamexperts.tune or StreamConfig.save wrote. Options "
        "on the command line win; a budget there replaces the file's --memory and --cache",
    )


def from_arguments(args: argparse.Namespace) -> StreamConfig:
    """The `StreamConfig` that a parsed command line asks for, its settings file included.

    Raises:
        StreamError: the settings file or an option is not understood.
    """
    config = StreamConfig.load(args.settings) if args.settings else StreamConfig()
    names = [f.name for f in fields(config) if f.name != "about"]
    stated = {n: value for n in names if (value := getattr(args, n)) is not None}
    if "memory" in stated or "cache" in stated:
        config = replace(config, memory=None, cache=None)
    return replace(config, **stated)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
