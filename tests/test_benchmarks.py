"""The benchmarks ask for the same work every time, and a run writes one complete row."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import workloads

ROOT = Path(__file__).parents[1]


def make(*options: str, max_model_len: int = 8192) -> workloads.Workload:
    parser = ArgumentParser()
    workloads.add_arguments(parser)
    return workloads.from_arguments(parser.parse_args(options), 1000, max_model_len, lambda text: [len(text)])


@pytest.mark.parametrize("kind", ["uniform", "lognormal", "shared-prefix"])
def test_a_seed_gives_the_same_requests_again(kind: str) -> None:
    assert make("--workload", kind) == make("--workload", kind)
    assert make("--workload", kind).requests != make("--workload", kind, "--workload-seed", "1").requests


def test_lognormal_lengths_have_the_mean_that_was_asked_for() -> None:
    work = make("--num-requests", "64", "--input-mean", "128", "--output-mean", "96")
    assert work.description["prompt_tokens"] / 64 == pytest.approx(128, abs=1)
    assert work.description["output_tokens"] / 64 == pytest.approx(96, abs=1)


def test_shared_prefix_requests_begin_alike_and_go_on_differently() -> None:
    requests = make("--workload", "shared-prefix", "--prefix", "40", "--num-requests", "8").requests
    assert len({tuple(r.prompt_token_ids[:40]) for r in requests}) == 1
    assert len({tuple(r.prompt_token_ids[:44]) for r in requests}) == 8


def test_requests_that_cannot_fit_are_left_out_and_counted() -> None:
    work = make("--num-requests", "64", max_model_len=150)
    assert all(len(r.prompt_token_ids) + r.num_output_tokens <= 150 for r in work.requests)
    assert 0 < work.description["left_out_too_long"] == 64 - len(work.requests)


def test_a_trace_gives_the_lengths(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n2023-11-16 18:15:50,396,109\n"
    )
    requests = make("--workload", str(trace)).requests
    assert [(len(r.prompt_token_ids), r.num_output_tokens) for r in requests] == [(374, 44), (396, 109)]


@pytest.mark.parametrize(("suffix", "join"), [(".json", "[{}]"), (".jsonl", "{}")])
def test_a_file_gives_the_prompts(tmp_path: Path, suffix: str, join: str) -> None:
    entries = [json.dumps(e) for e in ("abc", {"prompt": "abcd", "max_tokens": 7}, {"turns": ["abcde", "f"]})]
    file = tmp_path / f"prompts{suffix}"
    file.write_text(join.format((", " if suffix == ".json" else "\n").join(entries)))
    requests = make("--workload", str(file)).requests
    assert [r.prompt_token_ids for r in requests] == [[3], [4], [5]]
    assert requests[1].num_output_tokens == 7


def test_an_unknown_workload_names_the_known_ones() -> None:
    with pytest.raises(SystemExit, match="known: uniform, lognormal, shared-prefix"):
        make("--workload", "gamma")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["latency", pytest.param("throughput", marks=pytest.mark.long)])
@pytest.mark.torch
def test_a_run_appends_one_complete_row(tmp_path: Path, script: str) -> None:
    rows = tmp_path / "rows.jsonl"
    sizes = {
        "throughput": ["--num-requests", "4", "--input-mean", "12", "--output-mean", "8"],
        "latency": ["--input-len", "12", "--output-len", "8"],
    }[script]
    command = [sys.executable, f"benchmarks/{script}.py", "--dummy", "tiny", *sizes]
    command += ["--baseline", "hf", "--output", str(rows)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (row,) = (json.loads(line) for line in rows.read_text().splitlines())
    wanted = "date commit device versions model workload output_tokens_per_s total_tokens_per_s ttft_ms itl_ms"
    assert set(wanted.split()) | {"peak_memory_bytes", "num_compilations", "baseline"} <= row.keys()
    assert row["output_tokens_per_s"] > 0
