"""`make gpu` without a GPU: what a step may do wrong, and one file that holds what came of all of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import measure
import pytest
from conftest import CACHE
from gpu import Step

ROOT = Path(__file__).parents[1]


def run(
    program: str, seconds: float = 60.0, missing: dict[str, str] | None = None, **more: object
) -> dict[str, object]:
    step = Step("a step", [sys.executable, "-c", program], 1.0, **more)  # type: ignore[arg-type]
    return gpu.run(step, dict(os.environ), seconds, missing or {})


def test_a_step_that_fails_leaves_its_last_words_and_its_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    program = f"open({str(rows)!r}, 'w').write('{{\"a\": 1}}\\n'); raise SystemExit('out of memory')"
    result = run(program, rows=rows)
    assert result["outcome"] == "failed"
    assert "out of memory" in str(result["output"])
    assert result["rows"] == [{"a": 1}]


def test_a_step_that_hangs_ends_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_LEAST", 0.1)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    result = run(child, seconds=1.0)
    assert result["outcome"] == "timed out"
    assert float(str(result["seconds"])) < 20


def test_a_step_is_left_out_where_something_is_missing_or_time_is_up() -> None:
    assert run("", missing={"torch": "no comparison"}, needs=("torch",))["reason"] == "needs torch"
    assert run("", seconds=3.2)["reason"] == "3 s of the budget were left"


def test_the_steps_shares_are_the_budget(tmp_path: Path) -> None:
    steps = gpu.steps_for(tmp_path, {"tuned": "x.json"}, {}, small=False)
    assert sum(step.seconds for step in steps) == gpu.BUDGET == 480
    assert [step.name for step in steps] == [
        *("install", "kernel tests", "engine tests", "tune", "kernels", "step", "throughput")
    ]
    for step in steps:
        assert all((ROOT / word).exists() for word in step.command if word.endswith(".py"))


def test_transformers_is_compared_with_where_it_is(tmp_path: Path) -> None:
    for missing, compared in (({}, True), ({"torch": "no comparison"}, False)):
        *_, throughput = gpu.steps_for(tmp_path, {"tuned": "x.json"}, missing, small=False)
        assert ("--baseline" in throughput.command) == compared


def test_a_checkout_that_is_not_installed_has_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    names = {"jaxpaged": "not installed"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(names.get(name, name)))
    assert measure.host()["versions"].keys() == {"python", "jax", "jaxlib"}


@pytest.mark.slow
def test_one_file_holds_what_came_of_every_step(tmp_path: Path) -> None:
    command = [
        "make",
        "gpu",
        f"GPU_PYTHON={sys.executable}",
        f"RESULTS={tmp_path}",
        "GPU_OPTIONS=--small --budget-seconds 3000",
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.glob("gpu-*.json")
    document = json.loads(path.read_text())
    assert {"date", "commit", "machine", "missing", "steps"} <= document.keys()
    assert document["machine"]["platform"] == "cpu" and document["machine"]["versions"]["jax"]
    steps = document["steps"]
    assert {step["outcome"] for step in steps.values()} == {"passed"}
    assert steps["engine tests"]["tests"] == {"tests": 1, "failures": 0, "errors": 0, "skipped": 0}
    rows = steps["kernels"]["rows"]
    assert [row["op"] for row in rows] == ["sampling", "decode", "prompts", "mixed"]
    for row in rows[1:]:
        assert row["ours"]["auto"]["microseconds"] > 0
        assert row["ours"]["auto"]["error"] < 1e-2
        assert set(row["not_run"]) | set(row["others"]) == {"pallas_example", "cudnn", "torch_sdpa"}
    decode = rows[1]["ours"]["auto"]
    assert decode["of_copy"] == pytest.approx(decode["bytes_per_s"] / rows[1]["copy_bytes_per_s"], abs=1e-4)
    (step,) = steps["step"]["rows"]
    assert step["time_over_floor"] == pytest.approx(step["milliseconds"] / step["floor_milliseconds"], rel=0.02)
    (throughput,) = steps["throughput"]["rows"]
    assert throughput["output_tokens_per_s"] > 0
