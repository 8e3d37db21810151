"""Requests made of docs/openapi.json, good and broken ones: does the server keep to the document?

    python benchmarks/fuzz_apis.py --examples 2000

Schemathesis makes the requests. To each there must be an answer within a minute, none of status
500; what breaks a request's schema must be refused; every answer, error and event must be as the
document says. `tests/test_openapi.py` does so with a few. This starts a server of the embedded
model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
import soak
from hypothesis import HealthCheck, given, seed, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

DOCUMENT = json.loads((Path(__file__).parents[1] / "docs" / "openapi.json").read_text())
DOCUMENT["components"]["schemas"]["ModelName"] = {"enum": ["default_model"]}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict")
LONGEST = 4  # tokens of a reply
OPTIONS = ("--context-tokens", "512", "--max-tokens", str(LONGEST))
"""Of the server, so that examples take milliseconds."""
MODES = {"good": GenerationMode.POSITIVE, "broken": GenerationMode.NEGATIVE}

load_all_checks()
_CHECKS = [
    CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
    )
]


def operations() -> list[tuple[str, str]]:
    """Path and mode of all that can be tried; nothing is broken about a GET."""
    return [
        (path, mode)
        for path, methods in DOCUMENT["paths"].items()
        for mode in MODES
        if "post" in methods or mode == "good"
    ]


def tried(url: str, path: str, mode: str, examples: int, start: int = 0) -> Counter[int]:
    """Ask for something in so many ways; returns how often which status was the answer.

    Args:
        url: of the server, which was started with `OPTIONS`.
        path, mode: one of `operations`.
        start: seed.

    Raises:
        schemathesis.core.failures.FailureGroup: something is not as the document says.
        jsonschema.ValidationError: an event is not.
    """
    (method,) = DOCUMENT["paths"][path]
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method.upper()]
    found: Counter[int] = Counter()

    @seed(start)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(operation.as_strategy(generation_mode=MODES[mode]))
    def ask(case: Any) -> None:
        if method == "post":
            case.body = _short(_whole(case.body))
        answer = case.call(base_url=url, timeout=60)
        found[answer.status_code] += 1
        case.validate_response(answer, checks=_CHECKS)
        kind = answer.headers["content-type"][0].partition(";")[0]
        if answer.status_code == 200 and kind in ("text/event-stream", "application/x-ndjson"):
            contents = DOCUMENT["paths"][path][method]["responses"]["200"]["content"]
            _check_items(contents[kind]["x-item-schema"], answer.content)

    ask()
    return found


def _whole(value: Any) -> Any:
    """5 for 5.0: to JSON schema that is an integer, and to this server a number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return {k: _whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def _short(body: Any) -> Any:
    """The request for a short reply; a length that is wrong stays."""
    if not isinstance(body, dict):
        return body
    body = {**body}
    if "options" in body:
        body["options"] = _short(body["options"])
    for name in LENGTHS:
        stated = body.get(name)
        if type(stated) is int and -3 < stated < 1 << 31 and (stated > 0 or name == LENGTHS[-1]):
            body[name] = min(stated, LONGEST) if stated > 0 else LONGEST
    return body


def _check_items(schema: dict[str, Any], content: bytes) -> None:
    """Each event, or line, of a streamed reply is as the document says, or an error."""
    validator = Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    items = [line.removeprefix(b"data: ") for line in content.split(b"\n")]
    items = [json.loads(line) for line in items if line.startswith(b"{")]
    assert items
    for item in items:
        if not item.get("error"):
            validator.validate(item)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=1000, help="of each path, good and broken")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server = soak.Server("46MB", Path(scratch) / "log", limits=OPTIONS)
        try:
            for path, mode in operations():
                found = tried(server.url, path, mode, args.examples, args.seed)
                print(f"{path}, {mode}: {dict(found)}", flush=True)
        finally:
            ended = server.stop()
    print(f"the server ended with status {ended['exit_status']}, {ended['tracebacks']} tracebacks")


if __name__ == "__main__":
    main()
