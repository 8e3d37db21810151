"""The checks of the self-test: each tests one promise and returns an `Outcome`.

_selftest.py lists and runs them. Models are the embedded one and a small one that is written to a
temporary folder.
"""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._analysis import exactness
from .._analysis.exactness import load_streamed, random_tokens
from .._analysis.random_model import write_random_model
from .._config import StreamConfig, format_size
from .._experts.bank import Bank, SlotTensor, byte_view, in_place_fault
from .._io.checkpoint import read_checkpoint
from .._io.files import ShardFiles, direct_works
from .._io.ranges import ByteRange
from .._loading.demo import demo_model
from .._loading.load import plan


@dataclass(frozen=True)
class Effort:
    """How much is tested. These defaults take 61 s on two cores with MLX's CPU backend.

    Attributes:
        steps: decode steps per setting.
        shares: shares of the experts that are resident.
        schedules, schedule_seconds: random schedules, and the longest that they may take.
        prompt: tokens of the prompt on which prefill is compared.
        rounds: how often memory is written.
        ranges: ranges read of each file.
        hidden: width of the model that is written; with 64 MLX's CUDA backend gave NaN.
    """

    steps: int = 12
    shares: tuple[float, ...] = exactness.SHARES
    schedules: int = 40
    schedule_seconds: float = 20.0
    prompt: int = 64
    rounds: int = 40
    ranges: int = 100
    hidden: int = 512


EFFORT = Effort()


@dataclass(frozen=True)
class Outcome:
    """Whether a promise holds, and how much was checked or what is wrong."""

    passed: bool
    detail: str


def ways_left(stated: StreamConfig) -> dict[str, StreamConfig]:
    """The ways to decode that the stated options allow, by their names for users."""
    every = exactness.ways(stated)
    ways = {"ordinary": every["asked"]}
    if stated.prefetch != "off":
        ways["prefetching"] = every["asked, prefetching"]
    if stated.overlap != "off":
        ways["experts run as they arrive"] = every["asked, in lots"]
    if stated.bypass_page_cache != "off" and direct_works(_shards(demo_model())[0]):
        ways["past the page cache"] = replace(every["asked"], bypass_page_cache="on")
    if stated.keep_awake != "off":
        ways["kept awake"] = replace(every["asked"], keep_awake="on")
    if stated.run_ahead != "off" and stated.in_place != "off":
        ways["run-ahead forced"] = every["run ahead"]
    return ways


def written_bytes(config: StreamConfig) -> Outcome:
    """Write into arrays and through slices repeatedly; see `bank.in_place_fault`."""
    rounds = EFFORT.rounds
    fault = in_place_fault(rounds)
    return Outcome(fault is None, fault or f"arrays of 4 element types and slices, {rounds} times")


def while_computing(config: StreamConfig) -> Outcome:
    """Run quantized matmuls on half of the slots while the other half and its table are written.

    As in run-ahead, the table is a slice of an array that is written through its memory.
    """
    experts, slots, size, calls = 16, 4, 512, 6
    chance = np.random.default_rng(0)
    dense = mx.array(chance.normal(size=(experts, size, size)).astype(np.float32) * size**-0.5)
    parts = dict(
        zip(("weight", "scales", "biases"), mx.quantize(dense.astype(mx.bfloat16)), strict=True)
    )
    mx.eval(parts)
    module = nn.Module()
    tensors = {k: SlotTensor(module, k, v.shape[1:], v.dtype) for k, v in parts.items()}
    bank = Bank(tensors, 2 * slots, in_place=True)
    content = {k: np.frombuffer(byte_view(v), np.uint8).reshape(experts, -1)
               for k, v in parts.items()}  # fmt: skip
    tables = mx.zeros((2, 2, experts), mx.uint32)
    mx.eval(tables)
    memory = np.frombuffer(byte_view(tables), np.uint32).reshape(tables.shape)
    views = [tables[i, 1] for i in range(2)]  # [experts]
    mx.eval(views)
    x = mx.array(chance.normal(size=(1, 1, 1, 1, size)).astype(np.float32)).astype(mx.bfloat16)

    def run(where: dict[str, mx.array], rows: mx.array) -> mx.array:
        return mx.gather_qmm(
            x, where["weight"], where["scales"], where["biases"], rhs_indices=rows, transpose=True
        )

    held = [chance.permutation(experts)[:slots] for _ in range(2)]
    _rewrite(bank, content, memory[0, 1], held[0], 0)
    for i in range(EFFORT.rounds):
        half, other = i % 2, 1 - i % 2
        chosen = [mx.array(chance.choice(held[half], (1, 1, 2))) for _ in range(calls)]
        got = [run(dict(module), views[half][c]) for c in chosen]
        mx.async_eval(got)
        held[other] = chance.permutation(experts)[:slots]
        writer = threading.Thread(
            target=_rewrite, args=(bank, content, memory[other, 1], held[other], other * slots)
        )
        writer.start()
        writer.join()
        for mine, c in zip(got, chosen, strict=True):
            if not mx.array_equal(mine, run(parts, c)).item():
                return Outcome(False, f"a matmul gave another result in round {i}")
    nbytes = EFFORT.rounds * slots * sum(v.shape[1] for v in content.values())
    done = f"{EFFORT.rounds * calls} matmuls with their slots' bits while {format_size(nbytes)}"
    return Outcome(True, f"{done} were written beside them")


