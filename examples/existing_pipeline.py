"""A plain mlx-lm pipeline, with the lines that stream its experts.

python examples/existing_pipeline.py mlx_streamexperts/data/demo

Without the two marked lines this is an ordinary mlx-lm script that prints the same. The command
above uses the embedded model, in a checkout.
"""

import sys

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

import mlx_streamexperts  # <-- added

mlx_streamexperts.patch(cache="10MB").install()  # <-- added; for your own model: memory="96GB"

QUESTIONS = ["In the beginning", "And God said", "Then the people"]


def main() -> None:
    model, tokenizer = mlx_lm.load(sys.argv[1])
    sampler = make_sampler(temp=0.0)
    prompt_cache = make_prompt_cache(model)
    for question in QUESTIONS:
        answer = mlx_lm.generate(
            model,
            tokenizer,
            prompt=question,
            sampler=sampler,
            prompt_cache=prompt_cache,
            max_tokens=20,
        )
        print(f"{question}: {answer!r}")


if __name__ == "__main__":
    main()
