"""From plans to arrays: a bucket for every plan, every token in its slot, padding that does nothing."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import jax
import numpy as np
import pytest

from jaxpaged.engine import batch
from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.logit_edits import RowEdits
from jaxpaged.engine.request import Sequence
from jaxpaged.engine.scheduler import Chunk, Copy, Fork, Plan
from jaxpaged.model.cache import KVCache, init_cache
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope
from jaxpaged.model.step import ForwardOutputs, StepInputs, forward
from jaxpaged.sampling_params import SamplingParams

VOCAB = 37
PAGE_SIZE, NUM_PAGES, MAX_PAGES = 4, 16, 6


def sequence(token_ids: Seq[int], pages: Seq[int] = (), prompt_len: int | None = None, **params: object) -> Sequence:
    made = Sequence(
        request_id="r",
        index=0,
        params=SamplingParams(**params),
        prompt_len=len(token_ids) if prompt_len is None else prompt_len,
        token_ids=list(token_ids),
        max_tokens=8,
        seed=(11, 2**32 - 1),
        pages=list(pages),
        page_table=np.zeros(MAX_PAGES, np.int32),
    )
    made.page_table[: len(pages)] = pages
    return made


def pack(plan: Plan, bucket: Bucket, feedback: dict[Sequence, int] | None = None) -> StepInputs:
    return batch.pack(plan, bucket, feedback or {}, max_pages=MAX_PAGES, page_size=PAGE_SIZE, num_pages=NUM_PAGES)


@pytest.fixture
def plan() -> Plan:
    """One token of a prompt, one still on the device, and three chunks: from 0, from the middle, to the end."""
    known = sequence([1, 2, 3, 4, 5, 6, 7, 8], pages=[3, 5])
    unread = sequence([7, 8, 9, 10], pages=[4, 6], prompt_len=4)
    first = sequence(range(20, 30), pages=[7, 8])
    middle = sequence(range(10, 22), pages=[9, 1, 2])
    return Plan(
        [Chunk(known, 5, 1, False), Chunk(unread, 4, 1, True)],
        [Chunk(first, 0, 7, False), Chunk(middle, 3, 6, False), Chunk(middle, 9, 3, True)],
    )


BUCKET = Bucket(4, 20, 5)


# Buckets

LIMITS = [
    (max_num_seqs, budget)
    for max_num_seqs in (1, 2, 3, 5, 17, 64, 200)
    for budget in (1, 2, 7, 63, 64, 65, 200, 512, 513, 8192, 10_000, 40_000)
]


@pytest.mark.parametrize(("max_num_seqs", "budget"), LIMITS)
def test_every_plan_within_the_limits_has_a_bucket(max_num_seqs: int, budget: int) -> None:
    """As the scheduler makes them: a chunk has two tokens or more; decodes and chunks share sequences and budget."""
    buckets = batch.make_buckets(max_num_seqs, budget)
    for decodes in range(min(max_num_seqs, budget) + 1):
        for chunks in range(min(batch.max_chunks(max_num_seqs), max_num_seqs - decodes, (budget - decodes) // 2) + 1):
            for tokens in {2 * chunks, budget - decodes} if chunks else {0}:
                lengths = [2] * (chunks - 1) + [tokens - 2 * (chunks - 1)] * (chunks > 0)
                plan = Plan([Chunk(None, 5, 1, True)] * decodes, [Chunk(None, 0, n, True) for n in lengths])
                bucket = batch.choose([plan], buckets)
                assert bucket.num_decodes >= decodes
                assert bucket.num_chunks >= chunks
                assert bucket.num_chunk_tokens >= tokens


@pytest.mark.parametrize(("max_num_seqs", "budget"), LIMITS)
def test_buckets_are_few_and_no_larger_than_the_limits(max_num_seqs: int, budget: int) -> None:
    buckets = batch.make_buckets(max_num_seqs, budget)
    assert len(buckets) == len(set(buckets)) <= 24
    assert max(b.num_decodes for b in buckets) == max_num_seqs
    assert max(b.num_chunk_tokens for b in buckets) == budget


@pytest.mark.parametrize("running", [1, 4, 5, 33, 64])
def test_a_plan_of_decodes_alone_computes_no_chunk_and_at_most_four_times_its_rows(running: int) -> None:
    bucket = batch.choose([Plan([Chunk(None, 5, 1, True)] * running, [])], batch.make_buckets(64, 512))
    assert bucket.num_tokens == bucket.num_decodes <= 4 * running


@pytest.mark.parametrize("max_num_seqs", [1, 2, 4, 64])
def test_on_a_gpu_a_lone_decode_is_computed_as_four_rows(max_num_seqs: int) -> None:
    buckets = batch.make_buckets(max_num_seqs, 512, fewest_decodes=4)
    lone = Plan([Chunk(None, 5, 1, True)], [])
    assert batch.choose([lone], buckets) == Bucket(4, 0, 0)
    assert len(buckets) == len(set(buckets))


# pack


def test_every_token_has_its_id_position_and_slot(plan: Plan) -> None:
    inputs = pack(plan, BUCKET, {plan.decodes[1].sequence: 2})
    tokens = [(0, plan.decodes[0].sequence, 5), (1, plan.decodes[1].sequence, 4)]
    planned = [(c.sequence, c.start + i) for c in plan.chunks for i in range(c.length)]
    tokens += [(BUCKET.num_decodes + at, s, position) for at, (s, position) in enumerate(planned)]
    for at, s, position in tokens:
        assert inputs.positions[at] == position
        assert inputs.slots[at] == s.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        assert inputs.rope_lens[at] == max(s.rope_len, position + 1)
        if inputs.feedback[at] == -1:
            assert inputs.token_ids[at] == s.token_ids[position]


def test_a_token_not_read_yet_comes_from_the_row_that_sampled_it(plan: Plan) -> None:
    inputs = pack(plan, BUCKET, {plan.decodes[1].sequence: 2, plan.decodes[0].sequence: 3})
    assert inputs.feedback.tolist() == [-1, 2] + [-1] * (BUCKET.num_tokens - 2)


def test_every_row_sees_its_own_pages_and_length_and_answers_for_its_last_token(plan: Plan) -> None:
    inputs = pack(plan, BUCKET, {plan.decodes[1].sequence: 2})
    rows = dict(batch.rows_of(plan, BUCKET))
    assert list(rows) == [0, 1, 4, 5, 6]
    for row, chunk in rows.items():
        np.testing.assert_array_equal(inputs.page_table[row], chunk.sequence.page_table)
        assert inputs.kv_lens[row] == chunk.start + chunk.length
        assert inputs.positions[inputs.logit_rows[row]] == chunk.start + chunk.length - 1
    assert inputs.cu_q_lens.tolist() == [0, 7, 13, 16, 16, 16]
    assert inputs.logit_rows[[4, 5, 6]].tolist() == [10, 16, 19]


def test_forks_take_rows_behind_the_decodes_and_the_logits_of_what_they_fork_from(plan: Plan) -> None:
    chunk, decode = plan.chunks[2], plan.decodes[0]
    forks = [Fork(sequence([1]), chunk), Fork(sequence([2]), decode)]
    plan = plan._replace(forks=forks)
    inputs = pack(plan, BUCKET, {plan.decodes[1].sequence: 2})
    rows = dict(batch.rows_of(plan, BUCKET))
    assert list(rows) == [0, 1, 2, 3, 4, 5, 6]
    assert rows[2] == chunk._replace(sequence=forks[0].sequence)
    assert rows[3] == decode._replace(sequence=forks[1].sequence)
    assert inputs.logit_rows.tolist() == [0, 1, 19, 0, 10, 16, 19, 0, 0]
    assert inputs.kv_lens[2:4].tolist() == [0, 0]
    assert (inputs.slots[2:4] == NUM_PAGES * PAGE_SIZE).all()


def test_a_plan_with_forks_takes_a_bucket_with_rows_for_them() -> None:
    chunk = Chunk(None, 0, 3, True)
    plan = Plan([Chunk(None, 5, 1, True)], [chunk], [Fork(None, chunk)] * 3)
    assert batch.choose([plan], [Bucket(0, 64, 4), Bucket(3, 64, 4), Bucket(4, 64, 4)]) == Bucket(4, 64, 4)


@pytest.mark.parametrize("num_copies", [0, 1, batch.COPIES_PER_CALL, batch.COPIES_PER_CALL + 1])
def test_copies_come_in_pieces_of_one_size_and_in_order(num_copies: int) -> None:
    copies = [Copy(n, n + 100) for n in range(num_copies)]
    found = []
    for sources, targets in batch.pack_copies(Plan([], [], [], copies), num_pages=1000):
        assert sources.shape == targets.shape == (batch.COPIES_PER_CALL,)
        real = targets < 1000
        assert (targets[~real] == 1000).all()
        found += list(zip(sources[real].tolist(), targets[real].tolist(), strict=True))
    assert found == copies


def test_padding_is_written_past_the_pool_and_sees_nothing(plan: Plan) -> None:
    inputs = pack(plan, BUCKET, {plan.decodes[1].sequence: 2})
    padding = [2, 3, *range(20, 24)]
    assert (inputs.slots[padding] == NUM_PAGES * PAGE_SIZE).all()
    assert (inputs.kv_lens[[2, 3, 7, 8]] == 0).all()
    assert (inputs.page_table[[2, 3, 7, 8]] == 0).all()
    assert np.unique(inputs.slots).size == BUCKET.num_tokens - len(padding) + 1


def test_shapes_and_types_depend_on_the_bucket_alone(plan: Plan) -> None:
    full = pack(plan, BUCKET, {plan.decodes[1].sequence: 2})
    empty = pack(Plan([], []), BUCKET)
    assert [x.shape for x in full] == [x.shape for x in empty]
    assert all(x.dtype == np.int32 for x in (*full, *empty))


def tiny_decoder() -> Decoder:
    attention = Attention(heads=2, kv_heads=1, head_dim=8, scale=0.35, rope=Rope(10_000.0, 8))
    block = Block(attention, Mlp(16, "silu"), Norm("rms", 1e-5))
    return Decoder(
        vocab_size=VOCAB, dim=16, max_positions=64, blocks=(block,) * 2, norm=Norm("rms", 1e-5), embed_dim=16,
        tied_head=True,
    )  # fmt: skip


def test_padding_changes_neither_the_logits_nor_the_pool(plan: Plan) -> None:
    """The same plan through its tightest bucket and through a wide one."""
    spec = tiny_decoder()
    params = dummy_params(spec)
    step = jax.jit(forward, static_argnames="spec")
    sampled = np.arange(30, 36, dtype=np.int32)

    def run(bucket: Bucket) -> tuple[KVCache, ForwardOutputs]:
        cache = jax.tree.map(lambda pool: pool + 0.5, init_cache(spec, NUM_PAGES, PAGE_SIZE, np.float32))
        return step(params, cache, pack(plan, bucket, {plan.decodes[1].sequence: 3}), sampled, spec=spec)

    (tight_cache, tight), (wide_cache, wide) = run(Bucket(2, 16, 3)), run(BUCKET)
    rows = [row for row, _ in batch.rows_of(plan, BUCKET)]
    np.testing.assert_allclose(tight.logits, wide.logits[np.asarray(rows)], atol=1e-5)
    for one, other in zip(tight_cache.pools, wide_cache.pools, strict=True):
        np.testing.assert_allclose(one.pages, other.pages, atol=1e-5)
    untouched = sorted(set(range(NUM_PAGES)) - {p for c in (*plan.decodes, *plan.chunks) for p in c.sequence.pages})
    assert 0 in untouched
    assert all((np.asarray(pool.pages)[untouched] == 0.5).all() for pool in wide_cache.pools)


# Sampling


def test_rows_are_sampled_as_their_requests_ask(plan: Plan) -> None:
    asked = {"temperature": 0.5, "top_k": 5, "top_p": 0.25, "min_p": 0.125}
    drawn = sequence([1, 2, 3], **asked)
    inputs = batch.pack_sampling(Plan([], [Chunk(drawn, 0, 3, True)]), BUCKET, VOCAB)
    row = BUCKET.num_decodes
    assert {name: getattr(inputs, name)[row] for name in asked} == asked
    assert inputs.seeds[row].tolist() == [11, 2**32 - 1]
    assert inputs.positions[row] == 3  # of the token to come
    assert inputs.temperature.tolist() == [0.5 if r == row else 0 for r in range(BUCKET.num_rows)]


@pytest.mark.parametrize("top_k", [-1, 0, VOCAB, 10**12])
def test_a_top_k_of_nothing_or_of_more_than_there_is_keeps_all(top_k: int) -> None:
    chunk = Chunk(sequence([1], top_k=top_k, temperature=1.0), 0, 1, True)
    assert batch.pack_sampling(Plan([chunk], []), BUCKET, VOCAB).top_k[0] == VOCAB


def test_a_chunk_that_does_not_reach_the_end_asks_for_no_draw_and_no_logprobs() -> None:
    chunk = Chunk(sequence([1, 2, 3], temperature=1.0, top_p=0.5, logprobs=2), 0, 2, False)
    plan = Plan([], [chunk])
    inputs = batch.pack_sampling(plan, BUCKET, VOCAB)
    assert batch.pack_score_temperature(plan, BUCKET) is None
    assert (inputs.temperature == 0).all()
    assert (inputs.top_p == 1).all()


def test_logprobs_are_computed_where_any_row_wants_them() -> None:
    plan = Plan([Chunk(sequence([1]), 0, 1, True), Chunk(sequence([1], logprobs=0), 0, 1, True)], [])
    assert batch.pack_score_temperature(Plan(plan.decodes[:1], []), BUCKET) is None
    temperature = batch.pack_score_temperature(plan, BUCKET)
    assert temperature is not None
    assert (temperature == 1).all()


# Edits and masks


def row_edits(token_ids: Seq[int]) -> RowEdits:
    ids = np.asarray(token_ids, np.int32)
    return RowEdits(ids, ids.astype(np.float32) + 1, ids.astype(np.float32) - 100)


@pytest.mark.parametrize("count", [1, batch.EDITS_PER_CALL - 3, batch.EDITS_PER_CALL, 2 * batch.EDITS_PER_CALL + 1])
def test_edits_of_all_rows_come_in_pieces_of_one_size_and_each_once(count: int) -> None:
    given = {2: row_edits([5, 9, 30]), 0: row_edits(range(count))}
    found = []
    for piece in batch.pack_edits(given, num_rows=3):
        assert all(x.shape == (batch.EDITS_PER_CALL,) for x in piece)
        assert [x.dtype for x in piece] == [np.int32, np.int32, np.float32, np.float32]
        found += [entry for entry in zip(*(x.tolist() for x in piece), strict=True) if entry[0] < 3]
    assert found == [(row, t, t + 1.0, t - 100.0) for row, e in given.items() for t in e.token_ids.tolist()]


def test_no_edits_no_piece() -> None:
    assert list(batch.pack_edits({}, 3)) == []


@pytest.mark.parametrize("vocab", [32, 33, VOCAB, 300])
def test_the_mask_allows_what_each_row_allows_and_everything_to_others(vocab: int) -> None:
    limited = sequence([1], allowed_token_ids=[0, 31, vocab - 1, vocab - 1])
    not_yet = sequence([1, 2, 3], allowed_token_ids=[4])
    plan = Plan([Chunk(sequence([1]), 0, 1, True), Chunk(limited, 0, 1, True)], [Chunk(not_yet, 0, 2, False)])
    words = batch.pack_allowed(plan, BUCKET, vocab)
    assert words.dtype == np.uint32
    bits = (words[:, np.arange(vocab) // 32] >> (np.arange(vocab) % 32).astype(np.uint32)) & 1
    assert np.flatnonzero(bits[1]).tolist() == sorted({0, 31, vocab - 1})
    assert (np.delete(bits, 1, 0) == 1).all()


def test_where_nobody_is_limited_there_is_no_mask() -> None:
    assert batch.pack_allowed(Plan([Chunk(sequence([1]), 0, 1, True)], []), BUCKET, VOCAB) is None
