"""safetensors files: the tensors a header promises, checked against the file before one byte of them is read.

The format (https://github.com/huggingface/safetensors): 8 bytes, little-endian length of a JSON header; the header,
name -> {dtype, shape, data_offsets}; then the data, without holes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxpaged.convert.stored_tensor import StoredTensor, plain
from jaxpaged.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, from `model.safetensors` or from the shards its index names."""
    if (folder / SINGLE).is_file():
        return read_file(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    raise CheckpointError(_no_weights(folder))


def read_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises CheckpointError where the header does not fit the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8:
                raise CheckpointError(f"{file} has {size} bytes, too few for a safetensors file; fetch it again")
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{file} says its header has {length:,} bytes, but the file has {size:,} "
                    f"(and {_MAX_HEADER:,} is the most); it is cut short or no safetensors file: fetch it again"
                )
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    tensors = {
        name: _tensor(file, name, entry, start=8 + length)
        for name, entry in parse_json(header, f"the header of {file}").items()
        if name != "__metadata__"
    }
    _check_layout(file, tensors, start=8 + length, size=size)
    return tensors


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys. Raises CheckpointError that begins with `what`."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        pairs = list(pairs)
        if len(fields := dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice")
        return fields

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what} is a JSON {type(parsed).__name__}, not an object; fetch the file again")
    return parsed


def inside(folder: Path, name: object, named_by: Path) -> Path:
    """The file `name` of `folder`. Raises CheckpointError where it lies elsewhere: the name comes from a stranger.

    Links are followed, so one that points out is refused too. The hub's cache is the exception: its folders
    (`snapshots/<revision>`) hold nothing but links to `blobs` beside `snapshots`.
    """
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{named_by} names {name!r} where a file name belongs; fetch the file again")
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        target = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{named_by} names {name!r}, which is no usable file name ({error})") from error
    if not any(target.is_relative_to(home) for home in homes) or os.path.isabs(name) or ".." in Path(name).parts:
        raise CheckpointError(
            f"{named_by} names {name!r}, which lies outside {folder}; nothing outside the folder is read: "
            f"put the file into the folder and name it there"
        )
    return folder / name


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    try:
        weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map")
    except OSError as error:
        raise CheckpointError(f"cannot read {index}: {error.strerror or error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files; fetch the file again")
    files = {name: inside(folder, name, index) for name in weight_map.values() if isinstance(name, str)}
    if odd := [name for name in weight_map.values() if not isinstance(name, str)]:
        inside(folder, odd[0], index)
    if absent := sorted(name for name, file in files.items() if not file.is_file()):
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of the {len(files)} files that {INDEX} names: {', '.join(absent)}; "
            f"fetch them"
        )
    tensors: dict[str, StoredTensor] = {}
    for name, file in files.items():
        shard = read_file(file)
        if lacking := sorted(t for t, f in weight_map.items() if f == name and t not in shard):
            raise CheckpointError(
                f"{file} lacks {len(lacking)} tensors that {INDEX} places there; fetch both again:\n  "
                + "\n  ".join(lacking)
            )
        if twice := sorted(shard.keys() & tensors.keys()):
            raise CheckpointError(f"{file} and {tensors[twice[0]].file} both hold {', '.join(twice)}; keep one of them")
        tensors |= shard
    return tensors


def _tensor(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    def fail(why: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name!r} {why}; fetch the file again")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("is not described by dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape):
        raise fail(f"has shape {shape!r}, not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"has data_offsets {offsets!r}, not [begin, end]")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {entry['dtype']!r}, which we cannot read; "
            f"save the checkpoint as one of {', '.join(DTYPES)}"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise fail(
            f"spans {end - begin:,} bytes, but {entry['dtype']} {shape} takes {math.prod(shape) * dtype.itemsize:,}"
        )
    return plain(file, start + begin, end - begin, shape, dtype)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _check_layout(file: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """Data must follow the header without a hole or an overlap, and end where the file ends."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{file}: tensor {name!r} begins at byte {tensor.offset:,}, but the one before it ends at {end:,} "
                f"(offsets {'overlap' if tensor.offset < end else 'leave a hole'}); fetch the file again"
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{file} has {size:,} bytes, but its header describes {end:,}; "
            f"it is {'cut short' if size < end else 'followed by something else'}: fetch it again"
        )


def _no_weights(folder: Path) -> str:
    """What to say of a folder without safetensors: name what lies there instead."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return f"{folder} is empty; a checkpoint folder holds config.json and {SINGLE}"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{folder} holds {gguf[0]}; pass that file itself: {folder / gguf[0]}"
    if others := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{folder} has neither {SINGLE} nor {INDEX} (found {', '.join(others)}); rename the file or fetch the index"
        )
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{folder} has only pickled weights ({', '.join(pickles)}), which can run code when read; "
            f"convert them with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('converted')"
        )
    return f"{folder} has no {SINGLE} (found {', '.join(names[:8])}); is this the checkpoint's folder?"
