"""Tables that are looked up by token stay on the drive, and models give the bits that they gave."""

from __future__ import annotations

import json
import linecache
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families as lm
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import vlm_families
from conftest import QUIET, assert_same
from mlx.utils import tree_flatten

from mlx_streamexperts import (
    BudgetError,
    ExpertReadError,
    StreamConfig,
    StreamError,
    TokenError,
    UnsupportedModelError,
    pack,
    patch,
    plan,
    stream,
)
from mlx_streamexperts._cli import summary
from mlx_streamexperts._experts import rows
from mlx_streamexperts._experts.rows import RowPlace, Rows, RowTable, RowTensor, StreamedRows
from mlx_streamexperts._io.reader import ExpertReader, Ticket
from mlx_streamexperts._loading import discover, tables
from mlx_streamexperts._memory import model_graph
from mlx_streamexperts.doctor import _command as doctor

ROWS, WIDTH, SLOTS = 40, 8, 4
TABLE = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)


def test_rows_by_example(table: RowTable) -> None:
    stays = StreamedRows(table)  # where the model had nn.Embedding(40, 8)
    assert stays.parameters() == {}  # the table is a file
    y = stays(mx.array([[7, 3], [3, 7]]))  # reads two rows
    assert np.array_equal(y, TABLE[[[7, 3], [3, 7]]])
    assert (table.stats.misses, table.stats.hits, table.stats.bytes) == (2, 0, 2 * 4 * WIDTH)
    stays(mx.array([7]))  # the cache has it
    assert table.stats.hits == 1
    table.read_early(np.array([9]))  # the ids of a pass are known before it
    assert np.array_equal(stays(mx.array([9])), TABLE[[9]])
    assert (table.stats.early, table.stats.misses) == (1, 2)


@pytest.fixture
def reader() -> Iterator[ExpertReader]:
    reader = ExpertReader(threads=2)
    yield reader
    reader.close()


@pytest.fixture
def table(tmp_path: Path, reader: ExpertReader) -> RowTable:
    """Four slots for forty rows, which lie in two files."""
    places = []
    for name, first, end in (("a", 0, 25), ("b", 25, ROWS)):
        (tmp_path / name).write_bytes(b"head" + TABLE[first:end].tobytes())
        places.append(RowPlace(str(tmp_path / name), 4, first, f"table.{name}"))
    tensor = RowTensor("weight", mx.float32, 4 * WIDTH, tuple(places))
    made = RowTable("a.table", nn.Embedding(1, WIDTH), [tensor], ROWS)
    made.open(SLOTS, reader)
    return made


def test_more_rows_than_slots_go_in_pieces(table: RowTable) -> None:
    ids = np.random.default_rng(0).integers(0, ROWS, (3, 30))
    assert np.array_equal(table.look_up(mx.array(ids)), TABLE[ids])
    assert table.stats.misses == len(np.unique(ids))
    assert np.array_equal(table.look_up(mx.array(ids[:, :4])), TABLE[ids[:, :4]])


def test_the_row_not_used_for_the_longest_time_leaves(table: RowTable) -> None:
    table.look_up(mx.array([0, 1, 2, 3]))
    table.look_up(mx.array([0]))
    table.look_up(mx.array([30]))
    before = table.stats.misses
    table.look_up(mx.array([0, 2, 3, 30]))
    assert table.stats.misses == before
    table.look_up(mx.array([1]))
    assert table.stats.misses == before + 1


def test_numbers_count_from_the_end_as_in_the_stock_module(table: RowTable) -> None:
    ids = np.array([-1, 39, -40, 5])
    assert np.array_equal(table.look_up(mx.array(ids)), TABLE[ids])
    for wrong in (ROWS, -ROWS - 1):
        with pytest.raises(TokenError, match=f"a.table has {ROWS} rows, and no row {wrong}"):
            table.look_up(mx.array([3, wrong]))
    assert table.look_up(mx.zeros((2, 0), mx.int32)).shape == (2, 0, WIDTH)


