"""Leaves that are quantised as they are read: piece by piece, so that no whole float matrix is ever in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxpaged.convert.stored_tensor import Array, Indices
from jaxpaged.errors import CheckpointError
from jaxpaged.model.params import ParamSpec, ReadPart
from jaxpaged.model.quantized import STEPS, quantize
from jaxpaged.model.spec import Quantization

_PIECE = 4 << 20  # numbers, of which float32 copies are made


class QuantizingReader:
    """Parts of a leaf's values and of its scale, of `read`, which reads the floats.

    A column's scale depends on all its rows, so columns are read whole. The scale of what was quantised last is kept:
    it is asked for next.
    """

    def __init__(self, path: str, leaf: ParamSpec, read: ReadPart, how: Quantization) -> None:
        self._path, self._shape, self._read, self._how = path, leaf.shape, read, how
        self._known: tuple[Sequence[Indices], Array] | None = None

    def values(self, *index: NDArray[np.int64]) -> Array:
        """The values at `index`, an index for each axis."""
        *first, rows, columns = index
        groups = self._shape[-2] // (self._how.group_size or self._shape[-2])
        values = np.empty([len(axis) for axis in index], STEPS[self._how.dtype].dtype)
        scale = np.empty([*map(len, first), groups, len(columns)], np.float32)
        for at in _pieces([len(axis) for axis in (*first, columns)], self._shape[-2]):
            *leading, wanted = at
            found = [axis[cut] for axis, cut in zip((*first, columns), at, strict=True)]
            floats = self._read(*found[:-1], np.arange(self._shape[-2]), found[-1])
            with np.errstate(invalid="ignore"):  # what is not finite is told below
                part = quantize(floats.astype(np.float32, copy=False), self._how)
            values[*leading, :, wanted] = part.values[..., rows, :]
            scale[*leading, :, wanted] = part.scale
        if not np.isfinite(scale).all():
            raise CheckpointError(
                f"{self._path} holds weights that are not finite, which {self._how.dtype} cannot; load it in floats"
            )
        self._known = (*first, columns), scale
        return values

    def scale(self, *index: NDArray[np.int64]) -> Array:
        """The scale at `index`."""
        *first, groups, columns = index
        if self._known is None or not all(map(np.array_equal, self._known[0], (*first, columns))):
            self.values(*first, np.arange(0), columns)
        known: Any = self._known
        part: Array = known[1][..., groups, :]
        return part


def _pieces(sizes: Sequence[int], rows: int) -> Iterator[tuple[slice, ...]]:
    """Cuts of axes of these sizes, the last one's columns of `rows` numbers: one of each other axis at a time."""
    *leading, columns = sizes
    step = max(1, _PIECE // max(rows, 1))
    starts = product(*(range(size) for size in leading), range(0, columns, step))
    for *ones, start in starts:
        yield (*(slice(one, one + 1) for one in ones), slice(start, start + step))
