"""Write stand-ins of large models at full size, as sparse files.

A stand-in has the true configuration, tensor names, shapes and element types, and for
Qwen3.5-397B the published place of every expert tensor; mlx-lm or mlx-vlm loads it unmodified. The
trunk is random numbers, so that routing varies; experts and n-gram tables are holes that read as
zeros, but for a few experts that are filled, so that their values can be checked. It takes as much
disk as the trunk does.

    python examples/fullsize/write.py kimi-k2.5 FOLDER
    python examples/fullsize/write.py deepseek-v4-flash FOLDER
    python examples/fullsize/write.py qwen3.5-397b FOLDER --trunk holes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import vlm
from layout import HERE, Place, describe, header_text, layer_of, require, shard_layout, shard_sizes
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from tqdm import tqdm

from mlx_streamexperts import StreamError, demo_model

MODELS = ("kimi-k2.5", "qwen3.5-397b")
KIMI_PARAMETERS = 1_026_408_232_448  # as mlx_lm.utils.get_total_parameters counts
KIMI_SHARDS = 91
TABLES = ".ngram_embedding."  # in the names of tables that are looked up by token

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_CHUNK_ITEMS = 32 << 20  # random numbers made at a time: 128 MB


def build(name: str, layers: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The quantized model as its library makes it, nothing evaluated, and its configuration.

    Args:
        name: one of `MODELS` or `vlm.MODELS`.
        layers: cut down to so many layers; default: all.

    Raises:
        StreamError: too few layers to have experts, mlx-lm builds another model than Kimi K2.5, or
            mlx-vlm is needed and not installed.
    """
    config = json.loads((HERE / f"{name}.config.json").read_text())
    quantization = config.pop("quantization")
    if layers is not None:
        text = config.get("text_config", config)
        least = max(text.get("first_k_dense_replace", 0) + 1, *text.get("ple_layer_ids", [0]))
        if layers < least:
            raise StreamError(f"layers={layers}: {name} has experts from {least} layers on")
        text["num_hidden_layers"] = layers
    if name in vlm.MODELS:
        return vlm.build(config, quantization)
    model_class, arguments = mlx_lm.utils._get_classes(config)
    model = model_class(arguments.from_dict(config))
    keep = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(mx.bfloat16) if floating and keep(path) else array

    model.update(tree_map_with_path(cast, model.parameters()))
    model, config = mlx_lm.utils.quantize_model(model, config, **quantization)
    if name == "kimi-k2.5" and layers is None:
        count = mlx_lm.utils.get_total_parameters(model)
        require(count == KIMI_PARAMETERS, f"{count:,} parameters, not {KIMI_PARAMETERS:,}")
    return model, config


