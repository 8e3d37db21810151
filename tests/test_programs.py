"""mlx-lm's programs on a streamed model: chat, benchmark, any other, and what is refused."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import pytest
from conftest import QUIET, demo_texts, demo_tokens

from mlx_streamexperts import (
    StreamConfig,
    UnsupportedModelError,
    __version__,
    bench,
    chat,
    demo_model,
    load,
    patch,
    run,
    stream,
)
from mlx_streamexperts import __main__ as entry
from mlx_streamexperts._cli.commands import COMMANDS
from mlx_streamexperts._cli.summary import Timing, rows
from mlx_streamexperts._cli.terminal import print_rows

DEMO = str(demo_model())
SMALL = ["--cache", "10MB", "--no-progress"]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def options(parser: object) -> set[str]:
    return {s for a in parser._actions for s in a.option_strings}  # type: ignore[attr-defined]


def stock_output(module: str, arguments: list[str], monkeypatch: Patch, capsys: Capture) -> str:
    """What mlx-lm's own program prints with everything loaded."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    importlib.import_module(module).main()
    return capsys.readouterr().out


@pytest.mark.parametrize(("ours", "stock"), [(chat, "mlx_lm.chat"), (bench, "mlx_lm.benchmark")])
def test_every_option_of_mlx_lm_and_every_streaming_option_is_there(
    ours: object, stock: str
) -> None:
    known = options(ours.setup_arg_parser())  # type: ignore[attr-defined]
    assert options(importlib.import_module(stock).setup_arg_parser()) <= known
    fields = {
        f.metadata.get("flag", "--" + name.replace("_", "-"))
        for name, f in StreamConfig.__dataclass_fields__.items()
    }
    assert (fields - {"--progress", "--about"}) | {
        "--no-progress",
        "--trace",
        "--timeline",
    } <= known


def test_a_chat_with_no_flags_says_what_mlx_lm_would_say(
    capsys: Capture, monkeypatch: Patch
) -> None:
    """Two turns that share a cache, and one after a reset; the end of the input ends the chat."""
    turns = "In the beginning\n and the\nr\ndef main(\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
    assert chat.main(["-m", "8", "--no-progress", "--layer-hits"]) == 0
    out, err = capsys.readouterr()
    assert "no chat template" in err
    model, tokenizer = mlx_lm.load(DEMO)
    tokenizer.chat_template = chat._PLAIN_TEMPLATE
    cache = mlx_lm.models.cache.make_prompt_cache(model)
    for query in ("In the beginning", " and the", "def main("):
        if query.startswith("def"):
            cache = mlx_lm.models.cache.make_prompt_cache(model)
        expected = mlx_lm.generate(
            model, tokenizer, tokenizer.encode(query), max_tokens=8, prompt_cache=cache
        )
        assert expected in out
    assert "on average of 3" in out
    assert len(re.findall(r"switch_mlp: +\d+\.\d% #", out)) == 8


def test_bench_reports_what_mlx_lm_reports_and_counts_only_timed_trials(
    capsys: Capture, tmp_path: Path
) -> None:
    arguments = ["-p", "20", "-g", "4", "-n", "2", *SMALL, "--trace", str(tmp_path / "t.jsonl")]
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"Trial \d:  prompt_tps=.*total_time=", out)) == 2
    assert "on average of 2, 40 tokens in 2 chunks" in out
    assert "(0 first uses" in out  # those were the warm-up's
    traced = (tmp_path / "t.jsonl").read_text().splitlines()
    assert len(traced) - 1 == 8 * 3 * (1 + 1 + 4)  # layers, generations: prompt, its last, tokens


def test_bench_in_batches_leaves_room_for_all_of_them(capsys: Capture) -> None:
    arguments = ["-p", "12", "-g", "3", "-n", "1", "-b", "3"]
    args = bench.setup_arg_parser().parse_args(arguments)
    assert bench._with_room(StreamConfig(), args).context_tokens == 3 * 15
    stated = StreamConfig(context_tokens=99)
    assert bench._with_room(stated, args) is stated
    assert bench.main([*arguments, *SMALL]) == 0
    assert "Averages: " in capsys.readouterr().out


