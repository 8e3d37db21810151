"""Trains the byte-level BPE tokenizer and turns the topic texts into tokens.

The tokenizer sees an equal share of each topic's training text and nothing of
the test text. Every document is followed by `<|endoftext|>`; tokens are stored
as one flat uint16 array per topic and side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
CONTEXT_LENGTH = 1024
# Words with one leading non-letter, digits in threes, runs of punctuation, runs of blanks.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_documents(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def topics_in(text: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in text.glob("*.train.jsonl"))


def sample(text: Path, bytes_per_topic: int) -> Iterator[str]:
    for topic in topics_in(text):
        left = bytes_per_topic
        for document in read_documents(text / f"{topic}.train.jsonl"):
            yield document[:left]
            left -= len(document)
            if left <= 0:
                break


def train_tokenizer(text: Path, vocab_size: int, bytes_per_topic: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(text, bytes_per_topic), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, path: Path, batch: int = 256) -> np.ndarray:
    """All documents of one file as one uint16 array, each closed by end-of-text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts: list[np.ndarray] = []
    group: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch_fast(group):
            parts.append(np.array([*encoding.ids, end], dtype=np.uint16))
        group.clear()

    for document in read_documents(path):
        group.append(document)
        if len(group) == batch:
            flush()
    flush()
    return np.concatenate(parts)


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the folder corpus.py wrote")
    parser.add_argument("--vocab-size", type=int, default=12288)
    parser.add_argument("--bytes-per-topic", type=int, default=5_000_000)
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    text, out = args.work / "text", args.work / "tokens"
    out.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(text, args.vocab_size, args.bytes_per_topic)
    save_tokenizer(tokenizer, args.work / "tokenizer")
    print("vocabulary", tokenizer.get_vocab_size(), flush=True)
    counts = {}
    for topic in topics_in(text):
        counts[topic] = {}
        for side in ("test", "train"):
            tokens = encode(tokenizer, text / f"{topic}.{side}.jsonl")
            np.save(out / f"{topic}.{side}.npy", tokens)
            counts[topic][f"{side}_tokens"] = len(tokens)
        print(topic, counts[topic], flush=True)
    (out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
