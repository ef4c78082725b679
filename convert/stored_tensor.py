"""A tensor that lies in a file: what it is, and how to read that one, or a part of it, and no other byte.

Holds no data and no open file. `BYTES_READ` counts what this process has read of all tensors.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]
Indices = np.ndarray[Any, np.dtype[np.int64]]
"""Which elements along one axis, in the order wanted."""


class Odometer:
    """A count of bytes that only grows."""

    total = 0


BYTES_READ = Odometer()


class Block(NamedTuple):
    """Numbers that are stored together: how many, and in how many bytes. A row holds whole blocks."""

    size: int
    nbytes: int


class Undo(NamedTuple):
    """What a writer did to a tensor, and how it goes back: numbers one by one, rows moved, then turned."""

    numbers: Callable[[Array], Array] | None = None
    rows: Callable[[Array], Array] | None = None
    turned: bool = False

    def of(self, x: Array) -> Array:
        """The whole tensor as it was."""
        x = self.numbers(x) if self.numbers else x
        x = self.rows(x) if self.rows else x
        return x.T if self.turned else x


class BlockScales(NamedTuple):
    """What the numbers of a matrix are multiplied by: one number of `tensor` for each block of rows and columns."""

    tensor: StoredTensor
    rows: int
    columns: int

    def times(self, part: Array, rows: Indices, columns: Indices) -> Array:
        """These rows and columns of the matrix, multiplied."""
        row_blocks, row_of = np.unique(rows // self.rows, return_inverse=True)
        column_blocks, column_of = np.unique(columns // self.columns, return_inverse=True)
        scales = self.tensor.read_part(row_blocks, column_blocks).astype(np.float32)
        return part * scales[row_of][:, column_of]


class StoredTensor(NamedTuple):
    """`nbytes` bytes at `offset` of `file`: blocks, which `decode` turns into numbers, and `undo` into the tensor.

    `shape` is what `read` gives. `dtype` is what the file holds, None where that is a quantised format; `decode` then
    gives float32, which `scales` multiply where they lie in a tensor of their own.
    """

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    decode: Callable[[Array], Array]
    block: Block
    undo: Undo = Undo()
    scales: BlockScales | None = None

    def read(self) -> Array:
        """The tensor, read now. Raises CheckpointError where the file is gone or has become shorter since."""
        numbers = self.undo.of(self.decode(self._bytes([(0, self.nbytes)], self.nbytes)).reshape(self._stored_shape))
        return numbers if self.scales is None else self.scales.times(numbers, *map(np.arange, self.shape))

    def read_part(self, *index: Indices) -> Array:
        """`read()[np.ix_(*index)]`, of which no other block is read: an index for each axis, in any order.

        A run of blocks is one call of the system. Disks give whole pages: runs far below 4 KiB cost them more.
        """
        shape = self._stored_shape
        at = list(index[::-1] if self.undo.turned else index)
        if self.undo.rows:
            at[0] = self.undo.rows(np.arange(shape[0]))[at[0]]
        *leading, last = at
        rows = np.ravel_multi_index(np.ix_(*leading), shape[:-1]).ravel() if leading else np.zeros(1, np.int64)
        rows, row_of = np.unique(rows, return_inverse=True)
        blocks = np.unique(last // self.block.size)
        column_of = np.searchsorted(blocks, last // self.block.size) * self.block.size + last % self.block.size
        raw = self._bytes(self._runs(rows, blocks), len(rows) * len(blocks) * self.block.nbytes)
        part = self.decode(raw).reshape(len(rows), len(blocks) * self.block.size)
        part = part if is_all(row_of, part.shape[0]) else part[row_of]
        part = part if is_all(column_of, part.shape[1]) else part[:, column_of]
        part = self.undo.numbers(part) if self.undo.numbers else part
        part = part.reshape([len(i) for i in at])
        part = part.T if self.undo.turned else part
        return part if self.scales is None else self.scales.times(part, *index)

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.undo.turned else self.shape

    def _runs(self, rows: Indices, blocks: Indices) -> Iterable[tuple[int, int]]:
        """(offset, bytes) of these blocks of these rows, what lies together as one."""
        row_blocks = self._stored_shape[-1] // self.block.size
        if len(blocks) == row_blocks:
            for start, length in _together(rows):
                yield start * row_blocks * self.block.nbytes, length * row_blocks * self.block.nbytes
            return
        pieces = list(_together(blocks))
        for row in rows.tolist():
            for start, length in pieces:
                yield (row * row_blocks + start) * self.block.nbytes, length * self.block.nbytes

    def _bytes(self, runs: Iterable[tuple[int, int]], nbytes: int) -> Array:
        """These pieces one after another; not through a map of the file: its pages would count as ours, its end could
        move.
        """
        # Pages of its own go back to the system with the array; malloc would keep holes, 12 % of all weights.
        pages = mmap.mmap(-1, max(nbytes, 1))
        buffer, done = memoryview(pages), 0
        try:
            with self.file.open("rb", buffering=0) as stream:
                for offset, length in runs:
                    stream.seek(self.offset + offset)
                    num_read = _fill(stream, buffer[done : done + length])
                    BYTES_READ.total += num_read
                    if num_read != length:
                        raise CheckpointError(
                            f"{self.file} was cut short while being read: {length:,} bytes expected at "
                            f"{self.offset + offset:,}, {num_read:,} found; fetch the file again"
                        )
                    done += length
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror or error}") from error
        return np.frombuffer(pages, np.uint8, nbytes)


def _fill(stream: io.FileIO, buffer: memoryview) -> int:
    """Read until the buffer or the file ends; one call gives at most 2 GB."""
    num_read = 0
    while count := stream.readinto(buffer[num_read:]):
        num_read += count
    return num_read


def _together(numbers: Indices) -> Iterator[tuple[int, int]]:
    """(first, how many) of each run in ascending numbers."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        if len(run):
            yield int(run[0]), len(run)


def is_all(index: Indices, size: int) -> bool:
    """Whether these are all elements of an axis, in order."""
    return len(index) == size and bool((index == np.arange(size)).all())


def plain(file: Path, offset: int, nbytes: int, shape: Sequence[int], dtype: np.dtype[Any]) -> StoredTensor:
    """A tensor stored as it is used: little-endian rows."""
    return StoredTensor(
        file, offset, nbytes, tuple(shape), dtype, lambda raw: raw.view(dtype), Block(1, dtype.itemsize)
    )
