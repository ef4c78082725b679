"""The benchmark of the kernels writes one complete row a shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_run_writes_a_row_for_each_shape(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    small = "--decode 2x64 3x20 --prompts 1x64 --heads 4 --kv-heads 2 --head-dim 16 --copy-mib 8 --matmul-size 128"
    command = [sys.executable, str(ROOT / "benchmarks" / "attention.py"), *small.split(), "--output", str(output)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["op"], r["batch"], r["context"]) for r in rows] == [
        ("decode", 2, 64),
        ("decode", 3, 20),
        ("prompts", 1, 64),
    ]
    assert all(r["microseconds"] > 0 and r["device"] and r["commit"] for r in rows)
    assert rows[0]["bytes_per_s"] / rows[0]["copy_bytes_per_s"] == pytest.approx(rows[0]["of_copy"], abs=1e-3)
