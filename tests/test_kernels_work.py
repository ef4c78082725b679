"""Work lists: every query meets every key that it sees exactly once, in items of about one size."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.kernels.work import chunk_work, decode_work

LENS = st.lists(st.integers(0, 3000), min_size=7, max_size=7)


def items(work):
    """The items that have rows, as dictionaries of plain ints."""
    work = jax.tree.map(np.asarray, work)
    return [dict(zip(work._fields, map(int, item), strict=True)) for item in zip(*work, strict=True) if item[2] > 0]


@settings(deadline=None, max_examples=60)
@given(lens=LENS, num_splits=st.sampled_from([1, 2, 5]), window=st.sampled_from([None, 1, 100]))
def test_decode_items_cover_what_a_query_sees(lens, num_splits, window):
    op = jax.jit(partial(decode_work, window=window, block_k=64, num_splits=num_splits))
    work, start = op(np.asarray(lens, np.int32))
    found, start = items(work), np.asarray(start)
    assert len(work.seq) == len(lens) * num_splits
    for s, length in enumerate(lens):
        mine = found[start[s] : start[s + 1]]
        assert all(i["seq"] == i["row"] == s and i["position"] == length - 1 for i in mine)
        first = 0 if window is None else max(0, length - window) // 64 * 64
        keys = [k for i in mine for k in range(i["begin"], i["end"])]
        assert keys == list(range(first, length))
        assert all(i["begin"] % 64 == 0 for i in mine)
        assert [i["leading"] for i in mine] == ([1] + [0] * (len(mine) - 1) if mine else [])


@given(lens=LENS)
@settings(deadline=None, max_examples=60)
def test_decode_items_are_about_equal(lens):
    work, _ = jax.jit(partial(decode_work, window=None, block_k=16, num_splits=4))(np.asarray(lens, np.int32))
    sizes = [-(-(i["end"] - i["begin"]) // 16) for i in items(work)]
    blocks = sum(-(-n // 16) for n in lens)
    assert max(sizes, default=0) <= max(-(-blocks // (len(lens) * 3)), 2)


@settings(deadline=None, max_examples=60)
@given(
    q_lens=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    before=st.lists(st.integers(0, 300), min_size=6, max_size=6),
    window=st.sampled_from([None, 1, 100]),
)
def test_chunk_items_hold_every_token_once_with_the_keys_it_sees(q_lens, before, window):
    kv_lens = np.asarray([c + n if n else 0 for c, n in zip(before, q_lens, strict=True)], np.int32)
    cu = np.cumsum([0, *q_lens]).astype(np.int32)
    op = partial(chunk_work, num_tokens=256, window=window, block_q=16, block_k=32)
    found = items(jax.jit(op)(cu, kv_lens))
    rows = [i["row"] + n for i in found for n in range(i["num_rows"])]
    assert sorted(rows) == list(range(256))
    assert all(i["num_rows"] <= 16 for i in found)
    for i in found:
        if i["row"] >= cu[-1]:
            assert i["begin"] == i["end"] == 0
            continue
        s = i["seq"]
        assert cu[s] <= i["row"] < i["row"] + i["num_rows"] <= cu[s + 1]
        assert i["position"] == kv_lens[s] - q_lens[s] + i["row"] - cu[s]
        assert i["end"] == i["position"] + i["num_rows"]
        seen_first = 0 if window is None else max(0, i["position"] - window + 1)
        assert i["begin"] == seen_first // 32 * 32


@pytest.mark.parametrize("op", ["decode", "chunks"])
def test_the_number_of_items_is_told_by_shapes(op):
    lens = jax.ShapeDtypeStruct((5,), np.int32)
    if op == "decode":
        work, _ = jax.eval_shape(partial(decode_work, window=None, block_k=64, num_splits=3), lens)
        assert work.seq.shape == (15,)
    else:
        cu = jax.ShapeDtypeStruct((6,), np.int32)
        plan = partial(chunk_work, num_tokens=100, window=None, block_q=32, block_k=64)
        assert jax.eval_shape(plan, cu, lens).seq.shape == (100 // 32 + 5 + 1,)
