"""How long new weights take a live engine: 100 swaps between two trees, one before each step, while requests run.

python benchmarks/swap.py --output benchmarks/results/swap.jsonl
"""

from __future__ import annotations

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import jax
import jax.numpy as jnp
import measure
import numpy as np

from jaxpaged import SamplingParams

_NUM_SWAPS = 100


def main() -> None:
    """Swap, measure, write the row."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--num-requests", type=int, default=32, help="that run meanwhile (default: %(default)s)")
    parser.set_defaults(max_num_seqs=32, max_num_batched_tokens=128, max_model_len=256)
    args = parser.parse_args()

    llm = measure.build(args)
    engine = llm.engine
    trees = (engine.params, jax.tree.map(lambda leaf: leaf * jnp.asarray(1.001, leaf.dtype), engine.params))
    compiled = engine.stats().num_compilations
    for index in range(args.num_requests):
        params = SamplingParams(max_tokens=_NUM_SWAPS + 32, seed=index, ignore_eos=True, detokenize=False)
        engine.add_request(str(index), np.random.default_rng(index).integers(0, 100, 4).tolist(), params)
    seconds, work, num_running, num_copied = [], [], [], 0
    for _ in range(4):  # a step takes 16 prompts
        engine.step()
    for swap in range(1, _NUM_SWAPS + 1):
        given = trees[swap % 2]
        start, worked = time.perf_counter(), time.thread_time()
        engine.update_params(given)
        work.append(time.thread_time() - worked)
        seconds.append(time.perf_counter() - start)
        pairs = zip(jax.tree.leaves(engine.params), jax.tree.leaves(given), strict=True)
        num_copied += sum(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in pairs)
        engine.step()
        num_running.append(engine.stats().num_running)
    leaves = jax.tree.leaves(engine.params)
    row = {"benchmark": "swap"} | measure.environment(llm, args)
    row |= {
        "num_swaps": _NUM_SWAPS,
        "num_running_at_least": min(num_running),
        "num_leaves": len(leaves),
        "param_bytes": sum(leaf.nbytes for leaf in leaves),
        "leaves_copied": num_copied,
        "compilations_while_swapping": engine.stats().num_compilations - compiled,
        "swap_ms": _summary(seconds),
        "swap_cpu_ms": _summary(work),
    }
    measure.write(row, args.output)


def _summary(seconds: list[float]) -> dict[str, float]:
    return {name: round(float(f(seconds)) * 1e3, 3) for name, f in (("median", np.median), ("max", np.max))}


if __name__ == "__main__":
    main()
