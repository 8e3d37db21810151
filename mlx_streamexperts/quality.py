"""Measure what lossy settings cost and bring on your text, and recommend one.

python -m mlx_streamexperts.quality
python -m mlx_streamexperts.quality --model ./my-model --memory 24GB --text my.txt --plot it.svg

Every setting runs the same windows of the text, each from an empty expert cache: a prompt first,
then token after token as they are in the text. Prices are against the exact model: KL divergence,
perplexity, the share of tokens with the same likeliest successor, and a small bundled task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._cli.options import ended, failed, interrupted, make_parser
from ._config import format_size
from ._errors import StreamError

if TYPE_CHECKING:
    from ._analysis.quality import Price

_INSTEAD = "Prices are measured with models of mlx-lm"
_HEAD = (
    "setting", "perplexity", "KL, nats", "same first", "task", "left out", "of the mass",
    "tokens/s", "read a token", "prompt KL", "prompt tokens/s",
)  # fmt: skip


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's options, and those of streaming."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--model")
    add("--text", type=Path, metavar="FILE",
        help="your text, UTF-8. Default: the texts of a report, which are shipped")  # fmt: skip
    add("--try", action="append", dest="tried", metavar="SETTING",
        help="a value of --lossy to measure; can be given more than once. Default: the levels, "
        "and some of the other ways")  # fmt: skip
    add("--budget", type=float, default=0.01, metavar="SHARE",
        help="recommend the fastest setting that raises perplexity by at most this "
        "(default: 0.01, one percent)")  # fmt: skip
    add("--tokens", type=int, default=1024, help="of the text, at most (default: 1024)")
    add("--window", type=int, default=128,
        help="tokens that run one after another (default: 128)")  # fmt: skip
    add("--prompt-tokens", type=int, default=32,
        help="of a window, which run as its prompt (default: 32)")  # fmt: skip
    add("--task-items", type=int, default=12,
        help="items of the bundled task, at most 30; 0 leaves it out (default: 12)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--plot", type=Path, metavar="FILE", help="draw the frontier: .svg or .png")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    return make_parser(parser, "quality", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    from ._analysis.plots import plot_frontier, pyplot
    from ._analysis.quality import bundled_texts, measure, recommendation
    from ._cli.settings import stream_settings

    try:
        if args.lossy is not None:
            raise StreamError("--lossy: name the settings to measure with --try instead")
        if args.plot is not None:
            pyplot()  # before minutes of measuring
        texts = bundled_texts() if args.text is None else [_read(args.text)]
        config, model = stream_settings(args, _INSTEAD)
        assert model is not None
        found = list(measure(
            model, config, texts, args.tried, args.tokens, args.window,
            args.prompt_tokens, args.task_items, args.trust_remote_code, config.progress,
        ))  # fmt: skip
        if args.json is not None:
            args.json.write_text(json.dumps([p.as_dict() for p in found], indent=1) + "\n")
        if args.plot is not None:
            plot_frontier(found, args.plot)
    except (StreamError, OSError) as e:
        return failed(e)
    except KeyboardInterrupt:
        return interrupted()
    print("\n".join(table(found)))
    print(recommendation(found, args.budget))
    return 0


def table(found: Sequence[Price]) -> list[str]:
    """The prices as lines of a Markdown table."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for x in found:
        exact = x is found[0]
        change = f" ({x.decoded.perplexity_change:+.2%} ± {x.decoded.change_error:.2%})"
        cells = (
            x.setting,
            f"{x.decoded.perplexity:.3f}" + ("" if exact else change),
            f"{x.decoded.kl_nats:.4f}",
            f"{x.decoded.same_first:.1%}",
            "-" if x.task_score is None else f"{x.task_score:.0%}",
            f"{x.share_left_out:.1%}",
            f"{x.mass_left_out:.2%}",
            f"{x.decoding.tokens_per_s:.3g}",
            format_size(x.decoding.bytes_per_token),
            f"{x.prompts.kl_nats:.4f}",
            f"{x.prefill.tokens_per_s:.3g}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise StreamError(f"{file}: cannot be read as text: {e}") from e


if __name__ == "__main__":
    sys.exit(ended(main))
