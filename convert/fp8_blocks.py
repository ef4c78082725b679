"""Checkpoints whose matrices are float8 numbers with a scale for each block of 128 x 128 (DeepSeek-V3's way).

They are read as floats, a part of a tensor with its own part of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxpaged.convert.stored_tensor import Array, BlockScales, StoredTensor
from jaxpaged.errors import CheckpointError

_SCALES = "_scale_inv"  # what numbers are multiplied by, for all its name
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def fp8_blocks(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of a block; None where the config says nothing of such weights."""
    quantised = config.get("quantization_config")
    if not isinstance(quantised, dict) or quantised.get("quant_method") != "fp8":
        return None
    match quantised.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def scaled_by_blocks(tensors: Mapping[str, StoredTensor], rows: int, columns: int) -> dict[str, StoredTensor]:
    """The tensors without those of scales, which have become a part of what they scale.

    Raises CheckpointError where there are scales that do not fit, or float8 numbers without any.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALES)}
    for name, scales in tensors.items():
        if not name.endswith(_SCALES):
            continue
        of = name.removesuffix(_SCALES)
        matrix = found.get(of)
        if matrix is None or matrix.dtype != _FLOAT8 or len(matrix.shape) != 2:
            raise CheckpointError(f"{scales.file}: {name} scales no float8 matrix {of}; fetch the checkpoint again")
        want = -(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns)
        if scales.shape != want:
            raise CheckpointError(
                f"{scales.file}: {name} has shape {list(scales.shape)}, but {list(matrix.shape)} numbers in blocks of "
                f"{rows} x {columns} need {list(want)}; fetch the checkpoint again"
            )
        found[of] = matrix._replace(dtype=None, decode=_as_float32, scales=BlockScales(scales, rows, columns))
    if bare := [name for name, tensor in found.items() if tensor.dtype == _FLOAT8]:
        file = found[bare[0]].file
        raise CheckpointError(f"{file}: {bare[0]} is float8 and has no scales; fetch the checkpoint again")
    return found


def _as_float32(raw: Array) -> Array:
    numbers: Array = raw.view(_FLOAT8).astype(np.float32)
    return numbers
