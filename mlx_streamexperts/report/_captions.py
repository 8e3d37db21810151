"""The sentences of a report: each answers a figure's question with the figures of its JSON."""

from __future__ import annotations

import statistics
from typing import Any

from .._analysis.replay import BEST
from .._config import format_size
from ._power import counted


def sentence(key: str, report: dict[str, Any]) -> str:
    """The answer to a panel's question, or why there is none."""
    return str(_SENTENCES[key](report))


def _share(x: float) -> str:
    return f"{100 * x:.0f} %"


def _name(row: dict[str, Any]) -> str:
    return f"{row['task']}, {row['language']}"


def _by_prompt(r: dict[str, Any]) -> str:
    rows = sorted(r["speed"]["by_prompt"], key=lambda x: x["tokens_per_s"]["median"])
    found, slow, fast = r["speed"]["tokens_per_s"], rows[0], rows[-1]
    inner = statistics.median(
        (x["tokens_per_s"]["high"] - x["tokens_per_s"]["low"]) / x["tokens_per_s"]["median"]
        for x in rows
    )
    return (
        f"{found['median']:.3g} tokens/s at the median prompt with "
        f"{_share(r['method']['resident_share'])} of the experts resident; from "
        f"{found['low']:.3g} ({_name(slow)}, {_share(slow['hit_rate'])} hits) to "
        f"{found['high']:.3g} ({_name(fast)}, {_share(fast['hit_rate'])} hits). "
        + (
            f"Repeats of one prompt differ by {_share(inner)}."
            if len(rows[0]["tokens_per_s"]["values"]) > 1
            else "Each was measured once, so that nothing tells how much repeats differ."
        )
    )


def _sustained(r: dict[str, Any]) -> str:
    found = r["speed"]["sustained"]
    rate, count = found["tokens_per_s"], len(found["windows"])
    drift = (
        "too few windows to tell a drift"
        if found["drift"] is None
        else f"the last third runs {100 * found['drift']:+.1f} % against the first"
    )
    dips = "no dips" if not found["dips"] else f"{found['dips']} of {count} windows are dips"
    return (
        f"{rate['median']:.3g} tokens/s over {found['seconds']:.0f} s without a pause "
        f"({rate['low']:.3g} to {rate['high']:.3g} in windows of {found['window_s']:.2g} s): "
        f"{drift}, {dips}. Prompts took {_share(1 - found['decode_s'] / found['seconds'])} of the "
        "time and are not in the rates." + (" It was interrupted." if found["interrupted"] else "")
    )


def _first_token(r: dict[str, Any]) -> str:
    rows, cold = r["speed"]["by_prompt_length"], r["speed"]["cold_start"]
    last = rows[-1]
    dropped = (
        "with the files dropped from the page cache before"
        if cold["page_cache_dropped"]
        else ("with the files as the page cache had them (this system cannot drop them)")
    )
    on_cpu = "cpu" in r["method"]["machine"]["mlx_device"]
    kernels = "" if on_cpu else ", with what the device has to compile for it"
    return (
        f"{rows[0]['seconds']['median']:.3g} s for {rows[0]['prompt_tokens']} tokens, "
        f"{last['seconds']['median']:.3g} s for {last['prompt_tokens']}. From a cold start, "
        f"{dropped}: {cold['load_s']:.3g} s to load and {cold['first_token_s']:.3g} s to the first "
        f"token of {cold['prompt_tokens']}, once{kernels}."
    )


def _context(r: dict[str, Any]) -> str:
    first, last = r["speed"]["by_prompt_length"][0], r["speed"]["by_prompt_length"][-1]
    change = last["tokens_per_s"]["median"] / first["tokens_per_s"]["median"] - 1
    return (
        f"{last['tokens_per_s']['median']:.3g} tokens/s after {last['prompt_tokens']} tokens, "
        f"{100 * change:+.0f} % against {first['prompt_tokens']}; other text, so other experts too."
    )


def _batch(r: dict[str, Any]) -> str:
    rows = r["speed"]["by_batch"]
    one, best = rows[0], max(rows, key=lambda x: x["tokens_per_s"]["median"])
    ratio = best["tokens_per_s"]["median"] / one["tokens_per_s"]["median"]
    return (
        f"Most with {best['batch']} at once: {best['tokens_per_s']['median']:.3g} tokens/s, "
        f"{ratio:.2g} times one sequence, each of which then gets "
        f"{best['tokens_per_s']['median'] / best['batch']:.3g}."
    )


