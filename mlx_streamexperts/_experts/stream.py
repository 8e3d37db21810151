"""The expert stream behind a model: its layers, its reader, its budget and its statistics."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .._cache.expert_map import CacheStats, LayerNeed, fewest_slots, share_slots
from .._cache.lossy import LossyStats, Ways
from .._closing import Closing
from .._config import StreamConfig, format_size, parse_size
from .._distributed.pipeline import Stage
from .._distributed.ranks import Ranks
from .._distributed.watch import Watch
from .._errors import BudgetError, CheckpointError, StreamError, UnsupportedModelError
from .._io.checkpoint import extents
from .._io.files import allow_open, direct_works
from .._io.mirrors import find_mirrors
from .._io.reader import TINY_READ_BYTES, ExpertReader, ReadStats
from .._listeners import Listeners
from .._memory.budget import Plan, check_resize, experts_per_token
from .._memory.passes import PassListener
from .._memory.process_memory import (
    bytes_over_bound,
    held_bytes,
    hold_limits,
    register,
    release_limits,
    unregister,
)
from .._osinfo import available_memory_bytes, file_mark, on_metal, power_is_scarce
from .._progress import Progress, progress_bar
from .autotune import AutoTuner, StepTimer
from .bank import in_place_works
from .cpu_streams import CpuStreams
from .follower import Follower
from .hot_set import read_hot_set, read_in, save_hot_set
from .keep_awake import KeepAwake
from .layer import OVERLAPS, PHASES, ExpertLayer
from .lossy import LossyRun
from .prefetch import SMALL_EXPERT_BYTES
from .pressure import PressureWatch
from .rows import Rows
from .slots import PrefetchStats
from .speculative.runahead import RunAhead, RunAheadStats
from .stats import StreamStats
from .thread_guard import ThreadGuard
from .timeline import Timeline
from .trace import Trace

_STREAM = "_expert_stream"
Recording = TypeVar("Recording", Trace, Timeline)
_GIVES = 8  # part of the cache that is given at once
_log = logging.getLogger(__name__)


class ExpertStream(Closing):
    """The result of `stream(model)`. As a context manager, it closes the stream at the end.

    Close it, or drop the model, to free slots, files and threads.

    Attributes:
        layers: the expert layers in model order, for diagnosis; not part of the stable interface.
            None if only tables that are looked up by token are streamed.
        plan: how the budget was divided.
        config: the options in force.
        bypasses_page_cache: whether reads go past the system's page cache.
        in_place: whether reads go straight into MLX's memory.
        run_ahead: runs steps that do not wait for each layer; None if that is off.
        stage: this rank's decoder layers, if several machines share the model.
        ranks: those machines.
        token_rows: tokens that the model knows; None if its own code does not tell.
        on_pass: hear of the model's passes.
        folder: the checkpoint's; None for a model that did not come from a folder.
        model_config: its configuration, with what the caller of `load` put in place of parts of it.
        lossy: what passes leave out; None for a model that was loaded exact.
        batches_copied_whole: batches need room for a copy of their KV cache, as with mlx-lm's
            `batch_generate`.
    """

    batches_copied_whole = True
    lossy: LossyRun | None = None

    folder: Path | None = None

    stage: Stage | None = None
    token_rows: int | None = None
    ranks: Ranks | None = None
    _watch: Watch | None = None

    def __init__(
        self,
        layers: list[ExpertLayer],
        plan: Plan,
        config: StreamConfig,
        model_config: dict[str, Any],
        rows: Rows | None = None,
    ) -> None:
        self._rows = rows or Rows()
        self.layers, self.plan, self.config = layers, plan, config
        self.model_config = model_config
        self.in_place = config.in_place == "auto" and in_place_works()
        self.bypasses_page_cache = self._decide_bypass()
        hot = read_hot_set(layers, Path(config.hot_set)) if config.hot_set else []
        _let_go(layers)
        files = sorted({*expert_files(layers), *self._rows.files})
        marks, mirrors = _marks(files), None
        if config.mirrors:
            mirrors = find_mirrors(
                files, config.mirrors, marks, self.bypasses_page_cache, config.threads
            )
            for drive in mirrors.drives:
                if config.bypass_page_cache == "on" and not drive.files.direct:
                    raise StreamError(_cannot_bypass(drive.folder))
        copies = mirrors.copies if mirrors is not None else 0
        allow_open(len(files) + copies, str(Path(files[0]).parent))
        self._reader = ExpertReader(
            config.threads, parse_size(config.read_size), self.bypasses_page_cache, marks, mirrors
        )
        self.run_ahead: RunAhead | None = None
        self.on_pass = Listeners[PassListener]()
        self._closed = self._freed = False
        self._recordings: list[Trace | Timeline] = []
        self._changing = threading.RLock()  # one change of the cache at a time, closing included
        _alive.add(self)
        self._guard = ThreadGuard(self._flush_readers)
        self._cpu_streams = CpuStreams(config.cores)
        self._timers: dict[int, StepTimer] = {}  # by the size of an expert
        self._keep_awake: KeepAwake | None = None
        self._pressure: PressureWatch | None = None
        self._given_back = 0  # bytes of the planned cache; `plan` has what is left
        hold_limits(self, plan, config.wired == "auto")
        try:
            self._keep_awake = self._make_keep_awake()
            self._open(plan.slots)
            self._rows.open(self._reader)
            self.run_ahead = self._make_run_ahead()
            if hot:
                read_in(layers, hot, config.progress)
                self._reader.stats = ReadStats()
            if config.pressure == "auto":
                self._pressure = PressureWatch(self)
        except BaseException:
            self.close()
            raise

    def stats(self) -> StreamStats:
        """Counters since the last `reset`, summed over layers."""
        total = CacheStats()
        for layer in self.layers:
            total.add(layer.cache.stats)
        prefetch = [asdict(x.slots.prefetch_stats) for x in self.layers]
        return StreamStats(
            cache=total,
            read=ReadStats(**asdict(self._reader.stats)),
            layer_hit_rates={x.name: x.cache.stats.hit_rate for x in self.layers},
            prefetch=PrefetchStats(
                **{f.name: sum(p[f.name] for p in prefetch) for f in fields(PrefetchStats)}
            ),
            prefetching_layers=sum(
                x.prefetcher is not None and x.prefetcher.on for x in self.layers
            ),
            seconds={p: sum(x.stats.seconds[p] for x in self.layers) for p in PHASES},
            calls=sum(x.stats.calls for x in self.layers),
            waves=sum(x.stats.waves for x in self.layers),
            overlapped=sum(x.stats.overlapped for x in self.layers),
            resident_layers=sum(x.resident for x in self.layers),
            run_ahead=RunAheadStats(**asdict(self.run_ahead.stats) if self.run_ahead else {}),
            rows=self._rows.stats(),
            beats=self._keep_awake.beats if self._keep_awake is not None else 0,
            given_back=self._given_back,
            lossy=self.lossy.stats() if self.lossy is not None else LossyStats(),
        )

    def reset(self) -> None:
        """Set every counter to zero; cached experts stay."""
        for layer in self.layers:
            layer.reset()
        if self.run_ahead is not None:
            self.run_ahead.stats = RunAheadStats()
        self._rows.reset()
        if self.lossy is not None:
            self.lossy.reset()
        self._reader.stats = ReadStats()
        if self._keep_awake is not None:
            self._keep_awake.beats = 0

    def trace(self, path: str | os.PathLike[str]) -> Trace:
        """Record every routing decision into a file of JSON lines, until it is closed.

        While it runs, wholly resident layers too wait for the device's indices.

        Args:
            path: the file. Its first line describes the layers. Each further line is one call of
                one layer: its number, and for each token the experts that its router chose.

        Returns:
            A context manager. The file exists when it is closed, or this stream is.

        Raises:
            StreamError: this stream is closed, another recording into that file is under way, or
                the model is lossy.
            OSError: the file cannot be created.
            UnsupportedModelError: the model has no experts.
        """
        refuse_without_experts(self.layers, "A trace records which experts were chosen")
        if self.lossy is not None:
            raise StreamError(
                f"{path}: a trace records what routers choose, and this model was loaded with "
                f"lossy={self.config.lossy!r}, which leaves experts out; load it exact to record"
            )
        return self._record(lambda: Trace(path, self.layers, self.plan))

    def timeline(self, path: str | os.PathLike[str]) -> Timeline:
        """Record where time goes, until it is closed, for Perfetto or chrome://tracing.

        Args:
            path: the file, in Chrome's trace-event format (JSON).

        Returns:
            A context manager, which closes with this stream at the latest. Its `summary()` gives
            seconds by phase.

        Raises:
            StreamError: this stream is closed, or another recording into that file is under way.
            OSError: the file cannot be created.
            UnsupportedModelError: the model has no experts.
        """
        refuse_without_experts(self.layers, "A timeline records what expert layers wait for")
        return self._record(lambda: Timeline(path, self.layers, self._reader))

    def follow(
        self,
        listener: Callable[[Progress], None] | None = None,
        prompt_tokens: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Follower:
        """Follow the model's prompts layer by layer, until the result is closed.

        Args:
            listener: called with a `Progress` about four times a second while passes run, in the
                thread that runs them.
            prompt_tokens: tokens of the prompt; None if unknown, and then what is left is too.
            stop: called about ten times a second in that thread. Once it returns True, the pass
                under way ends with `PassStoppedError`, its KV caches as they were before. A pass
                whose caches cannot be taken back within the free memory runs to its end.

        Returns:
            A context manager. Its `now()` returns a `Progress` to any thread.

        Raises:
            StreamError: this stream is closed.
        """
        self._check_open()
        return Follower(
            self.layers, self.on_pass, lambda: self._reader.stats.bytes, listener, prompt_tokens,
            stop,
        )  # fmt: skip

    def save_hot_set(self, path: str | os.PathLike[str]) -> None:
        """Write the experts that are cached now, for `StreamConfig(hot_set=path)` at a later load.

        Args:
            path: the file (JSON).

        Raises:
            StreamError: this stream is closed.
            CheckpointError: the checkpoint's files cannot be read.
            UnsupportedModelError: the model has no experts.
        """
        self._check_open()
        refuse_without_experts(self.layers, "A hot set holds experts")
        save_hot_set(self.layers, Path(path))

    def resize(self, cache: int | str) -> None:
        """Change the expert cache's size while the model lives. It starts empty again.

        Args:
            cache: bytes, or a string such as "24GB".

        Raises:
            BudgetError: too small, or more than the `memory` stated at load allows beside what else
                is held; nothing has changed.
            StreamError: the size is not understood, or this stream is closed.
            ExpertReadError: a layer that is now wholly resident could not be read in.
            UnsupportedModelError: the model has no experts.
        """
        self._check_open()
        refuse_without_experts(self.layers, "Only the experts' cache can be resized")
        slots = share_slots(parse_size(cache), self.needs())
        taken = sum(n * x.expert_bytes for n, x in zip(slots, self.layers, strict=True))
        reserve = parse_size(self.config.reserve) if self.config.reserve else 0
        with self._change():
            self._check_open()
            plan = replace(self.plan, bound=self.plan.bound + self._given_back)
            bound = check_resize(plan, taken, reserve, held_bytes() - self.held_bytes())
            self._open(slots)
            self.plan = replace(plan, cache=taken, slots=tuple(slots), bound=bound)
            self._given_back = 0
            hold_limits(self, self.plan, self.config.wired == "auto")

    def make_room(self, needed: int, what: str, instead: str) -> None:
        """Shrink the expert cache until something fits that was not planned for.

        Args:
            needed: bytes that it takes.
            what: what it is, for messages.
            instead: what the user may do to need less.

        Raises:
            BudgetError: it does not fit beside the smallest expert cache that works.
        """
        with self._change():
            gc.collect()
            active = mx.get_active_memory()
            over = bytes_over_bound(active + needed)
            if over <= 0 or self._closed:
                return
            needs = self.needs()
            has = sum(x.cache.slots * x.expert_bytes for x in self.layers)
            least = sum(n.minimum * n.expert_bytes for n in needs)
            if has - over < least:
                enough = self.plan.bound_with(over - (has - least))
                if self.plan.row_cache:  # it keeps its size
                    instead += f", state less than {format_size(self.plan.row_cache)} of row_cache"
                raise BudgetError(
                    f"{what} does not fit: it needs {format_size(needed)} beside the "
                    f"{format_size(active)} that MLX holds within {format_size(self.plan.bound)}, "
                    f"and the expert cache can give no more than {format_size(has - least)}. Load "
                    f"with at least memory={enough:,} bytes ({format_size(enough)}), or {instead}, "
                    "or keep less besides (prompt caches, logits)",
                    needed_bytes=enough,
                )
            # A cache that shrinks starts empty, so it shrinks by a lot at once.
            slots = share_slots(max(least, has - max(over, has // _GIVES)), needs)
            taken = sum(n * x.expert_bytes for n, x in zip(slots, self.layers, strict=True))
            _log.warning(
                f"{what} needs {format_size(needed)} beside the {format_size(active)} that MLX "
                f"holds, more than was planned: the expert cache gives {format_size(has - taken)} "
                f"and keeps {format_size(taken)}. A larger context_tokens plans for longer "
                "contexts and for batches, a reserve for other arrays"
            )
            self._open(slots, counting=True)
            self.plan = replace(self.plan, cache=taken, slots=tuple(slots))
            hold_limits(self, self.plan, self.config.wired == "auto")

    @property
    def given_back(self) -> int:
        """Bytes of the planned expert cache that other programs have now."""
        return self._given_back

    @property
    def planned_cache(self) -> int:
        """Bytes of the expert cache while nothing is given back."""
        return self.plan.cache + self._given_back

    @property
    def most_given_back(self) -> int:
        """Bytes that the expert cache can do without: all but the experts of one token."""
        least = sum(max(n.minimum, n.top_k) * n.expert_bytes for n in self.needs())
        return max(0, self.planned_cache - least)

    def give_back(self, nbytes: int) -> None:
        """Leave a part of the planned expert cache to other programs from now on.

        Layer by layer, with the most useful experts kept where both sizes of a layer fit into what
        the cache had.

        Args:
            nbytes: bytes, at most `most_given_back`; 0 takes all of it again.

        Raises:
            StreamError: there is no memory to take; the cache has the size that it had.
        """
        with self._change():
            if self._closed:
                return
            planned = self.planned_cache
            given = max(0, min(nbytes, self.most_given_back))
            slots = share_slots(planned - given, self.needs())
            taken = sum(n * x.expert_bytes for n, x in zip(slots, self.layers, strict=True))
            try:
                self._open(slots, keep=True)
            except BaseException:
                self._open(self.plan.slots, keep=True)  # a layer that failed is closed otherwise
                raise
            # The bound falls too, so that no longer context takes what is given back.
            bound = self.plan.bound + self._given_back - (planned - taken)
            self.plan = replace(self.plan, cache=taken, slots=tuple(slots), bound=bound)
            self._given_back = planned - taken
            hold_limits(self, self.plan, self.config.wired == "auto")

    @property
    def reader(self) -> ExpertReader:
        """Reads the experts; for diagnosis, not part of the stable interface."""
        return self._reader

    def close(self) -> None:
        """Stop reading and free slots, files and threads. Later calls of the model raise.

        A device error that appears meanwhile is raised at the end.
        """
        if self._freed:
            return
        if self._pressure is not None:
            self._pressure.close()  # first: it waits for a change that is under way
        with self._change():
            self._closed = True
            with ExitStack() as steps:  # run in reverse order; each of them can be repeated
                steps.callback(mx.clear_cache)
                steps.callback(release_limits, self)
                if self._keep_awake is not None:
                    steps.callback(self._keep_awake.close)
                steps.callback(self._reader.close)
                for recording in self._recordings:
                    steps.callback(recording.close)
                for layer in reversed(self.layers):
                    steps.callback(layer.close)
                steps.callback(self._rows.close, "this model's expert stream is closed")
                if self._watch is not None:
                    steps.callback(self._watch.close)
            self._freed = True

    def held_bytes(self) -> int:
        """Bytes that this model holds, or may still take according to its plan."""
        if self._closed:
            return self.plan.trunk
        cache = sum(x.cache.slots * x.expert_bytes for x in self.layers)
        return self.plan.trunk + cache + self.plan.row_cache + self.plan.kv + self.plan.work

    def accompany(self, ranks: Ranks, watch: Watch) -> None:
        """Join the other ranks of a distributed run, until closed.

        Args:
            ranks: all of them.
            watch: notices when a rank is lost.
        """
        self.ranks, self._watch = ranks, watch

    def lost_rank(self) -> str | None:
        """Why a distributed run cannot go on, naming the rank; None while nothing is known."""
        return None if self._watch is None else self._watch.why()

    def leave(self, reason: str) -> None:
        """Close, and tell the other ranks of a distributed run the reason.

        Args:
            reason: one sentence, which they show to their users.
        """
        if self._watch is not None:
            self._watch.close(reason)
        self.close()

    def needs(self) -> list[LayerNeed]:
        """Each layer's sizes and minimum slots for a budget, in model order."""
        return layer_needs(self.layers, self.model_config)

    def __repr__(self) -> str:
        state = "closed" if self._closed else str(self.plan)
        return f"<ExpertStream of {len(self.layers)} layers: {state}>"

    def _record(self, begin: Callable[[], Recording]) -> Recording:
        with self._changing:
            self._check_open()
            self._recordings = [x for x in self._recordings if not x.closed]
            recording = begin()
            self._recordings.append(recording)
        return recording

    def _flush_readers(self) -> None:
        for layer in self.layers:
            layer.flush_readers()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Keep others from changing the cache, and run-ahead steps from running."""
        with self._changing, self.run_ahead.paused() if self.run_ahead else nullcontext():
            yield

    def _open(self, slots: Sequence[int], keep: bool = False, counting: bool = False) -> None:
        """Give each layer its number of slots, and read in layers that fit entirely.

        Args:
            slots: of each layer.
            keep: move experts to the new slots where that takes no more than the cache before or
                after, and go on counting.
            counting: go on counting in any case, or all counters of the cache and of reads are 0.
        """
        counting = counting or keep
        shrink, grow = [], []
        for layer, count in zip(self.layers, slots, strict=True):
            whole = count == layer.experts
            if count > layer.cache.slots or (whole and not layer.resident):
                grow.append((layer, count))
            elif count < layer.cache.slots or layer.closed:  # closed: an interrupted resize
                shrink.append((layer, count))
        held = sum(x.cache.slots * x.expert_bytes for x in self.layers)
        after = sum(n * x.expert_bytes for n, x in zip(slots, self.layers, strict=True))
        most = max(held, after)
        total = sum(x.experts * x.expert_bytes for x, count in grow if count == x.experts)
        shown = bool(self.config.progress and total and not keep)
        with progress_bar("Loading experts", shown, total) as bar:

            def reopen(layer: ExpertLayer, count: int) -> None:
                nonlocal held
                whole, fits = count == layer.experts, held + count * layer.expert_bytes <= most
                held += (count - layer.cache.slots) * layer.expert_bytes
                with layer.lock:  # no call may see it half-filled
                    counted = layer.cache.stats
                    self._open_layer(layer, count, keep and fits and not whole)
                    for nbytes in layer.load_all() if whole else ():
                        bar.update(nbytes)
                    if counting:
                        layer.cache.stats = counted

            for layer, count in shrink:
                reopen(layer, count)
                if keep:
                    mx.clear_cache()  # at once: other programs wait for it
            mx.clear_cache()  # before other layers grow, so that all stays within the budget
            for layer, count in grow:
                reopen(layer, count)
        if not counting:
            self._reader.stats = ReadStats()

    def _open_layer(self, layer: ExpertLayer, slots: int, keep: bool = False) -> None:
        overlaps = {"auto": OVERLAPS, "on": OVERLAPS[-1:], "off": OVERLAPS[:1]}[self.config.overlap]
        small = layer.expert_bytes < SMALL_EXPERT_BYTES
        likely = "halves" if small and len(overlaps) > 1 else overlaps[-1]
        awake = self._keep_awake
        if (timer := self._timers.get(layer.expert_bytes)) is None:
            timer = StepTimer(AutoTuner(overlaps, likely), awake.tuner if awake else None)
            self._timers[layer.expert_bytes] = timer
        layer.open(
            slots, self._reader, self.config.policy, timer, self._guard, self._cpu_streams,
            self.in_place, awake, keep,
        )  # fmt: skip

    def _make_keep_awake(self) -> KeepAwake | None:
        wanted = {"auto": on_metal(), "on": True, "off": False}[self.config.keep_awake]
        if not (wanted and self.layers):
            return None
        if self.config.keep_awake == "on":
            return KeepAwake(len(self.layers), always=True, scarce=lambda: False)
        return KeepAwake(len(self.layers), always=False, scarce=power_is_scarce)

    def _make_run_ahead(self) -> RunAhead | None:
        """None if it is off or impossible, or if the host is the device and never waits for it."""
        wanted = {"auto": mx.default_device() != mx.cpu, "on": True, "off": False}
        if not (wanted[self.config.run_ahead] and self.in_place and self.layers):
            return None
        lossy = Ways.parse(self.config.lossy)
        if lossy is not None and lossy.prefer:  # stand-ins are chosen on the host
            if self.config.run_ahead == "on":
                _log.warning("run_ahead does not work with lossy prefer: each router is awaited")
            return None
        top_k = max(need.top_k for need in self.needs())
        always = self.config.run_ahead == "on"
        return RunAhead(
            self.layers, top_k, self._guard, lambda: self._reader.stats.wait_seconds, always,
            lossy is not None,
        )  # fmt: skip

    def _decide_bypass(self) -> bool:
        if self.config.bypass_page_cache == "off":
            return False
        files = expert_files(self.layers) or sorted(self._rows.files)
        if self.config.bypass_page_cache == "auto" and _reads_are_tiny(self.layers):
            return False
        possible = all(direct_works(Path(f)) for f in files[:1])
        if self.config.bypass_page_cache == "on":
            if not possible:
                raise StreamError(_cannot_bypass(files[0]))
            return True
        # A page cache competes with the expert cache for memory, as others have measured. If it has
        # room for all experts that are not in slots, it makes misses cheap instead.
        unread = max(0, self.plan.trunk - mx.get_active_memory())  # the rest is not free any more
        room = available_memory_bytes() - unread - self.plan.cache
        return possible and self.plan.experts - self.plan.cache > room // 2

    def _disown(self) -> None:
        """Let calls raise `StreamError`: this is a forked process, where they would hang."""
        self._closed = self._freed = True
        self._changing = threading.RLock()
        for layer in self.layers:
            layer.disown()
        self._rows.disown()
        if self.run_ahead is not None:
            self.run_ahead.disown()

    def _check_open(self) -> None:
        if self._closed:
            raise StreamError("this expert stream is closed")


_alive: weakref.WeakSet[ExpertStream] = weakref.WeakSet()


def _after_fork() -> None:
    for expert_stream in list(_alive):
        expert_stream._disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def layer_needs(layers: list[ExpertLayer], model_config: dict[str, Any]) -> list[LayerNeed]:
    """Sizes and minimum slots of each layer."""
    needs = []
    for x in layers:
        top_k = experts_per_token(model_config, x.experts)
        pinned = len(x.traits.pinned)
        least = fewest_slots(top_k) + pinned
        needs.append(LayerNeed(x.experts, x.expert_bytes, least, top_k + pinned))
    return needs


def expert_files(layers: Sequence[ExpertLayer]) -> list[str]:
    """Every file that holds experts of these layers."""
    return sorted({f for x in layers for t in x.tensors.values() for f in t.stored.files})


def refuse_without_experts(layers: Sequence[object], why: str) -> None:
    """Refuse what makes sense with experts only.

    Args:
        layers: the model's expert layers, or something for each of them.
        why: begins the message.

    Raises:
        UnsupportedModelError: there are none.
    """
    if not layers:
        raise UnsupportedModelError(
            f"{why}, and this model has none: only its tables that are looked up by token stay on "
            "the drive"
        )


def _reads_are_tiny(layers: Sequence[ExpertLayer]) -> bool:
    """Does an expert lie in tiny parts? Then the page cache is the faster way to the drive."""
    streamed = [x for x in layers if not x.resident and x.tensors]
    if not streamed or unwritten(streamed):
        return False
    reads = extents([t.stored for t in streamed[0].tensors.values()], [0])
    return streamed[0].expert_bytes < TINY_READ_BYTES * len(reads)


def unwritten(layers: Sequence[ExpertLayer]) -> bool:
    """Are there experts that are in no file, because the checkpoint must be converted first?"""
    return any(not t.stored.files for x in layers for t in x.tensors.values())


def _cannot_bypass(file: str) -> str:
    return (
        f"bypass_page_cache='on', but the file system of {file} cannot read past the page cache; "
        "use 'auto' or 'off'"
    )


def _let_go(layers: Sequence[ExpertLayer]) -> None:
    """Drop the lazy arrays of all experts, because MLX keeps their files open meanwhile."""
    for layer in layers:
        for slot in layer.slots.slot_tensors.values():
            setattr(slot.module, slot.attribute, mx.zeros((0, *slot.shape), slot.dtype))


def _marks(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Marks that tell each file from a file that replaces it.

    Raises:
        CheckpointError: a file is gone.
    """
    try:
        return {f: file_mark(Path(f)) for f in files}
    except OSError as e:
        raise CheckpointError(f"{e.filename}: cannot be read: {e.strerror}") from e