def _rewrite(
    bank: Bank, content: dict[str, np.ndarray], table: np.ndarray, held: np.ndarray, first: int
) -> None:
    """Write experts into slots from `first` on, and enter them into the table."""
    table[:] = 0
    for slot, expert in enumerate(held.tolist(), first):
        for rows, into in zip(content.values(), bank.destinations(slot), strict=True):
            into[:] = rows[expert].data
        table[expert] = slot


class Lab:
    """The checks that need files or models, and what these share.

    Args:
        work: folder for the model that is written.
        reads: see `selftest`.
    """

    def __init__(self, work: Path, reads: Path | None = None) -> None:
        self._work, self._reads = work, reads or demo_model()
        self._expected: dict[str, list[np.ndarray] | None] = {}

    models = ("embedded model", "4-bit bfloat16")

    def folder(self, model: str) -> Path:
        """The folder of a model of `models`."""
        return demo_model() if model == self.models[0] else self._written

    @cached_property
    def _written(self) -> Path:
        return write_random_model(
            self._work / "model", layers=2, experts=32, hidden=EFFORT.hidden,
            inner=EFFORT.hidden // 2, bits=4, vocab=1024, dtype=mx.bfloat16,
        )  # fmt: skip

    def decoding(self, model: str, config: StreamConfig) -> Outcome:
        """Decode at several cache sizes and compare logits with mlx-lm's, bit for bit."""
        tokens = random_tokens(EFFORT.steps)
        if model not in self._expected:
            self._expected[model] = exactness.reference(self.folder(model), tokens)
        expected = self._expected[model]
        if expected is None:
            return Outcome(False, "mlx-lm's own logits differ from run to run here, or are NaN")
        rows = exactness.decoding(self.folder(model), tokens, expected, config, EFFORT.shares)
        wrong = [share for share, row in rows.items() if not row.identical]
        if wrong:
            at = ", ".join(f"{share:.0%}" for share in wrong)
            return Outcome(False, f"logits differ from mlx-lm's with {at} of the experts resident")
        if any(not row.misses for share, row in rows.items() if share < 1):
            return Outcome(False, "nothing was streamed, so that nothing was compared")
        detail = f"{len(rows) * len(tokens)} steps with mlx-lm's logits at {len(rows)} cache sizes"
        detail += f", {sum(row.misses for row in rows.values())} experts read"
        if config.run_ahead == "on" and config.in_place != "off":
            passes, steps = (sum(getattr(r, k) for r in rows.values()) for k in ("passes", "steps"))
            if not steps:
                return Outcome(False, "run-ahead cannot be used: reads are copied on this machine")
            detail += f", {passes} passes for {steps} steps"
        return Outcome(True, detail)

    def schedules(self, config: StreamConfig) -> Outcome:
        """Interleave lazy steps of several sequences; see `exactness.schedules`."""
        ways = ways_left(config)
        result = exactness.schedules(
            demo_model(), ways, EFFORT.schedules, EFFORT.schedule_seconds
        )  # fmt: skip
        if result.different:
            return Outcome(False, f"logits differ from mlx-lm's: {result.different[0]}")
        return Outcome(
            True,
            f"{result.schedules} schedules of {result.steps} steps, {result.compared} compared, "
            f"{result.taken_back} taken back",
        )

    def prefill(self, model: str, config: StreamConfig) -> Outcome:
        """Run a prompt with few experts resident: identical on the CPU, else within the bound."""
        rows = exactness.prompts(self.folder(model), [EFFORT.prompt], config, [0.25])
        (row,) = rows.values()
        what = f"logits of {EFFORT.prompt} tokens, in {row.waves} waves of experts, "
        differ = f"differ by {row.difference:.1e} of the largest, {row.bound:g} allowed"
        same = row.difference == 0
        return Outcome(
            row.difference <= row.bound, what + ("are the same bits" if same else differ)
        )

    def around_four_rows(self, model: str, config: StreamConfig) -> Outcome:
        """Run prompts just below and just above four rows per expert.

        MLX uses other kernels once a prompt has more rows than four times the experts to choose
        from.
        """
        planned = plan(str(self.folder(model)), config=replace(config, memory=None, cache="1TB"))
        limit = 4 * max(planned.layer_experts) // planned.top_k
        lengths = [limit - 1, limit, limit + 1]
        rows = exactness.prompts(self.folder(model), lengths, config, [0.25])
        worst = max(row.difference for row in rows.values())
        what = f"logits of {lengths[0]} to {lengths[-1]} tokens "
        bound = max(row.bound for row in rows.values())
        differ = f"differ by {worst:.1e} of the largest, {bound:g} allowed"
        return Outcome(worst <= bound, what + ("are the same bits" if worst == 0 else differ))

    def failing_device(self, config: StreamConfig) -> Outcome:
        """Check that an error is raised if an evaluation fails once and then yields garbage."""
        file = self._work / "cut.safetensors"
        mx.save_safetensors(str(file), {"x": mx.ones((1 << 16,))})
        (stored,) = mx.load(str(file)).values()  # type: ignore[union-attr]
        os.truncate(file, 1000)  # reading it now really fails
        module = nn.Module()
        bank = Bank({"x": SlotTensor(module, "x", (1,), mx.float32)}, 1, in_place=False)
        bank.track_reader(stored[:16] + 1)
        error: BaseException | None = None
        try:
            bank.flush_readers()
        except Exception as e:
            error = e
        said = []
        while error is not None:
            said.append(str(error))
            error = error.__cause__
        if not any("read" in text and "file" in text for text in said):
            return Outcome(
                False, f"the error was {'swallowed' if not said else 'lost: ' + said[0]}"
            )
        return Outcome(True, "an evaluation that failed once was reported by its own name")

    def memory(self, config: StreamConfig) -> Outcome:
        """Compare MLX's peak memory in loading, a prompt and decoding with the budget."""
        gc.collect()
        mx.clear_cache()
        folder = demo_model()
        config = replace(config, cache=None, context_tokens=256, prefill_tokens=64)
        small = plan(str(folder), config=replace(config, memory="1GB"))
        config = replace(config, memory=small.minimum + small.experts // 3)
        others = mx.get_active_memory()
        mx.reset_peak_memory()
        model, s = load_streamed(folder, config)
        with s:
            exactness.decode(model, random_tokens(8))
            prompt = mx.array(random_tokens(min(64, EFFORT.prompt), seed=2))[None]
            mx.eval(model(prompt))
            exactness.decode(model, random_tokens(EFFORT.steps))
            peak, misses = mx.get_peak_memory() - others, s.stats().cache.misses
        budget = s.plan.memory or 0
        detail = f"peak {format_size(peak)} of {format_size(budget)}, {misses} experts read"
        return Outcome(0 < peak <= budget and misses > 0, detail)

    def direct_reads(self, config: StreamConfig) -> Outcome:
        """Read ranges of the model's files with and without the page cache."""
        files = [(str(f), f.stat().st_size) for f in _shards(self._reads)]
        if not direct_works(Path(files[0][0])):
            if config.bypass_page_cache == "on":
                return Outcome(False, "this file system has no reads past the page cache")
            return Outcome(True, "this file system has none; reads go through the page cache")
        chance, nbytes = np.random.default_rng(0), 0
        readers = [ShardFiles(direct, {}) for direct in (True, False)]
        try:
            for file, size in files:
                length = min(size, 40_001)
                for offset in chance.integers(0, size - length + 1, EFFORT.ranges).tolist():
                    both = [bytearray(length), bytearray(length)]
                    for reader, into in zip(readers, both, strict=True):
                        reader.read([ByteRange(file, offset, memoryview(into), "", 0, "")])
                    if both[0] != both[1]:
                        return Outcome(False, f"{file} differs at byte {offset}")
                    nbytes += length
        finally:
            for reader in readers:
                reader.close()
        return Outcome(True, f"{format_size(nbytes)} of {len(files)} files were the same both ways")


def _shards(folder: Path) -> list[Path]:
    return sorted({t.file for t in read_checkpoint(folder).tensors.values()})
