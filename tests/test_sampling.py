"""Sampling beside plain numpy: what stays, how often it is drawn, what is edited, what is told about it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.kernels import sampling as kernel
from jaxpaged.model import sampling
from jaxpaged.model.sampling import MAX_LOGPROBS, Edits, Sampled, SamplingInputs

VOCABULARIES = [37, 300, 5000]

sample = jax.jit(sampling.sample)
edit = jax.jit(sampling.edit)
restrict = jax.jit(sampling.restrict)
logprobs_of = jax.jit(sampling.logprobs_of)
invert = jax.jit(kernel.invert, static_argnames="num_shards")


def inputs(rows: int, vocab: int, **given: object) -> SamplingInputs:
    """Neutral inputs, temperature 1, each row its own position; `given` fields are spread over the rows."""
    fields = {
        "temperature": 1.0,
        "top_k": vocab,
        "top_p": 1.0,
        "min_p": 0.0,
        "seeds": (1, 2),
        "positions": np.arange(rows),
    } | given
    types = SamplingInputs(*[np.float32, np.int32, np.float32, np.float32, np.uint32, np.int32])
    shapes = SamplingInputs(*[(rows,)] * 4, (rows, 2), (rows,))
    return SamplingInputs(
        **{
            name: np.array(np.broadcast_to(np.asarray(value, getattr(types, name)), getattr(shapes, name)))
            for name, value in fields.items()
        }
    )


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * np.float32(scale)


def draw(logits: np.ndarray, **given: object) -> Sampled:
    logits = np.asarray(logits, np.float32)
    return jax.device_get(sample(logits, inputs(*logits.shape, **given)))


# What stays


def ugly_rows(vocab: int) -> np.ndarray:
    """Rows that make a threshold hard, shifted as the draw shifts them: the largest is 0."""
    rng = np.random.default_rng(vocab)
    rows = [
        rng.normal(size=vocab) * 3,
        rng.normal(size=vocab) * 1e-6,
        rng.normal(size=vocab) * 1e6,
        np.round(rng.normal(size=vocab) * 2),  # many ties
        np.zeros(vocab),
        np.where(rng.random(vocab) < 0.5, -np.inf, rng.normal(size=vocab)),
        np.where(np.arange(vocab) == vocab // 2, 3.0, -np.inf),  # one token alone
    ]
    x = np.asarray(rows, np.float32)
    return x - x.max(-1, keepdims=True)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("k", [1, 2, 5, 36, 37])
def test_top_k_keeps_what_a_sort_would_and_all_ties(vocab: int, k: int) -> None:
    x = ugly_rows(vocab)
    found = kernel.kth_largest(jnp.asarray(x), jnp.full(len(x), k, jnp.int32))
    np.testing.assert_array_equal(found, np.sort(x, -1)[:, -k])


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("p", [1e-30, 1e-3, 0.3, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_p(vocab: int, p: float) -> None:
    x = ugly_rows(vocab)
    found = np.asarray(kernel.nucleus(jnp.asarray(x), jnp.full(len(x), p, jnp.float32)))[:, None]
    weights = np.exp(x.astype(np.float64))
    share = np.where(x >= found, weights, 0).sum(-1) / weights.sum(-1)
    share_without_the_least = np.where(x > found, weights, 0).sum(-1) / weights.sum(-1)
    assert (share > p - 1e-6).all()
    assert (share_without_the_least < p + 1e-6).all()
    assert (x == found).any(-1).all()  # the threshold is a token's own logit: exact, not a bisection's last guess


def test_top_p_of_1_keeps_everything() -> None:
    x = ugly_rows(37)
    assert (np.asarray(kernel.nucleus(jnp.asarray(x), jnp.ones(len(x), jnp.float32))) == -np.inf).all()


# How often


def probabilities(row: np.ndarray, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The exact distribution of one row's draw, by sorting."""
    x = row.astype(np.float64) / temperature
    weights = np.exp(x - x.max())
    weights[weights < min_p] = 0
    if top_k is not None:
        weights[weights < np.sort(weights)[-top_k]] = 0
    descending = np.sort(weights)[::-1]
    if top_p < 1:
        reached = np.cumsum(descending) >= top_p * weights.sum()
        weights[weights < descending[np.argmax(reached)]] = 0
    return weights / weights.sum()


