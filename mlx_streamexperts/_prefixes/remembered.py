"""Which prefix of a prompt is on the drive, and what of a prompt has to be written.

An entry holds what its tokens add to the entry before, or to the first tokens of that. It belongs
to a model by a digest that covers everything that could change a bit of a cache: the checkpoint,
adapter, configuration, the library that runs it, versions, device, how keys and values are
quantized, and the length of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import (
    DEFAULT_QUANTIZED_KV_START,
    generation_stream,
    maybe_quantize_kv_cache,
)
from mlx_lm.models.cache import make_prompt_cache

from .._config import parse_size
from .._errors import BudgetError, StreamError
from .._experts.stream import stream
from .._io.checkpoint import file_identity
from .._memory.footprint import leaves
from .._memory.process_memory import bytes_over_bound
from .entries import FORMAT, DamagedError, Entries, Entry, Head
from .states import GROWING, NotKeptError, grows, kinds, put, take

SHORTEST = 64
"""Tokens that are worth an entry."""

_WEIGHTY = 16 << 20  # bytes of an entry whose time says something about the drive

_log = logging.getLogger(__name__)


class PrefixCache:
    """Prefixes of one model's prompts on the drive.

    Args:
        model: a streamed model.
        folder: where they are kept; created if needed. Several processes may share it.
        nbytes: what the folder may take: bytes, or a string such as "50GB".
        adapter: the folder of the adapter that the model was loaded with, if any.
        kv_bits, kv_group_size, quantized_kv_start: as mlx-lm's `generate_step` takes them.

    Attributes:
        chunk: tokens of a prompt's pass.
        read_tokens, read_bytes, read_seconds: what was taken from the drive, and how long it took.
        written_bytes, write_seconds: the same of what was written.
        evicted: entries that were deleted to make room.

    Raises:
        StreamError: the size is not understood, or several machines share the model.
        UnsupportedModelError: the model is not streamed.
        CheckpointError: the checkpoint's files cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        nbytes: int | str,
        adapter: str | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    ) -> None:
        expert_stream = stream(model)
        if expert_stream.ranks is not None:
            raise StreamError("a prefix cache does not work with several machines; run without it")
        self._entries = Entries(Path(folder), parse_size(nbytes))
        self._lossy = expert_stream.lossy is not None
        self.chunk = expert_stream.plan.prefill_tokens
        self._quantized = {
            "kv_bits": kv_bits, "kv_group_size": kv_group_size,
            "quantized_kv_start": quantized_kv_start,
        }  # fmt: skip
        quantized = None if kv_bits is None else self._quantized
        self._identity = _identity(model, adapter, self.chunk, quantized)
        self.read_tokens = self.read_bytes = self.written_bytes = 0
        self.read_seconds = self.write_seconds = 0.0
        # Moving averages, None until measured: of a prompt's tokens, and of an entry's bytes.
        self._token_seconds: float | None = None
        self._byte_seconds: float | None = None

    @property
    def evicted(self) -> int:
        return self._entries.evicted

    def restore(
        self,
        caches: list[Any],
        tokens: Sequence[int],
        aligned: bool = False,
        beyond: int = 0,
        room: Callable[[int, int], bool] | None = None,
    ) -> int:
        """Fill new caches with the longest prefix that is there.

        Args:
            caches: the model's, empty. Plain ones may be replaced by quantized ones.
            tokens: all that may be restored.
            aligned: take a prefix only if it was computed in whole chunks, and is whole chunks or
                all of the tokens: to compute all of them would stop there too.
            beyond: take a prefix only if it is longer than this by what is worth an entry.
            room: hears how many tokens will be read, and what they take in bytes, before they are;
                False if there is no room.

        Returns:
            The prefix's tokens; 0 if there is none, and the caches are still empty.
        """
        start = time.perf_counter()
        found = [
            (n, name) for n, _, name in self._found(tokens, kinds(caches), aligned, _fit)
            if n >= beyond + SHORTEST
        ]  # fmt: skip
        for count, name in sorted(found, reverse=True):
            chain = self._chain(name)
            if chain is None or (room is not None and not room(count, _bytes_of(chain[-1], count))):
                continue
            if self._put(caches, chain, count):
                for entry in chain:
                    self._entries.used(entry)
                self.read_tokens += count
                self.read_seconds += time.perf_counter() - start
                return count
        return 0

    def computed(self, tokens: int, seconds: float) -> None:
        """Note how long tokens of a prompt took: what costs more to keep is not kept.

        Args:
            tokens: how many.
            seconds: of all of them.
        """
        self._token_seconds = _averaged(self._token_seconds, seconds / max(1, tokens))

    def save(self, tokens: Sequence[int], caches: Sequence[Any], aligned: bool = False) -> int:
        """Keep what caches hold, if it is not there, and worth it.

        It is if it has 64 new tokens, and if writing and reading it takes less time than computing
        them; below 16 MB that is taken for granted.

        A lossy run keeps nothing: an exact one would go on from what it had computed.

        Args:
            tokens: all that the caches hold.
            caches: of one sequence.
            aligned: they were computed in whole chunks from the beginning.

        Returns:
            Bytes written.
        """
        if self._lossy:
            return 0
        start = time.perf_counter()
        kind, count = kinds(caches), len(tokens)
        found = self._found(tokens, kind, aligned, operator.eq)
        new = count - max((n for n, _, _ in found), default=0)
        if new < SHORTEST:
            return 0
        begin, parent = max(((rows, name) for _, rows, name in found if rows), default=(0, None))
        begin = min(begin, count - 1)
        try:
            parts = take(caches, begin, count)
        except NotKeptError as e:
            _log.debug(f"not kept: {e}")
            return 0
        ids = np.asarray(tokens, np.int64)
        arrays = {**parts.rows, **parts.states}
        nbytes = sum(a.nbytes for a in arrays.values())
        if nbytes > self._entries.most_bytes or self._costs_more(nbytes, new):
            return 0
        all_grow = all(grows(c) for c in leaves(caches))
        head = Head(
            parent, begin, count, ids[begin:], kind, all_grow, aligned, int(time.time())
        )  # fmt: skip
        about = f"{self._identity} {kind} {begin} {parent} {aligned}".encode()
        name = f"{count}-{hashlib.sha256(about + ids.tobytes()).hexdigest()}"
        more = {"caches": parts.plain}
        written = self._entries.write(self._identity, name, head, more, arrays)
        self.written_bytes += written
        seconds = time.perf_counter() - start
        self.write_seconds += seconds
        if written >= _WEIGHTY:
            self._byte_seconds = _averaged(self._byte_seconds, seconds / written)
        return written

    def _costs_more(self, nbytes: int, tokens: int) -> bool:
        """Would writing and reading take longer than to compute the tokens?"""
        if nbytes < _WEIGHTY or self._byte_seconds is None or self._token_seconds is None:
            return False
        return 2 * nbytes * self._byte_seconds > tokens * self._token_seconds

    def _quantize(self, caches: list[Any]) -> None:
        """Quantize caches after a pass, as mlx-lm does."""
        maybe_quantize_kv_cache(caches, **self._quantized)

    def _found(
        self,
        tokens: Sequence[int],
        kind: list[str],
        aligned: bool,
        fit: Callable[[list[str], list[str]], bool],
    ) -> list[tuple[int, int, str]]:
        """Entries that the tokens begin with, at least in part, and whose caches fit.

        Returns:
            For each: with how many tokens one can go on from it, how many of its rows are those of
            the tokens, and its name.
        """
        ids = np.asarray(tokens, np.int64)
        heads = self._entries.heads(self._identity)
        common: dict[str | None, int] = {None: 0}
        found = []
        for name, head in sorted(heads.items(), key=lambda x: x[1].begin):
            if common.get(head.parent, -1) < head.begin or not fit(head.kinds, kind):
                continue  # the entry before is not there, or goes on otherwise
            if aligned and not (
                head.aligned and (head.end % self.chunk == 0 or head.end == len(ids))
            ):
                continue
            here = ids[head.begin : head.end]
            differ = np.flatnonzero(here != head.tokens[: len(here)])
            rows = head.begin + (int(differ[0]) if differ.size else len(here))
            if rows == head.begin or (aligned and rows != head.end):
                continue
            common[name] = rows
            found.append((rows if head.grows or rows == head.end else 0, rows, name))
        return found

    def _chain(self, name: str) -> list[Entry] | None:
        """An entry and those before it, the first one first; None if one is missing."""
        chain: list[Entry] = []
        following: str | None = name
        while following is not None:
            entry = self._entries.open(self._identity, following)
            if entry is None:
                return None
            chain.insert(0, entry)
            following = entry.header["parent"]
        return chain

    def _put(self, caches: list[Any], chain: list[Entry], count: int) -> bool:
        """Fill caches with `count` tokens of a chain; False if that is not possible."""
        last = chain[-1]
        reading: list[Entry] = [last]

        def read(entry: Entry, name: str) -> mx.array:
            reading[0] = entry
            array = entry.array(name)
            self.read_bytes += array.nbytes
            return array

        def rows(name: str) -> mx.array:
            parts = []
            stops = [*(entry.header["begin"] for entry in chain[1:]), count]
            for entry, stop in zip(chain, stops, strict=True):
                part, begin = read(entry, name), entry.header["begin"]
                if part.shape[-2] != entry.header["end"] - begin:
                    raise DamagedError(f"{entry.file}: {name} has other tokens")
                parts.append(part[..., : stop - begin, :])
            whole = mx.concatenate(parts, axis=-2)
            mx.eval(whole)
            return whole

        try:
            put(caches, last.header["caches"], count, rows, lambda name: read(last, name))
        except NotKeptError as e:
            _log.warning(f"{last.file}: not used: {e}")
            return False
        except (DamagedError, ValueError, KeyError) as e:
            self._entries.refuse(reading[0].file, e)
            return False
        return True


