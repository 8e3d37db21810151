"""A small version of benchmarks/promise.py: no caller takes more than was stated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROMISE = Path(__file__).parents[1] / "benchmarks" / "promise.py"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "glm_moe_dsa"])
def test_nobody_takes_more_than_was_stated(family: str) -> None:
    command = [sys.executable, str(PROMISE), "--json", "--family", family, "--context", "700"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")
    ]
    assert [r["caller"] for r in rows] == ["generate", "quantized", "batch", "bare"], done.stderr
    for row in rows:
        assert row["peak"] <= row["memory"], row
        assert row["kept"], row
        assert row["slots_after"] == row["slots"], row  # no cache gave anything: it was planned
    assert done.returncode == 0
    refused = [r["caller"] for r in rows if "refused" in r]
    assert refused == (["quantized"] if family in ("deepseek_v3", "gpt_oss") else [])