def chi_square_excess(counts: np.ndarray, expected: np.ndarray) -> float:
    """By how many of its own standard deviations the chi-square statistic exceeds its mean; rare cells are merged."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    cells = expected > 0
    freedom = max(cells.sum() - 1, 1)
    statistic = ((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    return float((statistic - freedom) / np.sqrt(2 * freedom))


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.05, "top_k": 12, "top_p": 0.8},
]


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: " ".join(f"{k}={v}" for k, v in f.items()) or "none")
def test_tokens_are_drawn_as_often_as_their_probability_says(vocab: int, filters: dict[str, float]) -> None:
    draws = {37: 4096, 300: 4096, 5000: 512}[vocab]
    row = logits_of(1, vocab, seed=vocab)[0]
    tokens = draw(np.tile(row, (draws, 1)), **filters).tokens
    expected = probabilities(row, **filters) * draws
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    assert chi_square_excess(counts, expected) < 5


def test_the_frequencies_test_would_notice_a_wrong_temperature() -> None:
    row = logits_of(1, 300)[0]
    tokens = draw(np.tile(row, (4096, 1)), temperature=1.1).tokens
    assert chi_square_excess(np.bincount(tokens, minlength=300), probabilities(row) * 4096) > 5


def test_tokens_that_tie_with_the_kth_stay() -> None:
    row = np.where(np.arange(37) < 5, 1.0, 0.0)
    tokens = draw(np.tile(row, (4096, 1)), top_k=3).tokens
    assert set(tokens.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_lone_possible_token_is_always_drawn(filters: dict[str, float]) -> None:
    alone = np.arange(4096) % 37
    rows = np.where(np.arange(37)[None] == alone[:, None], -5.0, -np.inf)
    np.testing.assert_array_equal(draw(rows, **filters).tokens, alone)


def test_equal_logits_are_drawn_alike() -> None:
    counts = np.bincount(draw(np.full((4096, 37), 7.0)).tokens, minlength=37)
    assert chi_square_excess(counts, np.full(37, 4096 / 37)) < 5


def test_a_token_of_weight_zero_is_never_drawn() -> None:
    """Cumulative sums are added in a tree: past 128 blocks they rise by rounding where nothing is added."""
    rng = np.random.default_rng(0)
    blocks = (rng.random((20, 384, kernel._BLOCK)) * (rng.random((20, 384, 1)) < 0.3)).astype(np.float32)
    sums = np.asarray(jax.jit(lambda x: jnp.cumsum(x.sum(-1), -1))(blocks))
    rises = (sums[:, 1:] > np.maximum.accumulate(sums, -1)[:, :-1]) & (blocks[:, 1:].sum(-1) == 0)
    rises[:, 0] = True  # there is something to try where a jax sums otherwise
    row, block = np.nonzero(rises)
    edges = (sums[row, block] / sums[row, -1]).view(np.int32)
    uniform = np.clip((edges[:, None] + np.arange(-3, 4, dtype=np.int32)).view(np.float32), 0, 1 - 2**-24)
    weights = np.repeat(blocks[row].reshape(len(row), -1), 7, 0)
    tokens = invert(weights, uniform.reshape(-1))
    assert (weights[np.arange(len(weights)), tokens] > 0).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_either_end_of_the_unit_interval_draws_a_possible_token(uniform: float) -> None:
    weights = np.zeros((1, 300), np.float32)
    weights[0, [130, 131, 290]] = 1.0
    token = invert(weights, np.asarray([uniform], np.float32))
    assert token[0] == {0.0: 130, 0.5: 131}.get(uniform, 290)


@pytest.mark.parametrize("num_shards", [2, 3, 6])
def test_a_vocabulary_in_parts_is_drawn_from_as_a_whole_one(num_shards: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, (500, 780)).astype(np.float32)  # sums of whole numbers are exact in any order
    uniform = rng.random(500, np.float32)
    np.testing.assert_array_equal(invert(weights, uniform, num_shards=num_shards), invert(weights, uniform))


# Greedy


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_greedy_takes_the_first_of_the_largest(vocab: int) -> None:
    rows = np.round(logits_of(4096 if vocab < 5000 else 512, vocab))
    rows[0] = 0.0
    rows[1] = np.where(np.arange(vocab) == vocab - 1, 1.0, -np.inf)
    np.testing.assert_array_equal(draw(rows, temperature=0.0).tokens, rows.argmax(-1))


def test_greedy_rows_stay_greedy_beside_random_ones() -> None:
    rows = logits_of(4096, 37)
    greedy = np.arange(4096) % 2 == 0
    tokens = draw(rows, temperature=np.where(greedy, 0.0, 1.0)).tokens
    np.testing.assert_array_equal(tokens[greedy], rows.argmax(-1)[greedy])
    assert (tokens[~greedy] != rows.argmax(-1)[~greedy]).any()


# Randomness


def test_a_rows_draws_do_not_depend_on_its_batch() -> None:
    """Alone, or as another row beside greedy, filtered and broken ones: forty positions, the same tokens."""
    row = logits_of(1, 300)[0]
    others = logits_of(5, 300, seed=1)
    others[0] = np.nan
    others[1] = -np.inf
    mine = {"temperature": 0.8, "top_p": 0.9, "seeds": (123, 456)}
    for position in range(40):
        alone = draw(row[None], positions=position, **mine).tokens[0]
        at = position % 5
        batch = inputs(
            5, 300, temperature=[0.0, 1, 2, 0, 1], top_k=[1, 300, 7, 2, 300], min_p=[0, 0.1, 0, 0, 0], seeds=(9, 9)
        )
        for name, value in (mine | {"positions": position, "top_k": 300, "min_p": 0.0}).items():
            getattr(batch, name)[at] = value
        rows = others.copy()
        rows[at] = row
        assert sample(rows, batch).tokens[at] == alone


def test_same_seed_and_position_same_token_else_another_stream() -> None:
    rows = np.tile(logits_of(1, 300)[0], (4096, 1))
    first = draw(rows).tokens
    np.testing.assert_array_equal(draw(rows).tokens, first)
    chance = (probabilities(rows[0]) ** 2).sum()  # that two independent draws agree
    for other in (
        draw(rows, seeds=(1, 3)).tokens,
        draw(rows, seeds=(2, 2)).tokens,
        draw(rows, positions=np.arange(4096) + 1).tokens,
        draw(rows, positions=np.arange(4096) + 4096).tokens,
        np.roll(first, 1),
    ):
        assert abs((other == first).mean() - chance) < 5 * np.sqrt(chance / 4096)


def test_the_draw_does_not_depend_on_the_programs_default_generator() -> None:
    rows = logits_of(5, 41)  # a shape of its own: traced here, not taken from another test
    with jax.default_prng_impl("rbg"):
        tokens = jax.jit(lambda *given: sampling.sample(*given).tokens)(rows, inputs(5, 41))
    np.testing.assert_array_equal(tokens, draw(rows).tokens)


# Edits and masks


def edited(logits: np.ndarray, changes: dict[tuple[int, int], tuple[float, float]], room: int = 16) -> np.ndarray:
    """`changes` maps (row, token) to (factor, add); unused room holds a row past the end, as the engine packs it."""
    rows = np.full(room, logits.shape[0], np.int32)
    tokens, factor, add = np.zeros(room, np.int32), np.ones(room, np.float32), np.zeros(room, np.float32)
    for at, ((row, token), (times, plus)) in enumerate(changes.items()):
        rows[at], tokens[at], factor[at], add[at] = row, token, times, plus
    return np.asarray(edit(logits, Edits(rows, tokens, factor, add)))


def test_edits_change_the_named_logits_and_nothing_else() -> None:
    logits = logits_of(3, 37)
    logits[1, 5], logits[1, 6], logits[2, 0] = 4.0, -4.0, 0.0
    changes = {(1, 5): (2.0, 0.0), (1, 6): (2.0, 0.0), (2, 0): (2.0, -1.5), (0, 36): (1.0, -np.inf), (1, 7): (0.5, 9.0)}
    expected = logits.copy()
    for (row, token), (factor, add) in changes.items():
        old = logits[row, token]
        expected[row, token] = (old / factor if old > 0 else old * factor) + add
    np.testing.assert_array_equal(edited(logits, changes), expected)
    assert expected[1, 5] == 2.0
    assert expected[1, 6] == -8.0


def test_padding_of_edits_touches_no_row() -> None:
    logits = logits_of(3, 37)
    np.testing.assert_array_equal(edited(logits, {}), logits)
    np.testing.assert_array_equal(edited(logits, {(3, 5): (2.0, 1.0), (4, 5): (2.0, 1.0)}), logits)


@pytest.mark.parametrize("vocab", [32, 37, 300])
def test_only_tokens_whose_bit_is_set_remain(vocab: int) -> None:
    logits = logits_of(3, vocab)
    allowed = np.random.default_rng(1).random((3, vocab)) < 0.3
    allowed[1], allowed[2] = True, np.arange(vocab) == vocab - 1
    bits = np.pad(allowed, ((0, 0), (0, -vocab % 32))).reshape(3, -1, 32)
    words = (bits * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(-1).astype(np.uint32)
    np.testing.assert_array_equal(restrict(logits, words), np.where(allowed, logits, -np.inf))


# What is told


@pytest.mark.parametrize("vocab", [3, *VOCABULARIES])
def test_logprobs_are_the_log_softmax_of_the_models_own_logits(vocab: int) -> None:
    logits = logits_of(5, vocab)
    tokens = np.asarray([0, 1, 2, vocab - 1, vocab // 2], np.int32)
    found = logprobs_of(logits, tokens)
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
    order = np.argsort(-expected, -1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_allclose(found.chosen, expected[np.arange(5), tokens], atol=1e-5)
    np.testing.assert_array_equal(found.rank, 1 + (expected > expected[np.arange(5), tokens][:, None]).sum(-1))
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, -1), atol=1e-5)


def test_each_rows_logprobs_are_of_its_logits_over_its_temperature() -> None:
    raw = logits_of(5, 300)
    over = np.asarray([1, 0.5, 2, 1, 3], np.float32)
    tokens = raw.argmax(-1).astype(np.int32)
    got, want = logprobs_of(raw, tokens, over), logprobs_of(raw / over[:, None], tokens)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_broken_rows_are_reported_and_harm_no_other() -> None:
    rows = logits_of(5, 300)
    broken = rows.copy()
    broken[0, 7] = np.nan
    broken[2] = -np.inf
    broken[4, 299] = np.inf
    settings = {"temperature": [1, 1, 0, 0, 1], "top_k": [5, 300, 300, 300, 5], "top_p": [0.5, 0.9, 1, 1, 0.5]}
    fine, outputs = draw(rows, **settings), draw(broken, **settings)
    assert outputs.healthy.tolist() == [False, True, False, True, False]
    assert fine.healthy.all()
    np.testing.assert_array_equal(outputs.tokens[[1, 3]], fine.tokens[[1, 3]])
    assert ((outputs.tokens >= 0) & (outputs.tokens < 300)).all()
