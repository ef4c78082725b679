"""`spec.apply`: the model that is served, in the form that is trained."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged import LLM, SamplingParams
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8)), Mlp(24, "silu"), _NORM)
SPEC = Decoder(40, 16, 64, (_BLOCK,) * 4, _NORM, 16, tied_head=False)
PARAMS = jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=5))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (3, 24)), jnp.int32)


def loss(params, tokens, remat=False):
    logprobs = jax.nn.log_softmax(SPEC.apply(params, tokens[:, :-1], remat=remat))
    return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], 2).mean()


def test_a_batch_is_its_rows_and_padding_is_seen_by_nobody_before_it():
    batch = jax.jit(SPEC.apply)(PARAMS, TOKENS)
    assert batch.shape == (3, 24, 40)
    assert batch.dtype == jnp.float32
    np.testing.assert_allclose(batch[1], SPEC.apply(PARAMS, TOKENS[1]), atol=1e-3)
    padded = TOKENS.at[1, 10:].set(0)
    np.testing.assert_allclose(SPEC.apply(PARAMS, padded)[1, :10], batch[1, :10], atol=1e-3)


def test_the_engine_says_what_the_trained_form_says():
    llm = LLM((SPEC, PARAMS), max_num_seqs=1, num_pages=16, page_size=4, max_num_batched_tokens=32, warmup=False)
    (output,) = llm.generate([TOKENS[0].tolist()], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    whole = jnp.asarray([*TOKENS[0].tolist(), *output.outputs[0].token_ids], jnp.int32)
    assert SPEC.apply(PARAMS, whole)[23:-1].argmax(-1).tolist() == output.outputs[0].token_ids


def test_remat_gives_the_same_gradients_and_keeps_little_for_them():
    plain, again = (jax.jit(jax.grad(partial(loss, remat=remat))) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(plain(PARAMS, TOKENS)), jax.tree.leaves(again(PARAMS, TOKENS)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)

    def kept(remat):
        pull_back = jax.eval_shape(lambda p: jax.vjp(partial(loss, tokens=TOKENS, remat=remat), p)[1], PARAMS)
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    assert kept(True) < 0.3 * kept(False)
