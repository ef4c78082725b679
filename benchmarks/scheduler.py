"""What the host does per step around the device: plan, pack and update, at full batch and with long queues. No model.

The pool is full of prefixes that nobody uses, as in a server that has run for a while: every page taken evicts another.

python benchmarks/scheduler.py --output benchmarks/results/scheduler.jsonl
"""

from __future__ import annotations

import gc
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from itertools import product
from pathlib import Path
from typing import Any

import measure
import numpy as np

from jaxpaged.bench.simulation import Simulation
from jaxpaged.engine.scheduler import Plan


def main() -> None:
    """Measure every queue length, write a row each."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--running", type=int, default=256, help="sequences that decode")
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 10_000], help="requests behind them")
    parser.add_argument("--steps", type=int, default=400, help="steps that are timed")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page")
    parser.add_argument("--host-pages", type=int, nargs="+", default=[0, 100_000], help="pages of the host tier")
    parser.add_argument("--output", type=Path, help="append the rows to this file of JSON lines")
    args = parser.parse_args()
    for waiting, host_pages in product(args.waiting, args.host_pages):
        row = {"benchmark": "scheduler"} | measure.host()
        row |= {"running": args.running, "waiting": waiting, "host_pages": host_pages}
        row |= {"steps": args.steps, "page_size": args.page_size}
        measure.write(row | overhead(args.running, waiting, args.steps, args.page_size, host_pages), args.output)


def overhead(running: int, waiting: int, steps: int, page_size: int, host_pages: int = 0) -> dict[str, Any]:
    """Milliseconds per step, and of each part, with `running` sequences decoding and `waiting` requests queued."""
    prompt, output = 128, 2 * steps + 64  # none finishes while it is timed
    most = prompt + output
    simulation = Simulation(
        running * -(-most // page_size) + 1,
        page_size,
        max_num_seqs=running,
        max_num_batched_tokens=max(2048, running),
        max_model_len=most,
        host_pages=host_pages,
    )
    for _ in range(running):
        simulation.add(most - 1, [1])
    simulation.run()
    for _ in range(running + waiting):
        simulation.add(prompt, [output])
    while len(simulation.step().decodes) < running:
        pass
    before = Plan([], [])
    times = []
    evicted = simulation.pool.num_cached
    gc.collect()
    for _ in range(steps):
        taken, before = simulation.timed_step(before)
        times.append((sum(taken), *taken))
    found: dict[str, Any] = {"pages_evicted": evicted - simulation.pool.num_cached}
    for name, seconds in zip(("step", "plan", "pack", "update"), zip(*times, strict=True), strict=True):
        found[f"{name}_ms"] = {f"p{p}": round(float(np.percentile(seconds, p)) * 1e3, 3) for p in (50, 99)}
    return found


if __name__ == "__main__":
    main()
