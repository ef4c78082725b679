"""Times one decode step of a whole model beside the bytes it must read: every weight, and the keys and values in use.

    python benchmarks/step.py --dummy llama-3-8b --batch-sizes 1 8 64 --output benchmarks/results/step.jsonl

The step is the engine's own function with a greedy choice behind it, each step's tokens the next one's input, without
the scheduler: what is left between this and the engine's throughput is the host's. Its first logits must be those of
the same model with the reference attention.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import host

from jaxpaged.bench.shapes import SHAPES
from jaxpaged.convert.families import FAMILIES
from jaxpaged.functional import Span, pack
from jaxpaged.kernels import trial
from jaxpaged.model.cache import KVCache, init_cache, page_bytes
from jaxpaged.model.params import Params, dummy_params, flatten
from jaxpaged.model.spec import Decoder
from jaxpaged.model.step import StepInputs, forward

PAGE_SIZE = 16
MAX_ERROR = 5e-2  # of logits, relative in the 2-norm: bfloat16's roundings add up over the layers


def main() -> None:
    """Measure, print and append."""
    args = _arguments()
    config = SHAPES[args.dummy]
    spec = FAMILIES[config["model_type"]].spec(config)
    params = dummy_params(spec, dtype=jnp.dtype(args.dtype))
    copy = trial.copy_rate(args.copy_mib)
    shared = host() | {"benchmark": "step", "model": args.dummy, "dtype": args.dtype, "copy_bytes_per_s": copy}
    for batch in args.batch_sizes:
        row = step_row(spec, params, batch, args.context, args.dtype, copy)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a") as file:
                file.write(json.dumps(shared | row) + "\n")


def step_row(spec: Decoder, params: Params, batch: int, context: int, dtype: str, copy: float) -> dict[str, Any]:
    """`batch` sequences, each of which computes its token number `context`."""
    row: dict[str, Any] = {"batch": batch, "context": context, "page_size": PAGE_SIZE}
    step = jax.jit(partial(_greedy, spec=spec), static_argnames="backend", donate_argnums=1)
    cache, inputs = filled(spec, batch, context, dtype)
    nothing_sampled = jnp.zeros(batch, jnp.int32)
    # A step writes one slot a sequence, with what the next writes again: both see the same cache.
    cache, want, _ = step(params, cache, inputs, nothing_sampled, backend="reference")
    state = [cache, want, nothing_sampled]

    def run(times: int) -> jax.Array:
        for _ in range(times):
            state[:] = step(params, state[0], inputs, state[2], backend="auto")
        logits: jax.Array = jax.block_until_ready(state[1])
        return logits

    error = trial.error(run(1), np.asarray(want))
    if not error < MAX_ERROR:
        return row | {"not_run": f"wrong: its logits' error is {error:.3g}, and {MAX_ERROR} is allowed"}
    seconds = trial.medians({"step": run}, turn_seconds=0.1)["step"]
    read = weight_bytes(params, spec) + batch * context * page_bytes(spec, PAGE_SIZE, dtype) // PAGE_SIZE
    floor = read / copy
    row |= {"milliseconds": round(seconds * 1e3, 4), "bytes": read, "floor_milliseconds": round(floor * 1e3, 4)}
    row["error"] = round(error, 5)
    return row | {"time_over_floor": round(seconds / floor, 3), "tokens_per_s": round(batch / seconds, 1)}


def filled(spec: Decoder, batch: int, context: int, dtype: str) -> tuple[KVCache, StepInputs]:
    """A cache full of random numbers, wide enough apart that attention is not a mean, and a step of its sequences."""
    width = -(-context // PAGE_SIZE)
    cache = init_cache(spec, batch * width + 1, PAGE_SIZE, dtype)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(cache))))
    fill = jax.jit(lambda key, pool: jax.random.normal(key, pool.shape, pool.dtype) * np.asarray(3, pool.dtype))
    cache = jax.tree.map(lambda pool: fill(next(keys), pool), cache)
    ids = np.random.default_rng(0).permutation(batch * width).reshape(batch, width) + 1
    spans = [Span([7], context - 1, pages.tolist()) for pages in ids]
    return cache, pack(spans, cache)._replace(feedback=jnp.arange(batch, dtype=jnp.int32))


def weight_bytes(params: Params, spec: Decoder) -> int:
    """All weights that a step reads: of the embedding a few rows at most, unless the head is tied to it."""
    return sum(w.nbytes for path, w in flatten(params) if spec.tied_head or not path.startswith("embed."))


def _greedy(
    params: Params, cache: KVCache, inputs: StepInputs, sampled: jax.Array, *, spec: Decoder, backend: Any
) -> tuple[KVCache, jax.Array, jax.Array]:
    cache, outputs = forward(params, cache, inputs, sampled, spec, attention_backend=backend)
    return cache, outputs.logits, outputs.logits.argmax(-1).astype(jnp.int32)


def _arguments() -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dummy", choices=sorted(SHAPES), default="llama-3-8b", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and cache (default: %(default)s)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 64], help="(default: 1 8 64)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each sequence (default: %(default)s)")
    parser.add_argument("--copy-mib", type=int, default=1024, help="size of the copy (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="append rows to this file of JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
