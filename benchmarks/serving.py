"""What the HTTP layer costs and outlives: tokens through it beside none, events a second, crawling readers, overload.

python benchmarks/serving.py overhead chunks crawlers overload --output benchmarks/results/serving.jsonl

overhead   the same greedy work by `LLM.generate` and by streams over HTTP, in turns, on one engine's settings
chunks     server-sent events a second from an engine that computes nothing, 64 streams
crawlers   p99 of the time between two tokens, with 64 readers of one byte a second and without
overload   answers a second at full load, and with ten times the requests
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import measure
import numpy as np
from fake_engine import fake_server
from served import crawling, elsewhere, serving

from jaxpaged import AsyncEngine, SamplingParams

_PROMPT = [1, 2, 3]


def main() -> None:
    """Measure what was asked for, a row each."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="+", choices=sorted(_KINDS))
    measure.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--num-requests", type=int, default=16, help="of `overhead` (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="of `overhead` (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of `overload` (default: %(default)s)")
    parser.set_defaults(max_num_seqs=16, max_num_batched_tokens=64, max_model_len=256)
    args = parser.parse_args()
    for kind in args.kinds:
        row = {"benchmark": f"serving {kind}"} | _KINDS[kind](args) | {"rounds": args.rounds}
        measure.write(row | measure.host(), args.output)


def _overhead(args: Namespace) -> dict[str, Any]:
    prompts = [np.random.default_rng(i).integers(0, 1000, 16).tolist() for i in range(args.num_requests)]
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    fields = {"temperature": 0, "max_tokens": args.output_len, "ignore_eos": True, "stream": True}
    bodies = [{"prompt": prompt} | fields for prompt in prompts]
    args.enable_prefix_caching = False
    offline, engine = measure.build(args), AsyncEngine(measure.build(args).engine)
    num_tokens = args.num_requests * args.output_len
    rates: dict[str, list[float]] = {"offline": [], "http": []}
    with serving(engine) as served:
        for turn in range(args.rounds + 1):
            began = time.perf_counter()
            offline.generate(prompts, params, use_tqdm=False)
            ended = time.perf_counter()
            found = elsewhere("read_streams", served.port, bodies)
            if turn:  # the first of each is a rehearsal
                rates["offline"].append(num_tokens / (ended - began))
                rates["http"].append(num_tokens / found["seconds"])
    ratios = np.divide(rates["http"], rates["offline"])
    row = measure.environment(offline, args) | {"num_requests": args.num_requests, "output_len": args.output_len}
    row |= {f"{name}_tokens_per_s": [round(rate, 1) for rate in each] for name, each in rates.items()}
    return row | {"http_over_offline": _summary(ratios.tolist())}


def _chunks(args: Namespace) -> dict[str, Any]:
    body = {"prompt": _PROMPT, "max_tokens": 2_000, "stream": True}
    rates, work = [], []
    with fake_server(64, 1_000) as served:
        for _ in range(args.rounds):
            worked = time.process_time()
            found = elsewhere("read_streams", served.port, [body] * 64)
            work.append((time.process_time() - worked) / found["events"] * 1e6)
            rates.append(found["events"] / found["seconds"])
    return {
        "streams": 64,
        "offered_per_s": 64_000,
        "chunks_per_s": _summary(rates),
        "cpu_us_per_chunk": _summary(work),
    }


def _crawlers(args: Namespace) -> dict[str, Any]:
    bodies = [{"prompt": _PROMPT, "max_tokens": 250, "stream": True}] * 8
    waits: dict[str, list[float]] = {"alone": [], "beside": []}
    with fake_server(128, 50) as served:
        for _ in range(args.rounds):
            waits["alone"].append(elsewhere("read_streams", served.port, bodies)["gap_p99"])
            with crawling(served.port, bodies[0] | {"max_tokens": 100_000}, 64):
                waits["beside"].append(elsewhere("read_streams", served.port, bodies)["gap_p99"])
    ratios = np.divide(waits["beside"], waits["alone"])
    row: dict[str, Any] = {f"p99_ms_{k}": [round(1e3 * s, 2) for s in each] for k, each in waits.items()}
    return row | {"crawlers": 64, "step_ms": 20, "p99_beside_over_alone": _summary(ratios.tolist())}


def _overload(args: Namespace) -> dict[str, Any]:
    body = {"prompt": _PROMPT, "max_tokens": 40}
    with fake_server(16, 50, max_num_queued=16) as served:
        peak = elsewhere("load", served.port, body, args.seconds / 3, None, 32)
        over = elsewhere("load", served.port, body, args.seconds, 10 * peak["goodput"])
    return {
        "seconds": args.seconds,
        "answers_per_s_at_peak": round(peak["goodput"], 2),
        "requests_per_s": round(10 * peak["goodput"], 2),
        "answers_per_s": round(over["goodput"], 2),
        "of_peak": round(over["goodput"] / peak["goodput"], 4),
        "statuses": over["statuses"],
        "refused_ms_p99": round(1e3 * over["refused_p99"], 2),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {name: round(float(f(values)), 3) for name, f in (("median", np.median), ("min", min), ("max", max))}


_KINDS: dict[str, Callable[[Namespace], dict[str, Any]]] = {
    "overhead": _overhead,
    "chunks": _chunks,
    "crawlers": _crawlers,
    "overload": _overload,
}

if __name__ == "__main__":
    main()
