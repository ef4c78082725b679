"""One's own function on the logits, compiled into the engine: Mirostat (arXiv 2007.14966), which holds surprise steady.

`python examples/logits_processor.py [MODEL]`. Tokens more surprising than a bound are left out, and each token that is
drawn moves the bound: a state, different for every sequence of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from any_model import open_llm

from jaxpaged import LogitsProcessor, SamplingParams

PROMPTS, TARGET, RATE = (
    ("Once upon a time", "The weather today is"),
    3.0,
    0.1,
)  # bits a token, and how fast to get there


class State(NamedTuple):
    """Of one sequence."""

    bound: jax.Array  # bits
    surprise: jax.Array  # [V], of the tokens that were to be drawn from


def mirostat(vocab_size: int) -> LogitsProcessor:
    """The three functions: before the first token, before each, after each."""

    def init(prompt_token_ids: Sequence[int]) -> State:
        return State(jnp.float32(2 * TARGET), jnp.zeros(vocab_size, jnp.float32))

    def apply(logits: jax.Array, state: State) -> tuple[jax.Array, State]:
        surprise = -jax.nn.log_softmax(logits) / jnp.log(2.0)
        least = jnp.min(surprise)
        kept = jnp.where(surprise <= jnp.maximum(state.bound, least), logits, -jnp.inf)
        return kept, State(state.bound, -jax.nn.log_softmax(kept) / jnp.log(2.0))

    def observe(state: State, token: jax.Array) -> State:
        return State(state.bound - RATE * (state.surprise[token] - TARGET), state.surprise)

    return LogitsProcessor(apply, init, observe)


def main() -> None:
    """Complete the prompts."""
    llm = open_llm(max_num_seqs=4, num_pages=64, max_model_len=128)
    params = SamplingParams(max_tokens=24, seed=1, logits_processor=mirostat(llm.engine.spec.vocab_size))
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
