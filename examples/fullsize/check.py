"""Load a stand-in within a budget, compare its filled experts with known bytes, generate, report.

    python examples/fullsize/check.py FOLDER --memory 20GB --tokens 2

The filled experts go the whole way: checkpoint headers, the stream's reader, a slot, the matmul.
They are compared byte by byte with the digests that write.py left, and their outputs bit by bit
with the library's own layer holding the same bytes. Peaks are MLX's and the process's resident
memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import vlm
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_streamexperts import (
    CheckpointError,
    ExpertStream,
    StreamConfig,
    StreamError,
    load,
    patch,
    stream,
)
from mlx_streamexperts._config import format_size, parse_size
from mlx_streamexperts._experts.bank import byte_view
from mlx_streamexperts._experts.layer import ExpertLayer
from mlx_streamexperts._io.checkpoint import read_checkpoint
from mlx_streamexperts._osinfo import resident_bytes


def check_experts(expert_stream: ExpertStream, folder: Path) -> int:
    """Compare every filled expert with its known bytes and the stock layer; returns how many.

    Raises:
        CheckpointError: a byte or an output differs.
    """
    digests: dict[tuple[str, int], dict[str, str]] = {}
    for entry in json.loads((folder / "filled.json").read_text()):
        layer = entry["tensor"].rsplit(".", 2)[0]
        part = entry["tensor"][len(layer) + 1 :]
        digests.setdefault((layer, entry["expert"]), {})[part] = entry["sha256"]
    for (name, expert), parts in digests.items():
        layer = next(x for x in expert_stream.layers if x.name == name)
        _check_expert(layer, expert, parts)
    return len(digests)


def _check_expert(layer: ExpertLayer, expert: int, digests: dict[str, str]) -> None:
    first = next(iter(layer.tensors.values())).slot
    columns = first.shape[-1] * 32 // first.module.bits
    x = mx.random.normal((1, columns)).astype(mx.bfloat16)
    y = layer(x, mx.array([[expert]]))  # [1, 1, D]
    mx.eval(y)
    slot = int(layer.cache.slot_of[expert])
    stock = next(k for k in type(layer.switch).__mro__ if k.__name__ == SwitchGLU.__name__)
    reference = stock(64, 64, 1, activation=layer.switch.activation)
    # Its shapes and numbers are replaced below.
    nn.quantize(reference, group_size=32, bits=4, mode=first.module.mode)
    for part, digest in digests.items():
        tensor = layer.tensors[part]
        projection, attribute = part.split(".")
        file = tensor.stored.files[0]
        offset = tensor.stored.offsets[0] + expert * tensor.stored.row_bytes
        where = f"{layer.name}, expert {expert}, {part} at byte {offset} of {file}"
        with open(file, "rb") as f:  # by plain arithmetic, past our reader
            f.seek(offset)
            data = f.read(tensor.stored.row_bytes)
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{where}: not the bytes that write.py wrote")
        table = getattr(tensor.slot.module, attribute)
        if bytes(byte_view(table[slot])) != data:
            raise CheckpointError(f"{where}: the slot holds other bytes than the file")
        mine = getattr(reference, projection)
        mine.group_size, mine.bits = tensor.slot.module.group_size, tensor.slot.module.bits
        raw = mx.array(np.frombuffer(data, np.uint8))
        setattr(mine, attribute, raw.view(table.dtype).reshape(1, *tensor.slot.shape))
    if not mx.array_equal(y, reference(x, mx.array([[0]]))).item() or not mx.any(y).item():
        raise CheckpointError(f"{layer.name}, expert {expert}: another output than the stock layer")


def open_model(
    folder: Path, config: StreamConfig, prompt: str, tokens: int
) -> tuple[nn.Module, Iterator[Any]]:
    """The model, loaded by the library that has its family, and an item for each new token."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    step = config.prefill_tokens
    if model_type not in vlm.MODEL_TYPES:
        model, tokenizer = load(str(folder), config=config)
        return model, mlx_lm.stream_generate(
            model, tokenizer, prompt, max_tokens=tokens, prefill_step_size=step
        )
    from mlx_vlm import utils
    from mlx_vlm.generate import generate_step

    with patch(config=config):
        model = utils.load_model(folder)
    ids = mx.array([mlx_lm.utils.load_tokenizer(folder).encode(prompt)])
    return model, generate_step(
        ids, model, None, None, max_tokens=tokens, prefill_step_size=step, temperature=0.0
    )


