"""What a load generator asks, and when: lengths as of conversations, with shared beginnings, or of a trace.

Prompts are made of common words, each of which is one token to most tokenizers; how many they were, the server says.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpaged.bench.lengths import MEANS, SIGMA, Lengths, draw
from jaxpaged.errors import ConfigError

_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part"
)
WORDS = _TEXT.split()

COLUMNS = ("arrival", "input", "output")


class Ask(NamedTuple):
    """A prompt, the tokens to be generated for it, and the second at which it is sent."""

    arrival: float
    prompt: str
    output: int


def conversations(name: str, count: int, max_len: int, seed: int) -> list[Lengths]:
    """Lognormal lengths with the means of ShareGPT's or Alpaca's."""
    return draw(MEANS[name], count, SIGMA, seed, max_len)


def uniform(prompt: int, output: int, spread: float, count: int, seed: int) -> list[Lengths]:
    """Lengths within `spread`, a share of 0 to 1, of these."""
    rng = np.random.default_rng(seed)

    def some(mean: int) -> list[int]:
        low, high = max(1, math.floor(mean * (1 - spread))), math.ceil(mean * (1 + spread))
        return [int(n) for n in rng.integers(low, high + 1, count)]

    return [Lengths(*both) for both in zip(some(prompt), some(output), strict=True)]


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start: gaps of a gamma distribution, which burstiness 1 makes a Poisson process; inf: all 0."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    return [float(second) for second in np.cumsum(gaps) - gaps[0]]


def prompts(lengths: Sequence[int], seed: int, prefix_len: int = 0, num_prefixes: int = 1) -> list[str]:
    """Texts of so many words; the first `prefix_len` of each are those of one of `num_prefixes` texts."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> list[str]:
        return [WORDS[place] for place in rng.integers(0, len(WORDS), count)]

    shared = [words(prefix_len) for _ in range(num_prefixes)]
    return [" ".join(shared[place % num_prefixes] + words(length)) for place, length in enumerate(lengths)]


def trace(path: Path, count: int | None) -> tuple[list[float], list[Lengths]]:
    """Arrivals and lengths of a CSV's first rows: arrival in seconds, the others in tokens. Raises ConfigError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ConfigError(f"{path} has no column {missing[0]!r}; its first line must name {','.join(COLUMNS)}")
            rows = [_row(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    rows = sorted(rows)[:count]
    if not rows:
        raise ConfigError(f"the trace {path} has no rows")
    first = rows[0][0]
    return [second - first for second, _ in rows], [lengths for _, lengths in rows]


def _row(path: Path, line: int, row: dict[str, str]) -> tuple[float, Lengths]:
    try:
        second, prompt, output = float(row["arrival"]), int(row["input"]), int(row["output"])
    except (TypeError, ValueError):
        raise ConfigError(f"{path}, line {line}: arrival must be a number, input and output whole numbers") from None
    if not math.isfinite(second) or prompt < 1 or output < 1:
        raise ConfigError(f"{path}, line {line}: arrival is {second}, input {prompt}, output {output}; each at least 1")
    return second, Lengths(prompt, output)
