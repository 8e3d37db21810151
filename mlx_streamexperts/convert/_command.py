"""The command `convert`: _options.py says what it does."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import save_config

from .._cli.options import failed
from .._config import StreamConfig, format_size, parse_size
from .._errors import CheckpointError, StreamError
from .._io.checkpoint import (
    CONVERSION,
    INDEX,
    Checkpoint,
    TensorEntry,
    check_model_folder,
    file_identity,
    read_checkpoint,
    read_json_object,
)
from .._io.moved import refuse_moved
from .._io.output import check_not_written, exclusive, sync_folder, write_json
from .._loading.libraries import require_mlx_lm
from .._loading.load import resolve
from .._osinfo import free_disk_bytes
from .._progress import progress_bar
from ._options import setup_arg_parser
from ._rewrite import Options, Rewrite
from ._shards import Shard, ShardWriter, lay_out

_FORMAT = 1
# Other files of a model folder; mlx_lm.convert keeps them too, through the tokenizer.
_COPIED = ("*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.jsonl")
# Written here, or replaced by entries of the new config.json.
_NOT_COPIED = {"config.json", INDEX, CONVERSION, "hf_quant_config.json"}
# MLX keeps freed buffers for reuse; more than those of one step are useless.
_MLX_CACHE_BYTES = 64 << 20


def convert(
    source: Path,
    out: Path,
    options: Options | None = None,
    *,
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> int:
    """Convert the checkpoint in `source` into `out`; returns the bytes of its tensors.

    After an interruption, a second call keeps the whole shards.

    Args:
        source: folder of the original.
        out: folder of the result; created.
        options: quantization and element type; None for neither.
        shard_size: limit of a shard's size, unless one projection's experts alone exceed it.
        overwrite: discard another conversion's files in `out`.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: show a progress bar.

    Raises:
        CheckpointError: the source is damaged or incomplete.
        UnsupportedModelError: it cannot be converted in parts.
        StreamError: the disk is full, `out` holds other files, or another process writes there.
    """
    options = options or Options()
    shard_bytes = parse_size(shard_size)
    if out.exists() and (not out.is_dir() or (source.exists() and out.samefile(source))):
        raise StreamError(f"{out}: choose a new folder; the original is never changed")
    check_not_written(source, "converting it")
    check_model_folder(source)
    refuse_moved(source, "converting it")
    require_mlx_lm(
        source,
        StreamConfig(),
        "convert",
        "An MLX conversion (mlx-community) streams as it is. mlx_vlm.convert writes one, on a "
        "machine that holds the model",
    )
    checkpoint = read_checkpoint(source)
    _check_single_experts(checkpoint)
    state = _state(checkpoint, options, shard_bytes)
    with exclusive(out, "converting"), _bounded_mlx_cache():
        _check_folder(out, state, overwrite)
        rewrite = Rewrite(checkpoint, options, {"trust_remote_code": trust_remote_code})
        shards = lay_out(rewrite.pieces, shard_bytes)
        finished = {s.file for s in shards if not overwrite and _is_whole(out / s.file, s)}
        _check_room(out, sum(s.nbytes for s in shards if s.file not in finished), finished)
        if overwrite:
            _discard(out)
        with _writing(out):
            write_json(out / CONVERSION, state)
        _write_shards(rewrite, shards, finished, out, progress)
        with _writing(out):
            _write_rest(source, out, rewrite, shards)
    return sum(p.nbytes for p in rewrite.pieces)


def _write_shards(
    rewrite: Rewrite, shards: list[Shard], finished: set[str], out: Path, progress: bool
) -> None:
    """Compute and write all shards that are not `finished`."""
    total = sum(p.nbytes for p in rewrite.pieces)
    with progress_bar("Converting", progress, total) as bar:
        for shard in shards:
            if shard.file in finished:
                bar.update(sum(p.nbytes for p in shard.pieces))
                continue
            with _writing(out / shard.file):
                for nbytes in _write_shard(rewrite, shard, out):
                    bar.update(nbytes)


def _write_shard(rewrite: Rewrite, shard: Shard, folder: Path) -> Iterator[int]:
    """Compute and write a shard, expert by expert where it holds experts; yields bytes done."""
    writer = ShardWriter(folder, shard)
    try:
        for switch, run in itertools.groupby(shard.pieces, rewrite.switch_of):
            pieces = list(run)
            if switch is None:
                for piece in pieces:
                    yield writer.write(piece.name, rewrite.trunk(piece.name))
                continue
            # All projections of a layer at once, so that tables they share are read once.
            for first, end in rewrite.steps(pieces):
                rows = rewrite.rows(pieces, first, end)
                yield sum(writer.write(name, array, first) for name, array in rows.items())
        writer.finish()
    finally:
        writer.close()


def _write_rest(source: Path, out: Path, rewrite: Rewrite, shards: list[Shard]) -> None:
    """Write tokenizer and other small files, the index, and last config.json."""
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, out / file.name)  # not its mode: it may be read-only
    names = {name: s.file for s in shards for piece in s.pieces for name in piece.tensors}
    total = sum(p.nbytes for p in rewrite.pieces)
    metadata = {"total_size": total, "total_parameters": rewrite.parameters}
    write_json(out / INDEX, {"metadata": metadata, "weight_map": dict(sorted(names.items()))})
    partial = out / "config.json.partial"
    save_config(dict(rewrite.config), partial, keep_vision_config=rewrite.keep_vision_config)
    with partial.open("rb") as f:
        os.fsync(f.fileno())
    partial.replace(out / "config.json")
    sync_folder(out)


_EXPERT = re.compile(r"^(.*\.experts\.)(\d+)(\..+)$")


def _check_single_experts(checkpoint: Checkpoint) -> None:
    """If experts are stored one by one, check that each is present and of the same shape."""
    families: dict[tuple[str, str], dict[int, TensorEntry]] = {}
    for name, entry in checkpoint.tensors.items():
        if match := _EXPERT.match(name):
            families.setdefault((match[1], match[3]), {})[int(match[2])] = entry
    counts: dict[str, int] = {}
    for (prefix, _), members in families.items():
        counts[prefix] = max(counts.get(prefix, 0), max(members) + 1)
    for (prefix, suffix), members in families.items():
        first = members[min(members)]
        for expert in range(counts[prefix]):
            if expert not in members:
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor {prefix}{expert}{suffix} is missing (expert "
                    f"{expert} of {prefix.removesuffix('.experts.')}), while {first.name} is in "
                    f"{first.file}: complete the checkpoint or download it again"
                )
            entry = members[expert]
            if entry.shape != first.shape:
                raise CheckpointError(
                    f"{entry.file}: tensor {entry.name} (expert {expert} of "
                    f"{prefix.removesuffix('.experts.')}) is {entry.dtype} {list(entry.shape)}, "
                    f"but {first.name} in {first.file} is {first.dtype} {list(first.shape)}: "
                    "download the shard again"
                )


def _state(checkpoint: Checkpoint, options: Options, shard_bytes: int) -> dict[str, Any]:
    """All inputs that determine the bytes of the result."""
    files: dict[str, Any] = {}
    for file in sorted({t.file for t in checkpoint.tensors.values()}):
        # Two fine-tunes of one model have equal headers and sizes; times and samples differ.
        files[file.name] = {**file_identity(file), "mtime_ns": file.stat().st_mtime_ns}
    config = (checkpoint.folder / "config.json").read_bytes()
    return {
        "format": _FORMAT,
        "source": str(checkpoint.folder.resolve()),
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "files": files,
        "options": {**asdict(options), "shard_bytes": shard_bytes},
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
    }


def _check_folder(out: Path, state: dict[str, Any], overwrite: bool) -> None:
    """Refuse to mix two conversions, or to overwrite a model that no conversion wrote."""
    file = out / CONVERSION
    if not file.is_file():
        if foreign := sorted([*out.glob("model*.safetensors"), *out.glob("config.json")]):
            raise StreamError(
                f"{out}: holds {foreign[0].name}, which no conversion wrote; choose a new folder"
            )
        return
    if overwrite:
        return
    known = read_json_object(file, "a conversion's state")
    # The source may have been moved.
    changed = [k for k in state if k != "source" and known.get(k) != state[k]]
    if changed:
        raise StreamError(
            f"{file}: this folder holds a conversion of {known.get('source')} with other "
            f"{' and '.join(changed)} ({_difference(known.get(changed[0]), state[changed[0]])}). "
            "Remove the folder, choose another, or use --overwrite to discard its files."
        )


def _difference(theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        key = next(k for k in [*mine, *theirs] if theirs.get(k) != mine.get(k))
        return f"{key}: {_difference(theirs.get(key), mine.get(key))}"
    return f"then {theirs}, now {mine}"


def _is_whole(file: Path, shard: Shard) -> bool:
    """Did an earlier run finish this shard? Unfinished ones have another name."""
    if not file.is_file() or file.stat().st_size != shard.nbytes:
        return False
    with file.open("rb") as f:
        return f.read(len(shard.header)) == shard.header


def _check_room(out: Path, needed: int, finished: set[str]) -> None:
    existing = next(p for p in [out, *out.resolve().parents] if p.exists())
    # Unfinished shards of an earlier run, and files to be discarded, make room.
    replaced = (f for f in out.glob("model*.safetensors*") if f.name not in finished | {INDEX})
    left = sum(f.stat().st_blocks * 512 for f in replaced)
    if needed > (free := free_disk_bytes(existing) + left):
        raise StreamError(
            f"{out}: converting needs {format_size(needed)} more and {format_size(free)} are free; "
            "nothing was written"
        )


def _discard(out: Path) -> None:
    """Remove files that a conversion writes, and no others."""
    for pattern in ("config.json", INDEX, CONVERSION, "model*.safetensors", "*.partial"):
        for file in out.glob(pattern):
            file.unlink()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise the file system's errors as `StreamError`."""
    try:
        yield
    except OSError as e:
        raise StreamError(
            f"{e.filename or path}: cannot be written: {e.strerror}. Run the same command again to "
            "continue."
        ) from e


@contextmanager
def _bounded_mlx_cache() -> Iterator[None]:
    before = mx.set_cache_limit(_MLX_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.quant_predicate is not None and (not args.quantize or args.q_mode != "affine"):
        parser.error("--quant-predicate needs --quantize and --q-mode affine")
    options = Options(
        args.quantize, args.q_bits, args.q_group_size, args.q_mode, args.quant_predicate, args.dtype
    )
    try:
        total = convert(
            resolve(args.model),
            args.out,
            options,
            shard_size=args.shard_size,
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
            progress=args.progress,
        )
    except StreamError as e:
        return failed(e)
    print(
        f"Converted into {args.out}: {format_size(total)}. It loads with mlx_lm.load, and streams "
        f"with python -m mlx_streamexperts.generate --model {args.out}"
    )
    return 0
