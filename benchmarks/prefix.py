"""What the prefix cache saves: requests that begin alike, with the cache and without, in one run.

python benchmarks/prefix.py --output benchmarks/results/prefix.jsonl
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
    parser.set_defaults(workload="shared-prefix", num_requests=32, input_mean=16, output_mean=8)
    args = parser.parse_args()
    row: dict[str, Any] = {"benchmark": "prefix"}
    tokens = {}
    for name, enabled in (("without", False), ("with", True)):
        row[name], about, tokens[name] = _run(Namespace(**vars(args) | {"enable_prefix_caching": enabled}))
        row |= about
    row["computed_prompt_tokens_saved"] = round(
        1 - row["with"]["computed_prompt_tokens"] / row["without"]["computed_prompt_tokens"], 4
    )
    row["requests_with_equal_tokens"] = sum(a == b for a, b in zip(*tokens.values(), strict=True))
    measure.write(row, args.output)


def _run(args: Namespace) -> tuple[dict[str, Any], dict[str, Any], list[list[int]]]:
    """What came of it, what ran where, the tokens."""
    llm = measure.build(args)
    work = workloads.from_arguments(args, llm.engine.spec.vocab_size, llm.engine.max_model_len, None)
    timing = measure.run(llm, work.requests)
    stats = llm.engine.stats()
    found = measure.results(timing, work.requests)
    found["computed_prompt_tokens"] = stats.prompt_tokens - stats.prefix_cache_hits
    about = measure.environment(llm, args) | {"workload": work.description}
    about["engine"].pop("enable_prefix_caching")
    return found, about, timing.token_ids


if __name__ == "__main__":
    main()
