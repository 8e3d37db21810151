"""Every program of mlx-lm on the embedded model: with everything loaded, and streamed.

    pip install '.[cpu]' datasets lm_eval
    python benchmarks/programs.py --out docs/programs.md

Each program runs twice, in processes of its own: as mlx-lm has it, and by `mlx_streamexperts.run`
with a quarter of the experts in the cache (`--cache 10MB`). What it prints or writes is compared,
timings left out. Data sets are made of the prompts that come with the model; nothing is downloaded.
Programs that `run` refuses must say so and write nothing. Takes about 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_streamexperts import demo_model
from mlx_streamexperts._io.output import partial_name
from mlx_streamexperts.run import programs

OURS = ["-m", "mlx_streamexperts.run", "--cache", "10MB", "--no-progress"]
EVALUATE = """
import functools, lm_eval.evaluator, lm_eval.tasks
lm_eval.evaluator.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_path="tasks")
from mlx_lm import evaluate
evaluate.main()
"""
PORTS = {"stock": 18431, "streamed": 18432}


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        program: of mlx-lm.
        arguments: as on the command line, from the folder of the run.
        result: what counts of it, from its standard output and its folder.
        stdin: typed into it.
        refused: `run` must refuse it.
    """

    program: str
    arguments: list[str]
    result: Callable[[str, Path], str]
    stdin: str = ""
    refused: bool = False


def line(pattern: str) -> Callable[[str, Path], str]:
    """The parts of the output that match."""
    return lambda out, folder: ", ".join(" ".join(m.split()) for m in re.findall(pattern, out))


def text(out: str, folder: Path) -> str:
    """All that was printed, shortened for the table by its middle."""
    return " ".join(out.split())


def tensors(out: str, folder: Path) -> str:
    """Every tensor written below the folder."""
    digest, count = hashlib.sha256(), 0
    for file in sorted((folder / "written").rglob("*.safetensors")):
        for name, array in sorted(mx.load(str(file)).items()):  # type: ignore[union-attr]
            digest.update(f"{file.name} {name} {array.shape} {array.dtype}".encode())
            digest.update(bytes(memoryview(mx.view(array.reshape(-1), mx.uint8))))
            count += 1
    return f"{count} tensors, sha256 {digest.hexdigest()[:12]}"


