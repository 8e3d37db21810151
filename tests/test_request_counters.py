"""Request counters: one request from its beginning to its end."""

from __future__ import annotations

from mlx_streamexperts.server._request_counters import FIRST_TOKEN_BOUNDS, RequestCounters


def test_requests_are_counted() -> None:
    counters = RequestCounters()
    assert counters.begin(limit=2)
    assert counters.begin(limit=2)
    assert not counters.begin(limit=2)
    for seconds in (0.05, FIRST_TOKEN_BOUNDS[0], 1e9):
        counters.prompt(10, 4, seconds)
    counters.token()
    counters.end("completed")
    stats = counters.stats()
    assert (stats.active, stats.requests["completed"], stats.tokens) == (1, 1, 1)
    assert (stats.prompt_tokens, stats.cached_tokens) == (30, 12)
    assert (stats.first_token[0], stats.first_token[-1], sum(stats.first_token)) == (2, 1, 3)
    assert stats.tokens_per_second > 0


def test_a_request_counts_with_all_its_replies() -> None:
    counters = RequestCounters()
    assert counters.begin(limit=4, replies=3)
    assert not counters.begin(limit=4, replies=2)
    assert counters.begin(limit=4)
    assert counters.stats().active == 2
    counters.end("completed", replies=3)
    assert counters.begin(limit=4, replies=3)


def test_stats_are_a_copy() -> None:
    counters = RequestCounters()
    before = counters.stats()
    counters.refused()
    counters.prompt(1, 0, 1.0)
    assert before.requests["refused"] == sum(before.first_token) == 0