def examine(folder: Path, config: StreamConfig, tokens: int, prompt: str) -> dict[str, Any]:
    """Everything that the report says."""
    before = resident_bytes()
    start = time.perf_counter()
    checkpoint = read_checkpoint(folder)
    indexed = time.perf_counter() - start
    index_bytes = resident_bytes() - before
    files = {t.file for t in checkpoint.tensors.values()}
    start = time.perf_counter()
    model, generated = open_model(folder, config, prompt, tokens)
    loaded = time.perf_counter() - start
    with stream(model) as expert_stream:
        plan = expert_stream.plan
        experts = check_experts(expert_stream, folder)
        expert_stream.reset()
        start = time.perf_counter()
        count = sum(1 for _ in generated)
        seconds = time.perf_counter() - start
        stats = expert_stream.stats()
        return {
            "model": folder.name,
            "apparent_bytes": sum(f.stat().st_size for f in files),
            "disk_bytes": sum(f.stat().st_blocks * 512 for f in files),
            "shards": len(files),
            "index_seconds": indexed,
            "index_bytes": index_bytes,
            "load_seconds": loaded,
            "memory": parse_size(config.memory or 0),
            "trunk": plan.trunk,
            "cache": plan.cache,
            "slots": [min(plan.slots), max(plan.slots)],
            "experts_checked": experts,
            "descriptors": len(os.listdir("/dev/fd")),
            "tokens": count,
            "seconds": seconds,
            "read_bytes": stats.read.bytes,
            "hit_rate": stats.cache.hit_rate,
            "peak_mlx": mx.get_peak_memory(),
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024),
        }


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what write.py wrote")
    parser.add_argument(
        "--memory", default="20GB", help="budget that both peaks must keep (default: 20GB)"
    )
    parser.add_argument(
        "--tokens", type=int, default=2, help="bfloat16 takes minutes each on a CPU (default: 2)"
    )
    parser.add_argument("--prompt", default="a", help="one token by default, for the same reason")
    parser.add_argument("--context-tokens", type=int, default=256, help="(default: 256)")
    parser.add_argument("--prefill-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 also where a peak exceeds the budget."""
    args = setup_arg_parser().parse_args(argv)
    config = StreamConfig(
        memory=args.memory,
        context_tokens=args.context_tokens,
        prefill_tokens=args.prefill_tokens,
    )
    try:
        r = examine(args.folder, config, args.tokens, args.prompt)
    except StreamError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(r, indent=1) + "\n")
    print(
        f"| {r['model']} | {format_size(r['apparent_bytes'])} in {r['shards']} shards | "
        f"{format_size(r['disk_bytes'])} | {r['index_seconds']:.1f} s, "
        f"{format_size(r['index_bytes'])} | {format_size(r['trunk'])} | {format_size(r['cache'])}, "
        f"{r['slots'][0]}-{r['slots'][1]} slots | {format_size(r['peak_mlx'])} | "
        f"{format_size(r['peak_rss'])} of {format_size(r['memory'])} | {r['tokens']} in "
        f"{r['seconds']:.0f} s | {r['experts_checked']} exact | {r['descriptors']} |"
    )
    over = [peak for peak in ("peak_mlx", "peak_rss") if r[peak] > r["memory"]]
    for peak in over:
        print(f"error: {peak} {r[peak]:,} exceeds memory {r['memory']:,}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
