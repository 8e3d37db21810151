"""Load a model whose experts are streamed, and generate.

python examples/script.py
python examples/script.py --model mlx-community/Qwen3.5-397B-A17B-4bit --memory 90GB --prompt hello
"""

import argparse
import sys

import mlx_lm

from mlx_streamexperts import StreamError, demo_model, load, stream


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or repository; default: the embedded model")
    parser.add_argument("--memory", help="all that MLX may hold, for example 90GB")
    parser.add_argument("--prompt", default="In the beginning God created")
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args(argv)

    # The embedded model fits any machine: it gets a cache of a quarter of its experts.
    budget = {"cache": "10MB"} if args.model is None else {"memory": args.memory}
    try:
        model, tokenizer = load(args.model or str(demo_model()), **budget)
    except StreamError as e:  # too small a budget, a damaged file, ...: the message says what to do
        print(f"error: {e}", file=sys.stderr)
        return 1

    with stream(model) as expert_stream:  # closed at the end: slots, files and threads are freed
        prompt = args.prompt
        if tokenizer.chat_template is not None:  # a model for chats; the embedded one is not
            message = {"role": "user", "content": prompt}
            prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        for response in mlx_lm.stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=args.max_tokens,
            prefill_step_size=expert_stream.plan.prefill_tokens,
        ):
            print(response.text, end="", flush=True)
        print()

        stats = expert_stream.stats()
        print(
            f"{response.generation_tps:.1f} tokens/s, {stats.cache.hit_rate:.0%} of experts were "
            f"resident, {stats.read.bytes / 1e6:.1f} MB read",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
