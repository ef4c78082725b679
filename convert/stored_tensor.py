"""A tensor that lies in a file: what it is, and how to read that one and no other. Holds no data and no open file."""

from __future__ import annotations

import io
import mmap
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
        """The tensor, read now, and not through a map of the file: its pages would count as ours, its end could move.

        Raises CheckpointError where the file is gone or has become shorter since it was opened.
        """
        # Pages of its own go back to the system with the array; malloc would keep holes, 12 % of all weights.
        pages = mmap.mmap(-1, max(self.nbytes, 1))
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.offset)
                num_read = _fill(stream, memoryview(pages)[: self.nbytes])
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror or error}") from error
        if num_read != self.nbytes:
            raise CheckpointError(
                f"{self.file} was cut short while being read: {self.nbytes:,} bytes expected at {self.offset:,}, "
                f"{num_read:,} found; fetch the file again"
            )
        return self.decode(np.frombuffer(pages, np.uint8, self.nbytes))


def _fill(stream: io.FileIO, buffer: memoryview) -> int:
    """Read until the buffer or the file ends; one call gives at most 2 GB."""
    num_read = 0
    while count := stream.readinto(buffer[num_read:]):
        num_read += count
    return num_read


def plain(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """The `decode` of a tensor stored as it is used: little-endian rows."""
    return lambda raw: raw.view(dtype).reshape(shape)
