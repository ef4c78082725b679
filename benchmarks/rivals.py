"""Other attention on the same inputs, where the machine has it: Pallas' example kernel, cuDNN's through JAX, torch's.

Each is a trial's chain: first and last layer out. They read keys and values laid out as they like best, made before the
clock starts. ValueError says what one cannot do at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.kernels.tiles import current_device, splits_for
from jaxpaged.kernels.trial import Inputs, Run, Shape, chain_of, num_calls

Rival = Callable[[Shape, Inputs], Run]


def pallas_example(shape: Shape, inputs: Inputs) -> Run:
    """jax.experimental.pallas.ops.gpu.paged_attention: decode."""
    if shape.kind != "decode":
        raise ValueError("decode only")
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    width = inputs.page_table.shape[1]
    wanted = splits_for(
        current_device(), num_seqs=len(shape.kv_lens), kv_heads=shape.kv_heads, max_keys=shape.kv_lens[0], block_k=64
    )
    splits = next(n for n in (16, 8, 4, 2, 1) if n <= max(wanted, 1) and width % n == 0)  # it wants equal parts
    pages_at_once = next(n for n in (8, 4, 2, 1) if width // splits % n == 0 and n * shape.page_size <= 128)
    op = jax.jit(partial(paged_attention, k_splits=splits, pages_per_compute_block=pages_at_once))
    scale = jnp.asarray(shape.head_dim**-0.5, inputs.q.dtype)

    def layer(q: Any, k: Any, v: Any, table: Any, _: Any, lens: Any) -> Any:
        return op(q * scale, k, v, table, lens)

    pools = [tuple(p[:, :, side].transpose(2, 0, 1, 3) for side in (0, 1)) for p in inputs.pools]
    return chain_of(layer, inputs.q, pools, inputs[3:], num_calls(shape, inputs))


def cudnn(shape: Shape, inputs: Inputs) -> Run:
    """cuDNN's paged attention, which JAX has but does not export: decode, and whole prompts of one length."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    _check_equal(shape)
    new, batch = shape.q_lens[0], len(shape.q_lens)
    mask = MaskType.PADDING if new == 1 else MaskType.PADDING_CAUSAL
    new_lens = jnp.full(batch, new, jnp.int32)

    def layer(q: Any, k: Any, v: Any, table: Any, _: Any, lens: Any) -> Any:
        rows, tables = q.reshape(batch, new, *q.shape[1:]), table[:, None, :, None]
        out = paged_attention(
            rows, k, v, new_lens, lens, tables, tables, scale=shape.head_dim**-0.5, mask_type=mask, qkv_layout="BTNH"
        )
        return (out[0] if isinstance(out, (tuple, list)) else out).reshape(q.shape)

    pools = [tuple(p[:, :, side] for side in (0, 1)) for p in inputs.pools]
    return chain_of(jax.jit(layer), inputs.q, pools, inputs[3:], num_calls(shape, inputs))


def torch_sdpa(shape: Shape, inputs: Inputs) -> Run:
    """torch's scaled_dot_product_attention on keys and values without pages: decode, and whole prompts."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    _check_equal(shape)
    new, batch, calls = shape.q_lens[0], len(shape.q_lens), num_calls(shape, inputs)
    on_gpu = jax.default_backend() == "gpu"
    dense = [_without_pages(pool, inputs.page_table, shape) for pool in inputs.pools]
    jax.block_until_ready(dense)
    layers = [tuple(torch.from_dlpack(x) for x in kv) for kv in dense]
    q = torch.from_dlpack(inputs.q.reshape(batch, new, shape.heads, shape.head_dim).transpose(0, 2, 1, 3))
    grouped = {"enable_gqa": True} if shape.heads != shape.kv_heads else {}

    def program() -> tuple[Any, Any]:
        first = last = None
        for i in range(calls):
            k, v = layers[i % len(layers)]
            last = scaled_dot_product_attention(q if last is None else last, k, v, is_causal=new > 1, **grouped)
            first = last if first is None else first
        return first, last

    go, out = _as_graph(torch, program) if on_gpu else (program, None)

    def run(times: int) -> tuple[Any, Any]:
        made: Any = out
        for _ in range(times):
            made = go() or out
        if on_gpu:
            torch.cuda.synchronize()
        first, last = made
        return _Rows(first), last

    return run


class _Rows:
    """A tensor [S, H, N, D] as our ops' rows [T, H, D], copied to the host when numpy asks for it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows = self.tensor.transpose(1, 2).flatten(0, 1).float().cpu().numpy()
        return np.asarray(rows, dtype)


RIVALS: dict[str, Rival] = {"pallas_example": pallas_example, "cudnn": cudnn, "torch_sdpa": torch_sdpa}


def available(shape: Shape, inputs: Inputs) -> tuple[dict[str, Run], dict[str, str]]:
    """Those that can be tried on this shape, and for the others why not."""
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    for name, make in RIVALS.items():
        if name == "torch_sdpa" and find_spec("torch") is None:
            reasons[name] = "torch is not installed"
        elif inputs.scales:
            reasons[name] = "no pools of 8 bits"
        else:
            try:
                runs[name] = make(shape, inputs)
            except Exception as exception:  # whatever another library raises, the rest goes on
                reasons[name] = told(exception)
    return runs, reasons


def told(exception: Exception) -> str:
    """In a row's words."""
    return f"{type(exception).__name__}: {exception}".partition("\n")[0][:200]


def _check_equal(shape: Shape) -> None:
    if shape.kind == "mixed" or len({*shape.q_lens}) > 1 or len({*shape.kv_lens}) > 1:
        raise ValueError("sequences of one length only")
    if shape.kind == "ragged" and shape.q_lens != shape.kv_lens:
        raise ValueError("whole prompts only")


def _without_pages(pool: jax.Array, table: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Keys and values [S, K, U, D]."""
    kv = pool[table].reshape(len(shape.kv_lens), -1, 2, shape.kv_heads, shape.head_dim)[:, : shape.kv_lens[0]]
    return kv[:, :, 0].transpose(0, 2, 1, 3), kv[:, :, 1].transpose(0, 2, 1, 3)


def _as_graph(torch: Any, program: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """A CUDA graph of the program, as JAX makes one of ours, and where it leaves what it gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            program()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = program()
    return graph.replay, out  # replay gives None
