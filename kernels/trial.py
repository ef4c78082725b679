"""One attention op on one shape, tried as it will be used: random inputs, a check against the reference, a clock.

Time is that of one layer in a chain of layers, as a model runs them: a call's result is the next one's queries, so
nothing overlaps; each reads another pool, so that the caches hold none of it; what is planned once a step is planned
once. What is compared is timed in turns, round after round, and the medians count: a clock that drifts, drifts for all.

A trial that is fast and wrong has no time: its first layer must agree with the reference on the same inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpaged.kernels.paged_attention import paged_attention, ragged_paged_attention

Run = Callable[[int], Any]
"""run(n): do it n times, wait for the last, and give what that one made."""

MAX_ERROR = 1e-2  # of bfloat16, relative in the 2-norm; rounding its inputs and weights alone makes 2e-3
_BEYOND_CACHES = 256 << 20  # bytes of pools: five times the L2 of an H100
_MAX_LAYERS = 16
_MIN_CHAIN_SECONDS = 400e-6  # ten times what a dispatch takes
_MAX_CALLS = 64


class Shape(NamedTuple):
    """Sequences with `q_lens` new of `kv_lens` tokens; the leading ones with one decode, as in the engine's step."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"  # of the pool; queries are bfloat16 where it has 8 bits

    @property
    def num_decodes(self) -> int:
        """Sequences that the decode op computes."""
        return next((i for i, n in enumerate(self.q_lens) if n != 1), len(self.q_lens))

    @property
    def kind(self) -> str:
        """Which of the two ops it runs."""
        return {0: "ragged", len(self.q_lens): "decode"}.get(self.num_decodes, "mixed")

    @property
    def decode_bytes(self) -> int:
        """Keys and values that decoding reads."""
        numbers = 2 * self.kv_heads * self.head_dim * sum(self.kv_lens[: self.num_decodes])
        return numbers * jnp.dtype(self.dtype).itemsize

    @property
    def chunk_flops(self) -> int:
        """Operations of the chunks' two products, those above the diagonal not counted."""
        chunks = list(zip(self.q_lens, self.kv_lens, strict=True))[self.num_decodes :]
        return 4 * self.heads * self.head_dim * sum(n * (k - n) + n * (n + 1) // 2 for n, k in chunks)

    def floor(self, bytes_per_s: float, flop_per_s: float) -> float:
        """Seconds that it takes at these rates."""
        return self.decode_bytes / bytes_per_s + self.chunk_flops / flop_per_s


class Inputs(NamedTuple):
    """What a chain of layers reads."""

    q: Array  # [T, H, D]
    pools: tuple[Array, ...]  # [P, page_size, 2, K, D] each, every page of which is in use
    scales: tuple[Array, ...]  # [P, page_size, 2, K] each; none but of 8-bit pools
    page_table: Array
    cu_q_lens: Array  # of the chunks
    kv_lens: Array


def decode_shape(batch: int, context: int, **more: Any) -> Shape:
    """Sequences of one length that decode."""
    return Shape((1,) * batch, (context,) * batch, **more)


def prompt_shape(batch: int, length: int, **more: Any) -> Shape:
    """Whole prompts."""
    return Shape((length,) * batch, (length,) * batch, **more)


def make_inputs(shape: Shape, *, seed: int = 0) -> Inputs:
    """Random ones; a sequence's pages lie scattered over the pool."""
    used = [-(-n // shape.page_size) for n in shape.kv_lens]
    numbers = (sum(used), shape.page_size, 2, shape.kv_heads, shape.head_dim)
    dtype = jnp.dtype(shape.dtype)
    layers = math.ceil(_BEYOND_CACHES / (math.prod(numbers) * dtype.itemsize))
    layers = min(_MAX_LAYERS, max(2, layers)) if jax.default_backend() == "gpu" else 2
    q_key, *keys = jax.random.split(jax.random.key(seed), layers + 1)
    is_narrow = dtype.itemsize == 1
    q = jax.random.normal(q_key, (sum(shape.q_lens), shape.heads, shape.head_dim), jnp.bfloat16 if is_narrow else dtype)
    if is_narrow:
        pools = tuple((jax.random.normal(key, numbers, jnp.float32) * 30).round().clip(-127, 127) for key in keys)
        pools = tuple(pool.astype(dtype) for pool in pools)
    else:
        pools = tuple(jax.random.normal(key, numbers, dtype) for key in keys)
    scales = tuple(jnp.full(numbers[:-1], 1 / 30, jnp.float32) for _ in keys) if is_narrow else ()
    table = np.zeros((len(used), max(used)), np.int32)
    ids = np.random.default_rng(seed).permutation(sum(used))
    for row, count, end in zip(table, used, np.cumsum(used), strict=True):
        row[:count] = ids[end - count : end]
    cu_q_lens = np.cumsum([0, *shape.q_lens[shape.num_decodes :]]).astype(np.int32)
    return Inputs(q, pools, scales, jnp.asarray(table), jnp.asarray(cu_q_lens), jnp.asarray(shape.kv_lens, jnp.int32))


def attend(shape: Shape, **how: Any) -> Callable[..., Array]:
    """op(q, pool, scales, inputs): decode op and ragged op on their parts, as in a step; `how` is backend and sizes."""
    decodes, scale = shape.num_decodes, shape.head_dim**-0.5

    def op(q: Array, pool: Array, scales: Array | None, table: Array, cu_q_lens: Array, kv_lens: Array) -> Array:
        parts = []
        if decodes:
            kwargs = {"scale": scale, "scales": scales, **how}
            parts.append(paged_attention(q[:decodes], pool, table[:decodes], kv_lens[:decodes], **kwargs))
        if decodes < len(shape.q_lens):
            kwargs = {"scale": scale, "scales": scales, **how}
            rest = (table[decodes:], cu_q_lens, kv_lens[decodes:])
            parts.append(ragged_paged_attention(q[decodes:], pool, *rest, **kwargs))
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    return op


def num_calls(shape: Shape, inputs: Inputs) -> int:
    """Links of the chain: every pool at least once, and enough that dispatching them costs little."""
    if jax.default_backend() != "gpu":
        return len(inputs.pools)
    fastest = shape.floor(5e12, 1e15)  # no card today is faster
    return min(_MAX_CALLS, max(len(inputs.pools), math.ceil(_MIN_CHAIN_SECONDS / fastest)))


def chain(shape: Shape, inputs: Inputs, **how: Any) -> Run:
    """The op as often as `num_calls` says. Gives the first and the last layer's result."""
    scales: tuple[Array | None, ...] = inputs.scales or (None,) * len(inputs.pools)
    pools = list(zip(inputs.pools, scales, strict=True))
    layer = jax.jit(attend(shape, **how))  # one program, called many times: it is lowered once
    return chain_of(layer, inputs.q, pools, inputs[3:], num_calls(shape, inputs))


def chain_of(layer: Callable[..., Array], q: Array, pools: list[Any], rest: tuple[Array, ...], calls: int) -> Run:
    """layer(q, *pools[i], *rest) with its result for the next one's q, `calls` times in one program."""
    return repeated(jax.jit(chained(layer, calls)), q, pools, rest)


def chained(layer: Callable[..., Array], calls: int) -> Callable[..., tuple[Array, Array]]:
    """That program."""

    def program(q: Array, pools: list[Any], rest: tuple[Array, ...]) -> tuple[Array, Array]:
        first = q = layer(q, *pools[0], *rest)
        for i in range(1, calls):
            q = layer(q, *pools[i % len(pools)], *rest)
        return first, q

    return program


def expected(shape: Shape, inputs: Inputs) -> np.ndarray:
    """The first layer's result by the reference, in float32."""
    op = jax.jit(attend(shape, backend="reference"))
    scales = inputs.scales[0] if inputs.scales else None
    with jax.default_matmul_precision("highest"):
        return np.asarray(op(inputs.q.astype(jnp.float32), inputs.pools[0], scales, *inputs[3:]))


def error(out: Any, want: np.ndarray) -> float:
    """The 2-norm of the difference over that of what is wanted; NaN where there is any."""
    exact = np.asarray(want, np.float64)
    return float(np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact))


def first_runs(runs: Mapping[str, Run]) -> dict[str, Any]:
    """What each makes, or the exception that it raises. Compilers run side by side."""

    def first(run: Run) -> Any:
        try:
            return run(1)
        except Exception as exception:  # of any compiler: one that fails must not end the others
            return exception

    with ThreadPoolExecutor(8) as threads:
        return dict(zip(runs, threads.map(first, runs.values()), strict=True))


def medians(runs: Mapping[str, Run], *, rounds: int = 7, turn_seconds: float = 0.01) -> dict[str, float]:
    """Seconds of one run of each, timed in turns of about `turn_seconds`."""
    repeats = {name: max(1, min(100, int(turn_seconds / _clock(run, 1)))) for name, run in runs.items()}
    times = [{name: _clock(run, repeats[name]) / repeats[name] for name, run in runs.items()} for _ in range(rounds)]
    return {name: float(np.median([t[name] for t in times])) for name in runs}


def _clock(run: Run, times: int) -> float:
    start = time.perf_counter()
    run(times)
    return time.perf_counter() - start


@cache
def copy_rate(mib: int = 1024) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    x = jax.random.normal(jax.random.key(0), (mib * 2**18,), jnp.float32)
    return 2 * x.nbytes / medians({"copy": repeated(jax.jit(lambda x: x + 1), x)})["copy"]


@cache
def matmul_rate(size: int = 8192) -> float:
    """Operations a second of a square bfloat16 matmul."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / medians({"matmul": repeated(jax.jit(jnp.matmul), x, x)})["matmul"]


def repeated(function: Callable[..., Any], *args: Any) -> Run:
    """function(*args), dispatched again and again."""

    def run(times: int) -> Any:
        for _ in range(times):
            out = function(*args)
        return jax.block_until_ready(out)

    return run
