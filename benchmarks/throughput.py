"""Offline throughput: all requests at once, one row.

python benchmarks/throughput.py --baseline hf --output benchmarks/results/throughput.jsonl
"""

from __future__ import annotations

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import measure
import workloads


def main() -> None:
    """Build, run, compare, write the row."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    measure.add_arguments(parser)
    workloads.add_arguments(parser)
    parser.add_argument("--baseline-requests", type=int, help="compare on so many requests, and batches")
    args = parser.parse_args()

    start = time.perf_counter()
    llm = measure.build(args)
    startup = time.perf_counter() - start
    encode = llm.tokenizer.encode if llm.tokenizer is not None else None
    work = workloads.from_arguments(args, llm.engine.spec.vocab_size, llm.engine.max_model_len, encode)

    compiled = llm.engine.stats().num_compilations
    timing = measure.run(llm, work.requests)
    stats = llm.engine.stats()
    row = {"benchmark": "throughput"} | measure.environment(llm, args) | {"workload": work.description}
    row |= measure.results(timing, work.requests) | measure.peak_memory()
    row |= {
        "startup_seconds": round(startup, 2),
        "num_compilations": stats.num_compilations,
        "num_compilations_after_warmup": stats.num_compilations - compiled,
        "num_preemptions": stats.num_preemptions,
    }
    if args.speculative_config is not None:
        row |= {"num_drafted_tokens": stats.num_drafted_tokens, "num_accepted_tokens": stats.num_accepted_tokens}
    if args.baseline == "hf":
        import baseline

        model = baseline.load(None if args.dummy else measure.model_path(args), args.dummy, row["dtype"])
        rate = row["output_tokens_per_s"]
        row["baseline"] = baseline.compare(model, work.requests, timing.token_ids, rate, args.baseline_requests)
    measure.write(row, args.output)


if __name__ == "__main__":
    main()