def reply(out: str, folder: Path) -> str:
    """What the chat said, without its frame and its speeds."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x01\x02]", "", out)
    kept = [x for x in plain.splitlines() if not re.search(r"[─╭╰│]|tok/s|commands", x)]
    return " ".join(" ".join(kept).replace("\u203a", "").split())


def cases() -> list[Case]:
    """All that is tried, by program."""
    model, prompt = ["--model", "model"], ["--prompt", "In the beginning God created"]
    say = [*model, *prompt, "-m", "16", "--verbose", "F"]
    cached = ["--prompt-cache-file", "written/cache.safetensors"]
    at_once = ["--quantized-kv-start", "0"]
    data = ["--data-path", "data", "--num-samples", "4"]
    tried = [
        Case("generate", say, text),
        Case("generate", [*say, "--temp", "0.8", "--top-p", "0.9", "--seed", "7"], text),
        Case("generate", [*say, "--draft-model", "model"], text),
        Case("generate", [*say, "--max-kv-size", "16"], text),
        Case("generate", [*say, "--kv-bits", "4", *at_once], text),
        Case("generate", [*say, "--adapter-path", "adapter"], text),
        Case("chat", [*model, "-m", "8"], reply, "In the beginning\nr\nfn main\nq\n"),
        Case("cache_prompt", [*model, *prompt, *cached], tensors),
        Case("cache_prompt", [*model, *prompt, *cached, "--kv-bits", "8", *at_once], tensors),
        Case("generate", ["-p", " the heaven", *say[4:], *cached], text),
        Case("perplexity", [*model, *data, "--sequence-length", "64"], line(r"Perplexity: .*")),
        Case("evaluate", [*model, "--tasks", "choose", "go_on"], line(r'"(?:acc|chrf),none": \S+')),
        Case("lora", [*model, "--data", "local", "--test", "--adapter-path", ""], line("Test .*")),
        Case(
            "lora", [*model, "--data", "local", "--test", "--adapter-path", "adapter"],
            line("Test .*"),
        ),
        Case(
            "dwq",
            [*model, *data, "--max-seq-length", "64", "--batch-size", "2", "--targets-only",
             "--target-dir", "written/targets"],
            tensors,
        ),
        Case("benchmark", [*model, "-p", "32", "-g", "8", "-n", "1"], line(r"Timing with .*")),
        Case("manage", ["--scan"], text),
        Case("server", [*model, "--port"], text),
    ]  # fmt: skip
    quantizer = [*model, "--mlx-path", "written/quantized"]
    refused = [
        ("convert", ["--hf-path", "model", "--mlx-path", "written/converted", "-q"]),
        ("fuse", [*model, "--adapter-path", "adapter", "--save-path", "written/fused"]),
        ("lora", [*model, "--data", "local", "--train", "--adapter-path", "written/adapter"]),
        ("awq", quantizer), ("dwq", quantizer), ("dynamic_quant", quantizer), ("gptq", quantizer),
    ]  # fmt: skip
    return tried + [Case(p, arguments, text, refused=True) for p, arguments in refused]


def prepare(folder: Path) -> None:
    """What the programs read: the model with a chat template, data sets, an adapter, tasks."""
    shutil.copytree(demo_model(), folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    texts = [p["prompt"] for p in json.loads((demo_model() / "prompts.json").read_text())]
    for name in ("data/train", "local/test", "local/train", "local/valid"):
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(json.dumps({"text": t[:300]}) for t in texts))
    halves = [(t[: len(t) // 2][-80:], t[len(t) // 2 :][:20]) for t in texts]
    questions = [
        {"text": text, "choices": [right, wrong], "label": 0, "answer": right}
        for (text, right), (_, wrong) in zip(halves, halves[1:] + halves[:1], strict=True)
    ]
    (folder / "tasks").mkdir()
    (folder / "tasks" / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    common = {
        "dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "questions.jsonl")}},
    }  # fmt: skip
    choose = {
        "task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    go_on = {
        "task": "go_on", "output_type": "generate_until", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "chrf"}],
    }  # fmt: skip
    for task in (choose, go_on):  # JSON is YAML
        (folder / "tasks" / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
    (folder / "evaluate.py").write_text(EVALUATE)
    model, _ = mlx_lm.load(str(folder / "model"))
    lora = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    linear_to_lora_layers(model, 8, lora)
    mx.random.seed(0)
    weights = {
        k: 0.05 * mx.random.normal(v.shape)
        for k, v in tree_flatten(model.trainable_parameters())
        if "lora" in k
    }
    (folder / "adapter").mkdir()
    mx.save_safetensors(str(folder / "adapter" / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 8, "lora_parameters": lora}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "hub").mkdir()


def run(case: Case, folder: Path, which: str) -> tuple[int, str, str]:
    """Run a case in a folder; returns exit status, standard output, standard error."""
    (folder / "written").mkdir(exist_ok=True)
    ours = OURS if which == "streamed" else []
    if case.program == "evaluate":  # it takes no folder of tasks
        command = [*ours, "evaluate.py", *case.arguments]
    elif ours:
        command = [*ours, f"mlx_lm.{case.program}", *case.arguments]
    else:
        command = ["-m", "mlx_lm", case.program, *case.arguments]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "hub"), "COLUMNS": "100",
    }  # fmt: skip
    if case.program == "server":
        return _ask_server([*command, str(PORTS[which])], PORTS[which], folder, environment)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, input=case.stdin,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def _ask_server(
    command: list[str], port: int, folder: Path, environment: dict[str, str]
) -> tuple[int, str, str]:
    """Start a server, ask it for a completion and a chat, stop it."""
    body = {"prompt": "In the beginning", "max_tokens": 12, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "fn main"}], "max_tokens": 8, "temperature": 0}
    with (folder / "server.log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log
        )
        try:
            out = []
            for path, asked in (("completions", body), ("chat/completions", chat)):
                answer = _post(f"http://127.0.0.1:{port}/v1/{path}", asked, server)
                choice = answer["choices"][0]
                out.append(choice["text"] if "text" in choice else choice["message"]["content"])
            return 0, " | ".join(out), ""
        except (OSError, RuntimeError, KeyError) as e:
            log.seek(0)
            return 1, "", f"{e}\n{log.read()[-2000:]}"
        finally:
            server.terminate()
            server.wait()


def _post(url: str, body: dict, server: subprocess.Popen) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    until = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"{e}: {e.read()[:500]!r}") from e
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(0.3)


def shown(result: str) -> str:
    """A cell of the table."""
    short = result if len(result) <= 90 else result[:55] + " ... " + result[-30:]
    return short.replace("|", "\\|")


def measure(root: Path) -> tuple[list[str], bool]:
    """Run everything; returns the table's rows, and whether all went as it should."""
    folders = {which: root / which for which in ("stock", "streamed")}
    prepare(folders["stock"])
    shutil.copytree(folders["stock"], folders["streamed"])
    for file in (folders["streamed"] / "tasks").glob("*.yaml"):
        file.write_text(file.read_text().replace(str(folders["stock"]), str(folders["streamed"])))
    rows, good = [], True
    for case in cases():
        command = shlex.join(case.arguments)
        if case.refused:
            before = sorted(folders["streamed"].rglob("*"))
            status, _, err = run(case, folders["streamed"], "streamed")
            refused = status == 1 and err.splitlines()[-1].startswith("error: mlx_lm.")
            ok = refused and sorted(folders["streamed"].rglob("*")) == before
            cells = ["writes or trains a model", f"refused: {shown(err.splitlines()[-1][7:])}"]
        else:
            results = []
            for which, folder in folders.items():
                status, out, err = run(case, folder, which)
                if status:
                    print(f"{which} {case.program} {command}: status {status}\n{err[-3000:]}")
                results.append(case.result(out, folder) if not status else f"status {status}")
            ok = results[0] == results[1] and bool(results[0]) and not results[0].startswith("stat")
            cells = [shown(r) for r in results]
        good &= ok
        mark = "refused" if case.refused and ok else "yes" if ok else "**no**"
        rows.append(f"| `{case.program} {command}` | {cells[0]} | {cells[1]} | {mark} |")
        print(rows[-1], flush=True)
    return rows, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the page to this file")
    out = parser.parse_args().out
    if missing := [name for name in ("datasets", "lm_eval") if find_spec(name) is None]:
        parser.error(f"some programs need more than mlx-lm: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="programs-") as root:
        rows, good = measure(Path(root))
    tried = {f"mlx_lm.{case.program}" for case in cases()}
    page = [
        "# mlx-lm's programs on a streamed model",
        "",
        f"Written by `python benchmarks/programs.py` with mlx-lm {mlx_lm.__version__}, MLX "
        f"{version('mlx')} on {mx.default_device()}, the embedded model and a quarter of its "
        "experts in the cache (`--cache 10MB`). Stock is `mlx_lm PROGRAM ...`, streamed is `python "
        "-m mlx_streamexperts.run --cache 10MB mlx_lm.PROGRAM ...`, with the same arguments and "
        "files.",
        "",
        "| program | stock | streamed | the same |",
        "|---|---|---|---|",
        *rows,
        "",
        "`benchmark` prints speeds, which differ, so only its description of the timed trials is "
        f"compared. `evaluate` runs lm_eval {version('lm_eval')} on two tasks of the script. Not "
        "tried, because they need other machines or an account and load no model: "
        + ", ".join(f"`{p.removeprefix('mlx_lm.')}`" for p in sorted(set(programs()) - tried))
        + ".",
    ]
    if out is not None:
        partial_name(out).write_text("\n".join(page) + "\n")
        partial_name(out).replace(out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
