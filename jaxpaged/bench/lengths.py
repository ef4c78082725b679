"""How long requests are: lognormal, with the means of the traces that PagedAttention was measured on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SIGMA = 0.7
"""Spread of the lognormal lengths: real conversations have 0.5 to 1.0 (Azure's LLM inference traces of 2023)."""

MEANS = {"sharegpt": (161, 338), "alpaca": (19, 58)}
"""Prompt and answer, in tokens (arXiv 2309.06180, section 6.1)."""


class Lengths(NamedTuple):
    """Prompt tokens, generated tokens."""

    prompt: int
    output: int


def draw(means: tuple[int, int], count: int, sigma: float, seed: int, max_len: int) -> list[Lengths]:
    """Lognormal lengths with these means, cut where prompt and answer exceed `max_len`."""
    rng = np.random.default_rng(seed)
    prompts, outputs = (_lognormal(rng, mean, count, sigma) for mean in means)
    prompts = np.minimum(prompts, max_len // 2)
    return [Lengths(int(p), int(min(o, max_len - p))) for p, o in zip(prompts, outputs, strict=True)]


def _lognormal(rng: np.random.Generator, mean: float, count: int, sigma: float) -> np.ndarray:
    return np.maximum(4, np.rint(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count))).astype(int)
