"""Every tensor's bytes are where `read_checkpoint` says, and any damage is a `CheckpointError`.

The tests write files byte by byte, so that each fault is the only one in its file.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mlx_streamexperts._errors import CheckpointError
from mlx_streamexperts._io.checkpoint import (
    ExpertTable,
    TensorEntry,
    read_checkpoint,
    read_header,
    whereabouts,
)


def test_a_checkpoint_by_example(tmp_path: Path) -> None:
    experts = np.arange(12, dtype=np.uint8).reshape(3, 4)  # [experts, bytes of one]
    save_file({"layers.0.w": experts}, tmp_path / "model.safetensors")
    entry = read_checkpoint(tmp_path).tensors["layers.0.w"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("U8", (3, 4), 12)
    table = ExpertTable.stacked(entry)  # where each expert's part is
    with open(table.files[2], "rb") as file:
        file.seek(table.offsets[2])
        assert file.read(table.row_bytes) == bytes([8, 9, 10, 11])
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_checkpoint(tmp_path / "elsewhere")


INDEX = "model.safetensors.index.json"
ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "F64": 8, "C64": 8},
}


def write_shard(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file; `header` is JSON-encoded unless it is bytes already."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def spec(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    """The description of one tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bits(array: mx.array) -> bytes:
    """An array's bytes, whatever its element type."""
    return np.array(array.view(mx.uint8) if array.ndim else array[None].view(mx.uint8)).tobytes()


def stored(entry: TensorEntry) -> bytes:
    """The bytes that an entry points to."""
    return entry.file.read_bytes()[entry.offset : entry.offset + entry.nbytes]


def stored_row(entry: TensorEntry, expert: int) -> bytes:
    """The bytes of one expert."""
    table = ExpertTable.stacked(entry)
    start = table.offsets[expert]
    return Path(table.files[expert]).read_bytes()[start : start + table.row_bytes]


def assert_refused(read: Callable[[], object], *named: object) -> None:
    """Expect exactly a `CheckpointError` that names these things."""
    with pytest.raises(CheckpointError) as e:
        read()
    assert type(e.value) is CheckpointError
    for name in named:
        assert str(name) in str(e.value)


# Where the bytes are.


@pytest.mark.parametrize(
    "dtype", [mx.uint32, mx.bfloat16, mx.float16, mx.float32, mx.uint8, mx.int8, mx.bool_]
)
def test_rows_are_the_bytes_that_mlx_saved(dtype: mx.Dtype, tmp_path: Path) -> None:
    table = (mx.random.uniform(0, 100, (5, 6, 8))).astype(dtype)
    other = mx.arange(7)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a.b": other, "experts.w": table})
    checkpoint = read_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a.b", "experts.w"}
    entry = checkpoint.tensors["experts.w"]
    assert (entry.shape, entry.nbytes) == ((5, 6, 8), table.nbytes)
    for expert in range(5):
        assert stored_row(entry, expert) == bits(table[expert])
    assert stored(checkpoint.tensors["a.b"]) == bits(other)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_layers_tensors_may_lie_in_different_shards(with_index: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tables = {
        f"layers.{layer}.{part}": rng.integers(0, 255, (4, 3, 5)).astype(kind)
        for layer in range(3)
        for part, kind in (("weight", np.uint32), ("scales", np.float16), ("biases", np.float32))
    }
    shards: dict[str, dict[str, np.ndarray]] = {}
    for i, (name, table) in enumerate(tables.items()):
        shards.setdefault(f"model-0000{i % 4}-of-00004.safetensors", {})[name] = table
    for shard, content in shards.items():
        save_file(content, tmp_path / shard)
    if with_index:
        write_index(tmp_path, {name: shard for shard, c in shards.items() for name in c})
    checkpoint = read_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tables)
    assert checkpoint.nbytes == sum(t.nbytes for t in tables.values())
    assert len({t.file for n, t in checkpoint.tensors.items() if "layers.0." in n}) == 3
    for name, table in tables.items():
        assert name in shards[checkpoint.tensors[name].file.name]
        for expert in range(4):
            assert stored_row(checkpoint.tensors[name], expert) == table[expert].tobytes()


