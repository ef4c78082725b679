"""What equal logprobs cost: the same requests in the default mode and with batch_invariant, in one run.

python benchmarks/invariance.py --output benchmarks/results/invariance.jsonl
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from typing import Any

import measure
import workloads


def main() -> None:
    """Run both and write the row."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    measure.add_arguments(parser)
    workloads.add_arguments(parser)
    args = parser.parse_args()
    row: dict[str, Any] = {"benchmark": "invariance"}
    tokens = {}
    for name, batch_invariant in (("default", False), ("invariant", True)):
        row[name], about, tokens[name] = _run(Namespace(**vars(args) | {"batch_invariant": batch_invariant}))
        row |= about
    rates = [row[name]["output_tokens_per_s"] for name in ("invariant", "default")]
    row["rate_of_default"] = round(rates[0] / rates[1], 3)
    row["requests_with_equal_tokens"] = sum(a == b for a, b in zip(*tokens.values(), strict=True))
    measure.write(row, args.output)


def _run(args: Namespace) -> tuple[dict[str, Any], dict[str, Any], list[list[int]]]:
    """What came of it, what ran where, the tokens."""
    llm = measure.build(args)
    work = workloads.from_arguments(args, llm.engine.spec.vocab_size, llm.engine.max_model_len, None)
    timing = measure.run(llm, work.requests)
    about = measure.environment(llm, args) | {"workload": work.description}
    return measure.results(timing, work.requests), about, timing.token_ids


if __name__ == "__main__":
    main()
