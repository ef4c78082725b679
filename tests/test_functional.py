"""The pure functions: the same numbers as the dense model and the engine, inside the caller's own jit and grad."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged import LLM, SamplingParams, functional
from jaxpaged.functional import Span
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8), window=9), Mlp(24, "silu"), _NORM)
SPEC = Decoder(40, 16, 64, (_BLOCK,) * 2, _NORM, 16, tied_head=True)
PARAMS = jax.tree.map(lambda w: w * 2, dummy_params(SPEC, seed=3))
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4]]
step = jax.jit(functional.step, static_argnames="spec", donate_argnums=1)


def empty_cache():
    return functional.init_cache(SPEC, num_pages=32, page_size=4, dtype="float32")


def dense(tokens):
    return np.asarray(functional.apply(PARAMS, jnp.asarray(tokens, jnp.int32), SPEC))


def pages_of(index, count=8):
    return list(range(1 + index * count, 1 + (index + 1) * count))


def test_packed_prompts_and_then_single_tokens_give_the_dense_models_logits():
    spans = [Span(prompt, 0, pages_of(i)) for i, prompt in enumerate(PROMPTS)]
    cache = empty_cache()
    cache, out = step(PARAMS, cache, functional.pack(spans, cache), spec=SPEC)
    for row, prompt in zip(out.logits, PROMPTS, strict=True):
        np.testing.assert_allclose(row, dense(prompt)[-1], atol=1e-5)
    more = [Span([7], len(prompt), pages_of(i)) for i, prompt in enumerate(PROMPTS)]
    _, out = step(PARAMS, cache, functional.pack(more, cache), spec=SPEC)
    for row, prompt in zip(out.logits, PROMPTS, strict=True):
        np.testing.assert_allclose(row, dense([*prompt, 7])[-1], atol=1e-5)


def test_a_loop_inside_jit_generates_what_the_engine_does():
    llm = LLM((SPEC, PARAMS), max_num_seqs=4, num_pages=32, page_size=4, max_num_batched_tokens=16, warmup=False)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)

    @jax.jit
    def generate(params, cache, inputs, positions):
        cache, out = functional.step(params, cache, inputs, spec=SPEC)
        first = jnp.argmax(out.logits, -1).astype(jnp.int32)
        _, rest = functional.decode_loop(
            params,
            cache,
            first,
            positions,
            inputs.page_table,
            lambda logits, _: jnp.argmax(logits, -1),
            num_steps=9,
            spec=SPEC,
        )
        return jnp.concatenate([first[None], rest]).T

    cache = empty_cache()
    inputs = functional.pack([Span(p, 0, pages_of(i)) for i, p in enumerate(PROMPTS)], cache)
    tokens = generate(PARAMS, cache, inputs, jnp.asarray([len(p) for p in PROMPTS], jnp.int32))
    assert tokens.tolist() == [o.outputs[0].token_ids for o in outputs]


def padded(prompts):
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32)


def dense_score(params, tokens, lengths):
    logits = jax.vmap(lambda row: functional.apply(params, row, SPEC))(tokens)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1], -1), tokens[:, 1:, None], 2)[:, :, 0]
    return jnp.where(jnp.arange(1, tokens.shape[1])[None] < lengths[:, None], logprobs, 0.0)


def test_scores_are_log_probabilities_and_zero_past_the_end():
    tokens, lengths = padded(PROMPTS)
    scores = jax.jit(partial(functional.score, spec=SPEC))(PARAMS, tokens, lengths)
    np.testing.assert_allclose(scores, dense_score(PARAMS, tokens, lengths), atol=1e-4)
    assert not np.any(scores[1, 1:])
    assert np.all(scores[2] < 0)


def test_scores_are_differentiable_in_the_weights():
    tokens, lengths = padded(PROMPTS)
    weight = jnp.linspace(-1.0, 1.0, 3)[:, None]
    got = jax.jit(jax.grad(lambda p: jnp.sum(weight * functional.score(p, tokens, lengths, spec=SPEC))))(PARAMS)
    want = jax.grad(lambda p: jnp.sum(weight * dense_score(p, tokens, lengths)))(PARAMS)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
        assert np.any(ours != 0)


REFUSED = [
    (Span([], 0, [1]), "span 0 has no token"),
    (Span([1] * 5, 0, [1]), "span 0 ends at token 5 but its 1 pages hold 4 tokens.*give it 2 pages"),
    (Span([1], 0, [0]), "span 0 names pages 0 to 0; the pool has 1 to 31"),
    (Span([1], 0, [32]), "span 0 names pages 32 to 32; the pool has 1 to 31"),
]


@pytest.mark.parametrize(("span", "message"), REFUSED, ids=["empty", "too few pages", "null page", "no such page"])
def test_spans_that_do_not_fit_are_refused(span, message):
    with pytest.raises(ValueError, match=message):
        functional.pack([span], empty_cache())