def test_early_reads_never_push_out_a_call_nor_fail(table: RowTable, tmp_path: Path) -> None:
    table.read_early(np.array([[5, 6], [7, 8], [99, -3]]))  # half of the slots
    assert np.array_equal(table.look_up(mx.array([5, 6, 7, 8])), TABLE[[5, 6, 7, 8]])
    assert (table.stats.early, table.stats.misses) == (2, 2)
    (tmp_path / "b").write_bytes(b"short")
    table.read_early(np.array([30]))
    with pytest.raises(ExpertReadError, match=r"cannot read row 30 of a\.table.*table\.b"):
        table.look_up(mx.array([5, 30]))
    (tmp_path / "b").write_bytes(b"head" + TABLE[25:].tobytes())
    assert np.array_equal(table.look_up(mx.array([30, 5])), TABLE[[30, 5]])


def test_an_interruption_at_any_line_leaves_no_wrong_row(table: RowTable) -> None:
    """Ctrl-C raises at one line after another of calls and early reads that change the slots.

    Not where a `with` ends: there the interpreter looks for no signals.
    """
    code, left = rows.__file__, 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != code:
            return None
        source = linecache.getline(rows.__file__, frame.f_lineno)
        if event == "line" and not source.lstrip().startswith("with "):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    interrupted, line = 0, 0
    while interrupted == line:
        line += 1
        left, first = line, line % 30
        early, ids = np.array([first + 4, first + 5]), [first, first + 4, first + 9]
        try:
            sys.settrace(trace)
            table.read_early(early)
            table.look_up(mx.array(ids))
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        again = [*ids, first + 5]
        assert np.array_equal(table.look_up(mx.array(again)), TABLE[again]), line
    assert interrupted > 100


def test_early_reads_stay_bounded_after_an_interrupted_call(
    table: RowTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a call waits leaves all of its rows in flight, more than early reads may be."""

    def interrupted(ticket: Ticket) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ticket, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.look_up(mx.array([1, 2, 3, 4]))
    before = table.stats.bytes
    table.read_early(np.arange(10, 30))
    assert table.stats.bytes == before
    ids = [1, 4, 15]
    assert np.array_equal(table.look_up(mx.array(ids)), TABLE[ids])


def test_a_closed_table_says_so(table: RowTable) -> None:
    table.close("this stream is closed")
    with pytest.raises(StreamError, match="this stream is closed"):
        table.look_up(mx.array([1]))
    table.read_early(np.array([1]))  # nothing


def test_the_cache_is_shared_out_and_never_larger_than_the_tables(table: RowTable) -> None:
    whole = Rows([table], 1 << 30)
    assert whole.cache_bytes < 1 << 15
    half = Rows([table], whole.cache_bytes // 2)
    assert 0.4 * whole.cache_bytes < half.cache_bytes <= whole.cache_bytes // 2
    assert Rows().cache_bytes == Rows().nbytes == 0


# Whole models. Only the smallest row cache would be too small for one token's rows.
STREAMED = StreamConfig(progress=False, prefetch="off", rows="on", row_cache=6000)


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Footprints from the configuration: tracing takes seconds for a family."""
    monkeypatch.setattr(
        discover, "measure", lambda _, switches, config: model_graph._estimate(switches, config)
    )


def names(model: nn.Module) -> str:
    return " ".join(name for name, _ in tree_flatten(model.parameters()))


@pytest.mark.usefixtures("not_compiled", "estimated")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["longcat_flash_ngram", "gemma4_text"])
def test_a_family_of_mlx_lm_gives_the_same_bits(
    family: str, bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "gemma4_text":
        monkeypatch.setitem(lm.FAMILIES[family], "hidden_size_per_layer_input", 32)
    folder = lm.build(family, tmp_path / "m", quantize=lm.Quantize(bits=4) if bits else None)
    stock, _ = mlx_lm.utils.load_model(folder)
    with patch(cache="900KB", config=STREAMED):
        model, _ = mlx_lm.utils.load_model(folder)
    assert "embedders" in names(stock) or "per_layer.weight" in names(stock)
    assert "embedders" not in names(model)
    assert "tokens_per_layer" not in names(model)
    tokens = lm.token_stream(lm.VOCAB, 40, 0)
    assert_same(lm.run(stock, tokens, 30), lm.run(model, tokens, 30), family)
    stats, planned = stream(model).stats(), stream(model).plan
    assert stats.rows.misses > max(t.slots for t in stream(model)._rows.tables)
    assert 0 < planned.row_cache <= 6000
    tables = [a for n, a in tree_flatten(stock.parameters()) if "embedders" in n or "s_per_l" in n]
    assert planned.tables == sum(a.nbytes for a in tables)
    assert planned.trunk + planned.experts + planned.tables == sum(
        a.nbytes for _, a in tree_flatten(stock.parameters())
    )


@pytest.mark.usefixtures("not_compiled", "estimated")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    ("family", "table"),
    [
        ("qwen4_exp", "ngram_embedding.shards"),
        ("longcat_flash_ngram", "ngram_embeddings.embedders"),
        ("longcat_flash_sparse", "ngram_embeddings.embedders"),
        ("gemma4_ple", "embed_tokens_per_layer"),
        ("deepseek_v41_engram", "engram.embed"),
    ],
)
def test_a_family_of_mlx_vlm_gives_the_same_bits(
    family: str, table: str, bits: int | None, tmp_path: Path
) -> None:
    """A prompt's rows, a picture's among them, do not fit; one token after the other follows."""
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    folder = vlm_families.make_vlm_checkpoint(tmp_path / "m", family, bits=bits)
    stock = utils.load_model(folder)
    with patch(cache="900KB", config=STREAMED):
        model = utils.load_model(folder)
    assert table in names(stock)
    assert table not in names(model)
    tokens = lm.token_stream(vlm_families.TEXT, 40, 0)
    ids, given = vlm_families.picture(family) or ([], {})
    tokens = np.concatenate([tokens[:2], np.array(ids, tokens.dtype), tokens[2:]])
    expected = vlm_families.run(stock, tokens, 30, **given)
    assert_same(expected, vlm_families.run(model, tokens, 30, **given), family)
    stats = stream(model).stats().rows
    assert stats.misses > max(t.slots for t in stream(model)._rows.tables)


