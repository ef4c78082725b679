"""How much KV memory holds tokens: pages against contiguous reservations, and what sharing saves. No model, no GPU.

python benchmarks/memory.py --output benchmarks/results/memory.jsonl

What is measured and how stands in `jaxpaged.bench.memory`; `jaxpaged bench memory` draws it.
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from typing import Any

import measure

from jaxpaged.bench.lengths import MEANS, SIGMA, draw
from jaxpaged.bench.memory import KINDS, MAX_LEN, RULES, SLOTS, Buddy, Packed, paged, reserved, saved, shares

PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def main() -> None:
    """One row for each workload."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=sorted(MEANS), default=list(MEANS), help="mean lengths")
    parser.add_argument("--num-requests", type=int, default=1000, help="requests of each run")
    parser.add_argument("--num-sharing", type=int, default=100, help="requests of each run that measures sharing")
    parser.add_argument("--sigma", type=float, default=SIGMA, help="spread of the lognormal lengths")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")
    parser.add_argument("--output", type=Path, help="append the rows to this file of JSON lines")
    args = parser.parse_args()
    for name in args.workloads:
        requests = draw(MEANS[name], args.num_requests, args.sigma, args.seed, MAX_LEN)
        by_page_size: dict[str, dict[str, float]] = {}
        for size in PAGE_SIZES:
            run = paged(requests, size)
            preemptions = round(run.num_preemptions / len(requests), 3)
            by_page_size[str(size)] = shares(run) | {"preemptions_per_request": preemptions}
        baselines = {
            rule: {
                "packed": shares(reserved(requests, reserve, Packed())),
                "buddy": shares(reserved(requests, reserve, Buddy())),
            }
            for rule, reserve in RULES.items()
        }
        in_flight, oracle = by_page_size["16"]["in_flight"], baselines["oracle"]
        row: dict[str, Any] = {"benchmark": "memory"} | measure.host()
        row |= {"workload": name, "means": MEANS[name], "sigma": args.sigma, "num_requests": args.num_requests}
        row |= {"seed": args.seed, "slots": SLOTS, "max_len": MAX_LEN}
        row |= {"by_page_size": by_page_size, "baselines": baselines}
        row["in_flight_over_oracle"] = {k: round(in_flight / oracle[k]["in_flight"], 2) for k in oracle}
        few = requests[: args.num_sharing]
        row["saved_by_sharing"] = {kind: {str(n): saved(few, n, kind) for n in (2, 4, 6)} for kind in KINDS}
        measure.write(row, args.output)


if __name__ == "__main__":
    main()
