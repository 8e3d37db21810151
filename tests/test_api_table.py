"""docs/server-api.md says what works and what is refused; its tables are true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_streamexperts.server._http import FORMS
from mlx_streamexperts.server._refusals import Refused
from mlx_streamexperts.server._request_checks import check_request, check_values, shape_of

# Names and values that the tables know, so that what is drawn gets past the first check.
WORDS = (
    "type", "text", "role", "user", "assistant", "content", "tool_use", "tool_result", "thinking",
    "name", "input", "id", "function", "arguments", "tools", "tool_calls", "parameters", "image",
    "source", "base64", "url", "data", "messages", "message", "call_id", "output", "json_schema",
    "schema", "function_call", "function_call_output", "reasoning", "input_text", "tool_use_id",
    "options", "format",
)  # fmt: skip
PAGE = (Path(__file__).parents[1] / "docs" / "server-api.md").read_text()
MESSAGES = {"messages": [{"role": "user", "content": "a"}]}
NEEDED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": MESSAGES,
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {**MESSAGES, "max_tokens": 5},
    "/api/chat": {"model": "a", **MESSAGES},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
    ),
    max_leaves=12,
)


def rows() -> list[tuple[str, str, str]]:
    """Endpoint, JSON fields and outcome of each row of the tables of fields."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        for line in section.splitlines():
            if match := re.match(r"\| `(\".*?)` \| (\w+) \|", line):
                found.append((section.splitlines()[0].strip(), match[1], match[2]))
    return found


@pytest.mark.parametrize(("endpoint", "fields", "outcome"), rows())
def test_a_row_is_true(endpoint: str, fields: str, outcome: str) -> None:
    given = json.loads("{" + fields + "}")
    form = FORMS[endpoint]("")
    try:
        shape_of(check_request(form.request({**NEEDED[endpoint], **given}), False, form.chat))
    except Refused as e:
        assert e.status == 400
        assert outcome == "refused", e.message
        assert any(field in e.message for field in given)
    else:
        assert outcome == "works"


def test_every_endpoint_has_a_table() -> None:
    assert {r[0] for r in rows()} == NEEDED.keys()
    others = {"/chat/completions", "/v1/messages/count_tokens"}  # take what these take
    assert FORMS.keys() - others == NEEDED.keys()


@pytest.mark.parametrize("endpoint", NEEDED)
def test_whatever_a_request_has_it_is_taken_or_refused(endpoint: str) -> None:
    """No other error comes out, and what is taken can be sent on."""
    fields = {name for e, f, _ in rows() if e == endpoint for name in json.loads(f"{{{f}}}")}
    names = st.sampled_from(sorted({*NEEDED[endpoint], *fields}))

    @settings(max_examples=60, deadline=None)
    @given(st.dictionaries(names, JSON, max_size=3))
    def tried(drawn: dict[str, Any]) -> None:
        form = FORMS[endpoint]("")
        try:
            check_values(drawn)
            asked = check_request(form.request({**NEEDED[endpoint], **drawn}), False, form.chat)
            shape_of(asked)
        except Refused as e:
            assert (e.status, bool(e.message)) == (400, True)
        else:
            json.dumps(asked, allow_nan=False)

    tried()
