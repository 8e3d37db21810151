"""Writes the shipped folder's model card from what the other steps measured.

Every number on the card comes from eval.json, sources.json, counts.json and the training log, so
that a rerun cannot leave an old one standing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CARD = """---
license: apache-2.0
library_name: mlx
pipeline_tag: text-generation
---

# The demonstration model of mlx-streamexperts

A small Mixture-of-Experts language model, trained from nothing for this package, so that streaming
can be seen at work, tested and studied with a *trained* router and without a 200 GB download. It
completes text; it follows no instructions and knows no facts worth trusting.

| | |
|---|---|
| architecture | `qwen3_moe`, as mlx-lm loads it unmodified |
| layers, experts, top-k | {layers}, {experts} per layer, {top_k} |
| hidden, expert width, heads | {hidden}, {inner}, {heads} query and {kv} key/value of {head_dim} |
| parameters | {parameters:.1f} M, of which {active:.1f} M are used for a token |
| vocabulary | {vocab:,}, byte-level BPE trained on the same text |
| context | {context} tokens |
| weights | 4-bit affine, group size 64, float32 scales (router 8-bit): {megabytes:.1f} MB |

## Held-out perplexity

Per token, on documents that were held out by a hash of their name ({windows} windows of up to
{window} tokens in all). *Bigram* counts pairs of the same training tokens (absolute discounting
onto the unigram), over all topics and over the topic's own; *unquantised* is the model before
rounding.

| topic | tokens | unigram | bigram | own bigram | unquantised | **shipped 4-bit** | bits per byte |
|---|---|---|---|---|---|---|---|
{perplexities}

Loss in nats, shipped weights: {losses}.
mlx-lm and the PyTorch model of the recipe agree on the loss of the same windows to {gap:.0e} nats.

## Routing differs by topic

Mean total-variation distance between two topics' use of the experts, by layer:
{between}; between two halves of the same topic: {within}. The busiest quarter of a layer's experts
serves {own:.0%} of a topic's choices, but {all:.0%} of all topics' together.

## Completions

Temperature 0.7, top-p 0.95, first try, cut after {sample_tokens} tokens.

{samples}

## Data

{total_mb:.0f} MB of text from Debian 12 packages, {total_tokens:.0f} M tokens; repeated paragraphs
removed, also between training and test text.

| topic | MB | training tokens | test tokens | licences of the text |
|---|---|---|---|---|
{data}

Packages: {packages}.

## Recipe

`examples/train_demo/` in the repository, step by step. Muon for matrices and AdamW for the rest,
{steps:,} steps of 128 windows of 1,024 tokens ({trained:.0f} M tokens; topics were seen {least} to
{most} times), {minutes:.1f} minutes on one NVIDIA H100. The last 30 % trained with 4-bit rounding
in the forward pass.

## Licence

The weights are released under Apache-2.0, like the package. The training text is under the licences
above; the model was made to be small and to complete text, not to reproduce it.
"""


def fill(model: Path, evaluation: dict[str, Any], work: Path, log: list[dict[str, Any]]) -> str:
    """The card's text."""
    config = json.loads((model / "config.json").read_text())
    sources = json.loads((work / "text" / "sources.json").read_text())
    counts = json.loads((work / "tokens" / "counts.json").read_text())
    done = next(line for line in reversed(log) if line.get("done"))
    parameters = next(line["parameters"] for line in log if "parameters" in line)
    topics, router = evaluation["topics"], evaluation["router"]
    d, i = config["hidden_size"], config["moe_intermediate_size"]
    idle = config["num_experts"] - config["num_experts_per_tok"]
    active = parameters - config["num_hidden_layers"] * idle * 3 * d * i

    def row(*cells: object) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    kinds = ("unigram", "bigram", "bigram_own_topic", "unquantised")
    perplexities = [
        row(
            topic, f"{t['tokens']:,}", *(f"{t[k]['perplexity']:,.1f}" for k in kinds),
            f"**{t['4bit']['perplexity']:.1f}**", f"{t['4bit']['bits_per_byte']:.3f}",
        )
        for topic, t in topics.items()
    ]  # fmt: skip
    samples = [
        f"*{s['topic']}*\n\n```\n{s['prompt']}⟶{s['completion'].rstrip()}\n```\n"
        for s in evaluation["samples"]
    ]
    data = [
        row(
            topic, f"{s['train_bytes'] / 1e6:.1f}", f"{counts[topic]['train_tokens']:,}",
            f"{counts[topic]['test_tokens']:,}", s["licences"],
        )
        for topic, s in sources.items()
    ]  # fmt: skip
    versions = {n: v for s in sources.values() for n, v in s["packages"].items()}
    return CARD.format(
        layers=config["num_hidden_layers"], experts=config["num_experts"],
        top_k=config["num_experts_per_tok"], hidden=d, inner=i,
        heads=config["num_attention_heads"], kv=config["num_key_value_heads"],
        head_dim=config["head_dim"], parameters=parameters / 1e6, active=active / 1e6,
        vocab=config["vocab_size"], context=config["max_position_embeddings"],
        megabytes=sum(f.stat().st_size for f in model.glob("*.safetensors")) / 1e6,
        windows=sum(-(-t["tokens"] // evaluation["window_tokens"]) for t in topics.values()),
        window=evaluation["window_tokens"], perplexities="\n".join(perplexities),
        losses=", ".join(f"{n} {t['4bit']['loss']:.3f}" for n, t in topics.items()),
        gap=evaluation["largest_loss_difference_to_mlx_lm"],
        between=", ".join(f"{x:.2f}" for x in router["total_variation_between_topics_by_layer"]),
        within=", ".join(f"{x:.2f}" for x in router["total_variation_within_topic_by_layer"]),
        own=sum(router["share_of_busiest_16_experts"].values()) / len(topics),
        all=router["share_of_busiest_16_experts_all_topics"],
        sample_tokens=evaluation["sample_tokens"], samples="\n".join(samples),
        total_mb=sum(s["train_bytes"] for s in sources.values()) / 1e6,
        total_tokens=sum(c["train_tokens"] for c in counts.values()) / 1e6,
        data="\n".join(data), packages=", ".join(f"{n} {v}" for n, v in sorted(versions.items())),
        steps=done["steps"], trained=done["tokens"] / 1e6,
        least=f"{min(done['epochs'].values()):.0f}", most=f"{max(done['epochs'].values()):.0f}",
        minutes=done["seconds"] / 60,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the 4-bit folder; gets the card")
    parser.add_argument("--eval", type=Path, required=True, help="eval.json of evaluate.py")
    parser.add_argument("--work", type=Path, required=True, help="the folder corpus.py wrote")
    parser.add_argument("--log", type=Path, required=True, help="log.jsonl of train.py")
    args = parser.parse_args()
    evaluation = json.loads(args.eval.read_text())
    log = [json.loads(line) for line in args.log.read_text().splitlines()]
    (args.model / "README.md").write_text(fill(args.model, evaluation, args.work, log))
    (args.model / "eval.json").write_text(json.dumps(evaluation, indent=1) + "\n")


if __name__ == "__main__":
    main()