def _how(r: dict[str, Any]) -> str:
    return "past the page cache" if r["ssd"]["bypasses_page_cache"] else "through the page cache"


def _bandwidth(r: dict[str, Any]) -> str:
    best = max(r["ssd"]["rates"], key=lambda x: x["rate"])
    return (
        f"Up to {format_size(best['rate'])}/s, with {best['depth']} reads of "
        f"{best['read_bytes'] >> 10} KiB in flight, random places of the model's own files, "
        f"{_how(r)}."
    )


def _latency(r: dict[str, Any]) -> str:
    rows = [x for x in r["ssd"]["rates"] if x["depth"] == 1]
    small, large = rows[0], rows[-1]
    return (
        f"{1e3 * small['latency']:.2g} ms for {small['read_bytes'] >> 10} KiB and "
        f"{1e3 * large['latency']:.2g} ms for {large['read_bytes'] >> 10} KiB one at a time, "
        f"{_how(r)}; 99 of 100 within {1e3 * small['latency_p99']:.2g} and "
        f"{1e3 * large['latency_p99']:.2g} ms."
    )


def _reads(r: dict[str, Any]) -> str:
    found = r["ssd"]["in_generation"]
    if not found["reads"]:
        return "Generation made no reads."
    at = {x["percentile"]: x for x in found["percentiles"]}
    return (
        f"{found['reads']} reads, of {format_size(at[50]['bytes'])} at the median and "
        f"{format_size(at[100]['bytes'])} at most, {at[50]['depth']:.0f} in flight "
        f"({at[99]['depth']:.0f} at the 99th percentile); each took "
        f"{1e3 * at[50]['latency_s']:.2g} ms, one in a hundred {1e3 * at[99]['latency_s']:.2g} ms "
        f"or more. {_share(found['ahead'] / found['reads'])} "
        "were ahead of any need."
    )


def _by_rate(r: dict[str, Any]) -> str:
    found = r["ssd"]["sensitivity"]
    free, slow = found["unthrottled"], min(found["by_rate"], key=lambda x: x["bytes_per_s"])
    fast = max(found["machines"], key=lambda m: m["bytes_per_s"])
    gain = fast["this_compute_tokens_per_s"] / free["tokens_per_s"]["median"] - 1
    return (
        f"{free['tokens_per_s']['median']:.3g} tokens/s unthrottled, one text again and again, "
        f"{_share(free['wait_s'] / free['token_s'])} of the time waiting for reads; "
        f"{slow['tokens_per_s']['median']:.3g} behind {format_size(slow['bytes_per_s'])}/s. "
        f"Measured time beside reads, and read bytes over rate: predicted for the drive of "
        f"{fast['name']} ({format_size(fast['bytes_per_s'])}/s) {100 * gain:+.0f} %, on this "
        "machine's processor."
    )


