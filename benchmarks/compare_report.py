"""The tables of `compare.py`, from its JSON."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

Run = dict[str, Any]
Setting = tuple[str, int, str, float]  # model, prompt tokens, state, share
DECODE, PREFILL = "decode_tokens_per_s", "prefill_tokens_per_s"


def rounds(report: dict[str, Any]) -> dict[Setting, dict[str, list[Run]]]:
    """Runs by setting and system. Stock, which has no share, stands in every share."""
    settings: dict[Setting, dict[str, list[Run]]] = {}
    stock: dict[tuple, list[Run]] = defaultdict(list)
    for run in report["runs"]:
        at = (run["model"], run["prompt_tokens"], run["state"])
        if run["system"] == "stock":
            stock[at].append(run)
            continue
        systems = settings.setdefault((*at, run["share"]), {})
        systems.setdefault(run["system"], []).append(run)
    for setting, systems in settings.items():
        settings[setting] = {"stock": stock[setting[:3]], **systems}
    return settings


def finished(runs: list[Run]) -> list[Run]:
    return [r for r in runs if DECODE in r]


def median(runs: list[Run], key: str) -> float:
    return statistics.median(r[key] for r in finished(runs))


def spread(runs: list[Run], key: str) -> str:
    values = sorted(r[key] for r in finished(runs))
    digits = 1 if values[-1] >= 10 else 2
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({values[0]:.{digits}f}-{values[-1]:.{digits}f})"


def ratio(runs: list[Run], others: list[Run], key: str) -> float | None:
    """Median of the ratios of the rounds that both finished."""
    by_round = {r["round"]: r[key] for r in finished(others)}
    ratios = [r[key] / by_round[r["round"]] for r in finished(runs) if r["round"] in by_round]
    return statistics.median(ratios) if ratios else None


def best(systems: dict[str, list[Run]], names: list[str], key: str) -> str | None:
    """The name with the highest median among those that ran."""
    able = [n for n in names if finished(systems.get(n, []))]
    return max(able, key=lambda n: median(systems[n], key), default=None)


def outputs(runs: list[Run], stock: list[Run]) -> str:
    """How many steps of all rounds chose stock's token, and how many had stock's very logits."""
    if not finished(stock):
        return "-"
    right = max((r["outputs"] for r in finished(stock)), key=len)
    pairs = [
        list(zip(run["outputs"], right, strict=False))  # appended rounds may differ in length
        for run in finished(runs)
    ]
    checked = sum(map(len, pairs))
    tokens, bits = (sum(a[i] == b[i] for p in pairs for a, b in p) for i in (0, 1))
    return f"{tokens}/{checked}, bits {bits}/{checked}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def summary(report: dict[str, Any]) -> str:
    """Ours against the best rival, setting by setting; a ratio below 1 is bold."""
    ours = report["ours"]
    rows = []
    for (model, prompt, state, share), systems in rounds(report).items():
        rivals = [n for n in systems if n not in ours and n != "stock"]
        cells = [model, str(prompt), state, f"{share:.1%}"]
        for key in (DECODE, PREFILL):
            rival, mine = best(systems, rivals, key), best(systems, ours, key)
            if not mine:
                cells += ["-"] * 4
                continue
            if rival:
                value = ratio(systems[mine], systems[rival], key)
                place = ratio(systems.get(ours[0], []), systems[rival], key)
                cells += [
                    f"{median(systems[rival], key):.1f} {rival}",
                    *(f"**{times(x)}**" if x and x < 1 else times(x) for x in (place, value)),
                ]
            else:
                cells += ["none ran", "-", "-"]
            cells.append(times(ratio(systems[mine], systems["stock"], key)))
        cells.append(memory(systems, rivals, ours))
        rows.append(cells)
    each = ["best rival, tok/s", "ours in place", "ours best", "of stock"]
    head = ["model", "prompt", "page cache", "share"]
    head += [f"{kind}: {x}" for kind in ("decode", "prefill") for x in each]
    return table([*head, "peak RSS, GB: ours / least rival"], rows)


def memory(systems: dict[str, list[Run]], rivals: list[str], ours: list[str]) -> str:
    def least(names: list[str]) -> str:
        values = [
            median(systems[n], "peak_rss_bytes") for n in names if finished(systems.get(n, []))
        ]
        return f"{min(values) / 1e9:.2f}" if values else "-"

    return f"{least(ours)} / {least(rivals)}"


def gigabytes(runs: list[Run], key: str) -> str:
    return f"{median(runs, key) / 1e9:.2f}"


def details(report: dict[str, Any]) -> str:
    """Every system in every setting."""
    rows = []
    for (model, prompt, state, share), systems in rounds(report).items():
        for name, runs in systems.items():
            cells = [model, str(prompt), state, f"{share:.1%}", name]
            done = finished(runs)
            if not done:
                why = next((r.get("refused") or r.get("failed") for r in runs), "not run")
                rows.append([*cells, "0", str(why).replace("|", "/"), *[""] * 10])
                continue
            steps = len(done[0]["step_seconds"])
            read = statistics.median(r["decode_read_bytes"] for r in done) / steps
            held = done[-1]["slot_bytes"]
            rows.append([
                *cells, str(len(done)),
                spread(runs, DECODE), times(ratio(runs, systems["stock"], DECODE)),
                spread(runs, PREFILL), times(ratio(runs, systems["stock"], PREFILL)),
                f"{median(runs, 'load_seconds'):.1f}", f"{read / 1e6:.1f}",
                f"{1e3 * median(runs, 'decode_cpu_seconds') / steps:.0f}",
                gigabytes(runs, "peak_rss_bytes"), gigabytes(runs, "peak_mlx_bytes"),
                "all" if held is None else f"{held / 1e6:.0f}", outputs(runs, systems["stock"]),
            ])  # fmt: skip
    head = [
        "model", "prompt", "page cache", "share", "system", "rounds", "decode tok/s", "of stock",
        "prefill tok/s", "of stock", "load s", "MB read/token",
        "CPU ms/token", "peak RSS GB", "peak MLX GB",
        "slots MB", "tokens as stock",
    ]  # fmt: skip
    return table(head, rows)


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    models = "\n".join(
        f"- {n}: {m['layers']} layers of {m['experts']} experts, {m['expert_bytes'] / 1e6:.3g} MB "
        f"each, top-{m['top_k']}; {m['all_expert_bytes'] / 1e9:.3g} GB of experts"
        for n, m in report["models"].items()
    )
    return (
        f"{report['machine']}; {versions}; {', '.join(report['rivals'])}; {report['date']}.\n"
        f"{report['decode_tokens']} decode steps a run; medians of rounds (lowest to "
        f"highest).\n\n{models}\n\n"
        f"## Ours against the best rival\n\n{summary(report)}\n## Every system\n\n{details(report)}"
    )
