"""Which prefix of a prompt is on the drive, and what of a prompt has to be written.

An entry is named by the digest of its model and of all its tokens, and holds what they add to the
entry before. Its model's digest covers everything that could change a bit of a cache: the
checkpoint, adapter, versions, device, and the length of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from .._config import parse_size
from .._errors import StreamError
from .._experts.stream import stream
from .._io.checkpoint import file_identity
from .entries import FORMAT, DamagedError, Entries, Entry
from .states import NotKeptError, in_batches, put, take

SHORTEST = 64
"""Tokens that are worth an entry."""

_log = logging.getLogger(__name__)


class PrefixCache:
    """Prefixes of one model's prompts on the drive.

    Args:
        model: a streamed model.
        folder: where they are kept; created if needed. Several processes may share it.
        nbytes: what the folder may take: bytes, or a string such as "50GB".
        adapter: the folder of the adapter that the model was loaded with, if any.

    Attributes:
        chunk: tokens of a prompt's pass.
        read_tokens, written_bytes: what was taken from the drive, and written to it.

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
    ) -> None:
        expert_stream = stream(model)
        if expert_stream.ranks is not None:
            raise StreamError("a prefix cache does not work with several machines; run without it")
        assert expert_stream.folder is not None
        self._entries = Entries(Path(folder), parse_size(nbytes))
        self._lossy = expert_stream.lossy is not None
        self.chunk = expert_stream.plan.prefill_tokens
        self._identity = _identity(expert_stream.folder, adapter, self.chunk)
        self.read_tokens = self.written_bytes = 0

    def restore(
        self, caches: Sequence[Any], tokens: Sequence[int], aligned: bool = False, beyond: int = 0
    ) -> int:
        """Fill new caches with the longest prefix that is there.

        Args:
            caches: the model's, empty.
            tokens: all that may be restored.
            aligned: take a prefix only if it is whole chunks, or all of the tokens: to compute all
                of them would stop there too.
            beyond: take a prefix only if it is longer than this.

        Returns:
            The prefix's tokens; 0 if there is none, and the caches are still empty.
        """
        for end, name in reversed(self._known(tokens)):
            if end <= beyond or (aligned and end % self.chunk and end != len(tokens)):
                continue
            chain = self._chain(name)
            if chain is not None and self._put(caches, chain):
                self.read_tokens += end
                return end
        return 0

    def save(self, tokens: Sequence[int], caches: Sequence[Any]) -> int:
        """Keep what caches hold, if it is not there and long enough.

        A lossy run keeps nothing: an exact one would go on from what it had computed.

        Args:
            tokens: all that the caches hold.
            caches: of one sequence.

        Returns:
            Bytes written.
        """
        known = self._known(tokens)
        begin, parent = known[-1] if known else (0, None)
        if self._lossy or len(tokens) - begin < SHORTEST:
            return 0
        try:
            parts = take(caches, begin, len(tokens))
        except NotKeptError as e:
            _log.debug(f"not kept: {e}")
            return 0
        name = self._names(tokens, [len(tokens)])[0]
        header = {
            "parent": parent, "begin": begin, "end": len(tokens), "caches": parts.plain,
        }  # fmt: skip
        arrays = in_batches({**parts.rows, **parts.states})
        written = self._entries.write(self._identity, name, header, arrays)
        self.written_bytes += written
        return written

    def _known(self, tokens: Sequence[int]) -> list[tuple[int, str]]:
        """Ends and names of the tokens' prefixes that are there, shortest first."""
        there = self._entries.names(self._identity)
        ends = sorted({int(n.partition("-")[0]) for n in there if n.partition("-")[0].isdigit()})
        ends = [n for n in ends if n <= len(tokens)]
        names = zip(ends, self._names(tokens, ends), strict=True)
        return [(end, name) for end, name in names if name in there]

    def _names(self, tokens: Sequence[int], ends: Sequence[int]) -> list[str]:
        """Names of the prefixes that end there, in order."""
        raw = np.asarray(tokens, np.int64).tobytes()
        digest, at, names = hashlib.sha256(self._identity.encode()), 0, []
        for end in ends:
            digest.update(raw[8 * at : 8 * end])
            at = end
            names.append(f"{end}-{digest.hexdigest()}")
        return names

    def _chain(self, name: str) -> list[Entry] | None:
        """An entry and those before it, the first one first; None if one is missing."""
        chain: list[Entry] = []
        following: str | None = name
        while following is not None:
            entry = self._entries.open(self._identity, following)
            if entry is None or (chain and entry.header["end"] != chain[0].header["begin"]):
                return None
            chain.insert(0, entry)
            following = entry.header["parent"]
        return chain

    def _put(self, caches: Sequence[Any], chain: list[Entry]) -> bool:
        """Fill caches from a chain; False if that is not possible."""
        last = chain[-1]
        reading: list[Entry] = [last]

        def read(entry: Entry, name: str) -> mx.array:
            reading[0] = entry
            return entry.array(name)

        def rows(name: str) -> mx.array:
            parts = []
            for entry in chain:
                part = read(entry, name)
                if part.shape[-2] != entry.header["end"] - entry.header["begin"]:
                    raise DamagedError(f"{entry.file}: {name} has other tokens")
                parts.append(part)
            whole = mx.concatenate(parts, axis=-2)
            mx.eval(whole)
            return whole

        try:
            put(caches, last.header["caches"], rows, lambda name: read(last, name))
        except NotKeptError as e:
            _log.warning(f"{last.file}: not used: {e}")
            return False
        except (DamagedError, ValueError, KeyError) as e:
            self._entries.delete(reading[0].file, e)
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
    done = kept.restore(caches, tokens[:last], aligned=not ends)
    with mx.stream(generation_stream):
        for stop in (s for s in stops if s > done):
            while done < stop:
                count = min(step, stop - done)
                model(mx.array([tokens[done : done + count]]), cache=caches)
                mx.eval([c.state for c in caches])
                mx.clear_cache()
                done += count
                kept.save(tokens[:done], caches)
    return caches, list(tokens[done:])


def _identity(folder: Path, adapter: str | None, chunk: int) -> str:
    """A digest of everything that could change a bit of a cache."""
    files = {f.name: file_identity(f) for f in sorted(folder.glob("*.safetensors"))}
    if adapter is not None:
        for f in sorted(Path(adapter).iterdir()):
            if f.is_file():
                files[f"adapter/{f.name}"] = {"sha256": _digest(f)}
    about = {
        "format": FORMAT, "files": files, "config": _digest(folder / "config.json"),
        "code": {f.name: _digest(f) for f in sorted(folder.glob("*.py"))},
        "versions": [version("mlx"), version("mlx-lm")],
        "device": [str(mx.default_device()), mx.device_info()], "chunk": chunk,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
