"""Embeddings: which tokens of a step belong to which text, and each text's sum of hidden states so far.

A text whose tokens all count takes nothing from the prefix cache, so its first chunk begins at its first token, and
does so again after it was preempted: that is where its sum begins anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxpaged.engine import batch
from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.scheduler import Chunk, Plan


class Embedded(NamedTuple):
    """The chunks of one step that want embeddings, by their row, and the sums [R, M] of their hidden states."""

    parts: list[tuple[int, Chunk]]
    sums: Any = None

    def take(self) -> None:
        """Add the sums, once they have been read, to their sequences."""
        for row, chunk in self.parts:
            sequence, before = chunk.sequence, chunk.sequence.hidden_sum
            is_first = before is None or chunk.start == 0 or sequence.pooling == "last"
            sequence.hidden_sum = self.sums[row].copy() if is_first else before + self.sums[row]


def pack_embedded(plan: Plan, bucket: Bucket) -> tuple[Embedded, np.ndarray]:
    """What of this step counts, and for each of its tokens the row that it counts for, [T]."""
    owners = np.full(bucket.num_tokens, bucket.num_rows, np.int32)
    parts = []
    for row, first, chunk in batch.tokens_of(plan, bucket):
        end = first + chunk.length
        if chunk.sequence.pooling == "mean":
            owners[first:end] = row
        elif chunk.sequence.pooling == "last" and chunk.samples:
            owners[end - 1] = row
        else:
            continue
        parts.append((row, chunk))
    return Embedded(parts), owners


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Each row over its length; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: np.ndarray = (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return scaled
