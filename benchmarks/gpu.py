"""Everything that needs a GPU, one after the other, and one file that says what came of it: `make gpu RESULTS=folder`.

    python benchmarks/gpu.py --results folder

For a bare machine with JAX for CUDA, PyTorch and no network. Each step is a process with a time limit of its own; what
it leaves of its time goes to those behind it, and a step that fails, hangs or finds something missing stops none of
them. The file, gpu-DATE.json, holds the machine, the versions, the commit, and of each step its outcome, its seconds
and its rows, as the benchmark itself writes them. `--small` goes through the same motions on a CPU with tiny shapes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from checkout import commit

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / ".gpu-wheels"
BUDGET = 480.0
_LEAST = 10.0  # seconds that are worth beginning a step with
_TAIL = 2000  # characters of a failed step's output that the file keeps

# What is missing costs: nothing runs, or what is named here is left out.
CORE = ("jax", "numpy", "ml_dtypes", "jaxtyping", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "tqdm")
OPTIONAL = {
    "pytest": "no tests",
    "hypothesis": "no tests",
    "xdist": "tests in one process",
    "beartype": "no check of the shapes in signatures",
    "gguf": "no GGUF file is read",
    "torch": "no comparison with torch's attention, nor with transformers",
    "transformers": "no comparison with transformers",
}
_VERSIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "triton", "transformers", "numpy")


class Step(NamedTuple):
    """One process: its share of the budget in seconds, what it cannot do without, the files it leaves for us."""

    name: str
    command: list[str]
    seconds: float
    needs: tuple[str, ...] = ()
    rows: Path | None = None
    junit: Path | None = None
    document: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, write the file. 1 where a step failed."""
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="the folder that gets the file")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET, help="of all steps (default: %(default)s)")
    parser.add_argument("--steps", nargs="*", help="only these, by name (default: all)")
    parser.add_argument("--small", action="store_true", help="on the CPU with tiny shapes: tries this script")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    date = datetime.now(UTC)
    args.results.mkdir(parents=True, exist_ok=True)
    output = args.results / f"gpu-{date:%Y-%m-%d-%H%M%S}.json"

    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(Path(folder), small=args.small)
        missing = _missing(environment)
        for name, loss in missing.items():
            print(f"missing: {name}: {loss}", flush=True)
        document: dict[str, Any] = {
            "date": date.isoformat(timespec="seconds"),
            "commit": commit(),
            "small": args.small,
            "machine": _machine(environment),
            "missing": missing,
            "steps": {},
        }
        steps = steps_for(Path(folder), document["machine"], missing, small=args.small)
        chosen = [step for step in steps if args.steps is None or step.name in args.steps]
        shares = 0.0
        for step in chosen:
            shares += step.seconds * args.budget_seconds / BUDGET
            left = shares - (time.monotonic() - start)
            document["steps"][step.name] = result = run(step, environment, left, missing)
            document["seconds"] = round(time.monotonic() - start, 1)
            output.write_text(json.dumps(document, indent=1) + "\n")  # after each: whatever ends us finds the rest
            told = {key: result[key] for key in ("tests", "reason") if key in result}
            print(f"== {step.name}: {result['outcome']} in {result['seconds']} s {told or ''}", flush=True)
    print(f"wrote {output}")
    return int(any(result["outcome"] in ("failed", "timed out") for result in document["steps"].values()))