def test_an_error_of_ours_is_one_line_in_every_command(capsys: Capture) -> None:
    program = ["mlx_lm.cache_prompt", "--model", DEMO, "--prompt", "x", "--prompt-cache-file", "x"]
    for main, rest in ((chat.main, []), (bench.main, []), (run.main, program)):
        assert main(["--cache", "1kB", *rest]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_run_leaves_a_programs_output_alone(
    capsys: Capture, monkeypatch: Patch, tmp_path: Path
) -> None:
    """mlx_lm.lora --test reads a data set, and prints a loss; ours adds to standard error only."""
    lines = [json.dumps({"text": t[:60]}) for t in demo_texts()[:3]]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    arguments = ["--model", DEMO, "--data", str(tmp_path), "--test", "--batch-size", "2"]
    arguments += ["--adapter-path", ""]
    expected = stock_output("mlx_lm.lora", arguments, monkeypatch, capsys)
    record = ["--trace", str(tmp_path / "t.jsonl"), "--timeline", str(tmp_path / "t.json")]
    assert run.main([*SMALL, *record, "mlx_lm.lora", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "Test loss" in out
    assert out == expected
    assert "hit rate" in err
    assert re.search(r"^Timeline: .* wait \d", err, re.M)
    head, *calls = (tmp_path / "t.jsonl").read_text().splitlines()
    assert calls and len(calls) % len(json.loads(head)["layers"]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_run_gives_perplexity_to_the_last_digit(capsys: Capture, monkeypatch: Patch) -> None:
    program = importlib.import_module("mlx_lm.perplexity")
    data = mx.array(demo_tokens(96).tolist()).reshape(3, 32)
    monkeypatch.setattr(program, "load_data", lambda *args, **kwargs: data)  # no download
    arguments = ["--model", DEMO, "--batch-size", "2"]
    expected = stock_output("mlx_lm.perplexity", arguments, monkeypatch, capsys)
    assert run.main([*SMALL, "perplexity", *arguments]) == 0
    ours = capsys.readouterr().out
    assert [x for x in ours.splitlines() if "Perplexity" in x] == [
        x for x in expected.splitlines() if "Perplexity" in x
    ]


def test_what_follows_the_program_is_the_programs(capsys: Capture, tmp_path: Path) -> None:
    """Even where it looks like an option of ours; a program may be any file, and may fail."""
    file = tmp_path / "my_program.py"
    (tmp_path / "beside_it.py").write_text("NAME = 'beside'\n")
    file.write_text(
        "import sys\nfrom beside_it import NAME\nfrom mlx_lm import load\n"
        "model, _ = load(sys.argv[1])\nprint(NAME, sys.argv[1:], __name__)\nsys.exit(7)\n"
    )
    before = list(sys.path)
    assert run.main([*SMALL, str(file), DEMO, "--cache", "1kB", "--help"]) == 7
    out, err = capsys.readouterr()
    assert out == f"beside {[DEMO, '--cache', '1kB', '--help']} __main__\n"
    assert "expert cache 9.98 MB" in err
    assert sys.path == before


def test_room_for_what_a_program_runs_at_once() -> None:
    parse = run.setup_arg_parser().parse_args
    assert run._config(parse(["mlx_lm.cache_prompt"])).prefill_tokens == 2048
    args = parse(["mlx_lm.generate", "--prefill-step-size", "64", "--max-kv-size", "128"])
    assert run._config(args).prefill_tokens == 64
    assert run._config(args).context_tokens == 128
    assert run._config(parse(["--prefill-tokens", "9", "mlx_lm.x"])).prefill_tokens == 9


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["mlx_lm.perplexitty"], "mlx_lm.perplexity, "),
        (["no.such.module"], "no module or program"),
        (["mlx_lm.utils"], "not a program"),
        (["mlx_lm.models"], "not a program"),
        (["nothing.py"], "no such file"),
        (["mlx_lm.convert", "--hf-path", "x"], "mlx_streamexperts.convert"),
        (["mlx_lm", "fuse"], "--adapter-path"),
        (["awq", "--model", "x"], "mlx_lm.quant.awq"),
        (["mlx_lm.gptq"], "holds the model"),
        (["mlx_lm.dynamic_quant"], "holds the model"),
        (["mlx_lm.dwq", "--model", "x"], "--targets-only"),
        (["mlx_lm.lora", "--train"], "--test"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    command: list[str], message: str, capsys: Capture
) -> None:
    assert run.main([*SMALL, *command]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_help_lists_every_program_of_the_installed_mlx_lm(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = capsys.readouterr().out
    installed = run.programs()
    assert {"mlx_lm.perplexity", "mlx_lm.evaluate", "mlx_lm.cache_prompt"} <= set(installed)
    refused = {name for name in run.REFUSED_PROGRAMS if name.startswith("mlx_lm.")}
    assert refused <= set(installed.values())
    for name in installed:
        assert re.search(rf"^  {re.escape(name)} +\w", text, re.M), name


def test_no_function_of_mlx_lm_saves_or_trains_a_model_without_its_experts(tmp_path: Path) -> None:
    from mlx_lm.tuner.trainer import TrainingArgs, train

    originals = mlx_lm.utils.save_model, mlx_lm.utils.quantize_model, train
    dense = nn.Linear(64, 64)
    with patch(cache="10MB", config=QUIET):
        model, tokenizer, config = mlx_lm.load(DEMO, return_config=True)
        out = tmp_path / "saved"
        with pytest.raises(UnsupportedModelError, match=r"mlx_streamexperts\.convert"):
            mlx_lm.utils.save(out, DEMO, model, tokenizer, config)
        with pytest.raises(UnsupportedModelError, match="quantize_model"):
            mlx_lm.utils.quantize_model(model, config, 64, 4)
        with pytest.raises(UnsupportedModelError, match="dequantize_model"):
            mlx_lm.utils.dequantize_model(model)
        with pytest.raises(UnsupportedModelError, match="trained"):
            mlx_lm.tuner.trainer.train(model, None, [], None, TrainingArgs())
        assert not list(tmp_path.rglob("*.safetensors"))
        mlx_lm.utils.save_model(tmp_path / "dense", dense)  # others are none of our business
    assert list((tmp_path / "dense").glob("*.safetensors"))
    assert originals == (
        mlx_lm.utils.save_model, mlx_lm.utils.quantize_model, mlx_lm.tuner.trainer.train,
    )  # fmt: skip


def test_generate_main_of_mlx_lm_inside_a_patch(capsys: Capture, monkeypatch: Patch) -> None:
    """An existing script that calls it needs one line."""
    arguments = ["--model", DEMO, "-p", "The system call", "-m", "8", "--verbose", "F"]
    expected = stock_output("mlx_lm.generate", arguments, monkeypatch, capsys)
    with patch(cache="10MB", config=QUIET) as patched:
        importlib.import_module("mlx_lm.generate").main()
        assert capsys.readouterr().out == expected
        assert patched.streams[0].stats().cache.misses > 0


def test_streamexperts_dispatches_to_whatever_is_there(capsys: Capture, monkeypatch: Patch) -> None:
    for arguments in ([], ["--help"]):
        assert entry.main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in COMMANDS)
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlx-streamexperts {__version__}\n"
    assert entry.main(["gnerate"]) == 2
    assert "did you mean generate?" in capsys.readouterr().err
    assert entry.main(["run", "mlx_lm.utils"]) == 1
    assert "not a program" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_only_where_there_is_a_terminal_that_wants_one(monkeypatch: Patch) -> None:
    lines = [("Read", "1 GB in [2] reads"), ("Memory", "peak 3 GB")]
    plain = "Read: 1 GB in [2] reads\nMemory: peak 3 GB\n"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def printed(file: io.StringIO) -> str:
        print_rows(lines, "Expert streaming", file)
        return file.getvalue()

    table = printed(Terminal())
    assert "Expert streaming" in table
    assert "1 GB in [2] reads" in table
    assert table != plain
    assert printed(io.StringIO()) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(Terminal()) == plain
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert printed(Terminal()) == plain
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "rich", None)  # not installed
    assert printed(Terminal()) == plain


def test_the_summary_tells_drafts_and_reads_per_token() -> None:
    model, _ = load(DEMO, cache="10MB", config=QUIET)
    with stream(model) as expert_stream:
        timing = Timing(generations=1, tokens=11, drafted=6, later_experts=45, later_bytes=10**6)
        found = dict(rows([expert_stream], timing))
        assert found["Drafts"] == (
            "6 of 11 tokens were drafted and accepted; 4.5 experts, 100 kB read per token after "
            "the first"
        )
        assert rows([expert_stream], Timing())[0][0] == "Experts"
        both = [label for label, _ in rows([expert_stream, expert_stream], Timing())]
        assert both.count("Experts (second model)") == 1


@pytest.mark.parametrize(
    ("thinks", "stated", "room"), [(True, False, 4096), (True, True, 9), (False, False, 9)]
)
def test_a_model_that_thinks_gets_room_to_answer(
    thinks: bool, stated: bool, room: int, monkeypatch: Patch
) -> None:
    stock, asked = importlib.import_module("mlx_lm.chat"), []

    def generating(model: object, tokenizer: object, max_tokens: int) -> Iterator[str]:
        asked.append(max_tokens)
        yield "text"

    monkeypatch.setattr(stock, "stream_generate", generating)
    with chat._room_to_think(stated):
        tokenizer = SimpleNamespace(has_thinking=thinks)
        assert list(stock.stream_generate(None, tokenizer, max_tokens=9)) == ["text"]
    assert asked == [room] and stock.stream_generate is generating
