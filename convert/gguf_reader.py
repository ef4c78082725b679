"""GGUF files: metadata and tensors, every count and size checked against the file before it is believed.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic, version, number of
tensors, number of metadata pairs; the pairs; the tensors' names, shapes, types and offsets; then the data, aligned.
PyPI's `gguf` dequantises; it is imported when a file is read, and not missed by who has none. Its own reader makes
several arrays per token of the vocabulary (2.2 s for 49,152 tokens, where this one takes 0.07 s) and believes what a
header says, so the header is read here.
"""

from __future__ import annotations

import math
import mmap
import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxpaged.convert.stored_tensor import Array, Block, StoredTensor, plain
from jaxpaged.errors import CheckpointError

PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
QUANTISED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
)
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_CHUNK_BLOCKS = 1 << 13  # dequantised at once: at most two million weights, so little lies beside the result


class GgufFile(NamedTuple):
    """What a GGUF file says of itself, and its tensors under GGUF's names with shapes as numpy has them."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def gguf_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a GGUF file, vocabulary and chat template included: str, bool, int, float or a list of one.

    Float32 comes as the shortest decimal that means it (1e-05, not 9.999999747378752e-06). Raises CheckpointError.
    """
    return read_gguf(path).metadata


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file. Raises CheckpointError where it is cut short or does not fit the file."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            if path.stat().st_size < 24:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size} bytes, too few for a GGUF file; fetch it again"
                )
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


class _Header:
    """A cursor over the header; every step checks that the file goes on that far."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why} (at byte {self.at:,} of {len(self.data):,}); fetch the file again")

    def skip(self, num_bytes: int) -> int:
        """Where the next `num_bytes` begin."""
        start, self.at = self.at, self.at + num_bytes
        if self.at > len(self.data):
            self.at = start
            raise self.fail(f"the header asks for {num_bytes:,} more bytes than the file has left, or it is cut short")
        return start

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize(code)))
        return value

    def count(self, what: str, min_bytes: int) -> int:
        """A number of things that take at least `min_bytes` each: more than the file can hold is a lie."""
        value = int(self.number("Q"))
        if value * min_bytes > len(self.data) - self.at:
            raise self.fail(f"the header promises {value:,} {what}, more than the file can hold")
        return value

    def string(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"a string is not UTF-8 ({error.reason})") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"unknown metadata type {kind}")
        value = self.number(_SCALARS[kind])
        return shortest(np.float32(value)) if _SCALARS[kind] == "f" else value

    def array(self) -> list[Any]:
        kind = int(self.number("I"))
        if kind == _STRING:
            return [self.string() for _ in range(self.count("strings", 8))]
        if kind not in _SCALARS:
            raise self.fail(f"unknown metadata array type {kind}")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        count = self.count("values", dtype.itemsize)
        start = self.skip(count * dtype.itemsize)
        return list(np.frombuffer(self.data[start : self.at], dtype).tolist())

    def read(self) -> GgufFile:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{self.path} does not begin with GGUF; it is no GGUF file or was not fetched whole")
        self.at = 4
        version = self.number("I")
        if version not in _VERSIONS:
            raise self.fail(
                f"GGUF version {version} (of a big-endian file?), we read versions {_VERSIONS[0]} and {_VERSIONS[1]}"
            )
        num_tensors, num_pairs = self.count("tensors", 24), self.count("metadata pairs", 13)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.string()
            if key in metadata:
                raise self.fail(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(int(self.number("I")))
        if metadata.get("split.count", 0) > 1:
            raise CheckpointError(
                f"{self.path} is one of {metadata['split.count']} parts; join them first: llama-gguf-split --merge"
            )
        return GgufFile(metadata, self.tensors(num_tensors, metadata.get("general.alignment", 32)))

    def tensors(self, count: int, alignment: object) -> dict[str, StoredTensor]:
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, num_dims = self.string(), int(self.number("I"))
            if name in infos:
                raise self.fail(f"tensor {name!r} appears twice")
            if num_dims > _MAX_DIMS:
                raise self.fail(f"tensor {name!r} has {num_dims} dimensions, GGUF allows {_MAX_DIMS}")
            shape = tuple(int(self.number("Q")) for _ in range(num_dims))[::-1]  # GGUF writes the innermost first
            infos[name] = shape, int(self.number("I")), int(self.number("Q"))
        start = -(-self.at // alignment) * alignment
        tensors = {name: self.tensor(name, *info, start) for name, info in infos.items()}
        self.check_overlaps(tensors)
        return tensors

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> StoredTensor:
        import gguf

        kinds = {int(member): member for member in gguf.GGMLQuantizationType}
        type_name = kinds[kind].name if kind in kinds else f"number {kind}"
        if type_name not in (*PLAIN, *QUANTISED):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {type_name}, which we cannot read; "
                f"quantise the model as one of {', '.join((*PLAIN, *QUANTISED))}"
            )
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[kind]]
        elements, row = math.prod(shape), shape[-1] if shape else 1
        if row % block:
            raise self.fail(f"tensor {name!r} has rows of {row:,}, not a multiple of {type_name}'s blocks of {block}")
        nbytes = elements // block * block_bytes
        if start + offset + nbytes > len(self.data):
            raise CheckpointError(
                f"{self.path} has {len(self.data):,} bytes, but tensor {name!r} ({type_name} {list(shape)}) ends at "
                f"{start + offset + nbytes:,}; the file is cut short: fetch it again"
            )
        dtype = PLAIN.get(type_name)
        if dtype is not None:
            return plain(self.path, start + offset, nbytes, shape, dtype)
        stored = Block(block, block_bytes)
        return StoredTensor(self.path, start + offset, nbytes, shape, None, partial(_dequantise, kinds[kind]), stored)

    def check_overlaps(self, tensors: dict[str, StoredTensor]) -> None:
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if tensor.offset < end:
                raise self.fail(f"tensors {before!r} and {name!r} overlap")
            end, before = tensor.offset + tensor.nbytes, name


def _dequantise(kind: Any, raw: Array) -> Array:
    """`raw` as float32, a chunk of blocks at a time: gguf keeps all its pieces until it joins them."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty((len(blocks), block), np.float32)
    for i in range(0, len(blocks), _CHUNK_BLOCKS):
        chunk = blocks[i : i + _CHUNK_BLOCKS]
        out[i : i + len(chunk)] = gguf.dequantize(chunk.reshape(1, -1), kind).reshape(-1, block)
    return out


def shortest(value: np.float32) -> float:
    """The float of fewest digits that means this float32: what the writer's config said."""
    return float(str(value))