def prefill(
    model: nn.Module,
    tokens: Sequence[int],
    kept: PrefixCache,
    caches: list[Any] | None = None,
    ends: Sequence[int] = (),
) -> tuple[list[Any], list[int]]:
    """Run a prompt but for its last token, as far as it is not on the drive, and keep it there.

    Args:
        model: a streamed model.
        tokens: of the prompt.
        kept: its prefixes.
        caches: empty ones to fill; made if None.
        ends: where a part of the prompt ends that other prompts share, such as a system prompt.

    Returns:
        The caches, and the tokens that are left to run: the last one.

    Raises:
        ValueError: there is no token.
    """
    if not tokens:
        raise ValueError("a prompt needs at least one token")
    caches = make_prompt_cache(model) if caches is None else caches
    last, step = len(tokens) - 1, kept.chunk
    stops = sorted({e for e in ends if 0 < e < last} | {last})
    aligned = not ends

    def room(_: int, nbytes: int) -> bool:
        """Let the expert cache give up slots for what is read, as before a pass."""
        if bytes_over_bound(mx.get_active_memory() + nbytes) > 0:
            try:
                stream(model).make_room(nbytes, "a prompt from the drive", "shorten the prompt")
            except BudgetError:
                return False  # the pass that does not fit says so
        return True

    done = kept.restore(caches, tokens[:last], aligned, room=room)
    with mx.stream(generation_stream):
        for stop in (s for s in stops if s > done):
            while done < stop:
                count, start = min(step, stop - done), time.perf_counter()
                model(mx.array([tokens[done : done + count]]), cache=caches)
                kept._quantize(caches)
                mx.eval([c.state for c in caches])
                mx.clear_cache()
                done += count
                kept.computed(count, time.perf_counter() - start)
                kept.save(tokens[:done], caches, aligned)
    return caches, list(tokens[done:])


