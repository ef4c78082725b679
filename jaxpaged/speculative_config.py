"""How tokens are guessed ahead of the model, which checks several of them in one step. Names are vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxpaged.errors import ConfigError
from jaxpaged.settings import Settings

DraftFunction = Callable[[Sequence[int], int], Sequence[int]]
"""draft(token_ids, count): at most `count` tokens that may follow those of a sequence, its prompt and answer so far."""


@dataclass(frozen=True)
class SpeculativeConfig(Settings):
    """What guesses, and how far ahead. Raises ConfigError, naming field, value and range, where one is wrong.

    method                  ngram: what followed a sequence's last tokens where they stood before; or your own function
    num_speculative_tokens  most tokens guessed for a sequence in one step
    prompt_lookup_max       of ngram: most last tokens that are compared; the place where most are the same is taken
    prompt_lookup_min       of ngram: fewest last tokens that must be the same
    """

    error: ClassVar[type[ConfigError]] = ConfigError

    method: Literal["ngram"] | DraftFunction = "ngram"
    num_speculative_tokens: int = 8
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2

    def __post_init__(self) -> None:
        """Check every field."""
        if self.method != "ngram" and not callable(self.method):
            raise ConfigError(f"method is {self.method!r}; known: ngram, or a function draft(token_ids, count)")
        self._check_int("num_speculative_tokens", 1, 64)
        self._check_int("prompt_lookup_max", 1, 64)
        self._check_int("prompt_lookup_min", 1, 64)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min is {self.prompt_lookup_min} but prompt_lookup_max is {self.prompt_lookup_max}; "
                "lower the one or raise the other"
            )