def test_offsets_are_absolute_and_count_the_padded_header(tmp_path: Path) -> None:
    raw = json.dumps({"b": spec("U16", [2, 3], 4, 16), "a": spec("U8", [4], 0, 4)}).encode()
    raw += b" " * 13  # writers pad with spaces, not always to a multiple of 8
    file = write_shard(tmp_path / "model.safetensors", raw, bytes(range(16)))
    a, b = sorted(read_header(file), key=lambda t: t.name)
    start = 8 + len(raw)
    assert (a.offset, a.nbytes, b.offset, b.nbytes) == (start, 4, start + 4, 12)
    table = ExpertTable.stacked(b)
    assert (table.row_bytes, table.offsets) == (6, (start + 4, start + 10))
    assert stored_row(b, 1) == bytes(range(10, 16))


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "mlx"}, "a": spec("U8", [1], 0, 1)}
    file = write_shard(tmp_path / "model.safetensors", header, b"x")
    assert [t.name for t in read_header(file)] == ["a"]


def test_zero_size_tensors_and_scalars_are_fine(tmp_path: Path) -> None:
    header = {
        "empty_first": spec("F32", [0, 4], 0, 0),
        "a": spec("U8", [4], 0, 4),
        "empty_between": spec("F32", [3, 0], 4, 4),
        "scalar": spec("BF16", [], 4, 6),
        "empty_last": spec("F32", [0], 6, 6),
    }
    file = write_shard(tmp_path / "model.safetensors", header, b"123456")
    sizes = {t.name: t.nbytes for t in read_header(file)}
    assert sizes == {"empty_first": 0, "a": 4, "empty_between": 0, "scalar": 2, "empty_last": 0}


def test_a_file_without_tensors_is_fine(tmp_path: Path) -> None:
    assert read_header(write_shard(tmp_path / "model.safetensors", {})) == []


def test_only_the_files_that_mlx_lm_loads_are_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": spec("U8", [1], 0, 1)}, b"x")
    write_shard(tmp_path / "adapters.safetensors", {"a": spec("U8", [1], 0, 1)}, b"y")
    (tmp_path / "consolidated.safetensors").write_bytes(b"damaged")
    entry = read_checkpoint(tmp_path).tensors["a"]
    assert entry.file == tmp_path / "model.safetensors"


def test_shards_may_be_symbolic_links(tmp_path: Path) -> None:
    """The Hub's cache consists of links: snapshots/<commit>/<name> -> ../../blobs/<hash>."""
    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    weight_map = {}
    for i in range(2):
        save_file({f"t{i}": np.full((2, 3), i, np.uint16)}, blobs / f"hash{i}")
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        (snapshot / shard).symlink_to(Path("..", "..", "blobs", f"hash{i}"))
        weight_map[f"t{i}"] = shard
    write_index(blobs, weight_map)
    (snapshot / INDEX).symlink_to(blobs / INDEX)
    checkpoint = read_checkpoint(snapshot)
    for i in range(2):
        assert stored(checkpoint.tensors[f"t{i}"]) == np.full((2, 3), i, np.uint16).tobytes()


