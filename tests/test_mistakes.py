"""What newcomers get wrong: each command answers in one line that says what to do."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_streamexperts import (
    StreamError,
    UnsupportedModelError,
    bench,
    demo_model,
    doctor,
    generate,
    load,
    report,
    server,
    simulate,
    stream,
)
from mlx_streamexperts._config import parse_size
from mlx_streamexperts._io.checkpoint import check_model_folder, read_checkpoint

_TOKENIZER = """
open({ran!r}, "w").close()
from transformers import PreTrainedTokenizer

class Letters(PreTrainedTokenizer):
    vocab_size = 100
    def get_vocab(self): return {{str(i): i for i in range(100)}}
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return ord(token) % 100
    def _convert_id_to_token(self, index): return str(index)
"""


def with_code(tmp_path: Path) -> tuple[Path, Path]:
    """A model like Kimi K2.5, whose tokenizer is code; and a file that is there if the code ran."""
    folder, ran = Path(shutil.copytree(demo_model(), tmp_path / "model")), tmp_path / "ran"
    (folder / "tokenizer.json").unlink()
    (folder / "letters.py").write_text(_TOKENIZER.format(ran=str(ran)))
    auto_map = {"AutoTokenizer": ["letters.Letters", None]}
    settings = {"tokenizer_class": "Letters", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, ran


def test_a_tokenizer_that_is_code_is_named_and_runs_only_if_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder, ran = with_code(tmp_path)
    asked = ["--model", str(folder), "--cache", "10MB", "--no-progress"]
    for command in (generate, bench, server, report):
        assert command.main(asked) == 1
        error = capsys.readouterr().err
        assert "letters.py" in error and "pass --trust-remote-code" in error, command
    with pytest.raises(UnsupportedModelError, match=r"letters\.py"):
        load(str(folder), cache="10MB")
    assert doctor.main(["--model", str(folder), "--machine", "m4 16"]) == 0
    out = capsys.readouterr().out
    assert "--memory 10GB --trust-remote-code\n" in out and "letters.py" in out
    assert not ran.exists()
    assert generate.main([*asked, "-p", "hello", "-m", "2", "--trust-remote-code"]) == 0
    assert ran.exists()


def test_bench_runs_no_tokenizers_code_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stock's benchmark trusts every tokenizer."""
    folder, ran = with_code(tmp_path)
    shutil.copy(demo_model() / "tokenizer.json", folder)  # so that the code is not needed
    sizes = ["-p", "4", "-g", "2", "-n", "1", "--cache", "10MB", "--no-progress"]
    assert bench.main(["--model", str(folder), *sizes]) == 0
    assert "Averages" in capsys.readouterr().out and not ran.exists()


def test_what_is_no_model_folder_is_told(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with pytest.raises(StreamError, match="is a file: state a model's folder"):
        check_model_folder(gguf)
    with pytest.raises(StreamError, match="GGUF files cannot be streamed"):
        read_checkpoint(tmp_path)
    gguf.unlink()
    with pytest.raises(StreamError, match="download the model again"):
        read_checkpoint(tmp_path)
    with pytest.raises(UnsupportedModelError, match="this object is not streamed"):
        stream(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["--trace", "--timeline"])
def test_a_recording_that_cannot_be_created(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "missing" / "recording")
    assert generate.main(["-m", "1", "--no-progress", option, file]) == 1
    error = f"error: {file}: cannot be created: No such file or directory"
    assert capsys.readouterr().err.splitlines()[-1] == error


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--memroy=5GB"], "did you mean --memory? "),
        (["./my-model"], "did you mean --model ./my-model? "),
        (["hello"], "unrecognized arguments: hello; "),
    ],
)
def test_an_unknown_argument(
    arguments: list[str], asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        generate.main(arguments)
    assert asked in capsys.readouterr().err


def test_help_is_not_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulate.main(["trace.jsonl", "--model", "m"])
    assert "unrecognized arguments: --model m; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (server.main, ["--port", "99999"], "--port 99999: a port is a number from 0 to 65535"),
        (report.main, ["--render", "none.json"], "none.json: cannot be read: No such file"),
        (doctor.main, ["--machine", "m4 pro 48", "--memory", "96GB"], "more than M4 Pro 48 GB can"),
    ],
)
def test_a_value_that_cannot_be(
    main: Callable[[list[str]], int],
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_a_port_in_use_is_told_before_the_model_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert server.main(["--port", str(port), "--no-progress"]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: Address already in use (--port states another one)" in error
    assert "Loaded" not in error


def test_half_a_gigabyte_is_asked_about() -> None:
    with pytest.raises(StreamError, match=r"did you mean '0\.5GB'"):
        parse_size("0.5")
