"""From each data shard's arrays to a step's: end to end along the first axis, as `Placement.over_data` wants them.

Each shard's are packed for itself (`batch.py`), in the same shapes, rows and page ids counted from its own first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TypeVar

import jax
import numpy as np

T = TypeVar("T")


def stack(parts: Sequence[T]) -> T:
    """The same leaf of every part, one after another; of one part, the part itself."""
    if len(parts) == 1:
        return parts[0]
    stacked: T = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return stacked


def stack_found(parts: Sequence[np.ndarray | None], neutral: float) -> np.ndarray | None:
    """As `stack`, filled with `neutral` where a shard has none; None where none has one."""
    found = next((part for part in parts if part is not None), None)
    if found is None:
        return None
    return stack([np.full_like(found, neutral) if part is None else part for part in parts])


def stack_pieces(pieces: Sequence[Iterable[T]], nothing: T) -> Iterator[T]:
    """The first piece of every shard, then the second of every shard; `nothing` stands for those it does not have."""
    return (stack(together) for together in zip_longest(*pieces, fillvalue=nothing))
