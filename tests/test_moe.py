"""Mixtures of experts: what was chosen computed alone is the sum over all, whoever chooses what, and gradients flow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.functional import score
from jaxpaged.model import moe as forms
from jaxpaged.model.decoder import apply
from jaxpaged.model.moe import route
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Moe, Norm, Rope

NORM = Norm("rms", 1e-5)
DIM = 24
MOE = Moe(experts=5, top_k=2, dim=12, act="silu", renormalize=True)
SHARED = replace(MOE, renormalize=False, shared=Mlp(20, "silu"), shared_gate=True)


def model(moe: Moe) -> Decoder:
    mixer = Attention(4, 2, 8, 8**-0.5, Rope(1e3, 8))
    return Decoder(61, DIM, 64, (Block(mixer, moe, NORM),), NORM, DIM, tied_head=False)


def weights(moe: Moe, seed: int = 0) -> Any:
    return dummy_params(model(moe), seed)["layers"][0]["ffn"]


@partial(jax.jit, static_argnums=2)
def plain(x: jax.Array, p: Any, moe: Moe) -> jax.Array:
    """The meaning, all at once."""
    likely, own = jax.nn.softmax(x @ p["router"]["w"]), p["experts"]
    least = jnp.sort(likely)[:, -moe.top_k][:, None]
    likely = jnp.where(likely >= least, likely, 0)
    likely = likely / likely.sum(1, keepdims=True) if moe.renormalize else likely
    hidden = jax.nn.silu(jnp.einsum("tm,emf->tef", x, own["gate"]["w"])) * jnp.einsum("tm,emf->tef", x, own["up"]["w"])
    y = jnp.einsum("tef,efm,te->tm", hidden, own["down"]["w"], likely)
    if moe.shared is not None:
        s = p["shared"]
        shared = (jax.nn.silu(x @ s["gate"]["w"]) * (x @ s["up"]["w"])) @ s["down"]["w"]
        y = y + jax.nn.sigmoid(x @ p["shared_gate"]["w"]) * shared
    return y


chosen_experts = jax.jit(forms.chosen_experts, static_argnums=2)
every_expert = jax.jit(forms.every_expert, static_argnums=2)
MIXTURES = {"mixture": MOE, "with a shared expert": SHARED, "of one": replace(MOE, experts=1, top_k=1)}


@pytest.mark.parametrize("num_rows", [1, 70])  # of 70, blocks are of another size
@pytest.mark.parametrize("moe", MIXTURES.values(), ids=MIXTURES.keys())
def test_both_forms_are_the_sum_over_all_experts(moe: Moe, num_rows: int) -> None:
    x, p = jax.random.normal(jax.random.key(1), (num_rows, DIM)), weights(moe)
    want = plain(x, p, moe)
    np.testing.assert_allclose(every_expert(x, p, moe), want, atol=1e-5)
    np.testing.assert_allclose(chosen_experts(x, p, moe), want, atol=1e-5)


@pytest.mark.parametrize("num_rows", [3, 120])
def test_no_row_is_dropped_where_all_choose_the_same_experts(num_rows: int) -> None:
    p = weights(MOE)
    likes_two = jnp.zeros_like(p["router"]["w"]).at[:, 1].set(1.0).at[:, 4].set(0.9)
    x = jnp.abs(jax.random.normal(jax.random.key(2), (num_rows, DIM)))
    p = {**p, "router": {"w": likes_two}}
    assert {tuple(row) for row in route(x, p, MOE).experts.tolist()} == {(1, 4)}
    np.testing.assert_allclose(chosen_experts(x, p, MOE), plain(x, p, MOE), atol=1e-5)


def test_rows_that_hold_nothing_of_use_disturb_no_other() -> None:
    x, p = jax.random.normal(jax.random.key(3), (9, DIM)), weights(MOE)
    padded = jnp.concatenate([x, jnp.full((7, DIM), jnp.inf)])
    np.testing.assert_allclose(np.asarray(chosen_experts(padded, p, MOE))[:9], plain(x, p, MOE), atol=1e-5)


def test_gradients_are_those_of_the_sum_over_all_experts() -> None:
    x, p = jax.random.normal(jax.random.key(4), (9, DIM)), weights(SHARED)

    def loss(form: Any) -> Any:
        return jax.jit(jax.grad(lambda x, p: jnp.sin(form(x, p, SHARED)).sum(), argnums=(0, 1)))(x, p)

    for got, want in zip(jax.tree.leaves(loss(every_expert)), jax.tree.leaves(loss(plain)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_score_sends_gradients_to_routers_and_experts() -> None:
    spec = model(SHARED)
    params, tokens = dummy_params(spec), jax.random.randint(jax.random.key(5), (2, 11), 0, 61)
    lengths = jnp.array([11, 7])

    @jax.jit
    def dense(params: Any) -> jax.Array:
        logprobs = jax.nn.log_softmax(jax.vmap(lambda row: apply(params, row, spec))(tokens)[:, :-1])
        each = jnp.take_along_axis(logprobs, tokens[:, 1:, None], 2)[:, :, 0]
        return jnp.where(jnp.arange(1, 11)[None] < lengths[:, None], each, 0.0)

    got = jax.jit(jax.grad(lambda p: score(p, tokens, lengths, spec=spec).sum()))(params)["layers"][0]["ffn"]

    want = jax.grad(lambda p: dense(p).sum())(params)["layers"][0]["ffn"]
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)
        assert float(jnp.abs(g).max()) > 1e-4
