"""Convert an original that write_original.py wrote, follow its filled experts, report peaks.

    python examples/fullsize/check_convert.py FOLDER OUT
    python examples/fullsize/check_convert.py FOLDER OUT --quantize

What is all zeros is not written but left as holes, so that the result takes little disk, and no
room is asked for; nothing else differs from `python -m mlx_streamexperts.convert`. The filled
experts are computed again from the original's bytes, by a formula of this file, and compared with
the converted ones byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_streamexperts import CheckpointError, StreamError
from mlx_streamexperts._config import format_size
from mlx_streamexperts._io.checkpoint import Checkpoint, TensorEntry, read_checkpoint
from mlx_streamexperts._osinfo import resident_bytes
from mlx_streamexperts.convert import _command as convert
from mlx_streamexperts.convert import _shards as shards
from mlx_streamexperts.convert._rewrite import Options

_HOLE = 1 << 20
_PARTS = ("gate_proj", "up_proj", "down_proj")


def write_leaving_holes(fd: int, data: memoryview, offset: int) -> None:
    """As `shards.write_at`, into a file that was created at its full size."""
    for first in range(0, len(data), _HOLE):
        block = data[first : first + _HOLE]
        if np.frombuffer(block, np.uint8).any():
            os.pwrite(fd, block, offset + first)


def expected(source: Checkpoint, layer: int, expert: int, part: str) -> dict[str, mx.array]:
    """One projection of one expert, as it must come out before quantization."""

    def stored(ending: str, row: int | None = None) -> mx.array:
        ending = f".layers.{layer}.mlp.experts.{ending}"
        names = [n for n in source.tensors if n.endswith(ending) and not n.startswith("mtp")]
        return _read(source.tensors[names[0]], row)

    if any(".experts.gate_up_proj" in n for n in source.tensors):
        if part == "down_proj":
            return {"weight": stored("down_proj", expert)}
        both = stored("gate_up_proj", expert)  # [2 x rows, columns]
        return {"weight": both[: len(both) // 2] if part == "gate_proj" else both[len(both) // 2 :]}
    name = f"{expert}.{part}.weight"
    if any(n.endswith("weight_packed") for n in source.tensors):
        scales = stored(f"{name}_scale")
        packed = stored(f"{name}_packed").view(mx.uint32)
        return {"weight": packed, "scales": scales, "biases": scales * -8}
    blocks = stored(f"{name}_scale_inv")  # one scale for 128 x 128
    scales = mx.repeat(mx.repeat(blocks, 128, 0), 128, 1)
    weight = mx.from_fp8(stored(name), mx.float32)
    return {"weight": (weight * scales[: weight.shape[0], : weight.shape[1]]).astype(mx.bfloat16)}


def _read(entry: TensorEntry, row: int | None) -> mx.array:
    """A tensor, or one row of its first dimension, past the package's reader."""
    nbytes, offset, shape = entry.nbytes, entry.offset, entry.shape
    if row is not None:
        nbytes, shape = nbytes // shape[0], shape[1:]
        offset += row * nbytes
    with entry.file.open("rb") as f:
        f.seek(offset)
        data = mx.array(np.frombuffer(f.read(nbytes), np.uint8))
    kinds = {"BF16": mx.bfloat16, "F32": mx.float32, "I32": mx.int32, "U32": mx.uint32}
    return data.view(kinds.get(entry.dtype, mx.uint8)).reshape(shape)


def check_experts(folder: Path, out: Path) -> int:
    """Compare every filled expert; returns how many.

    Raises:
        CheckpointError: a byte differs.
    """
    source, result = read_checkpoint(folder), read_checkpoint(out)
    quantization = json.loads((out / "config.json").read_text()).get("quantization")
    experts = json.loads((folder / "filled.json").read_text())["experts"]
    for layer, expert in experts:
        for part in _PARTS:
            tables = expected(source, layer, expert, part)
            if quantization and "scales" not in tables:
                made = mx.quantize(
                    tables["weight"], quantization["group_size"], quantization["bits"]
                )
                tables = dict(zip(("weight", "scales", "biases"), made, strict=True))
            for kind, table in tables.items():
                ending = f".layers.{layer}.mlp.switch_mlp.{part}.{kind}"
                (name,) = (n for n in result.tensors if n.endswith(ending))
                got = _read(result.tensors[name], expert)
                same = got.dtype == table.dtype and mx.array_equal(got, table).item()
                if not same or not mx.any(got).item():
                    raise CheckpointError(f"{name}, expert {expert}: not what the original holds")
    return len(experts)


def examine(folder: Path, out: Path, options: Options) -> dict[str, Any]:
    """Everything that the report says."""
    before = resident_bytes()
    shards.write_at = write_leaving_holes
    convert._check_room = lambda *arguments: None  # type: ignore[assignment]
    start = time.perf_counter()
    nbytes = convert.convert(folder, out, options, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - start
    peak_mlx = mx.get_peak_memory()
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = read_checkpoint(folder)
    return {
        "form": json.loads((folder / "filled.json").read_text())["form"],
        "quantize": options.quantize,
        "source_bytes": source.nbytes,
        "result_bytes": nbytes,
        "disk_bytes": sum(f.stat().st_blocks * 512 for f in out.glob("*.safetensors")),
        "largest_tensor": max(t.nbytes for t in source.tensors.values()),
        "seconds": seconds,
        "rss_before": before,
        "peak_mlx": peak_mlx,
        "peak_rss": peak_rss * (1 if sys.platform == "darwin" else 1024),
        "experts_checked": check_experts(folder, out),
    }


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what write_original.py wrote")
    parser.add_argument("out", type=Path, help="the new model folder")
    parser.add_argument("-q", "--quantize", action="store_true", help="to 4 bits in groups of 64")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        r = examine(args.folder, args.out, Options(quantize=args.quantize))
    except StreamError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(r, indent=1) + "\n")
    how = ", quantized" if r["quantize"] else ""
    print(
        f"| {r['form']}{how} | {format_size(r['source_bytes'])} | "
        f"{format_size(r['largest_tensor'])} | {format_size(r['result_bytes'])} | "
        f"{r['seconds']:.0f} s | {format_size(r['peak_mlx'])} | {format_size(r['peak_rss'])} | "
        f"{r['experts_checked']} exact |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
