"""The Triton sampling kernel against the reference op: in Pallas' interpreter or, with --device gpu, compiled."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import INTERPRET
from test_kernels_dispatch import on
from test_sampling import inputs, logits_of, ugly_rows

from jaxpaged.kernels.sampling import draw
from jaxpaged.model import sampling

# jax 0.11 announces the end of its Triton lowering, which our range of versions has.
pytestmark = pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")

ALMOST_1 = float(np.nextafter(np.float32(1), np.float32(0)))
reference = jax.jit(partial(draw, backend="reference"))
_kernels = {block: jax.jit(partial(draw, backend="triton", interpret=INTERPRET, block=block)) for block in (64, 512)}


def settings_of(rows, vocab, **given):
    """Neutral ones, but for `given`, which are spread over the rows."""
    neutral = {"temperature": 1.0, "top_k": vocab, "top_p": 1.0, "min_p": 0.0} | given
    return {
        name: np.array(np.broadcast_to(np.asarray(value, np.int32 if name == "top_k" else np.float32), (rows,)))
        for name, value in neutral.items()
    }


def by_sorting(row, uniform, temperature, top_k, top_p, min_p):
    """The tokens that a row may give, by sorting and in float64: all between which the last bits may decide."""
    if temperature == 0:
        return [0]
    x = row.astype(np.float32) / np.float32(temperature)
    x = (x - x.max()).astype(np.float64)
    weights = np.exp(x)
    if min_p > 0:
        weights[x < np.log(np.float32(min_p))] = 0
    if top_k < len(x):
        weights[x < np.sort(np.where(weights > 0, x, -np.inf))[-top_k]] = 0
    allowed = []
    for p in (top_p - 1e-6, top_p + 1e-6) if top_p < 1 else (1.0,):
        kept = weights.copy()
        if top_p < 1:
            descending = np.sort(kept)[::-1]
            reached = np.cumsum(descending) >= p * kept.sum()
            kept[kept < descending[np.argmax(reached) if reached.any() else -1]] = 0
        sums = np.cumsum(kept)
        for shifted in (uniform - 1e-6, uniform + 1e-6):
            possible = np.flatnonzero((sums > shifted * sums[-1]) & (kept > 0))
            allowed.append(possible[0] if len(possible) else np.flatnonzero(kept)[-1])
    return allowed


def check(logits, uniform, how, block=64):
    logits, uniform = np.asarray(logits, np.float32), np.asarray(uniform, np.float32)
    got = np.asarray(_kernels[block](logits, uniform, **how))
    for row, token in enumerate(got):
        allowed = by_sorting(logits[row], uniform[row], **{name: values[row] for name, values in how.items()})
        assert token in allowed, (row, token, allowed)
    same = np.asarray(reference(logits, uniform, **how)) == got
    assert same.mean() > 0.98  # sums are added in other orders
    return got


# Vocabularies: less than a block, a block, its edge, a power of two and not.
VOCABULARIES = [5, 64, 65, 256, pytest.param(777, marks=pytest.mark.slow)]
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_p": 1e-30},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 4, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.05, "top_k": 4, "top_p": 0.8},
]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_filter_on_every_ugly_row_draws_what_sorting_says(vocab):
    """Ties, all alike, -inf from masks, one token alone, very near and very far apart."""
    rows = ugly_rows(vocab)
    uniforms = np.asarray([0.0, 0.3, 0.77, ALMOST_1])
    logits = np.repeat(np.tile(rows, (len(FILTERS), 1)), len(uniforms), 0)
    each = [settings_of(len(rows) * len(uniforms), vocab, **f) for f in FILTERS]
    how = {name: np.concatenate([e[name] for e in each]) for name in each[0]}
    check(logits, np.tile(uniforms, len(rows) * len(FILTERS)), how)


def test_a_block_wider_than_the_vocabulary_gives_the_same():
    logits, uniform = logits_of(40, 300), np.random.default_rng(0).random(40)
    how = settings_of(40, 300, top_k=np.arange(40) + 1, top_p=0.9)
    np.testing.assert_array_equal(check(logits, uniform, how, 512), check(logits, uniform, how, 64))


def test_ties_with_the_last_that_stays_stay_too():
    logits = np.tile(np.where(np.arange(37) % 9 == 2, 1.0, 0.0), (200, 1))
    uniform = (np.arange(200) + 0.5) / 200
    for how in ({"top_k": 2}, {"top_p": 0.1}):
        assert set(check(logits, uniform, settings_of(200, 37, **how)).tolist()) == {2, 11, 20, 29}


def test_neighbouring_floats_are_told_apart():
    """A search that halves a gap of one bit must end, on the right side."""
    steps = np.arange(40, dtype=np.int32)[::-1]
    logits = np.tile((np.float32(-1).view(np.int32) + steps).view(np.float32), (40, 1))
    logits[:, 11] = 0.0
    kept = np.sort(logits[0])[::-1]
    for k in range(1, 41):
        how = settings_of(40, 40, top_k=k)
        drawn = check(logits, (np.arange(40) + 0.5) / 40, how)
        assert logits[0, drawn].min() >= kept[k - 1]


def test_a_target_that_rounding_leaves_above_all_sums_draws_the_last_possible_token():
    logits = np.full((1, 300), -np.inf, np.float32)
    logits[0, [3, 70, 130, 150]] = 0.0
    assert _kernels[64](logits, np.ones(1, np.float32), **settings_of(1, 300))[0] == 150


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 30.0]), decimals=st.sampled_from([0, 1, 6]))
def test_any_row_with_any_parameters(seed, scale, decimals):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((16, 200)) * scale, decimals)
    logits[rng.random(logits.shape) < rng.choice([0.0, 0.9])] = -np.inf
    logits[:, 7] = 0.0  # no row is empty
    how = settings_of(
        16,
        200,
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0], 16),
        top_k=rng.choice([1, 2, 50, 199, 200], 16),
        top_p=rng.choice([1e-9, 0.2, 0.9, 1.0], 16),
        min_p=rng.choice([0.0, 1e-3, 0.5], 16),
    )
    check(logits, rng.random(16), how)


def test_broken_rows_give_some_token_and_harm_no_other():
    logits = logits_of(5, 300)
    how = settings_of(5, 300, top_k=9, top_p=0.9)
    uniform = np.full(5, 0.6, np.float32)
    fine = check(logits, uniform, how)
    logits[0], logits[1], logits[2, 5] = np.nan, -np.inf, np.nan
    logits[4, 7] = np.inf
    got = np.asarray(_kernels[64](logits, uniform, **how))
    assert got[3] == fine[3]
    assert ((got >= 0) & (got < 300)).all()


def test_a_step_samples_the_same_with_either_backend(monkeypatch):
    logits = logits_of(12, 300)
    given = inputs(12, 300, temperature=np.arange(12) % 4 / 2, top_k=20, top_p=0.9, min_p=0.01)
    want = jax.jit(sampling.sample)(logits, given).tokens
    monkeypatch.setattr(sampling, "draw", partial(draw, interpret=INTERPRET, block=64))
    got = jax.jit(partial(sampling.sample, backend="triton"))(logits, given).tokens
    np.testing.assert_array_equal(got, want)


# Which backend, and what is refused


def shapes(rows=4, vocab=32001):
    number, whole = jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    how = {"temperature": number, "top_k": whole, "top_p": number, "min_p": number}
    return (jax.ShapeDtypeStruct((rows, vocab), jnp.float32), number), how


def test_auto_is_the_kernel_on_nvidia_gpus_and_the_reference_elsewhere():
    args, how = shapes()

    def text(*args, **how):
        return str(jax.make_jaxpr(lambda *a, **k: draw(*a, **k))(*args, **how))

    with on("TPU v5e"):
        assert "pallas_call" not in text(*args, **how)
    with on("NVIDIA H200"):
        assert "pallas_call" in text(*args, **how)


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
@pytest.mark.parametrize("vocab", [32000, 32001, 262144])
def test_the_kernel_lowers_for_cuda(gpu, vocab):
    args, how = shapes(vocab=vocab)
    with on(gpu):
        text = jax.jit(lambda *a, **k: draw(*a, **k)).trace(*args, **how).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.parametrize("how", [{"backend": "reference"}, {"backend": "triton", "interpret": INTERPRET}], ids=str)
def test_asking_for_a_gradient_says_what_to_differentiate_instead(how):
    given = {name: jnp.asarray(values) for name, values in settings_of(2, 37).items()}

    def token(logits):
        return jnp.take_along_axis(logits, draw(logits, jnp.full(2, 0.5), **given, **how)[:, None], 1).sum()

    with pytest.raises(NotImplementedError, match=r"no gradient; differentiate its log-probability instead"):
        jax.grad(token)(jnp.zeros((2, 37)))


def test_what_makes_no_sense_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    args, how = shapes()
    with pytest.raises(ValueError, match="unknown backend 'mosaic'; known: auto, reference, triton"):
        jax.eval_shape(partial(draw, backend="mosaic"), *args, **how)
    with pytest.raises(ValueError, match="block is 48; it must be a power of two and at least 16"):
        jax.eval_shape(partial(draw, backend="triton", block=48), *args, **how)