@pytest.mark.usefixtures("not_compiled", "estimated")
@pytest.mark.parametrize("family", ["qwen4_exp", "deepseek_v41_engram", "longcat_flash_ngram"])
def test_rows_are_read_before_layers_ask(family: str, tmp_path: Path) -> None:
    """A token's n-grams are known at the start of its pass."""
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    folder = vlm_families.make_vlm_checkpoint(tmp_path / "m", family)
    stock = utils.load_model(folder)
    with patch(cache="900KB", config=replace(STREAMED, row_cache="1MB")):
        model = utils.load_model(folder)
    tokens = lm.token_stream(vlm_families.TEXT, 20, 0)
    expected = vlm_families.run(stock, tokens, 8)
    assert_same(expected, vlm_families.run(model, tokens, 8), family)
    stats = stream(model).stats().rows
    assert stats.early > 20
    assert stats.misses == 0
    bytes_read = stats.bytes
    assert_same(expected, vlm_families.run(model, tokens, 8), family)
    stats = stream(model).stats().rows
    assert stats.bytes == bytes_read  # all hits, and no early read of what is there


@pytest.mark.usefixtures("not_compiled", "estimated")
def test_an_engram_is_never_loaded_whole_nor_charged(tmp_path: Path) -> None:
    """mlx-vlm reads its rows itself, but leaves the whole table among the parameters."""
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    folder = vlm_families.make_vlm_checkpoint(tmp_path / "m", "deepseek_v41_engram", bits=4)
    stock = utils.load_model(folder)
    with patch(cache="900KB", config=StreamConfig(progress=False, rows="off")) as patched:
        model = utils.load_model(folder)
    assert "engram.embed" in names(stock)
    assert "engram.embed" not in names(model)
    tables = sum(a.nbytes for n, a in tree_flatten(stock.parameters()) if "engram.embed" in n)
    planned = patched.streams[0].plan
    assert planned.tables == tables
    assert planned.trunk == sum(a.nbytes for _, a in tree_flatten(model.parameters()))