def steps_for(folder: Path, machine: Mapping[str, Any], missing: Mapping[str, str], *, small: bool) -> list[Step]:
    """What runs, in order. Rows and reports go to `folder` on the way to the file."""
    python, processes = sys.executable, _processes(missing)
    pytest = [python, "-m", "pytest", "-q", "--device", "cpu" if small else "gpu", "-p", "no:cacheprovider"]
    pytest += ["-n", str(processes), "--dist", "worksteal"] if processes > 1 and not small else []
    kernels = [
        f"tests/test_kernels_{name}.py" for name in ("work", "attention", "mosaic", "sampling", "expert_product")
    ]
    tests = {
        "kernel": ["tests/test_paged_attention.py", *(name for name in kernels if (ROOT / name).exists())],
        "engine": [f"tests/test_{name}.py" for name in ("families", "engine", "sampling", "functional")],
    }
    tests["engine"] += ["-m", "not slow"]
    if small:
        tests["kernel"] = ["tests/test_kernels_work.py", "-k", "told_by_shapes"]
        tests["engine"] = ["tests/test_families.py", "-k", "dense_logits and llama_linear"]
    reports = {name: folder / f"{name}.xml" for name in tests}
    # What is tuned is read by the steps behind it.
    table = folder / "tuned.json" if small else Path(machine["tuned"])
    bench = {"tune": [python, "-m", "jaxpaged.kernels.tune", "--output", str(table)]}
    for name in ("kernels", "step", "throughput"):
        bench[name] = [python, f"benchmarks/{name}.py", "--output", str(folder / f"{name}.jsonl")]
    if small:
        more = {
            "tune": "--interpret --cases decode,2,16,float32",
            "kernels": "--small",
            "step": "--dummy tiny --dtype float32 --batch-sizes 1 --context 40 --copy-mib 8",
            "throughput": "--dummy tiny --num-requests 2 --input-mean 8 --output-mean 4 --max-num-seqs 2",
        }
    else:
        more = {
            "tune": "--budget-seconds 35",
            "kernels": "--budget-seconds 70",
            "step": "",
            "throughput": "--dummy llama-3-8b --num-requests 256 --input-mean 128 --output-mean 128 "
            "--max-num-seqs 256 --max-num-batched-tokens 2048 --max-model-len 2048",
        }
        if not {"torch", "transformers"} & set(missing):
            more["throughput"] += " --baseline hf --baseline-requests 2"
    for name, command in bench.items():
        command += shlex.split(more[name])
    share = (("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6"),)  # the rest is torch's
    steps = [
        Step("install", [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."], 20),
        *(
            Step(
                f"{name} tests",
                [*pytest, *tests[name], f"--junitxml={reports[name]}"],
                seconds,
                needs=("pytest", "hypothesis"),
                junit=reports[name],
            )
            for name, seconds in (("kernel", 105), ("engine", 75))
        ),
        Step("tune", bench["tune"], 50, document=table),
        Step("kernels", bench["kernels"], 85, rows=folder / "kernels.jsonl", environment=share),
        Step("step", bench["step"], 55, rows=folder / "step.jsonl"),
        Step("throughput", bench["throughput"], 90, rows=folder / "throughput.jsonl", environment=share),
    ]
    return steps[1:] if small else steps  # a dry run installs nothing


def run(step: Step, environment: dict[str, str], seconds: float, missing: dict[str, str]) -> dict[str, Any]:
    """The step's outcome: passed, failed, timed out or skipped; and what it left."""
    if lacking := [name for name in step.needs if name in missing]:
        return {"outcome": "skipped", "reason": f"needs {', '.join(lacking)}", "seconds": 0}
    if seconds < _LEAST:
        return {"outcome": "skipped", "reason": f"{max(seconds, 0):.0f} s of the budget were left", "seconds": 0}
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment | dict(step.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its own children end with it
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        outcome = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        outcome = "timed out"
    print(output[-_TAIL:], flush=True)
    result: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    result |= {"limit_seconds": round(seconds, 1), "command": step.command[1:]} | dict(step.environment)
    if outcome != "passed":
        result["output"] = output[-_TAIL:]
    if step.junit is not None and step.junit.exists():
        result["tests"], result["failures"] = _read_junit(step.junit)
    if step.rows is not None and step.rows.exists():
        result["rows"] = [json.loads(line) for line in step.rows.read_text().splitlines()]
    if step.document is not None and step.document.exists():
        result["document"] = {"name": step.document.name, "content": json.loads(step.document.read_text())}
    return result


def _environment(folder: Path, *, small: bool) -> dict[str, str]:
    """The checkout and carried wheels first on the path; one cache of compiled programs for all steps."""
    paths = [str(ROOT)]
    if wheels := sorted(str(path) for path in WHEELS.glob("*.whl")):
        site = folder / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
        subprocess.run([*command, *wheels], check=True)
        paths.append(str(site))
    paths += [path for path in (os.environ.get("PYTHONPATH"),) if path]
    extra = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    extra["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    extra |= {"COMMIT": commit(), "TQDM_DISABLE": "1"}
    return dict(os.environ) | extra | ({"JAX_PLATFORMS": "cpu"} if small else {})


def _missing(environment: dict[str, str]) -> dict[str, str]:
    """Packages that are not there, and what goes without them. SystemExit where nothing would run."""
    names = [*CORE, *OPTIONAL]
    program = f"from importlib.util import find_spec; print(*[n for n in {names} if find_spec(n) is None])"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    absent = done.stdout.split()
    if core := [name for name in absent if name in CORE]:
        raise SystemExit(
            f"{', '.join(core)} must be there; where there is a network run make gpu-wheels WHEELS={core[0]}, "
            f"and take the folder {WHEELS.name} along"
        )
    return {name: OPTIONAL[name] for name in absent}


def _machine(environment: dict[str, str]) -> dict[str, Any]:
    """Devices, driver and versions, asked of a process that ends: this one must hold no GPU memory."""
    program = (
        "import jax, json; from jaxpaged.kernels.tiles import file_name; d = jax.devices(); "
        "print(json.dumps({'platform': d[0].platform, 'device': d[0].device_kind, 'num_devices': len(d), "
        "'tuned': f'kernels/tuned/{file_name(d[0].device_kind)}.json'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"JAX finds no device:\n{done.stderr[-_TAIL:]}")
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        machine["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    except OSError:
        machine["nvidia_smi"] = []
    machine["cores"] = os.cpu_count()
    machine["versions"] = {"python": platform.python_version()}
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            machine["versions"][name] = version(name)
    return machine


def _read_junit(path: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Counts of a pytest run, and the last line of what each failure said."""
    suite = next(ET.parse(path).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    said = {}
    for case in suite.iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            said[f"{case.get('classname')}::{case.get('name')}"] = (problem.get("message") or "")[:500]
    return counts, said


def _processes(missing: Mapping[str, str]) -> int:
    """Test processes that share the GPU: compiling is most of their time."""
    return 1 if "xdist" in missing else max(1, min(8, (os.cpu_count() or 1) // 2))


if __name__ == "__main__":
    sys.exit(main())
