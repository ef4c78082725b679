"""The converted model against the Hugging Face reference: the same tokens through both, the largest difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.convert.checkpoint import Checkpoint
from jaxpaged.convert.stored_tensor import Array
from jaxpaged.errors import CheckpointError

NUM_TOKENS = 48
TOLERANCE = 1e-3
"""Of the largest logit, both computed in float32: a wrong config is off by a tenth and more, rounding by 1e-5."""


class Comparison(NamedTuple):
    """How far our logits are from the reference's, beside how large they are."""

    max_error: float
    max_logit: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference."""
        return self.max_error <= TOLERANCE * max(1.0, self.max_logit)


def sample_tokens(vocab_size: int, max_positions: int) -> Array:
    """Arbitrary token ids, always the same."""
    return np.random.default_rng(0).integers(0, vocab_size, min(NUM_TOKENS, max_positions), np.int32)


def compare(ours: Array, reference: Array) -> Comparison:
    """Both [T, V]. Raises CheckpointError where the shapes differ; NaN counts as an infinite error."""
    if ours.shape != reference.shape:
        raise CheckpointError(f"our logits have shape {ours.shape}, the reference's {reference.shape}")
    error = np.nan_to_num(np.abs(ours - reference), nan=np.inf).max()
    return Comparison(float(error), float(np.abs(reference).max()))


def reference_logits(checkpoint: Checkpoint, tokens: Array, dtype: str) -> Array:
    """[T, V] in float32 from transformers, its weights first rounded to `dtype` as ours were.

    Raises CheckpointError where torch or transformers is missing or the reference does not load.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"--verify needs torch and transformers ({error}); pip install torch transformers"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, options = _location(checkpoint)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception as error:  # transformers raises whatever the family's code meets
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"transformers cannot load the reference {checkpoint.path}: {reason}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        logits = model.eval()(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    result: Array = logits.numpy()
    return result


def _location(checkpoint: Checkpoint) -> tuple[Path, dict[str, Any]]:
    if checkpoint.format == "gguf":
        return checkpoint.path.parent, {"gguf_file": checkpoint.path.name}
    return checkpoint.path, {}
