"""Write docs/predictions.md, and the table of Macs and models in the README.

    python docs/make_predictions.py

Everything in both is arithmetic on specifications, beside what others report.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_streamexperts._analysis.catalogue import KNOWN_MODELS, KnownModel, known_model
from mlx_streamexperts._analysis.predict import REPORTED, predict
from mlx_streamexperts._errors import BudgetError
from mlx_streamexperts._memory.hardware import named_machine
from mlx_streamexperts._osinfo import apple_budget

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- predictions -->", "<!-- end of predictions -->"
MACS = (
    "M4 16 GB", "M4 Pro 24 GB", "M4 Pro 48 GB", "M2 Max 96 GB", "M4 Max 128 GB", "M5 Max 128 GB",
    "M3 Ultra 256 GB", "M3 Ultra 512 GB",
)  # fmt: skip
IN_README = (
    ("Qwen3-30B-A3B", "M4 16 GB"), ("Qwen3-Next-80B", "M4 Pro 24 GB"),
    ("gpt-oss-120b", "M4 Pro 48 GB"), ("Qwen3.5-397B", "M4 Pro 48 GB"),
    ("Qwen3-235B", "M5 Max 128 GB"), ("Qwen3.5-397B", "M2 Max 96 GB"),
    ("Qwen3.5-397B", "M5 Max 128 GB"), ("Kimi K2.5", "M4 Max 128 GB"),
    ("Kimi K2.5", "M3 Ultra 512 GB"),
)  # fmt: skip
HEAD = (
    "| Mac | model | resident | tokens/s, predicted | first of 1,000 tokens | download | "
    "reported by others |\n|---|---|---|---|---|---|---|\n"
)


def texts() -> dict[Path, str]:
    """Each file with what it should contain."""
    readme = README.read_text()
    before, _, rest = readme.partition(BEGIN)
    table = before + BEGIN + "\n" + readme_table() + END + rest.partition(END)[2]
    return {DOCS / "predictions.md": page_text(), README: table}


def main() -> int:
    """Write both."""
    for file, text in texts().items():
        file.write_text(text)
    return 0


def row(model: KnownModel, mac: str) -> str:
    """One line of a table; an empty one if the model does not fit."""
    machine = named_machine(mac)
    try:
        plan = model.plan(apple_budget(machine.memory))
    except BudgetError:
        return ""
    p = predict(plan, machine)
    first = p.first_token.rounded(2) + " s"
    reported = [
        f"{r.tokens_per_s}"
        for r in REPORTED
        if r.machine == mac and known_model(r.model_type, r.layers) == model and r.top_k is None
    ]
    return (
        f"| {mac} | {model.name} | {plan.resident_share:.0%} | {p.tokens_per_s.rounded(2)} | "
        f"{first} | {'' if model.exact else 'about '}{model.disk / 1e9:.0f} GB | "
        f"{', '.join(reported)} |\n"
    )


def readme_table() -> str:
    pairs = [(next(m for m in KNOWN_MODELS if m.name.startswith(name)), mac)
             for name, mac in IN_README]  # fmt: skip
    return HEAD + "".join(row(*pair) for pair in pairs)


def page_text() -> str:
    """The page with every Mac, and the predictions beside every reported row."""
    lines = "".join(row(m, mac) for mac in MACS for m in KNOWN_MODELS)
    checks = ""
    for r in REPORTED:
        model = known_model(r.model_type, r.layers)
        assert model is not None
        try:
            there = predict(model.plan(r.memory, r.top_k), named_machine(r.machine))
            found = there.tokens_per_s.rounded(2)
        except BudgetError:
            found = "does not fit"
        checks += (
            f"| {r.machine} | {model.name} | {r.memory / 1e9:.0f} GB | {found} | "
            f"{r.tokens_per_s} | {r.note} |\n"
        )
    return f"""# Predictions

Nobody has measured this package on a Mac. Everything here is arithmetic on specifications, written by
`python docs/make_predictions.py`. [`report`](guide.md#measure-a-machine-and-share-the-report) measures
a machine, and its file is welcome.

## Macs and models

The budget is some 70 % of the memory, which a Mac's GPU can hold safely; some Macs [allow more](guide.md#the-wired-limit). Ranges are in brackets.
Models that do not fit are left out. A table cannot know your prompts: `doctor` judges your model's real
headers, and `doctor --trace` your own recording.

{HEAD}{lines}
## Beside what others report

Their systems differ from this one. Each result must lie in the range, or its note says why not; a
test holds this. The range is wide where nobody has published how a model routes.

| Mac | model | budget | predicted tokens/s | reported | by, and what differs |
|---|---|---|---|---|---|
{checks}
## How far off it is where we can measure

`python benchmarks/predictions.py` decodes the embedded model behind drives of stated rates and compares with
the formula, given the hit rate of the run. On 2 shared, busy cores (MLX 0.32.4, CPU backend, 2026-11-28; 25 and
50 % resident, 25 to 100 MB/s) the likely value was too fast in all six rows: by 18 to 143 %, 37 % at
the median. All six measured rates lay below their range. Other work on the machine, and wrong prefetches,
which the formula does not count, may be the reasons; we have not separated them. Expect less than the likely
value, and trust comparisons more than figures.

## What is assumed

- *Drive.* One basis for every Mac: sequential reads as reviewers measure them with Blackmagic's disk test, on
  1 TB or more. That is 2.7 GB/s for M1 to M4, 6.3 for M5; 5.4 for Pro, Max and Ultra up to M3, 7 for M4, 13
  for M5. Reads of experts are taken to reach 0.75 to 1.1 of it. Small drives reach half. State
  yours with `--drive 3GB/s`.
- *Memory.* Apple's specification; decoding is taken to reach 0.6 to 0.9 of it.
- *Waiting for a router.* 0.5 ms a layer, half of that at best.
- *Hit rate.* LRU curves that boyle published for three models. Another model gets their mean, and 0.1 more on
  both sides of their range.
- *Arithmetic of a prompt.* Two operations for each weight that a token uses. Prompts are taken to reach 0.3 to
  0.7 of the GPU's float32 rate by specification (M4 Max 18.4 Tflop/s); an M5 counts as four M4, as Apple states.
- *Not in it.* Run-ahead and right prefetches, which help; wrong prefetches, and attention over long contexts,
  which take longer.

The formula is in `_analysis/predict.py`. Sizes are in `_analysis/catalogue.py`; those of Kimi K2.5 and
Qwen3.5-397B are the checkpoints' own, the others ("about") follow from public configurations.
"""  # noqa: E501


if __name__ == "__main__":
    sys.exit(main())