def write(
    name: str, folder: Path, *, trunk: bool = True, layers: int | None = None, seed: int = 0
) -> None:
    """Write a stand-in.

    Args:
        name: one of `MODELS` or `vlm.MODELS`.
        folder: where to; created.
        trunk: fill the trunk with random numbers (else it is holes, and computes zeros).
        layers: cut down to so many layers.
        seed: of the random numbers.

    Raises:
        StreamError: the disk has no room for the trunk, or `folder` holds a checkpoint already.
    """
    model, config = build(name, layers)
    tensors = dict(tree_flatten(model.parameters()))
    places, headers = shard_layout(name, tensors)
    experts = {p for p, m in model.named_modules() if _is_switch(m)}
    holes = experts | {p for p, _ in model.named_modules() if TABLES in p}
    needed = sum(a.nbytes for n, a in tensors.items() if n.rsplit(".", 1)[0] not in holes)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("model*.safetensors")):  # shards of another layout would be loaded with ours
        raise StreamError(f"{folder} holds a checkpoint already: remove it or choose another")
    if trunk and shutil.disk_usage(folder).free < needed + (1 << 30):
        raise StreamError(f"{folder}: the trunk takes {needed:,} bytes, which are not free there")

    mx.random.seed(seed)
    files: dict[str, int] = {}
    try:
        _open_files(files, folder, tensors, places, headers)
        if trunk:
            with tqdm(total=needed, unit="B", unit_scale=True, desc="Writing the trunk") as bar:
                for tensor, first, data in _trunk(model, holes):
                    _put(files, places[tensor], first, data)
                    bar.update(data.nbytes)
        filled = _fill_experts(model, experts, files, places)
        for fd in files.values():
            os.fsync(fd)
    except BaseException:
        for partial in folder.glob("model*.safetensors.partial"):  # a killed run's too
            partial.unlink()
        raise
    finally:
        for fd in files.values():
            os.close(fd)
    for file in files:
        (folder / f"{file}.partial").replace(folder / file)
    for file in demo_model().glob("token*"):
        shutil.copy(file, folder)
    (folder / "filled.json").write_text(json.dumps(filled, indent=1) + "\n")
    index = {"metadata": {}, "weight_map": {n: p.file for n, p in sorted(places.items())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")  # last: complete


def _is_switch(module: nn.Module) -> bool:
    """mlx-vlm has a class of its own."""
    return any(k.__name__ == QuantizedSwitchLinear.__name__ for k in type(module).__mro__)


def _open_files(
    files: dict[str, int],
    folder: Path,
    tensors: dict[str, mx.array],
    places: dict[str, Place],
    headers: dict[str, int],
) -> None:
    """Create every file at its full size with its header; puts descriptors by name into `files`."""
    for file, start in headers.items():
        inside = [n for n, p in places.items() if p.file == file]
        inside.sort(key=lambda n: places[n].offset)
        entries = [describe(n, tensors[n], places[n].offset - start) for n in inside]
        text = header_text(entries).encode()
        require(len(text) <= start - 8, f"{file}: its header does not fit before its data")
        fd = os.open(folder / f"{file}.partial", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        files[file] = fd
        # The format allows blanks at a header's end.
        os.pwrite(fd, (start - 8).to_bytes(8, "little") + text.ljust(start - 8), 0)
        os.truncate(fd, max(places[n].offset + tensors[n].nbytes for n in inside))


# --- contents --------------------------------------------------------------


def _put(files: dict[str, int], place: Place, first: int, data: np.ndarray) -> None:
    """Write bytes at `first` within a tensor."""
    view, offset = memoryview(data).cast("B"), place.offset + first
    while view:
        count = os.pwrite(files[place.file], view, offset)
        view, offset = view[count:], offset + count


def _bytes(array: mx.array) -> np.ndarray:
    return np.ascontiguousarray(np.array(array.view(_UNSIGNED[array.dtype.size]))).reshape(-1)


def _matrix(rows: int, columns: int) -> mx.array:
    return mx.random.normal((rows, columns)) * columns**-0.5


def _trunk(model: nn.Module, holes: set[str]) -> Iterator[tuple[str, int, np.ndarray]]:
    """Random contents of the trunk, a piece at a time: tensor name, first byte, bytes.

    Args:
        model: the model.
        holes: paths of modules that stay empty.
    """
    for path, module in model.named_modules():
        if path in holes:
            continue
        own = {k: v for k, v in module.items() if isinstance(v, mx.array) and k[0] != "_"}
        quantized = "scales" in own
        for key, array in own.items():
            name = f"{path}.{key}" if path else key
            if quantized and key in ("weight", "scales", "biases"):
                continue
            if array.ndim < 2 or key.startswith(("A_log", "dt_bias")):
                if "correction_bias" in key:
                    array = (0.01 * mx.random.normal(array.shape)).astype(array.dtype)
                yield name, 0, _bytes(array)  # norms and the like: as initialised
                continue
            if key == "tid2eid":
                yield name, 0, _bytes(_expert_ids(*array.shape, module.num_experts))
                continue
            rows, columns = array.shape[0], math.prod(array.shape[1:])
            step = max(1, _CHUNK_ITEMS // columns)
            for first in range(0, rows, step):
                part = _matrix(min(step, rows - first), columns).astype(array.dtype)
                yield name, first * columns * array.dtype.size, _bytes(part)
        if quantized:
            yield from _quantized(path, module)


def _quantized(path: str, module: nn.Module) -> Iterator[tuple[str, int, np.ndarray]]:
    """A quantized layer of random numbers, a few rows at a time."""
    shape, columns = module.weight.shape, module.weight.shape[-1] * 32 // module.bits
    rows = math.prod(shape[:-1])  # attention's absorbed projections have a head dimension
    step = max(1, _CHUNK_ITEMS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        for key, data in _random_quantized(module, count, columns).items():
            yield f"{path}.{key}", first * (data.nbytes // count), data


def _expert_ids(tokens: int, top_k: int, experts: int) -> mx.array:
    """Each token's experts where they are looked up, none twice: [tokens, top_k] int32."""
    return (mx.random.randint(0, experts, (tokens, 1)) + 7 * mx.arange(top_k)) % experts


def _random_quantized(module: nn.Module, rows: int, columns: int) -> dict[str, np.ndarray]:
    """The tensors of rows of random codes, with variance about 1/columns.

    Random codes at once: making normal numbers and quantizing them took minutes.
    """
    seed = int(mx.random.randint(0, 1 << 30).item())
    top = 2**module.bits - 1
    codes = np.random.default_rng(seed).bytes(rows * columns * module.bits // 8)
    if module.mode != "affine":  # floats of 4 or 8 bits, and a power of two for each group
        weight, spread = np.frombuffer(codes, np.uint8), 2.9
        if module.bits == 8:
            weight, spread = weight & 0xBF, 0.62  # below 2: no infinity, no NaN
        exponent = 127 - round(math.log2(columns**0.5 * spread))
        scales = np.full(rows * columns // module.group_size, exponent, np.uint8)
        return {"weight": weight, "scales": scales}
    step = 12**0.5 / (top + 1) * columns**-0.5
    uneven = mx.random.uniform(0.7, 1.3, (rows, columns // module.group_size))
    scales = (step * uneven).astype(mx.bfloat16)
    biases = (scales * (-top / 2)).astype(mx.bfloat16)
    return {
        "weight": np.frombuffer(codes, np.uint8),
        "scales": _bytes(scales),
        "biases": _bytes(biases),
    }


def _fill_experts(
    model: nn.Module, experts: set[str], files: dict[str, int], places: dict[str, Place]
) -> list[dict[str, Any]]:
    """Fill the first and last expert of the first and last expert layer; returns what is where."""
    modules = {p: m for p, m in model.named_modules() if p in experts}
    switches = sorted({p.rsplit(".", 1)[0] for p in modules}, key=lambda p: int(layer_of(p) or 0))
    filled = []
    for switch in dict.fromkeys((switches[0], switches[-1])):  # once where there is one layer
        for path, module in sorted(modules.items()):
            if path.rsplit(".", 1)[0] != switch:
                continue
            count, rows, packed = module.weight.shape
            for expert in (0, count - 1):
                columns = packed * 32 // module.bits
                for key, data in _random_quantized(module, rows, columns).items():
                    name = f"{path}.{key}"
                    _put(files, places[name], expert * data.nbytes, data)
                    digest = hashlib.sha256(data.tobytes()).hexdigest()
                    filled.append({"tensor": name, "expert": expert, "sha256": digest})
    return filled


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=(*MODELS, *vlm.MODELS))
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument(
        "--trunk",
        choices=("random", "holes"),
        default="random",
        help="holes take no disk and compute zeros: for checks of headers and plans",
    )
    parser.add_argument("--layers", type=int, help="cut down to the first so many layers")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    random = args.trunk == "random"
    try:
        write(args.model, args.folder, trunk=random, layers=args.layers, seed=args.seed)
    except (StreamError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(shard_sizes(args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