@pytest.mark.usefixtures("estimated")
def test_engrams_stay_on_the_drive_whatever_path_leads_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy resolves the links of the file that mlx-vlm maps; the Hub's cache is full of them."""
    pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    folder = vlm_families.make_vlm_checkpoint(tmp_path / "m", "deepseek_v41_engram", bits=4)
    expected = plan(folder, memory="2GB")
    assert expected.tables > 0
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for path in ("m", "link", str(tmp_path / "link"), "snapshot"):
        found = plan(path, memory="2GB")
        assert (found.tables, found.trunk) == (expected.tables, expected.trunk), path
    monkeypatch.setattr(tables, "_mapped", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"layers\.\d\.engram\.embed"):
        plan(folder, memory="2GB")


def test_small_tables_stay_in_memory_and_an_option_decides(
    checkpoint: Callable[..., Path],
) -> None:
    folder = checkpoint("longcat_flash_ngram")
    assert plan(folder, memory="2GB").tables == 0
    assert plan(folder, memory="2GB", config=StreamConfig(rows="off")).row_cache == 0
    planned = plan(folder, memory="2GB", config=StreamConfig(rows="on"))
    assert planned.tables > 0
    assert "of tables stay on the drive" in str(planned)
    assert planned.as_dict()["row_cache"] == planned.row_cache
    with pytest.raises(BudgetError, match="row cache"):
        plan(folder, memory="1MB", config=StreamConfig(rows="on"))
    with pytest.raises(StreamError, match="row_cache"):
        StreamConfig(row_cache="much")


