"""Side by side: the published rivals that run on Linux, this package, and stock mlx-lm.

    python benchmarks/compare.py --work FOLDER --quick       # 3 minutes, the embedded model
    python benchmarks/compare.py --work FOLDER               # everything; hours
    python benchmarks/compare.py --work FOLDER --models 4bit --shares 0.25 --states cold

Every system gets the same checkpoint, tokens, bytes of expert slots, MLX and page-cache state, and
a fresh process in a virtual environment of its own with pinned versions, which this script makes in
`--work`. Systems take turns: a round runs each of them once on each setting. Figures are medians of
rounds; a ratio is the median of the rounds' ratios. A system that refuses or crashes is a row too.

cold: the page cache loses the system's files before the prompt and before every decode step, as if
the model were much larger than memory. once: only before the prompt. warm: it holds them.
What is timed and counted is in `adapters/measure.py`; the settings of each system in `run_*.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from compare_report import markdown
from decode import prompt_tokens
from random_model import write_random_model

from mlx_streamexperts import demo_model, mirror
from mlx_streamexperts._io.reader import TINY_READ_BYTES

ADAPTERS = Path(__file__).parent / "adapters"


@dataclass(frozen=True)
class System:
    """One system with one setting.

    Attributes:
        adapter: `adapters/run_<adapter>.py`.
        requirement: pinned package of a rival, in its own environment; None for this one.
        store: folder name of its own copy of the experts, "" where it reads the checkpoint.
        mirrored: reads copies of the experts' files beside them, in the folders of `--mirrors`.
        options: passed to the adapter. `by_state` adds options by page-cache state.
    """

    name: str
    adapter: str
    requirement: str | None = None
    store: str = ""
    mirrored: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    by_state: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.adapter == "ours"


# Past the page cache where it is dropped anyway: what `auto` does with a model larger than memory,
# unless its experts lie in tiny parts.
_OURS = {"cold": {"bypass_page_cache": "on"}, "warm": {"bypass_page_cache": "off"}}
SYSTEMS = [
    System("stock", "stock"),
    System("ours", "ours", by_state=_OURS),
    System("ours, packed", "ours", store="ours", by_state=_OURS),
    System("ours, mirrored", "ours", mirrored=True, by_state=_OURS),
    System("mlx-vlm offload", "mlx_vlm", "mlx-vlm==0.7.10", "mlx-vlm"),
    System("bigrig", "bigrig", "bigrig==0.9.1", "bigrig"),
    System("bigrig, slots", "bigrig", "bigrig==0.9.1", "bigrig", options={"views": False}),
    System("boyle", "boyle", "boyle==0.2.1"),
    System("boyle, packed", "boyle", "boyle==0.2.1", "boyle"),
    System("nunspark", "nunspark", "nunspark==0.13.0", "nunspark"),
    System(
        "nunspark, look-ahead", "nunspark", "nunspark==0.13.0", "nunspark",
        options={"lookahead": True, "bulk_warm": True},
    ),
]  # fmt: skip


def environment(work: Path, requirement: str) -> Path:
    """The interpreter of a rival's own environment, made where it is missing."""
    folder = work / "environments" / requirement.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        backend = "" if sys.platform == "darwin" else "[cpu]"
        pins = [requirement, f"mlx{backend}=={mx.__version__}", f"mlx-lm=={version('mlx-lm')}"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        (folder / "ready").touch()
    return python


def checkpoint(work: Path, name: str) -> Path:
    """The folder of a model by its short name, written where it is missing."""
    if name == "demo":
        folder = work / "models" / "demo"
        shutil.copytree(demo_model(), folder, dirs_exist_ok=True)
        return folder
    if name == "4bit":
        return write_random_model(work / "models" / "4bit", layers=4, experts=256, bits=4)
    if name == "heavy":
        # A token takes 1.3 parameters outside the experts for each one in them: 101 and 75 million
        # here; in Qwen3.5-397B-A17B 9.4 and 7.5 billion.
        return write_random_model(
            work / "models" / "heavy", layers=4, experts=128, bits=4, heads=160
        )
    if name == "float32":
        return write_random_model(work / "models" / "float32", layers=4)
    return Path(name)


def expert_layout(folder: Path) -> tuple[int, int, int, int]:
    """Layers with experts, experts a layer, bytes of one expert and its parts: from the headers."""
    shapes: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for name, t in header.items():
            if ".switch_mlp." in name:
                start, end = t["data_offsets"]
                shapes[name] = (t["shape"][0], end - start)
    layers = len({name.split(".switch_mlp.")[0] for name in shapes})
    experts = next(iter(shapes.values()))[0]
    nbytes = sum(size for _, size in shapes.values()) // (layers * experts)
    return layers, experts, nbytes, len(shapes) // layers


def call(python: Path | str, adapter: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """One run of an adapter. Whatever happens to it comes back as a result."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
        json.dump(job, f)
        f.flush()
        command = [str(python), str(ADAPTERS / f"run_{adapter}.py"), f.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer within {timeout:.0f} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and last.startswith("{"):
        result: dict[str, Any] = json.loads(last)
        return result
    error = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failed": f"exit status {done.returncode}: {error}"}


def prepare(
    args: argparse.Namespace, systems: list[System], folder: Path, layers: int
) -> tuple[dict[str, Path | str], dict[str, str]]:
    """Environments and packed copies. Returns interpreters, and why a system cannot take part."""
    pythons: dict[str, Path | str] = {}
    refused: dict[str, str] = {}
    packed: dict[str, str] = {}
    for s in systems:
        try:
            pythons[s.name] = environment(args.work, s.requirement) if s.requirement else (
                sys.executable
            )  # fmt: skip
        except subprocess.CalledProcessError as e:
            refused[s.name] = f"cannot be installed: {e}"
            continue
        for copy in mirrors_of(args, folder) if s.mirrored else ():
            if mirror.main([str(folder), copy, "--no-progress"]):
                refused[s.name] = f"cannot be mirrored to {copy}"
        if not s.store:
            continue
        store = store_of(args.work, folder, s)
        if s.store not in packed and not (store / "complete").exists():
            shutil.rmtree(store, ignore_errors=True)
            job = {
                "pack": True, "checkpoint": str(folder), "store": str(store / "data"),
                "options": s.options, "layers": layers,
            }  # fmt: skip
            result = call(pythons[s.name], s.adapter, job, args.timeout)
            packed[s.store] = result.get("failed", result.get("refused", ""))
            if not packed[s.store]:
                (store / "complete").touch()
        if packed.get(s.store):
            refused[s.name] = f"cannot pack: {packed[s.store]}"
    return pythons, refused


def store_of(work: Path, folder: Path, system: System) -> Path:
    return work / "stores" / folder.name / system.store


def mirrors_of(args: argparse.Namespace, folder: Path) -> list[str]:
    return [str(drive / folder.name) for drive in args.mirrors]


def compare_model(args: argparse.Namespace, name: str, report: dict[str, Any]) -> None:
    """All rounds on one model; appends to `report["runs"]` and saves it as it goes."""
    folder = checkpoint(args.work, name)
    name = folder.name  # no machine's paths in the report
    layers, experts, expert_bytes, parts = expert_layout(folder)
    tiny = expert_bytes < parts * TINY_READ_BYTES
    top_k = json.loads((folder / "config.json").read_text())["num_experts_per_tok"]
    systems = [s for s in SYSTEMS if not args.systems or s.name in args.systems]
    pythons, refused = prepare(args, systems, folder, layers)
    report["models"][name] = {
        "layers": layers, "experts": experts, "expert_bytes": expert_bytes, "top_k": top_k,
        "all_expert_bytes": layers * experts * expert_bytes,
    }  # fmt: skip
    failures: dict[tuple, int] = {}
    done = [r["round"] for r in report["runs"] if r["model"] == name]
    start = max(done, default=-1) + 1
    for round_number in range(start, start + args.repeats):
        for prompt_length in args.prompts:
            tokens = prompt_tokens(folder, prompt_length + args.decode)
            for state in args.states:
                for share in args.shares:
                    slots = max(top_k, round(share * experts))
                    for s in systems:
                        key = (s.name, state, share, prompt_length)
                        job = {
                            "checkpoint": str(folder), "layers": layers, "state": state,
                            "slots": slots, "cache_bytes": layers * slots * expert_bytes,
                            "prompt": tokens[:prompt_length],
                            "continuation": tokens[prompt_length:],
                            "options": s.options | s.by_state.get(state, {}),
                            "store": (
                                str(store_of(args.work, folder, s) / "data") if s.store else None
                            ),
                        }  # fmt: skip
                        if s.ours and not s.store and tiny:  # as `auto` does
                            job["options"]["bypass_page_cache"] = "off"
                        if s.mirrored:
                            job["options"]["mirrors"] = mirrors_of(args, folder)
                        if s.name in refused:
                            result: dict[str, Any] = {"refused": refused[s.name]}
                        elif s.name == "stock" and share != args.shares[0]:
                            continue  # holds everything whatever the share: once a round
                        elif failures.get(key, 0) >= 2:
                            continue
                        else:
                            result = call(pythons[s.name], s.adapter, job, args.timeout)
                        if "refused" in result or "failed" in result:
                            failures[key] = failures.get(key, 0) + 1
                        report["runs"].append({
                            "model": name, "state": state, "share": share, "slots": slots,
                            "cache_bytes": job["cache_bytes"], "prompt_tokens": prompt_length,
                            "system": s.name, "round": round_number, **result,
                        })  # fmt: skip
                        print(describe(report["runs"][-1]), flush=True)
                    save(args, report)


def describe(run: dict[str, Any]) -> str:
    where = (
        f"{run['round'] + 1} {run['model']} {run['prompt_tokens']} {run['state']} "
        f"{run['share']:.1%} {run['system']:21s}"
    )
    if "decode_tokens_per_s" not in run:
        return f"{where} {run.get('refused') or run.get('failed')}"
    return (
        f"{where} decode {run['decode_tokens_per_s']:7.2f}  prefill "
        f"{run['prefill_tokens_per_s']:7.1f} tok/s  RSS {run['peak_rss_bytes'] / 1e9:.2f} GB"
    )


def save(args: argparse.Namespace, report: dict[str, Any]) -> None:
    for file, text in (
        (args.json, json.dumps(report, indent=1) + "\n"), (args.markdown, markdown(report)),
    ):  # fmt: skip
        part = file.with_suffix(".part")
        part.write_text(text)
        os.replace(part, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda kind: lambda text: [kind(x) for x in text.split(",")]  # noqa: E731
    names = numbers(str)
    add = parser.add_argument
    add(
        "--work", type=Path, required=True, help="folder for environments, models and packed copies"
    )
    add(
        "--models",
        type=names,
        default=["demo", "4bit", "float32", "heavy"],
        help="a folder's path, or demo (the embedded one), 4bit, float32, heavy (its trunk)",
    )
    add("--shares", type=numbers(float), default=[0.125, 0.25, 0.5])
    add("--states", type=names, default=["cold", "warm"], help="of cold, once, warm")
    add("--prompts", type=numbers(int), default=[64, 1024], help="tokens")
    add("--decode", type=int, default=32, help="timed decode steps")
    add("--repeats", type=int, default=5)
    add("--systems", type=lambda t: t.split(";"), help="names, separated by semicolons")
    add(
        "--mirrors",
        type=numbers(Path),
        help="folders for the copies of 'ours, mirrored', each on a drive of its own (default: two "
        "in WORK, on the one drive that it has)",
    )
    add("--timeout", type=float, default=600, help="seconds for one run")
    add("--json", type=Path, help="default: WORK/compare.json")
    add("--markdown", type=Path, help="default: WORK/compare.md")
    add("--quick", action="store_true", help="the embedded model, 25 %% cold, 2 rounds")
    add("--append", action="store_true", help="add rounds to --json instead of replacing it")
    add("--report", type=Path, help="only write the tables of this JSON file")
    args = parser.parse_args()
    if args.quick:
        args.models, args.shares, args.states = ["demo"], [0.25], ["cold"]
        args.prompts, args.decode, args.repeats = [64], 24, 2
    if args.report:
        print(markdown(json.loads(args.report.read_text())))
        return
    if args.systems and (unknown := set(args.systems) - {s.name for s in SYSTEMS}):
        parser.error(f"unknown systems {sorted(unknown)}: {'; '.join(s.name for s in SYSTEMS)}")
    args.work.mkdir(parents=True, exist_ok=True)
    args.mirrors = args.mirrors or [args.work / "mirrors" / n for n in ("1", "2")]
    args.json = args.json or args.work / "compare.json"
    args.markdown = args.markdown or args.work / "compare.md"
    report: dict[str, Any] = {
        "machine": f"{host.system()} {host.machine()}, {os.cpu_count()} cores, "
        f"{mx.default_device()}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {p: version(p) for p in ("mlx", "mlx-lm", "mlx-streamexperts")},
        "rivals": sorted({s.requirement for s in SYSTEMS if s.requirement}),
        "decode_tokens": args.decode, "models": {}, "runs": [],
        "ours": [s.name for s in SYSTEMS if s.ours],
    }  # fmt: skip
    if args.append and args.json.exists():
        before = json.loads(args.json.read_text())
        report |= {"models": before["models"], "runs": before["runs"]}
    for name in args.models:
        compare_model(args, name, report)
    save(args, report)
    print(args.markdown.read_text())


if __name__ == "__main__":
    main()