def test_a_link_to_a_blob_that_is_gone_names_the_shard(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert_refused(lambda: read_checkpoint(tmp_path), "model.safetensors", "No such file")


# Files that are no safetensors files.


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated"),
        (b"\x02\0\0", "truncated"),
        (b"\xff" * 8, "truncated"),  # claims 2**64 - 1 bytes
        ((100).to_bytes(8, "little") + b"{}", "100 bytes"),
        ((2).to_bytes(8, "little") + b"{", "truncated"),
        ((0).to_bytes(8, "little"), "JSON"),
        ((4).to_bytes(8, "little") + b"nope", "JSON"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\xfa\xf0", "JSON"),  # no text either
        ((9).to_bytes(8, "little") + b'{"a": {},', "JSON"),
        ((2).to_bytes(8, "little") + b"[]", "object"),
        ((4).to_bytes(8, "little") + b"null", "object"),
        ((2).to_bytes(8, "little") + b"17", "object"),
    ],
)
def test_a_file_that_is_no_safetensors_file(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert_refused(lambda: read_header(file), file, says)
    assert_refused(lambda: read_checkpoint(tmp_path), file, says)


def test_a_header_above_the_formats_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(file, 200_000_000)  # sparse: takes no space
    assert_refused(lambda: read_header(file), file, "100000001", "limit")


@pytest.mark.parametrize("nest", [b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"[" * 5000])
def test_deep_nesting_is_not_followed(nest: bytes, tmp_path: Path) -> None:
    file = write_shard(tmp_path / "model.safetensors", nest)
    assert_refused(lambda: read_header(file), file, "JSON")


def test_a_folder_named_like_a_shard(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert_refused(lambda: read_checkpoint(tmp_path), tmp_path / "model.safetensors")


# Tensors that cannot be as described. The file holds 16 bytes of data.

BAD_TENSORS = {
    "no object": [1],
    "a string": "U8",
    "null": None,
    "empty": {},
    "no shape": {"dtype": "U8", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "U8", "shape": [4]},
    "unknown dtype": spec("Q4_K", [4], 0, 4),
    "dtype in lower case": spec("u8", [4], 0, 4),
    "dtype null": spec(None, [4], 0, 4),
    "dtype a number": spec(3, [4], 0, 4),
    "dtype a list": spec(["U8"], [4], 0, 4),
    "dtype an object": spec({"U8": 1}, [4], 0, 4),
    "shape a number": spec("U8", 4, 0, 4),
    "shape a string": spec("U8", "4", 0, 4),
    "shape an object": spec("U8", {"0": 4}, 0, 4),
    "size negative": spec("U8", [-4], 0, 4),
    "sizes negative twice": spec("U8", [-2, -2], 0, 4),
    "size a bool": spec("U8", [True, 4], 0, 4),
    "size a float": spec("U8", [4.0], 0, 4),
    "size a string": spec("U8", ["4"], 0, 4),
    "size null": spec("U8", [None], 0, 4),
    "size infinite": spec("U8", [math.inf], 0, 4),
    "size huge": spec("U8", [10**30], 0, 4),
    "size with too many digits to print": spec("U8", [10**4000, 10**4000], 0, 4),
    "product with too many digits to print": spec("U8", [10**18] * 400, 0, 4),
    "offsets a number": {"dtype": "U8", "shape": [4], "data_offsets": 4},
    "offsets null": {"dtype": "U8", "shape": [4], "data_offsets": None},
    "one offset": {"dtype": "U8", "shape": [4], "data_offsets": [4]},
    "three offsets": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 8]},
    "offsets bools": spec("U8", [1], False, True),
    "offsets floats": spec("U8", [4], 0.0, 4.0),
    "offsets strings": spec("U8", [4], "0", "4"),
    "offsets backwards": spec("U8", [4], 4, 0),
    "offsets negative": spec("U8", [4], -4, 0),
    "offsets into the header": spec("U8", [4], -2, 2),
    "too few bytes": spec("U32", [4], 0, 12),
    "too many bytes": spec("U32", [2], 0, 12),
    "bytes for an empty shape": spec("U8", [0, 4], 0, 4),
    "no bytes for a scalar": spec("U8", [], 0, 0),
    "beyond the file": spec("U8", [4], 16, 20),
    "partly beyond the file": spec("U8", [4], 13, 17),
    "empty, beyond the file": spec("U8", [0], 17, 17),
    "far beyond the file": spec("U8", [4], 2**63, 2**63 + 4),
    "offset of 4300 digits": spec("U8", [0], 10**4299 * 9, 10**4299 * 9),
    "end with too many digits to print": spec("U8", [0], 10**4300 - 1, 10**4300 - 1),
}


@pytest.mark.parametrize("description", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_a_tensor_that_cannot_be_is_named(description: object, tmp_path: Path) -> None:
    header = {"model.good": spec("U8", [2], 0, 2), "model.bad": description}
    file = write_shard(tmp_path / "model.safetensors", header, bytes(16))
    assert_refused(lambda: read_header(file), file, "model.bad")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((0, 4), (0, 4)),
        ((0, 4), (3, 7)),
        ((2, 6), (0, 3)),
        ((0, 16), (5, 6)),
        ((0, 8), (4, 4)),  # an empty tensor inside another
    ],
)
def test_overlapping_tensors_are_both_named(
    a: tuple[int, int], b: tuple[int, int], tmp_path: Path
) -> None:
    header = {n: spec("U8", [e - s], s, e) for n, (s, e) in {"t.a": a, "t.b": b}.items()}
    file = write_shard(tmp_path / "model.safetensors", header, bytes(16))
    assert_refused(lambda: read_header(file), file, "t.a", "t.b", "overlap")


@pytest.mark.parametrize("keep", [1, 100, 0.5, -1])
def test_a_truncated_shard_is_named(keep: float, tmp_path: Path) -> None:
    file = tmp_path / "model-00001-of-00001.safetensors"
    save_file({"w": np.zeros((8, 64), np.uint32)}, file)
    size = file.stat().st_size
    os.truncate(file, int(size * keep) if isinstance(keep, float) else keep % size)
    assert_refused(lambda: read_checkpoint(tmp_path), file, "truncated")


def test_a_shard_truncated_in_its_data_names_the_tensor(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((8, 64), np.uint32)}, file)
    os.truncate(file, file.stat().st_size - 1)
    assert_refused(lambda: read_header(file), file, "tensor w", "truncated")


