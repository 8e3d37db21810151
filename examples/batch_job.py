"""Answer a file of prompts, several at once. After an interruption the same command resumes.

python examples/batch_job.py prompts.jsonl answers.jsonl
python examples/batch_job.py prompts.jsonl answers.jsonl --model ./my-model --memory 90GB --batch 32

A line of the input is {"id": ..., "prompt": ...}, one of the output {"id", "model", "text",
"tokens"}. Results are in answers.jsonl.partial, synced after every batch, until all are there.
Tokens of one batch that choose the same expert share its read, so prompts of one kind belong
together.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm import batch_generate

from mlx_streamexperts import StreamError, demo_model, load, stream


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The jobs of the input file. A job without an id gets its line number."""
    jobs = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            job = json.loads(line)
            jobs.append({"id": job.get("id", number), "prompt": job["prompt"]})
    if len({job["id"] for job in jobs}) < len(jobs):
        raise SystemExit(f"{file}: two prompts have the same id")
    return jobs


def finished(partial: Path, model: str) -> set[Any]:
    """Ids that an earlier run answered. Cuts off the line that it was writing when it ended."""
    if not partial.exists():
        return set()
    done, whole = set(), 0
    with partial.open("rb+") as f:
        for line in f:
            if not line.endswith(b"\n"):
                break
            result = json.loads(line)
            if result["model"] != model:
                raise SystemExit(f"{partial}: begun with {result['model']}, not with {model}")
            done.add(result["id"])
            whole += len(line)
        f.truncate(whole)
    return done


def batches(jobs: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for first in range(0, len(jobs), size):
        yield jobs[first : first + size]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", help="folder or repository; default: the embedded model")
    parser.add_argument("--memory", help="all that MLX may hold, for example 90GB")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once")
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args(argv)

    if args.answers.exists():
        print(f"{args.answers}: is there already", file=sys.stderr)
        return 1
    name = args.model or str(demo_model())
    partial = args.answers.with_name(args.answers.name + ".partial")
    done = finished(partial, name)
    jobs = [job for job in read_prompts(args.prompts) if job["id"] not in done]
    print(f"{len(done)} answered before, {len(jobs)} to do", file=sys.stderr)

    budget = {"cache": "10MB"} if args.model is None else {"memory": args.memory}
    try:
        model, tokenizer = load(name, **budget)
        with stream(model) as expert_stream, partial.open("a") as out:
            for batch in batches(jobs, args.batch):
                prompts = [tokenizer.encode(job["prompt"]) for job in batch]
                replies = batch_generate(
                    model,
                    tokenizer,
                    prompts,
                    max_tokens=args.max_tokens,
                    prefill_step_size=expert_stream.plan.prefill_tokens,
                    return_token_ids=True,
                )
                for job, text, tokens in zip(batch, replies.texts, replies.token_ids, strict=True):
                    result = {"id": job["id"], "model": name, "text": text, "tokens": len(tokens)}
                    out.write(json.dumps(result) + "\n")
                out.flush()
                os.fsync(out.fileno())  # an answer that is in the file is never computed again
            print(f"hit rate {expert_stream.stats().cache.hit_rate:.0%}", file=sys.stderr)
    except StreamError as e:  # what was answered so far is kept: the same command goes on
        print(f"error: {e}", file=sys.stderr)
        return 1
    partial.replace(args.answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
