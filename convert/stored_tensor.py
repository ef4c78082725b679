"""A tensor that lies in a file: what it is, and how to read that one and no other. Holds no data and no open file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]


class StoredTensor(NamedTuple):
    """`nbytes` bytes at `offset` of `file`, which `decode` turns into an array of `shape`.

    `dtype` is what the file holds, None where that is a quantised format; `decode` then gives float32.
    """

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    decode: Callable[[Array], Array]

    def read(self) -> Array:
        """The tensor, read now, and not through a memory map: its pages would count as ours, and its end could move.

        Raises CheckpointError where the file is gone or has become shorter since it was opened.
        """
        try:
            raw = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.offset)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror or error}") from error
        if raw.nbytes != self.nbytes:
            raise CheckpointError(
                f"{self.file} was cut short while being read: {self.nbytes:,} bytes expected at {self.offset:,}, "
                f"{raw.nbytes:,} found; fetch the file again"
            )
        return self.decode(raw)


def plain(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """The `decode` of a tensor stored as it is used: little-endian rows."""
    return lambda raw: raw.view(dtype).reshape(shape)
