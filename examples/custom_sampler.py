"""A sampler of one's own inside one jit: locally typical sampling (arXiv 2202.00666) on the engine's pure step.

`python examples/custom_sampler.py [MODEL]`. No engine runs: the program holds the pages, the loop and the randomness.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from any_model import open_llm

from jaxpaged.functional import Span, decode_loop, init_cache, pack, step

PROMPT, NUM_TOKENS, PAGE_SIZE, MASS = "Once upon a time", 24, 16, 0.9


def typical(logits: jax.Array, positions: jax.Array) -> jax.Array:
    """Draw from the tokens whose surprise is nearest to the entropy, as many as hold `MASS` of the probability."""
    logprobs = jax.nn.log_softmax(logits, -1)
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, -1, keepdims=True)
    order = jnp.argsort(jnp.abs(-logprobs - entropy), -1)
    sorted_logprobs = jnp.take_along_axis(logprobs, order, -1)
    before = jnp.cumsum(jnp.exp(sorted_logprobs), -1) - jnp.exp(sorted_logprobs)
    kept = jnp.where(before < MASS, sorted_logprobs, -jnp.inf)
    keys = jax.vmap(lambda position: jax.random.fold_in(jax.random.key(0), position))(positions)
    picks = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.take_along_axis(order, picks[:, None], 1)[:, 0]


def main() -> None:
    """Prefill two sequences of one prompt, then decode both in one traced loop."""
    llm = open_llm(warmup=False, num_pages=8)  # only for its weights and tokenizer
    spec, params, tokenizer = llm.engine.spec, llm.engine.params, llm.engine.tokenizer
    assert tokenizer is not None  # noqa: S101
    prompt = tokenizer.encode(PROMPT)
    pages_each = -(-(len(prompt) + NUM_TOKENS) // PAGE_SIZE)
    cache = init_cache(spec, 1 + 2 * pages_each, PAGE_SIZE, params["embed"]["w"].dtype)
    first, second = range(1, 1 + pages_each), range(1 + pages_each, 1 + 2 * pages_each)
    inputs = pack([Span(prompt, 0, list(first)), Span(prompt[:-1], 0, list(second))], cache)

    cache, outputs = jax.jit(step, static_argnames="spec", donate_argnums=1)(params, cache, inputs, spec=spec)
    positions = inputs.kv_lens
    tokens = typical(outputs.logits, positions).astype(jnp.int32)
    generate = jax.jit(decode_loop, static_argnames=("sampler", "num_steps", "spec"))
    _, more = generate(
        params, cache, tokens, positions, inputs.page_table, typical, num_steps=NUM_TOKENS - 1, spec=spec
    )
    for row, start in enumerate((PROMPT, tokenizer.decode(prompt[:-1]))):
        print(repr(start), "->", repr(tokenizer.decode([int(tokens[row]), *more[:, row].tolist()])))


if __name__ == "__main__":
    main()
