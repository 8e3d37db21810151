"""Measures a finished checkpoint on the held-out text.

Reports loss, perplexity and bits per byte by topic for the shipped 4-bit
weights and the unquantised ones, against unigram and bigram models of the same
training tokens; how the router spreads each topic over the experts; and sample
completions. MLX's CPU backend is slow on long prompts, so the losses come from
model.py holding the checkpoint's (dequantised) weights, after mlx_lm has given
the same losses on the first `--check` half windows of every topic.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler
from model import DemoConfig, DemoModel
from torch.nn import functional

LENGTH = 1024
DISCOUNT = 0.75  # absolute discounting of the bigram model


def read_windows(tokens: Path, topic: str, count: int) -> np.ndarray:
    """Up to `count` windows of LENGTH + 1 held-out tokens, spread evenly -> [n, LENGTH + 1]."""
    flat = np.load(tokens / f"{topic}.test.npy").astype(np.int64)
    rows = (len(flat) - 1) // LENGTH
    starts = np.linspace(0, rows - 1, min(rows, count)).astype(np.int64) * LENGTH
    return flat[starts[:, None] + np.arange(LENGTH + 1)]


def token_bytes(tokenizer: Any) -> np.ndarray:
    """Bytes of text each token stands for; byte-level tokens spell one byte a character."""
    special = set(tokenizer.all_special_ids)
    sizes = np.zeros(len(tokenizer), dtype=np.int64)
    for token, i in tokenizer.get_vocab().items():
        sizes[i] = 0 if i in special else len(token)
    return sizes


# --- the model -------------------------------------------------------------


def dequantized_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights a loaded mlx_lm model computes with, under model.py's names."""
    weights = {}
    for path, module in model.named_modules():
        if hasattr(module, "scales"):
            w = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
            weights[f"{path}.weight"] = w
    for path, w in tree_flatten(model.parameters()):
        if path.endswith(".weight"):
            weights.setdefault(path, w)
    arrays = {
        k.removeprefix("model."): torch.from_numpy(np.array(w.astype(mx.float32)))
        for k, w in weights.items()
    }
    state = {}
    for name, w in arrays.items():
        if ".switch_mlp." in name:
            prefix, projection = name.split("switch_mlp.")
            if projection == "gate_proj.weight":
                up = arrays[f"{prefix}switch_mlp.up_proj.weight"]
                state[f"{prefix}gate_up"] = torch.stack([w, up], dim=1)
            elif projection == "down_proj.weight":
                state[f"{prefix}down"] = w
        elif "_proj." in name:
            state[name] = w
        else:
            state[name.removesuffix(".weight")] = w
    return state


def mlx_loss(model: nn.Module, windows: np.ndarray) -> float:
    tokens = mx.array(windows)
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return float(nn.losses.cross_entropy(logits, tokens[:, 1:]).mean())


