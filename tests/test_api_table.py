"""docs/server-api.md says what works and what is refused; its tables are true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlx_streamexperts.server._http import FORMS
from mlx_streamexperts.server._refusals import Refused
from mlx_streamexperts.server._request_checks import check_request, shape_of

PAGE = (Path(__file__).parents[1] / "docs" / "server-api.md").read_text()
MESSAGES = {"messages": [{"role": "user", "content": "a"}]}
NEEDED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": MESSAGES,
    "/v1/completions": {"prompt": "a"},
    "/v1/messages": {**MESSAGES, "max_tokens": 5},
}


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
