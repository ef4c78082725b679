"""The bytes of pages kept on the host: a numpy array per pool, a row per slot, filled as they come from the device."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

_FLOPS_PER_BYTE = {"cpu": 10, "gpu": 10_000}
"""What a device computes while the host moves a byte: some 4e14 flop/s beside 4e10 byte/s, 5e10 beside 5e9 on a CPU."""


class _Arrival(NamedTuple):
    slots: np.ndarray
    pages: list[Any]  # jax arrays; jax's own type does not tell of is_ready


class HostPages:
    """Room for `num_slots` pages of these pools (any pytree of arrays [P, ...])."""

    def __init__(self, pools: Any, num_slots: int) -> None:
        """The system gives the memory when a slot is first written."""
        leaves, self._structure = jax.tree.flatten(pools)
        self._rows = [np.empty((num_slots, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
        self._arriving: deque[_Arrival] = deque()

    def put(self, slots: np.ndarray, pages: Any) -> None:
        """Take arrays [N, ...] that the device may still be computing: page n for slots[n], none where that is -1."""
        self.settle(wait=False)
        self._arriving.append(_Arrival(slots, jax.tree.leaves(pages)))

    def get(self, slots: np.ndarray) -> Any:
        """The pages of these slots, as arrays [N, ...] of their own."""
        self.settle(wait=True)
        return jax.tree.unflatten(self._structure, [rows[slots] for rows in self._rows])

    def settle(self, *, wait: bool) -> None:
        """Store what has arrived, in the order in which it was sent; with `wait`, all of it."""
        while self._arriving and (wait or all(page.is_ready() for page in self._arriving[0].pages)):
            slots, pages = self._arriving.popleft()
            real = slots >= 0
            for rows, arrived in zip(self._rows, pages, strict=True):
                rows[slots[real]] = np.asarray(arrived)[real]


def pages_worth_moving(call_bytes: int, page_size: int, num_params: int, platform: str, most: int) -> int:
    """The fewest pages whose moving in is cheaper than computing their tokens anew, at most `most`, what a call moves.

    A call takes the time of `call_bytes` however few of its pages are meant; a token takes two flops per parameter.
    """
    flops_per_byte = _FLOPS_PER_BYTE["cpu" if platform == "cpu" else "gpu"]
    tokens = call_bytes * flops_per_byte / (2 * num_params)
    return min(max(1, math.ceil(tokens / page_size)), most)