@torch.no_grad()
def torch_losses(model: DemoModel, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> loss of every token [n, LENGTH], expert load of every window [n, layers, experts]."""
    losses, loads = [], []
    for row in torch.from_numpy(windows):
        logits, _, _, load_ = model(row[None, :-1])
        losses.append(
            functional.cross_entropy(logits[0].float(), row[1:], reduction="none").numpy()
        )
        loads.append(load_.numpy())
    return np.stack(losses), np.stack(loads)


# --- baselines -------------------------------------------------------------


class NGrams:
    """Unigram (add one) and bigram (absolute discounting onto the unigram) of some tokens."""

    def __init__(self, arrays: list[np.ndarray], vocab: int) -> None:
        self.vocab = vocab
        pairs = np.zeros(vocab * vocab, dtype=np.int32)
        for tokens in arrays:
            keys = tokens[:-1].astype(np.int64) * vocab + tokens[1:]
            values, counts = np.unique(keys, return_counts=True)
            pairs[values] += counts.astype(np.int32)
        self.pairs = pairs.reshape(vocab, vocab)
        single = sum(np.bincount(tokens, minlength=vocab) for tokens in arrays)
        self.unigram = (single + 1) / (single.sum() + vocab)
        self.context = self.pairs.sum(1, dtype=np.int64)
        self.kinds = np.array([np.count_nonzero(row) for row in self.pairs])

    def losses(self, windows: np.ndarray) -> tuple[float, float]:
        """Mean unigram and bigram loss in nats."""
        before, after = windows[:, :-1], windows[:, 1:]
        uni = self.unigram[after]
        total = np.maximum(self.context[before], 1)
        kept = np.maximum(self.pairs[before, after] - DISCOUNT, 0) / total
        backed_off = np.where(self.context[before] > 0, DISCOUNT * self.kinds[before] / total, 1.0)
        return float(-np.log(uni).mean()), float(-np.log(kept + backed_off * uni).mean())


# --- router ----------------------------------------------------------------


def router_report(loads: dict[str, np.ndarray]) -> dict[str, Any]:
    """How differently the topics use the experts; loads [windows, layers, experts]."""
    topics = list(loads)
    mean = {t: w.mean(0) for t, w in loads.items()}  # [layers, experts]
    half = {t: (w[0::2].mean(0), w[1::2].mean(0)) for t, w in loads.items()}

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # -> [layers]
        return 0.5 * np.abs(a - b).sum(-1)

    pairs = [(a, b) for i, a in enumerate(topics) for b in topics[i + 1 :]]
    between = np.mean([distance(mean[a], mean[b]) for a, b in pairs], axis=0)
    within = np.mean([distance(*half[t]) for t in topics], axis=0)
    top = {t: np.sort(m, -1)[:, ::-1] for t, m in mean.items()}
    every = np.mean(list(mean.values()), axis=0)
    return {
        "total_variation_between_topics_by_layer": between.round(4).tolist(),
        "total_variation_within_topic_by_layer": within.round(4).tolist(),
        "total_variation_by_topic_pair": {
            f"{a}-{b}": round(float(distance(mean[a], mean[b]).mean()), 4) for a, b in pairs
        },
        "share_of_busiest_16_experts": {
            t: round(float(top[t][:, :16].sum(-1).mean()), 4) for t in topics
        },
        "share_of_busiest_16_experts_all_topics": round(
            float(np.sort(every, -1)[:, ::-1][:, :16].sum(-1).mean()), 4
        ),
        "busiest_experts_by_layer": {
            t: np.argsort(-mean[t], axis=-1)[:, :8].tolist() for t in topics
        },
        "expert_load": {t: mean[t].round(4).tolist() for t in topics},
    }


# --- samples ---------------------------------------------------------------


def sample_completions(
    model: nn.Module, tokenizer: Any, prompts: list[dict[str, str]], tokens: int
) -> list[dict[str, Any]]:
    sampler = make_sampler(temp=0.7, top_p=0.95)
    out = []
    for i, item in enumerate(prompts):
        mx.random.seed(i)
        text, rate = "", 0.0
        for part in stream_generate(
            model, tokenizer, item["prompt"], max_tokens=tokens, sampler=sampler
        ):
            text, rate = text + part.text, part.generation_tps
        out.append({**item, "completion": text, "tokens_per_second": round(rate, 1)})
    return out


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the 4-bit folder")
    parser.add_argument("--float-model", type=Path, required=True, help="unquantised checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help="folder tokenizer.py wrote")
    parser.add_argument("--prompts", type=Path, help="prompts.json, for the samples")
    parser.add_argument("--out", type=Path, required=True, help="eval.json")
    parser.add_argument("--windows", type=int, default=32, help="per topic, 1024 tokens each")
    parser.add_argument(
        "--check", type=int, default=1, help="half windows per topic run by mlx_lm too"
    )
    parser.add_argument("--sample-tokens", type=int, default=100)
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    topics = sorted(p.name.split(".")[0] for p in args.tokens.glob("*.test.npy"))
    windows = {t: read_windows(args.tokens, t, args.windows) for t in topics}
    result: dict[str, Any] = {
        "window_tokens": LENGTH, "sample_tokens": args.sample_tokens, "topics": {}
    }  # fmt: skip
    loads: dict[str, np.ndarray] = {}
    largest_difference = 0.0

    for label, folder in (("4bit", args.model), ("unquantised", args.float_model)):
        model, tokenizer, config = load(str(folder), return_config=True)
        sizes = token_bytes(tokenizer)
        names = DemoConfig.__dataclass_fields__
        ours = DemoModel(DemoConfig(**{k: v for k, v in config.items() if k in names}))
        ours.load_state_dict(dequantized_state(model))
        for topic in topics:
            started = time.perf_counter()
            row = result["topics"].setdefault(topic, {})
            losses, load_ = torch_losses(ours, windows[topic])
            if args.check:
                part = windows[topic][: args.check, : LENGTH // 2 + 1]
                theirs = mlx_loss(model, part)
                gap = abs(theirs - float(losses[: args.check, : LENGTH // 2].mean()))
                assert gap < 1e-3, f"{topic}: mlx_lm and model.py differ by {gap:.2e} nats"
                largest_difference = max(largest_difference, gap)
            targets = windows[topic][:, 1:]
            loss = float(losses.mean())
            row["tokens"] = int(targets.size)
            row["bytes"] = int(sizes[targets].sum())
            row[label] = {
                "loss": round(loss, 4),
                "perplexity": round(math.exp(loss), 2),
                "bits_per_byte": round(loss / math.log(2) * row["tokens"] / row["bytes"], 4),
            }
            if label == "4bit":
                loads[topic] = load_
            print(label, topic, row[label], f"{time.perf_counter() - started:.0f} s", flush=True)
        if label == "4bit" and args.prompts:
            prompts = json.loads(args.prompts.read_text())
            result["samples"] = sample_completions(model, tokenizer, prompts, args.sample_tokens)
        vocab = config["vocab_size"]
    result["largest_loss_difference_to_mlx_lm"] = largest_difference
    result["router"] = router_report(loads)

    train = {t: np.load(args.tokens / f"{t}.train.npy") for t in topics}
    everything = NGrams(list(train.values()), vocab)
    for topic in topics:
        row = result["topics"][topic]
        own = NGrams([train[topic]], vocab)
        baselines = {
            "unigram": everything.losses(windows[topic])[0],
            "bigram": everything.losses(windows[topic])[1],
            "bigram_own_topic": own.losses(windows[topic])[1],
        }
        for name, loss in baselines.items():
            row[name] = {
                "loss": round(loss, 4),
                "perplexity": round(math.exp(loss), 2),
                "bits_per_byte": round(loss / math.log(2) * row["tokens"] / row["bytes"], 4),
            }
        print(topic, {k: v["perplexity"] for k, v in row.items() if isinstance(v, dict)})
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
