# %% [markdown]
# # A walk through recorded routing
#
# This records which experts the embedded model's routers choose. From the recording it finds how
# large a cache should be and which expert should make room. The cells (`# %%`) run one by one in an
# editor that supports them (VS Code, Spyder, `jupytext --to notebook`), or all at once:
#
#     python examples/routing_walkthrough.py
#
# For your own model, change the first cell. Plots need the `plots` extra.

# %%
from collections import Counter
from pathlib import Path

import matplotlib
import mlx_lm
import numpy as np

from mlx_streamexperts import StreamConfig, demo_model, load, read_trace, stream
from mlx_streamexperts._analysis.plots import plot_rates
from mlx_streamexperts._analysis.replay import replay_routing, total
from mlx_streamexperts.simulate import NAMED_MACHINES, simulate

MODEL = str(demo_model())
CONFIG = StreamConfig(cache="10MB", prefetch="off", progress=False)
PROMPTS = ["In the beginning God created", "def __init__(self", "The system call returns"]
TOKENS = 40

# %% [markdown]
# ## Record
#
# Any cache size will do, since the routers' choices do not depend on it. Prefetching is off, so
# that the cache's own counts can be compared with the replay's below.

# %%
model, tokenizer = load(MODEL, config=CONFIG)
with stream(model) as expert_stream, expert_stream.trace("routing.jsonl"):
    for prompt in PROMPTS:
        mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=TOKENS)
    live, slots = expert_stream.stats(), expert_stream.plan.slots

routing = read_trace(Path("routing.jsonl"))
top_k = routing.model["top_k"]
print(f"{len(routing.layers)} layers, {routing.experts[0]} experts each, {top_k} a token")
print(f"{sum(len(rows) for rows in routing.layers[0])} tokens, prompts included")

# %% [markdown]
# ## Which experts?
#
# If a few experts did most of the work, keeping those would be enough. This prints the share of all
# uses that goes to the most used quarter of a layer's experts. Even routing would give 25 %.

# %%
for number, calls in enumerate(routing.layers):
    uses = Counter(np.concatenate([rows.ravel() for rows in calls]).tolist())
    quarter = sorted(uses.values(), reverse=True)[: routing.experts[number] // 4]
    print(f"layer {number}: {sum(quarter) / sum(uses.values()):.0%} of uses by a quarter")


# %% [markdown]
# ## Reuse distances
#
# When a token needs an expert that was used before, how many *other* experts of the layer were used
# since? If fewer than there are slots, LRU still has it. The distribution of these distances is
# therefore LRU's hit rate at every cache size at once (counting each token separately).


# %%
def reuse_distances(rows: np.ndarray) -> list[int | None]:
    """For each use, the distinct experts used since the last one; None for a first use.

    Args:
        rows: int [T, K], the experts of each token.
    """
    recent: list[int] = []  # least recently used first
    distances: list[int | None] = []
    for row in rows.tolist():
        for expert in row:
            distances.append(len(recent) - 1 - recent.index(expert) if expert in recent else None)
        for expert in row:
            if expert in recent:
                recent.remove(expert)
            recent.append(expert)
    return distances


distances = [reuse_distances(np.concatenate(calls)) for calls in routing.layers]
flat = [d for layer in distances for d in layer]
again = np.array([d for d in flat if d is not None])
print(f"first uses: {flat.count(None) / len(flat):.0%} of {len(flat)}")
for count in (8, 16, 32, 48):
    print(f"found among the {count} latest: {(again < count).sum() / len(flat):.0%}")

# %%
matplotlib.use("Agg")  # draws into files; leave out in a notebook
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(layout="constrained")
sizes = np.arange(1, routing.experts[0] + 1)
for number, layer in enumerate(distances):
    known = np.array([d for d in layer if d is not None])
    axes.plot(sizes, [100 * (known < n).sum() / len(layer) for n in sizes], label=f"layer {number}")
axes.set_xlabel("slots")
axes.set_ylabel("uses found by LRU, %")
axes.legend()
figure.savefig("reuse.svg")
plt.close(figure)

# %% [markdown]
# ## Hit rate by layer
#
# The replay drives the same cache as the live layer, call by call, prompts included. Its counts are
# the live ones, not an estimate.

# %%
replayed = replay_routing(routing, slots, CONFIG.with_defaults().policy)
for number, (layer, rate) in enumerate(zip(replayed, live.layer_hit_rates.values(), strict=True)):
    print(f"layer {number}: {layer.stats.hit_rate:.1%} replayed, {rate:.1%} live")
assert total(replayed).stats == live.cache

# %% [markdown]
# ## Policies and sizes
#
# `belady` knows the future and is the best that any policy could do. First uses, which only a hot
# set avoids, and too few slots separate it from 100 %. The gap between a policy and `belady` is all
# that a better policy could gain.

# %%
shares = [0.125, 0.25, 0.5, 0.75]
policies = ["lru", "s3fifo", "lrfu", "belady"]
report = simulate([routing], shares, policies, NAMED_MACHINES["M4 Max 128 GB"])
print("resident  " + "".join(f"{p:>8s}" for p in policies))
for share in shares:
    row = {r.policy: r.hit_rate for r in report.rows if r.share == share}
    print(f"{share:8.1%}  " + "".join(f"{row[p]:8.1%}" for p in policies))
plot_rates(report.rows, Path("rates.svg"))

# %% [markdown]
# The same from the command line, with more options: `python -m mlx_streamexperts.simulate
# routing.jsonl --layers --plot rates.svg`. docs/policies.md has the results of longer recordings.