def _bytes_of(last: Entry, tokens: int) -> int:
    """What caches of so many tokens take that a chain gives back, and the copy of one array.

    Args:
        last: of the chain; all entries have the same width.
        tokens: how many of them.
    """
    header, most = last.header, 0
    rows = {str(i) for i, c in enumerate(header["caches"]) if c["class"] in GROWING}
    total = 0
    for name, at in header["arrays"].items():
        nbytes = at["bytes"]
        if name.partition(".")[0] in rows:
            nbytes = nbytes * tokens // (header["end"] - header["begin"])
        total, most = total + nbytes, max(most, nbytes)
    return total + most


def _averaged(before: float | None, now: float) -> float:
    return now if before is None else 0.8 * before + 0.2 * now


def _fit(kept: list[str], made: list[str]) -> bool:
    """Can caches of these kinds come back? A plain one may have been quantized."""
    return len(kept) == len(made) and all(
        k == m or (k.startswith("QuantizedKVCache") and m == "KVCache")
        for k, m in zip(kept, made, strict=True)
    )


def _identity(
    model: nn.Module, adapter: str | None, chunk: int, quantized: dict[str, Any] | None
) -> str:
    """A digest of everything that could change a bit of a cache."""
    expert_stream = stream(model)
    folder, library = expert_stream.folder, type(model).__module__
    assert folder is not None
    device = mx.device_info()  # its limits of memory change with settings of the system
    libraries = ["mlx", "mlx-lm", *(["mlx-vlm"] if library.startswith("mlx_vlm.") else [])]
    files = {f.name: file_identity(f) for f in sorted(folder.glob("*.safetensors"))}
    if adapter is not None:
        for f in sorted(Path(adapter).iterdir()):
            if f.is_file():
                files[f"adapter/{f.name}"] = {"sha256": _digest(f)}
    about = {
        "format": FORMAT, "files": files, "config": expert_stream.model_config,
        "code": {f.name: _digest(f) for f in sorted(folder.glob("*.py"))},
        "library": library, "versions": [version(name) for name in libraries],
        "device": [str(mx.default_device()), device.get("device_name"), device.get("architecture")],
        "chunk": chunk, "quantized": quantized,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