def flatten(module: nn.Module) -> list[tuple[str, mx.array]]:
    """A module's parameters by path."""
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))


def attach(model: nn.Module, expert_stream: ExpertStream, language: nn.Module) -> None:
    """Attach the stream to its model, and to its language model; it closes with the model."""
    for module in (model, language):
        object.__setattr__(module, _STREAM, expert_stream)
    register(expert_stream)
    weakref.finalize(model, _gone, expert_stream)


def _gone(expert_stream: ExpertStream) -> None:
    unregister(expert_stream)
    if expert_stream.reader.is_mine():
        # Python's collector ran in a thread that `close` waits for, or with a lock that it takes.
        threading.Thread(target=expert_stream.close, name="expert-stream-close").start()
    else:
        expert_stream.close()


def stream(model: nn.Module) -> ExpertStream:
    """The `ExpertStream` behind a model that `load` or `patch` made.

    Args:
        model: a model from `load`, or from `mlx_lm.load` under `patch`.

    Returns:
        The same object at every call, closed or not.

    Raises:
        UnsupportedModelError: the model is not streamed.
    """
    if not is_streamed(model):
        raise UnsupportedModelError(
            f"this {type(model).__name__} is not streamed: load it with mlx_streamexperts.load, or "
            "with mlx_lm.load inside mlx_streamexperts.patch"
        )
    return cast(ExpertStream, model.__dict__[_STREAM])


def is_streamed(model: nn.Module) -> bool:
    """Does this model have an `ExpertStream`?"""
    return _STREAM in getattr(model, "__dict__", ())  # it may be anything
