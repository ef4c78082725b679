"""Latency: a few requests of one length, started together and alone on the machine; one row, the median run's.

python benchmarks/latency.py --batch-size 1 --baseline hf --output benchmarks/results/latency.jsonl
"""

from __future__ import annotations

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import measure
import workloads


def main() -> None:
    """Build, run several times, compare, write the row."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=1, help="requests at a time")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens generated for each")
    parser.add_argument("--runs", type=int, default=3, help="timed runs, each with prompts of its own")
    args = parser.parse_args()

    start = time.perf_counter()
    llm = measure.build(args)
    startup = time.perf_counter() - start
    lengths = (args.batch_size, args.input_len, args.output_len)
    works = [workloads.fixed(*lengths, llm.engine.spec.vocab_size, seed) for seed in range(args.runs)]
    timings = [measure.run(llm, work.requests) for work in works]
    median = sorted(range(args.runs), key=lambda i: timings[i].seconds)[args.runs // 2]
    timing, work = timings[median], works[median]

    row = {"benchmark": "latency"} | measure.environment(llm, args) | {"workload": work.description}
    row |= {"runs_seconds": [round(t.seconds, 3) for t in timings]}
    row |= measure.results(timing, work.requests) | measure.peak_memory()
    row |= {"startup_seconds": round(startup, 2), "num_compilations": llm.engine.stats().num_compilations}
    if args.baseline == "hf":
        import baseline

        model = baseline.load(None if args.dummy else measure.model_path(args), args.dummy, row["dtype"])
        result = baseline.static_batches(model, work.requests, args.batch_size)
        row["baseline"] = baseline.setting(model) | {
            "output_tokens_per_s": round(result.output_tokens_per_s, 2),
            "ratio": round(row["output_tokens_per_s"] / result.output_tokens_per_s, 2),
            "requests_with_equal_tokens": baseline.num_equal(result.token_ids, timing.token_ids),
        }
    measure.write(row, args.output)


if __name__ == "__main__":
    main()
