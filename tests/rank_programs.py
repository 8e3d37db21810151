"""What the ranks of distributed tests run: `python rank_programs.py NAME ARGUMENTS`.

Each program prints one JSON line at its end, and lets errors end the process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
from conftest import QUIET, smallest_cache
from mlx_lm.sample_utils import make_sampler

from mlx_streamexperts import (
    ExpertReadError,
    StreamConfig,
    StreamError,
    generate,
    load,
    patch,
    stream,
)
from mlx_streamexperts._distributed import watch
from mlx_streamexperts._loading import on_ranks

TOKENS, PREFILL = 20, 14
SHARED = StreamConfig(progress=False, prefetch="off", pipeline=True)


def rank() -> int:
    return int(mx.distributed.init().rank())


def load_part(folder: str, **options: Any) -> nn.Module:
    """This rank's part of a model, without tokenizer."""
    with patch(config=StreamConfig(**{"progress": False, "pipeline": True, **options})):
        return mlx_lm.utils.load_model(Path(folder))[0]


def save_logits(model: nn.Module, file: Path) -> None:
    vocab = families.VOCAB
    np.savez(file, *families.run(model, families.token_stream(vocab, TOKENS, 0), PREFILL))


def logits(out: str, *folders: str) -> None:
    """Logits of each model, with the smallest cache in which a token's experts fit."""
    layers, misses = [], []
    for number, folder in enumerate(folders):
        model = load_part(folder, cache=1 << 40, prefetch="off")
        with stream(model) as s:
            s.resize(smallest_cache(s))
            save_logits(model, Path(out) / f"{number}-{rank()}.npz")
            layers.append([x.name for x in s.layers])
            assert set(s.stats().layer_hit_rates) == set(layers[-1])
            misses.append(s.stats().cache.misses)
    print(json.dumps({"layers": layers, "misses": misses}))


def measured(folder: str, options: str) -> None:
    """The same, with options; and what memory and reading it took."""
    model = load_part(folder, **json.loads(options))
    with stream(model) as s:
        loaded = mx.get_peak_memory()
        save_logits(model, Path(folder) / f"measured-{rank()}.npz")
        report = {
            "stage": str(s.stage),
            "plan": {"trunk": s.plan.trunk, "cache": s.plan.cache, "experts": s.plan.experts},
            "loaded": loaded,
            "peak": mx.get_peak_memory(),
            "stats": s.stats().as_dict(),
            "prefill_tokens": s.plan.prefill_tokens,
        }
    print(json.dumps(report))


def parts_of_a_copy(folders: str, stores: str, shard: str) -> None:
    """Logits of this rank's own copy of its part, of its part of a store, and without a shard."""
    folder = folders.replace("{rank}", str(rank()))
    for name, store in (("in-place", None), ("packed", stores)):
        model = load_part(folder, cache="150kB", store=store)
        save_logits(model, Path(folder) / f"{name}.npz")
        stream(model).close()
    mx.eval(mx.distributed.all_sum(mx.ones(1), stream=mx.cpu))  # nobody deletes before all read
    if rank() == 1:
        (Path(folder) / shard).unlink()
    print(json.dumps(error_of(folder, cache="150kB")))


def failures(folder: str, other: str) -> None:
    """Load in ways that cannot work, one after the other, and in one that does."""
    second = rank() == 1
    found = [
        error_of(folder, memory="1GB,1MB", context_tokens=64),
        error_of(other if second else folder, cache="1MB"),
        error_of(folder, cache="1MB", context_tokens=64 if second else 4096),
        error_of(folder, cache="1MB", split="7,2"),
    ]
    libraries = on_ranks.libraries
    on_ranks.libraries = lambda: libraries() | {"mlx-lm": "1.0" if second else "2.0"}
    found.append(error_of(folder, cache="1MB"))
    on_ranks.libraries = libraries
    found.append(error_of(folder, cache="1MB"))
    found.append(str(stream(load_part(folder)).plan.memory))
    print(json.dumps(found))


def error_of(folder: str, **options: Any) -> str:
    """What loading raises."""
    try:
        model = load_part(folder, **options)
    except StreamError as e:
        return f"{type(e).__name__}: {e}"
    stream(model).close()
    return ""


def texts(folder: str) -> None:
    """Greedy text of a long prompt through `load`; one drawn without a seed, through mlx-lm's own
    way to load a part.
    """
    model, tokenizer = load(folder, cache="5MB", config=SHARED)
    prompt = tokenizer.encode("In the beginning " * 10)
    greedy = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=15, prefill_step_size=16)
    stream(model).close()
    group = mx.distributed.init()
    with patch(config=QUIET, cache="5MB"):
        try:
            mlx_lm.utils.sharded_load(folder, None, group)
            refused = ""
        except ValueError as e:
            refused = str(e)
        model, tokenizer = mlx_lm.utils.sharded_load(folder, group)
    mx.enable_compile()  # the random state is an input of the compiled sampler
    sampler = make_sampler(temp=1.0)
    drawn = mlx_lm.generate(model, tokenizer, prompt="The", max_tokens=15, sampler=sampler)
    print(json.dumps({"greedy": greedy, "drawn": drawn, "refused": refused}))


def one_ends(victim: str, how: str) -> None:
    """The command line, of which one rank is killed, stops or cannot read while it generates."""
    if how in (
        "SIGSTOP",
        "unplug",
    ):  # else longer than a loaded machine keeps a thread from running
        watch.SILENCE_SECONDS, watch.GRACE_SECONDS = 4.0, 1.0
    if how == "loading" and rank() == int(victim):
        on_ranks.discover = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    mlx_lm_generate = importlib.import_module("mlx_lm.generate")
    original, steps = mlx_lm_generate.generate_step, 0

    def stepping(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        for answer in original(*args, **kwargs):
            steps += 1
            if steps == 3 and rank() == int(victim):
                if how == "read":
                    file = Path("model.safetensors")
                    raise ExpertReadError("model.layers.1.mlp", 7, "weight", file, 0, 5)
                if how == "unplug":
                    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
                else:
                    os.kill(os.getpid(), getattr(signal, how))
            yield answer

    mlx_lm_generate.generate_step = stepping
    sys.exit(generate.main(["-m", "50", "--no-progress", "--cache", "5MB"]))


def command(*arguments: str) -> None:
    """The command line of `generate`."""
    sys.exit(generate.main(list(arguments)))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
