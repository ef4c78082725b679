"""transformers on the same work: `generate` one request at a time, and in static padded batches, greedy.

On the CPU in float32, on a GPU in the type of the engine's weights.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from workloads import BenchRequest

from jaxpaged.bench.shapes import SHAPES

BATCH_SIZE = 16


class Result(NamedTuple):
    """Seconds, and the tokens of each request that were asked for; padding and overshoot do not count."""

    seconds: float
    token_ids: list[list[int]]

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens that were asked for, per second."""
        return sum(len(t) for t in self.token_ids) / self.seconds


def load(model: Path | None, dummy: str | None, dtype_on_gpu: str) -> Any:
    """The model, warmed up, on the GPU or every core. GGUF is dequantised; a dummy has random weights of its own."""
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else getattr(torch, dtype_on_gpu)
    if dummy is not None:
        config = transformers.AutoConfig.for_model(**SHAPES[dummy])
        with torch.device(device):  # billions of random numbers take the host minutes
            loaded = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    elif model is not None and model.suffix == ".gguf":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(str(model.parent), gguf_file=model.name, dtype=dtype)
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
    loaded = loaded.eval().to(device)
    loaded.generation_config = transformers.GenerationConfig(pad_token_id=0, do_sample=False)
    one_by_one(loaded, [BenchRequest([1, 2, 3, 4], 4)])
    return loaded


def setting(model: Any) -> dict[str, Any]:
    """The part of a row that says what the baseline ran on."""
    where = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    return {"name": "transformers", "versions": versions, "threads": torch.get_num_threads()} | where


def one_by_one(model: Any, requests: Sequence[BenchRequest]) -> Result:
    """Each request alone, one after the other."""
    start = time.perf_counter()
    token_ids = [_generate(model, [r.prompt_token_ids], r.num_output_tokens)[0] for r in requests]
    return Result(time.perf_counter() - start, token_ids)


def static_batches(model: Any, requests: Sequence[BenchRequest], size: int = BATCH_SIZE) -> Result:
    """`size` requests at a time, padded on the left, until the longest of them is done."""
    start = time.perf_counter()
    token_ids = []
    for first in range(0, len(requests), size):
        batch = requests[first : first + size]
        longest = max(r.num_output_tokens for r in batch)
        rows = _generate(model, [r.prompt_token_ids for r in batch], longest)
        token_ids += [row[: r.num_output_tokens] for row, r in zip(rows, batch, strict=True)]
    return Result(time.perf_counter() - start, token_ids)


def compare(
    model: Any, requests: Sequence[BenchRequest], ours: Sequence[list[int]], rate: float, limit: int | None
) -> dict[str, Any]:
    """Both ways of running, their rates, and `rate` (ours) over theirs. `limit`: of requests, or of batches of them."""
    chosen = list(range(len(requests)))
    if limit is not None and limit < len(requests):
        chosen = sorted(np.random.default_rng(0).choice(len(requests), limit, replace=False).tolist())
    alone = one_by_one(model, [requests[i] for i in chosen])
    together = requests if limit is None else requests[: limit * BATCH_SIZE]
    batched = static_batches(model, together)
    return {
        **setting(model),
        "one_by_one": {
            "requests": len(chosen),
            "output_tokens_per_s": round(alone.output_tokens_per_s, 2),
            "ratio": round(rate / alone.output_tokens_per_s, 2),
            "requests_with_equal_tokens": num_equal(alone.token_ids, [ours[i] for i in chosen]),
        },
        f"static_batches_of_{BATCH_SIZE}": {
            "requests": len(together),
            "output_tokens_per_s": round(batched.output_tokens_per_s, 2),
            "ratio": round(rate / batched.output_tokens_per_s, 2),
        },
    }


def num_equal(theirs: Sequence[list[int]], ours: Sequence[list[int]]) -> int:
    """How many requests got the same tokens from both. Of a dummy hardly one: its two sets of weights differ."""
    return sum(a == b for a, b in zip(theirs, ours, strict=True))


def _generate(model: Any, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    width = max(len(p) for p in prompts)
    input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens
        )
    tokens: list[list[int]] = out[:, width:].tolist()
    return tokens