# Folders whose files do not belong together.


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    """A sound checkpoint of two shards with one tensor each, and an index."""
    weight_map = {}
    for i in (1, 2):
        shard = f"model-0000{i}-of-00002.safetensors"
        write_shard(tmp_path / shard, {f"t{i}": spec("U8", [4], 0, 4)}, bytes([i] * 4))
        weight_map[f"t{i}"] = shard
    write_index(tmp_path, weight_map)
    assert set(read_checkpoint(tmp_path).tensors) == {"t1", "t2"}
    return tmp_path


def test_missing_shard(two_shards: Path) -> None:
    """Only the load can tell if the model needs it, and then says what the index knows."""
    missing = two_shards / "model-00002-of-00002.safetensors"
    missing.unlink()
    found = read_checkpoint(two_shards)
    assert (set(found.tensors), found.absent) == ({"t1"}, {"t2": missing.name})
    assert f"{missing} is missing (1 of 2 shards" in whereabouts(found)


def test_all_shards_missing(two_shards: Path) -> None:
    for shard in two_shards.glob("*.safetensors"):
        shard.unlink()
    assert_refused(lambda: read_checkpoint(two_shards), two_shards, "2 of 2")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\xfa",
        b"[" * 200_000,
        b"[]",
        b"null",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b'{"weight_map": "model.safetensors"}',
    ],
)
def test_an_index_that_is_none(content: bytes, two_shards: Path) -> None:
    (two_shards / INDEX).write_bytes(content)
    assert_all_there(two_shards)


def test_an_index_that_is_a_folder(two_shards: Path) -> None:
    (two_shards / INDEX).unlink()
    (two_shards / INDEX).mkdir()
    assert_all_there(two_shards)


def assert_all_there(two_shards: Path) -> None:
    found = read_checkpoint(two_shards)
    assert (set(found.tensors), found.absent, whereabouts(found)) == ({"t1", "t2"}, {}, "")


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "../model.safetensors",
        "../../model.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        "model.safetensors/",
        "",
        ".",
        "..",
        None,
        7,
        ["model-00001-of-00002.safetensors"],
        {"file": "model-00001-of-00002.safetensors"},
    ],
)
def test_an_index_may_not_point_outside_the_folder(shard: object, two_shards: Path) -> None:
    """Even if there is a good file."""
    source = two_shards / "model-00001-of-00002.safetensors"
    (two_shards / "sub").mkdir()
    for target in (two_shards / "sub", two_shards.parent):
        (target / "model.safetensors").write_bytes(source.read_bytes())
    write_index(two_shards, {"t1": source.name, "t.outside": shard})
    assert_all_there(two_shards)


@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors\0", "\ud800", "x" * 5000])
def test_an_index_with_a_name_that_no_file_can_have(shard: str, two_shards: Path) -> None:
    write_index(two_shards, {"t1": shard, "t3": shard})
    assert_all_there(two_shards)


