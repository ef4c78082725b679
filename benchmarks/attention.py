"""Times the attention kernels alone: each row says how near a shape comes to a copy, or to a matmul, of the same run.

    python benchmarks/attention.py --output benchmarks/results/attention.jsonl

Decode is counted in the bytes of keys and values it must read, over the bytes a second of a device-to-device copy;
prompts in the operations of their two products, over those a second of a square bfloat16 matmul.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import host

from jaxpaged.kernels.paged_attention import paged_attention, ragged_paged_attention

_MIN_SECONDS = 0.2  # of measuring, a case


def main() -> None:
    """Measure, print and append."""
    args = _arguments()
    shared = host() | {"benchmark": "attention", "backend": args.backend, "dtype": args.dtype}
    copy, matmul = copy_rate(args.copy_mib), matmul_rate(args.matmul_size)
    print(f"copy {copy / 1e9:,.1f} GB/s, bfloat16 matmul {matmul / 1e12:,.3f} TFLOP/s")
    for row in _rows(args, copy, matmul):
        print("  ".join(f"{k} {v}" for k, v in row.items()))
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(shared | {"copy_bytes_per_s": copy, "matmul_flop_per_s": matmul} | row) + "\n")


def copy_rate(mib: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    x = jnp.zeros(mib * 2**18, jnp.float32)
    return 2 * x.nbytes / seconds_of(jax.jit(lambda x: x + 1), x)


def matmul_rate(size: int) -> float:
    """Operations a second of a square bfloat16 matmul."""
    x = jnp.ones((size, size), jnp.bfloat16)
    return 2 * size**3 / seconds_of(jax.jit(jnp.matmul), x, x)


def seconds_of(function: Callable[..., Any], *args: Any) -> float:
    """The median of calls, each of as many dispatches in a row as hide the host's part."""
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    repeats = max(1, min(50, int(_MIN_SECONDS / 5 / (time.perf_counter() - start))))
    times: list[float] = []
    while len(times) < 3 or sum(times) * repeats < _MIN_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready([function(*args) for _ in range(repeats)])
        times.append((time.perf_counter() - start) / repeats)
    return float(np.median(times))


def _rows(args: Namespace, copy: float, matmul: float) -> Iterator[dict[str, Any]]:
    heads, kv_heads, dim = args.heads, args.kv_heads, args.head_dim
    facts = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "page_size": args.page_size}
    for batch, context in (tuple(map(int, shape.split("x"))) for shape in args.decode):
        q, pages, table, lens = _case(args, batch, context, batch)
        op = jax.jit(partial(paged_attention, scale=dim**-0.5, backend=args.backend))
        seconds = seconds_of(op, q, pages, table, lens)
        read = batch * context * 2 * kv_heads * dim * pages.dtype.itemsize
        row = {"op": "decode", "batch": batch, "context": context, **facts, "microseconds": round(seconds * 1e6, 1)}
        yield row | {"bytes_per_s": read / seconds, "of_copy": round(read / seconds / copy, 3)}
    for batch, length in (tuple(map(int, shape.split("x"))) for shape in args.prompts):
        q, pages, table, lens = _case(args, batch, length, batch * length)
        cu_q_lens = jnp.arange(batch + 1, dtype=jnp.int32) * length
        ragged = jax.jit(partial(ragged_paged_attention, scale=dim**-0.5, backend=args.backend))
        seconds = seconds_of(ragged, q, pages, table, cu_q_lens, lens)
        work = 4 * heads * dim * batch * length * (length + 1) // 2
        row = {"op": "prompts", "batch": batch, "context": length, **facts, "microseconds": round(seconds * 1e6, 1)}
        yield row | {"flop_per_s": work / seconds, "of_matmul": round(work / seconds / matmul, 3)}


def _case(args: Namespace, batch: int, context: int, rows: int) -> tuple[jax.Array, ...]:
    """Sequences of one length whose pages lie in random order in a pool of just their size."""
    width = -(-context // args.page_size)
    shape = (batch * width + 1, args.page_size, 2, args.kv_heads, args.head_dim)
    q_key, pool_key = jax.random.split(jax.random.key(0))
    ids = np.random.default_rng(0).permutation(batch * width).reshape(batch, width) + 1
    return (
        jax.random.normal(q_key, (rows, args.heads, args.head_dim), args.dtype),
        jax.random.normal(pool_key, shape, args.dtype),
        jnp.asarray(ids, jnp.int32),
        jnp.full(batch, context, jnp.int32),
    )


def _arguments() -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="auto", help="auto, reference, triton, mosaic (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of queries and pool (default: %(default)s)")
    parser.add_argument(
        "--decode", nargs="*", default=["1x8192", "8x8192", "64x1024", "64x4096", "256x512"], help="batch x context"
    )
    parser.add_argument("--prompts", nargs="*", default=["1x8192", "8x1024"], help="sequences x length")
    for name, value in {"heads": 32, "kv-heads": 8, "head-dim": 128, "page-size": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--copy-mib", type=int, default=1024, help="size of the copy (default: %(default)s)")
    parser.add_argument("--matmul-size", type=int, default=8192, help="rows of the matmul (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="append rows to this file of JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
