"""Embeddings: the dense model's hidden states, pooled, whatever chunks, preemption and cached prefixes do to a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import LENGTH, PARAMS, PROMPTS, SPEC, VOCAB, make
from tiny_chat_model import write_chat_model

from jaxpaged import LLM, RequestError, SamplingParams
from jaxpaged.kernels.reference import attention
from jaxpaged.model.decoder import hidden_states

LONG = np.random.default_rng(9).integers(0, VOCAB, 80).tolist()
TEXTS = [*PROMPTS, LONG]
ATOL = 2e-4  # these weights make rounding grow


@jax.jit
def padded_hidden(params, tokens):
    def attend(kv, q, k, v, a, sinks):
        return attention(q, k, v, scale=a.scale), kv

    positions = jnp.arange(LENGTH, dtype=jnp.int32)
    return hidden_states(params, tokens, positions, positions, SPEC, (None,) * len(SPEC.blocks), attend)[0]


def dense(tokens, pooling, params=PARAMS):
    hidden = np.asarray(padded_hidden(params, jnp.asarray(tokens + [0] * (LENGTH - len(tokens)), jnp.int32)))
    return hidden[: len(tokens)].mean(0) if pooling == "mean" else hidden[len(tokens) - 1]


@pytest.fixture(scope="module")
def llm():
    return make()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_dense_models_hidden_states(llm, pooling):
    """80 tokens come in chunks of at most 32; asked again, a prefix is found in the cache where it is not needed."""
    llm.reset_prefix_cache()
    expected = np.stack([dense(text, pooling) for text in TEXTS])
    for turn in range(2):
        before = llm.engine.stats().prefix_cache_hits
        np.testing.assert_allclose(llm.embed(TEXTS, pooling, normalize=False, use_tqdm=False), expected, atol=ATOL)
        found = llm.engine.stats().prefix_cache_hits - before
        assert (found > 0) == (pooling == "last" and turn == 1)
    assert llm.engine.stats().generation_tokens == llm.engine.stats().pages_held == 0


def test_embeddings_share_steps_with_answers_and_are_of_length_one(llm):
    alone = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    engine = llm.engine
    engine.add_request("answer", PROMPTS[0], SamplingParams(temperature=0, max_tokens=8), output_kind="final")
    vectors = llm.embed(TEXTS, use_tqdm=False)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    expected = np.stack([dense(text, "mean") for text in TEXTS])
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=ATOL)
    engine.add_request("answer too", PROMPTS[0], SamplingParams(temperature=0, max_tokens=8), output_kind="final")
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == alone[0].outputs[0].token_ids and outputs[-1].embedding is None


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_text_begun_anew_counts_no_token_twice(pooling):
    """Half of it is computed, and read a step later, when other weights make all of it be computed anew."""
    engine = make().engine
    engine.add_request("text", LONG, pooling=pooling)
    engine.step()
    engine.step()
    other = jax.tree.map(lambda w: w * 1.1, PARAMS)
    engine.update_params(other, policy="recompute")
    while not (outputs := engine.step()):
        pass
    np.testing.assert_allclose(outputs[0].embedding, dense(LONG, pooling, other), atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_on_a_mesh_embeddings_are_the_same(pooling):
    vectors = make(tensor_parallel_size=2, data_parallel_size=2).embed(TEXTS, pooling, normalize=False, use_tqdm=False)
    np.testing.assert_allclose(vectors, np.stack([dense(text, pooling) for text in TEXTS]), atol=ATOL)


def test_a_text_may_be_as_long_as_the_model_allows(llm):
    text = (LONG + LONG)[:LENGTH]
    np.testing.assert_allclose(llm.embed([text], normalize=False)[0], dense(text, "mean"), atol=ATOL)
    with pytest.raises(RequestError, match="has 97 tokens but max_model_len is 96; shorten it"):
        llm.embed([[*text, 1]])
    assert llm.embed([]).shape == (0, SPEC.dim)


def test_what_is_no_pooling_is_refused(llm):
    with pytest.raises(RequestError, match="pooling is 'max'; known: mean, last"):
        llm.embed([[1]], "max")
    with pytest.raises(RequestError, match="without params"):
        llm.engine.add_request("x", [1], SamplingParams(), pooling="mean")


def test_logits_that_are_not_finite_make_nans_of_that_text_alone():
    bad = PARAMS | {"embed": {"w": PARAMS["embed"]["w"].at[5].set(jnp.nan)}}
    good, poisoned = ([token if token != 5 else 6 for token in LONG], [5] * 7)
    vectors = make(bad).embed([good, poisoned, good], normalize=False)
    assert np.isnan(vectors[1]).all() and np.isfinite(vectors[0]).all()
    np.testing.assert_allclose(vectors[2], dense(good, "mean"), atol=ATOL)


@pytest.mark.slow
@pytest.mark.torch
def test_embeddings_are_transformers_last_hidden_states(tmp_path):
    import torch
    from transformers import AutoModel

    folder = write_chat_model(tmp_path / "model")
    llm = LLM(folder, warmup=False, max_num_batched_tokens=16, num_pages=129, page_size=4)
    text = "banana 12 " * 5
    with torch.no_grad():
        tokens = torch.tensor([llm.tokenizer.encode(text)])
        hidden = AutoModel.from_pretrained(folder, dtype=torch.float32)(tokens).last_hidden_state[0].numpy()
    np.testing.assert_allclose(llm.embed(text, normalize=False)[0], hidden.mean(0), atol=ATOL)
    np.testing.assert_allclose(llm.embed(text, "last", normalize=False)[0], hidden[-1], atol=ATOL)
