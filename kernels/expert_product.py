"""Rows times the matrix of their expert, block by block: the product that a mixture of experts is made of.

    rows [N, B, M]     N blocks of B rows each, of one expert       experts [N]    whose
    weights [E, M, F]                                               num_used       blocks that count; they come first
    scale [E, 1, F] or None    of weights in 8 bits, a scale for each column, which the product's sums are multiplied by

Backends: "reference" is a loop over the blocks in jnp and runs everywhere; "triton" is a Pallas kernel for NVIDIA GPUs
from A100 on, which does all blocks in one launch and reads each expert's matrix where it lies; "auto" is triton on
NVIDIA GPUs. XLA alone would copy a matrix for each block, or multiply all rows with all experts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxpaged.kernels.backend import Backend, choose
from jaxpaged.kernels.forward_only import forward_only
from jaxpaged.kernels.tiles import current_device

_BLOCK_ROWS = {"reference": (8, 32), "triton": (16, 64)}
"""Rows of a block, where an expert has fewer than 16 rows on average and where it has more. On two CPU cores, of 64
experts of 1024 x 256, 8 a token, blocks of 8 take a third of the time of blocks of 32 for 16 tokens, and as long for
256; of 8 experts of 512 x 1792, 2 a token, blocks of 32 take 0.4 of the time of blocks of 8 for 256 tokens. A GPU's
are the smallest that tensor cores take, and the largest that kept the kernel from spilling; not measured."""


def block_rows(num_rows: int, num_experts: int, backend: Backend = "auto") -> int:
    """How many rows a block should have, where so many rows are spread over so many experts."""
    few, many = _BLOCK_ROWS[choose(backend)]
    return few if num_rows < 16 * num_experts else many


def expert_product(
    rows: Float[Array, "N B M"],
    weights: Shaped[Array, "E M F"],
    experts: Int[Array, " N"],
    num_used: Int[Array, ""],
    scale: Float[Array, "E 1 F"] | None = None,
    *,
    backend: Backend = "auto",
    interpret: bool = False,
    block_k: int | None = None,
    block_f: int = 64,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Float[Array, "N B F"]:
    """rows[n] @ weights[experts[n]] * scale[experts[n]] of the first `num_used` blocks; the others may hold anything.

    Sums are float32. `block_k` and `block_f`, powers of two, cut the kernel's work. The gradient is refused.
    """
    backend = choose(backend, interpret=interpret)
    if block_k is None:
        block_k = 64 if rows.dtype.itemsize <= 2 else 32  # what spills no register
    if backend == "triton":
        device = current_device()
        if weights.dtype == jnp.float8_e4m3fn and not interpret and device.capability < 8.9:
            raise ValueError(
                f"float8_e4m3fn weights need compute capability 8.9; {device.name} has {device.capability}: use int8"
            )
        for name, size in (("block_k", block_k), ("block_f", block_f), ("rows of a block", rows.shape[1])):
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}: {size}; it must be a power of two and at least 16")

    def op(rows: Array, weights: Array, experts: Array, num_used: Array, *scale: Array) -> Array:
        if backend == "reference":
            return _reference(rows, weights, experts, num_used, *scale)
        from jaxpaged.kernels import triton_expert_product  # Pallas is slow to import

        tile = triton_expert_product.Tile(rows.shape[1], block_k, block_f)
        return triton_expert_product.expert_product(
            rows,
            weights,
            experts,
            num_used,
            *scale,
            tile=tile,
            num_warps=num_warps,
            num_stages=num_stages,
            interpret=interpret,
        )

    guarded = forward_only(
        op,
        "the product of chosen experts has no gradient; differentiate the sum over all experts instead: "
        "jaxpaged.model.moe.every_expert, jaxpaged.model.decoder.apply",
    )
    product: Array = guarded(rows, weights, experts, num_used, *(() if scale is None else (scale,)))
    return product


def _reference(
    rows: Float[Array, "N B M"],
    weights: Shaped[Array, "E M F"],
    experts: Int[Array, " N"],
    num_used: Int[Array, ""],
    scale: Float[Array, "E 1 F"] | None = None,
) -> Float[Array, "N B F"]:
    def one(index: Array, out: Array) -> Array:
        x, expert = rows[index], experts[index]
        # Asked for bfloat16, XLA on CPU is slow: see model/linear.py.
        y = jnp.matmul(x, weights[expert].astype(x.dtype), preferred_element_type=jnp.float32)
        y = y if scale is None else y * scale[expert]
        return out.at[index].set(y.astype(x.dtype))

    out: Array = lax.fori_loop(0, num_used, one, jnp.zeros((*rows.shape[:2], weights.shape[2]), rows.dtype))
    return out