@pytest.mark.usefixtures("not_compiled", "estimated")
def test_what_a_stream_tells_of_its_rows(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("longcat_flash_ngram")
    with patch(cache="900KB", config=STREAMED) as patched:
        model, _ = mlx_lm.utils.load_model(folder)
    ids = mx.array([[1, 2, 3]])
    mx.eval(model(ids, cache=model.make_cache()))
    stats = patched.streams[0].stats()
    assert stats.rows.early == 6
    assert 0 < stats.rows.bytes <= stats.read.bytes
    assert json.loads(json.dumps(stats.as_dict()))["rows"]["early"] == 6
    assert dict(summary.rows(patched.streams, summary.Timing()))["Rows"].startswith(
        "6 looked up in 66 kB of tables on the drive: 0 in the cache (5.56 kB), 6 read early, 0"
    )
    patched.streams[0].reset()
    mx.eval(model(ids, cache=model.make_cache()))
    assert (stats.rows.early, patched.streams[0].stats().rows.hits) == (6, 6)
    with pytest.raises(StreamError, match=r"send less, state less than .* of row_cache,"):
        patched.streams[0].make_room(1 << 40, "A film", "send less")
    patched.streams[0].close()
    with pytest.raises(StreamError, match="closed"):
        model(ids)


@pytest.mark.usefixtures("estimated")
def test_doctor_explains_the_tables(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("longcat_flash_ngram")
    machine = ["--machine", "M4 Max 128 GB", "--memory", "2GB"]
    assert doctor.main(["--model", str(folder), *machine, "--rows", "on"]) == 0
    said = capsys.readouterr().out
    assert "of tables that are looked up by token stay on the drive; a cache of" in said
    assert doctor.main(["--model", str(folder), *machine]) == 0
    assert "looked up by token" not in capsys.readouterr().out


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["gemma3n", "gemma4_dense"])
def test_a_model_without_experts_streams_its_tables(
    family: str, bits: int | None, tmp_path: Path
) -> None:
    folder = lm.build(family, tmp_path / "m", quantize=lm.Quantize(bits=4) if bits else None)
    stock, _ = mlx_lm.utils.load_model(folder)
    with patch(memory="200MB", config=STREAMED):
        model, _ = mlx_lm.utils.load_model(folder)
    tokens = lm.token_stream(lm.VOCAB, 40, 0)
    assert_same(lm.run(stock, tokens, 30), lm.run(model, tokens, 30), family)
    s, parameters = stream(model), [a for _, a in tree_flatten(stock.parameters())]
    assert s.stats().rows.misses > max(t.slots for t in s._rows.tables)
    assert s.plan.trunk + s.plan.tables == sum(a.nbytes for a in parameters)
    assert (s.layers, s.plan.experts, s.plan.cache, s.plan.resident_share) == ([], 0, 0, 1.0)
    assert "expert" not in str(s.plan)
    assert json.loads(json.dumps(s.stats().as_dict()))["rows"]["misses"] > 0
    lines = summary.rows([s], summary.Timing())
    assert [label for label, _ in lines] == ["Rows", "Memory"]
    assert "expert" not in str(lines)


@pytest.mark.usefixtures("not_compiled")
def test_a_model_of_mlx_vlm_without_experts_streams_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    dense = vlm_families.FAMILIES["gemma4_ple"]
    monkeypatch.setitem(dense.config["text_config"], "enable_moe_block", False)
    folder = vlm_families.make_vlm_checkpoint(tmp_path / "m", "gemma4_ple", bits=4)
    stock = utils.load_model(folder)
    with patch(memory="200MB", config=STREAMED):
        model = utils.load_model(folder)
    ids, given = vlm_families.picture("gemma4_ple") or ([], {})
    tokens = lm.token_stream(vlm_families.TEXT, 40, 0)
    tokens = np.concatenate([tokens[:2], np.array(ids, tokens.dtype), tokens[2:]])
    expected = vlm_families.run(stock, tokens, 30, **given)
    assert_same(expected, vlm_families.run(model, tokens, 30, **given), "gemma4_ple")
    assert stream(model).layers == []
    assert stream(model).stats().rows.misses > 0


@pytest.mark.usefixtures("not_compiled", "estimated")
def test_what_needs_experts_is_refused_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lm.build("gemma4_dense", tmp_path / "m")
    with patch(memory="2GB", config=STREAMED):
        model, _ = mlx_lm.utils.load_model(folder)
    s = stream(model)
    for call in (
        lambda: s.resize("1MB"),
        lambda: s.save_hot_set(tmp_path / "hot"),
        lambda: s.trace(tmp_path / "trace"),
        lambda: s.timeline(tmp_path / "timeline"),
        lambda: plan(folder, config=replace(STREAMED, store=tmp_path / "store")),
        lambda: plan(folder, config=replace(STREAMED, hot_set=tmp_path / "hot")),
    ):
        with pytest.raises(UnsupportedModelError, match="this model has none"):
            call()
    with pytest.raises(UnsupportedModelError, match="has no routed experts; load it without"):
        plan(folder, config=replace(STREAMED, rows="off"))
    with pytest.raises(BudgetError, match=r"the row cache \(.*\) need [\d,]+ bytes"):
        plan(folder, memory="1MB", config=STREAMED)
    heard: list[Any] = []
    with s.follow(heard.append, 3):
        mx.eval(model(mx.array([[1, 2, 3]]), cache=model.make_cache()))
    assert (heard[-1].tokens, heard[-1].layers) == (3, 0)
    machine = ["--machine", "M4 16 GB", "--memory", "2GB", "--rows", "on"]
    assert doctor.main(["--model", str(folder), *machine]) == 0
    said = capsys.readouterr().out
    assert "of tables that are looked up by token stay on the drive" in said
    assert "no routed experts" in said
    assert "resident" not in said
    assert pack.main(["--model", str(folder), "--out", str(tmp_path / "store")]) == 1
    assert "no routed experts" in capsys.readouterr().err


def test_a_model_without_tables_has_no_row_cache(checkpoint: Callable[..., Path]) -> None:
    planned = plan(checkpoint("qwen3_moe"), memory="1GB", config=StreamConfig(rows="on"))
    assert planned.row_cache == planned.tables == 0
    assert "row cache" not in str(planned)
    assert QUIET.row_cache is None
