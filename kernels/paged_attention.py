"""Paged attention: softmax attention whose keys and values lie in pages, found through a page table.

These two functions are the public ops, useful without the engine. `pages` is one layer's pool,
`[P, page_size, 2, K, D]` with keys at index 0 and values at index 1; `page_table[s]` lists the pages of sequence s in
order. The tokens of a sequence, new ones included, have been written to their pages before the call.

Every sequence is causal within itself. `scale` multiplies q.k, `softcap` bounds the scores as softcap * tanh(x /
softcap), `window` counts the keys that a query sees with itself among them, `sinks` [H] adds one logit per head to the
softmax's denominator, `scales` [P, page_size, 2, K] multiplies K and V of an 8-bit pool. A sequence with kv_lens 0 and
rows of q past the last sequence give zeros; page-table entries past a sequence's length may hold anything.

Backends: "reference" is plain jnp and runs everywhere (forward only); "auto" is the best one there is for the device.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float, Int

from jaxpaged.kernels import reference

Backend = Literal["auto", "reference"]
_BACKENDS = ("auto", "reference")


def paged_attention(
    q: Float[Array, "S H D"],
    pages: Array,
    page_table: Int[Array, "S max_pages"],
    kv_lens: Int[Array, " S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    scales: Float[Array, "P page_size 2 K"] | None = None,
    backend: Backend = "auto",
) -> Float[Array, "S H D"]:
    """Decode: row s of q is the newest of sequence s's kv_lens[s] tokens. Raises ValueError on wrong shapes."""
    _check(q, pages, page_table, kv_lens, backend)
    if q.shape[0] != kv_lens.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows but kv_lens has {kv_lens.shape[0]}; decode takes one query each")
    return reference.paged_attention(
        q, pages, page_table, kv_lens, scale=scale, window=window, softcap=softcap, sinks=sinks, scales=scales
    )


def ragged_paged_attention(
    q: Float[Array, "T H D"],
    pages: Array,
    page_table: Int[Array, "S max_pages"],
    cu_q_lens: Int[Array, " S+1"],
    kv_lens: Int[Array, " S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    scales: Float[Array, "P page_size 2 K"] | None = None,
    backend: Backend = "auto",
) -> Float[Array, "T H D"]:
    """Any mix of prompt chunks and single tokens: rows cu_q_lens[s]:cu_q_lens[s + 1] of q are the newest of kv_lens[s].

    Raises ValueError on wrong shapes.
    """
    _check(q, pages, page_table, kv_lens, backend)
    if cu_q_lens.shape[0] != kv_lens.shape[0] + 1:
        raise ValueError(f"cu_q_lens has {cu_q_lens.shape[0]} entries; {kv_lens.shape[0]} sequences need one more")
    return reference.ragged_paged_attention(
        q,
        pages,
        page_table,
        cu_q_lens,
        kv_lens,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        scales=scales,
    )


def _check(q: Array, pages: Array, page_table: Array, kv_lens: Array, backend: str) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(_BACKENDS)}")
    if q.ndim != 3 or pages.ndim != 5 or pages.shape[2] != 2:
        raise ValueError(f"q must be [T, H, D] and pages [P, page_size, 2, K, D]; got {q.shape} and {pages.shape}")
    if q.shape[1] % pages.shape[3] or q.shape[2] != pages.shape[4]:
        raise ValueError(
            f"q has {q.shape[1]} heads of {q.shape[2]}, pages {pages.shape[3]} of {pages.shape[4]}; "
            "query heads must be a multiple of kv heads, and head sizes equal"
        )
    if page_table.shape[0] != kv_lens.shape[0]:
        raise ValueError(f"page_table has {page_table.shape[0]} rows but kv_lens has {kv_lens.shape[0]}")