def test_a_tensor_that_the_index_promises_but_no_shard_has(two_shards: Path) -> None:
    shards = {f"t{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    write_index(two_shards, {**shards, "t3": shards["t1"]})
    said = whereabouts(read_checkpoint(two_shards))
    assert f"tensor t3 should be in {two_shards / shards['t1']}" in said
    assert "missing" not in said  # the file is there


def test_a_tensor_in_a_file_that_mlx_lm_does_not_read(two_shards: Path) -> None:
    write_shard(two_shards / "mtp.safetensors", {"t3": spec("U8", [1], 0, 1)}, b"x")
    write_index(two_shards, {"t3": "mtp.safetensors"})
    said = whereabouts(read_checkpoint(two_shards))
    assert "missing" not in said
    assert "mlx-lm reads model*.safetensors only" in said


def test_a_tensor_in_two_shards(two_shards: Path) -> None:
    stray = write_shard(two_shards / "model.safetensors", {"t2": spec("U8", [1], 0, 1)}, b"x")
    assert_refused(
        lambda: read_checkpoint(two_shards),
        stray,
        two_shards / "model-00002-of-00002.safetensors",
        "tensor t2",
    )


def test_one_damaged_shard_of_several(two_shards: Path) -> None:
    bad = write_shard(two_shards / "model-00002-of-00002.safetensors", {"t2": 5})
    assert_refused(lambda: read_checkpoint(two_shards), bad, "tensor t2")


def test_no_shard_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert_refused(lambda: read_checkpoint(tmp_path), tmp_path, "no model*.safetensors")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(lambda: read_checkpoint(tmp_path / "gone"), tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    assert_refused(lambda: read_checkpoint(tmp_path / "file"), tmp_path / "file")


# Arbitrary damage: entries that hold what they promise, or a CheckpointError.

VALID: dict[str, Any] = {
    "__metadata__": {"format": "mlx"},
    "w": spec("U32", [3, 2, 2], 0, 48),
    "scales": spec("BF16", [3, 4], 48, 72),
    "bias": spec("F32", [3], 72, 84),
    "none": spec("U8", [0, 3], 84, 84),
}
DATA = random.Random(1).randbytes(84)


def assert_sound_or_refused(file: Path) -> None:
    """The file's entries are in bounds, disjoint and of the right size, or it is refused."""
    try:
        entries = read_header(file)
    except CheckpointError as e:
        assert str(file) in str(e)
        return
    size = file.stat().st_size
    data_start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    taken: set[int] = set()
    for t in entries:
        assert t.nbytes == math.prod(t.shape) * ITEM_BYTES[t.dtype]
        assert data_start <= t.offset <= t.offset + t.nbytes <= size
        mine = set(range(t.offset, t.offset + t.nbytes))
        assert not mine & taken
        taken |= mine


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-100, 100)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**40, 10**4200])
    | st.floats()
    | st.sampled_from([*ITEM_BYTES, "Q4"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
fuzz = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def damaged_headers(draw: st.DrawFn) -> Any:
    """A valid header of which one to three values, at any depth, are replaced or removed."""
    header = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        node: Any = header
        while True:
            keys = list(range(len(node))) if isinstance(node, list) else list(node)
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.integers(0, 3)):
                node = node[key]
                continue
            if draw(st.integers(0, 5)):
                node[key] = draw(json_values)
            else:
                del node[key]
            break
    return header


@fuzz
@given(header=damaged_headers())
def test_fuzz_header_values(header: Any, tmp_path: Path) -> None:
    assert_sound_or_refused(write_shard(tmp_path / "model.safetensors", header, DATA))


@fuzz
@given(
    begins=st.lists(st.integers(-3, 90), min_size=2, max_size=5),
    sizes=st.lists(st.integers(-1, 30), min_size=5, max_size=5),
    kinds=st.lists(st.sampled_from(["U8", "U16", "F32"]), min_size=5, max_size=5),
)
def test_fuzz_positions(
    begins: list[int], sizes: list[int], kinds: list[str], tmp_path: Path
) -> None:
    """Well-formed descriptions at arbitrary places are accepted exactly if they are disjoint."""
    spans, header = [], {}
    for i, (begin, n, kind) in enumerate(zip(begins, sizes, kinds, strict=False)):
        spans.append((begin, begin + n * ITEM_BYTES[kind]))
        header[f"t{i}"] = spec(kind, [n], *spans[-1])
    file = write_shard(tmp_path / "model.safetensors", header, DATA)
    assert_sound_or_refused(file)
    ordered = sorted(spans)
    disjoint = all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))
    if disjoint and all(0 <= a <= b <= len(DATA) for a, b in spans):
        assert len(read_header(file)) == len(spans)
    else:
        assert_refused(lambda: read_header(file), file)


@fuzz
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 2), st.binary(max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_fuzz_bytes(edits: list[tuple[float, int, bytes]], tmp_path: Path) -> None:
    """Bytes of a sound file overwritten, inserted or removed anywhere, header length included."""
    file = write_shard(tmp_path / "model.safetensors", VALID, DATA)
    content = bytearray(file.read_bytes())
    for where, remove, insert in edits:
        at = int(where * len(content))
        content[at : at + remove] = insert
    file.write_bytes(content)
    assert_sound_or_refused(file)


@fuzz
@given(content=st.binary(max_size=64))
def test_fuzz_headers_of_noise(content: bytes, tmp_path: Path) -> None:
    assert_sound_or_refused(write_shard(tmp_path / "model.safetensors", content, DATA))


@fuzz
@given(index=st.one_of(json_values, json_values.map(lambda v: {"weight_map": v})))
def test_fuzz_index(index: Any, tmp_path: Path) -> None:
    """With any JSON as its index, the checkpoint is read as it is."""
    shard = write_shard(tmp_path / "model.safetensors", VALID, DATA)
    (tmp_path / INDEX).write_text(json.dumps(index))
    checkpoint = read_checkpoint(tmp_path)
    assert {t.file for t in checkpoint.tensors.values()} == {shard}
    assert not set(checkpoint.absent) & set(checkpoint.tensors)
    assert bool(whereabouts(checkpoint)) == bool(checkpoint.absent)