def _by_latency(r: dict[str, Any]) -> str:
    found = r["ssd"]["sensitivity"]
    rows = found["by_latency"]
    middle, error = rows[len(rows) // 2], found["median_error_of_model"]
    loss = 1 - middle["tokens_per_s"]["median"] / found["unthrottled"]["tokens_per_s"]["median"]
    return (
        f"{1e3 * middle['latency_s']:.2g} ms more on each read cost {_share(loss)} of the speed. "
        "The model counts a latency for each layer with a miss, again where its reads are more "
        f"than can be in flight; it is off by {_share(error)} at the median of both series."
    )


def _policies(r: dict[str, Any]) -> str:
    found = r["locality"]["caches"]
    rows, chosen = found["by_policy"], found["policy"]
    share = min(found["shares"], key=lambda s: abs(s - 0.25))
    at = {x["policy"]: x["hit_rate"] for x in rows if x["share"] == share}
    others = ", ".join(f"{p} {_share(v)}" for p, v in at.items() if p not in (chosen, BEST))
    return (
        f"With {_share(share)} resident {chosen} hits {_share(at[chosen])}"
        + (f" ({others})" if others else "")
        + f"; no policy could exceed {_share(at[BEST])} (Belady's optimum). Replayed from "
        f"{r['locality']['tokens']} recorded tokens, prompts one after another."
    )


def _misses(r: dict[str, Any]) -> str:
    found = r["locality"]["caches"]
    rows = [x for x in found["by_policy"] if x["policy"] == found["policy"]]
    row = min(rows, key=lambda x: abs(x["share"] - 0.25))
    missed = row["compulsory"] + row["capacity"]
    part = row["compulsory"] / missed if missed else 0.0
    return (
        f"With {_share(row['share'])} resident, {_share(part)} of all misses are first uses, which "
        "no cache saves (longer runs have relatively fewer); the others come of eviction."
    )


def _layers(r: dict[str, Any]) -> str:
    rows = r["locality"]["caches"]["by_layer"]
    row = min(rows, key=lambda x: abs(x["share"] - 0.25))
    rates = row["hit_rates"]
    low, high = rates.index(min(rates)), rates.index(max(rates))
    return (
        f"With {_share(row['share'])} resident, hits go from {_share(rates[low])} in expert layer "
        f"{low} to {_share(rates[high])} in layer {high}."
    )


def _alone(r: dict[str, Any]) -> str:
    rows = r["locality"]["caches"]["by_prompt_alone"]
    share = min({x["share"] for x in rows}, key=lambda s: abs(s - 0.25))
    mine = sorted((x for x in rows if x["share"] == share), key=lambda x: x["hit_rate"])
    prompts = r["method"]["prompts"]
    low, high = mine[0], mine[-1]
    return (
        f"Each prompt by itself from an empty cache, {_share(share)} resident: from "
        f"{_share(low['hit_rate'])} ({_name(prompts[low['prompt']])}) to "
        f"{_share(high['hit_rate'])} ({_name(prompts[high['prompt']])}); standard deviation over "
        f"prompts {100 * r['locality']['by_kind']['deviation']:.1f} points."
    )


def _reuse(r: dict[str, Any]) -> str:
    found = r["locality"]["reuse"]
    quarter = found["uses"][found["shares"].index(0.25)]
    return (
        f"{_share(quarter)} of a token's expert uses come before a quarter of the layer's other "
        f"experts were used; {_share(found['first_uses'])} are first uses."
    )


def _tokens(r: dict[str, Any]) -> str:
    rows = r["locality"]["token_overlap"]
    if not rows:
        return "Too few tokens were generated to tell."
    first, last = rows[0], rows[-1]
    return (
        f"A token shares {_share(first['shared'])} of its experts with the one before and "
        f"{_share(last['shared'])} with the one {last['lag']} before; by chance it would be "
        f"{_share(first['by_chance'])}."
    )


def _requests(r: dict[str, Any]) -> str:
    matrix, prompts = r["locality"]["request_overlap"], r["method"]["prompts"]
    same: list[float] = []
    other: list[float] = []
    for i, row in enumerate(matrix):
        for j in range(i):
            (same if prompts[i]["task"] == prompts[j]["task"] else other).append(row[j])
    parts = [
        f"{statistics.fmean(values):.2f} between requests of {what}"
        for values, what in ((same, "one task"), (other, "different tasks"))
        if values
    ]
    if not parts:
        return "One request alone has nothing to be compared with."
    return (
        f"Cosine of how often each expert is used: {', '.join(parts)} (1: the same experts equally "
        "often; columns are in the order of rows)."
    )


def _missing(r: dict[str, Any], heat: bool) -> str:
    return "; ".join(
        f"{name}: {why}"
        for name, why in r["power"]["missing"].items()
        if name == "NVML" or heat == (name == "temperature")
    )


def _watts(r: dict[str, Any]) -> str:
    found = r["power"]
    if found["joules_per_token"] is None:
        why = _missing(r, False)
        return f"Not measured, and not guessed: no energy counter can be read here ({why})."
    total, rest = (sum(counted(found[k]).values()) for k in ("watts", "watts_at_rest"))
    return (
        f"{found['joules_per_token']:.3g} J a token, prompts' energy included; {total:.3g} W while "
        f"decoding, {rest:.3g} W at "
        f"rest, of {', '.join(sorted(counted(found['watts'])))} and nothing else of the machine."
    )


def _heat(r: dict[str, Any]) -> str:
    found = r["power"]
    if not found["celsius_after"]:
        return (
            f"Not measured, and not guessed: no temperature can be read here ({_missing(r, True)})."
        )
    before, after = found["celsius_before"], found["celsius_after"]
    parts = [f"{k} {before[k]:.0f} to {v:.0f} °C" for k, v in after.items() if k in before]
    throttled = (
        f"clocks were held down in {found['throttled_windows']} windows"
        if found["tells_throttling"]
        else "whether clocks were held down, nothing here tells"
    )
    parts = parts or [f"{k} {v:.0f} °C at the end" for k, v in after.items()]
    return f"{', '.join(parts)} over the sustained run; {throttled}."


def _quality(r: dict[str, Any]) -> str:
    found = r["quality"]["streamed"]
    if found is None:
        return str(r["quality"]["not_measured"])
    text = f"{_exact(found, r['quality'].get('exactness'))} "
    lossy = r["quality"]["lossy"]
    if not lossy:
        return text + "No lossy what-if fits this model."
    least, most = (f(lossy, key=lambda x: x["kl_nats"]) for f in (min, max))
    return (
        f"{text}Lossy what-ifs (*), which the package does not offer, move the predictions by "
        f"{least['kl_nats']:.2g} ({least['name']}) to {most['kl_nats']:.2g} nats ({most['name']})."
    )


def _exact(found: dict[str, Any], seen: dict[str, Any] | None) -> str:
    text = f"Streamed logits of {found['tokens']} tokens, whole and one by one, are "
    if found["identical"]:
        return f"{text}the same bits as stock."
    if seen is None:  # an older report
        return f"{text}off by {found['largest_difference']:.3g} at most."
    decoded = "the same bits as stock" if seen["decoded_identical"] else "NOT the same as stock"
    apart, bound = seen["prompts_difference"], seen["prompts_bound"]
    text = (
        f"Decoded one by one, streamed logits of {seen['decoded_tokens']} tokens are {decoded}. Of "
        f"whole prompts they differ by {_small_share(apart)} of the largest logit at most: "
    )
    if apart <= bound:
        text += f"this device sums in another order there (allowed: {_small_share(bound)})."
    else:
        text += (
            f"MORE than the {_small_share(bound)} that another order of sums explains, unless a "
            "router that wavered between two experts took the other."
        )
    if seen["decoded_identical"] and apart <= bound:
        return text
    return f"{text} See doctor --selftest."


def _small_share(part: float) -> str:
    return f"{100 * part:.2g} %"


def _perplexity(r: dict[str, Any]) -> str:
    found = r["quality"]
    if found["stock"] is None:
        return f"{found['streamed_perplexity']:.4g} streamed; stock was not measured."
    stock = found["stock"]["perplexity"]
    text = f"{found['streamed']['perplexity']:.4g} streamed, {stock:.4g} stock, on the prompts."
    for row in found["lossy"]:
        text += f" {row['name']}*: {100 * (row['perplexity'] / stock - 1):+.1f} %."
    return text


def _score(r: dict[str, Any]) -> str:
    found = r["quality"]
    count, score = found["task_items"], found["task_score"]
    wide = (score * count + 2) / (count + 4)  # Agresti and Coull: not 0 where all are right
    error = (wide * (1 - wide) / (count + 4)) ** 0.5
    text = (
        f"Of {count} two-way choices {_share(score)} right, streamed (standard error "
        f"{_share(error)}: only large losses show)."
    )
    if found["stock"] is not None:
        text += f" Stock: {_share(found['stock']['task_score'])}."
    return text


_SENTENCES = {
    "by_prompt": _by_prompt, "sustained": _sustained, "first_token": _first_token,
    "context": _context, "batch": _batch, "bandwidth": _bandwidth, "latency": _latency,
    "reads": _reads, "by_rate": _by_rate, "by_latency": _by_latency, "policies": _policies,
    "misses": _misses, "layers": _layers, "alone": _alone, "reuse": _reuse, "tokens": _tokens,
    "requests": _requests, "watts": _watts, "heat": _heat, "kl": _quality,
    "perplexity": _perplexity, "score": _score,
}  # fmt: skip
