"""From a plan to arrays: which bucket a step takes, and its inputs padded to that bucket's shapes. numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.engine.logit_edits import RowEdits
from jaxpaged.engine.request import Sequence as TokenSequence
from jaxpaged.engine.scheduler import Chunk, Plan
from jaxpaged.model.sampling import Edits, SamplingInputs
from jaxpaged.model.step import StepInputs

EDITS_PER_CALL = 4096
COPIES_PER_CALL = 32  # pages that lie beside the pool for a moment, over all layers
MOVES_PER_CALL = 8  # pages on their way to or from the host together: one alone takes as long
PROMPT_ROWS = 64  # prompt tokens whose logprobs one call computes
_SMALL_CHUNKS = 4  # chunks a step with few chunk tokens may hold
_CHUNKS = 16


class Bucket(NamedTuple):
    """A padded shape of a step that has been compiled: decode rows, chunk tokens, chunks. Where there are drafts, all
    that decode are chunks, and every token has a row of logits: `num_drafts` more than there are chunks.
    """

    num_decodes: int
    num_chunk_tokens: int
    num_chunks: int
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes, padding included."""
        return self.num_decodes + self.num_chunk_tokens

    @property
    def num_seqs(self) -> int:
        """Rows of the page table."""
        return self.num_decodes + self.num_chunks

    @property
    def num_rows(self) -> int:
        """Rows of logits: one for each sequence, and for each token of a draft."""
        return self.num_seqs + self.num_drafts


class PromptPiece(NamedTuple):
    """Prompt tokens at positions start .. start + num_rows of a sequence, and the step's rows that tell of them."""

    sequence: TokenSequence
    start: int
    num_rows: int
    rows: np.ndarray  # int32 [PROMPT_ROWS]
    targets: np.ndarray


def max_chunks(max_num_seqs: int) -> int:
    """Chunks that one step holds at most."""
    return min(_CHUNKS, max_num_seqs)


def make_buckets(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    *,
    fewest_decodes: int = 1,
    num_shards: int = 1,
    multiple: int = 1,
    max_drafted_tokens: int = 0,
) -> list[Bucket]:
    """The shapes worth compiling, smallest first: few, because each takes seconds to compile.

    Steps that only decode come in 1, 4, 8, doublings and the middles between those from 16 to 64 (without them 64
    requests of mixed lengths took 5 % longer on a CPU); steps with chunks have either no decode row or all of them, and
    64, 192, 512, ... chunk tokens. None that only decodes has fewer rows than `fewest_decodes`. All data shards take
    one bucket: of `num_shards`, one may decode while another computes a chunk. All tokens of a step with chunks are a
    multiple of `multiple`. Steps with drafts have 4, 8, 16, ... up to `max_drafted_tokens` tokens.
    """
    rows = {n for n in (1, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024) if n < max_num_seqs} | {max_num_seqs}
    rows = {max(n, fewest_decodes) for n in rows}
    decode = [Bucket(n, 0, 0) for n in sorted(rows)]
    sizes = {n for n in (64, 192, 512, 2048, 8192, 32768) if n < max_num_batched_tokens} | {max_num_batched_tokens}
    mixed = []
    for size in sorted(sizes):
        is_small = size <= 64 and size < max_num_batched_tokens  # the largest must hold as many chunks as there may be
        chunks = min(_SMALL_CHUNKS, max_num_seqs) if is_small else max_chunks(max_num_seqs)
        mixed += [Bucket(n, size + -(n + size) % multiple, chunks) for n in (0, max_num_seqs)]
    if max_num_seqs == num_shards == 1:
        mixed = [b for b in mixed if b.num_decodes == 0]
    tokens = {n for n in (4, 8, 16, 32, 64, 128) if n < max_drafted_tokens} | {max_drafted_tokens} - {0}
    seqs = {n: min(n - 1, max_num_seqs) for n in tokens}
    drafted = [Bucket(0, n, count, n - count) for n, count in seqs.items()]
    return sorted(decode + mixed + drafted, key=lambda b: b.num_tokens)


def choose(plans: Sequence[Plan], buckets: Sequence[Bucket]) -> Bucket:
    """The smallest bucket that holds each of the plans, forks in rows of decodes. The scheduler's limits leave one."""
    if num_drafted := sum(plan.num_drafted for plan in plans):
        (plan,) = plans
        count = len(plan.decodes)
        drafted = (b for b in buckets if b.num_drafts)
        return next(b for b in drafted if b.num_chunks >= count and b.num_chunk_tokens >= count + num_drafted)
    decodes = max(len(plan.decodes) + len(plan.forks) for plan in plans)
    tokens, chunks = max(plan.num_chunk_tokens for plan in plans), max(len(plan.chunks) for plan in plans)
    return next(
        b
        for b in buckets
        if b.num_decodes >= decodes and b.num_chunk_tokens >= tokens and b.num_chunks >= chunks and not b.num_drafts
    )


def rows_of(plan: Plan, bucket: Bucket) -> Iterator[tuple[int, Chunk]]:
    """(row of logits, chunk) for every row; in that of a draft's token, the token is the chunk."""
    for row, chunk in first_rows(plan, bucket):
        yield row, chunk
        for index in range(1, len(chunk.draft) + 1):
            yield row + index, Chunk(chunk.sequence, chunk.start + index, 1, True)


def first_rows(plan: Plan, bucket: Bucket) -> Iterator[tuple[int, Chunk]]:
    """(row of logits, chunk) for all that is planned; a fork's row says what its parent's does, of the fork. The rows
    of a draft follow its chunk's.
    """
    if bucket.num_drafts:
        row = 0
        for chunk in plan.decodes:
            yield row, chunk
            row += 1 + len(chunk.draft)
        return
    yield from enumerate(plan.decodes)
    yield from enumerate((c._replace(sequence=s) for s, c in plan.forks), len(plan.decodes))
    yield from enumerate(plan.chunks, bucket.num_decodes)


def tokens_of(plan: Plan, bucket: Bucket) -> Iterator[tuple[int, int, Chunk]]:
    """(row of logits, first token among the step's, chunk) for all that is computed."""
    if bucket.num_drafts:
        yield from ((row, row, chunk) for row, chunk in first_rows(plan, bucket))
        return
    at = bucket.num_decodes
    for row, chunk in enumerate(plan.decodes):
        yield row, row, chunk
    for row, chunk in enumerate(plan.chunks, bucket.num_decodes):
        yield row, at, chunk
        at += chunk.length


def pack(
    plan: Plan, bucket: Bucket, feedback: Mapping[TokenSequence, int], *, max_pages: int, page_size: int, num_pages: int
) -> StepInputs:
    """The plan as a step's inputs. `feedback` has the row of the step before for each sequence it sampled, unread."""
    tokens, decodes = bucket.num_tokens, bucket.num_decodes
    token_ids = _full(tokens, 0)
    source = _full(tokens, -1)
    positions = _full(tokens, 0)
    rope_lens = _full(tokens, 1)
    slots = _full(tokens, num_pages * page_size)  # past the pool: dropped
    page_table = _full((bucket.num_seqs, max_pages), 0)
    kv_lens = _full(bucket.num_seqs, 0)
    cu_q_lens = _full(bucket.num_chunks + 1, 0)
    logit_rows = _full(bucket.num_rows, 0)
    each_row = bucket.num_rows if bucket.num_drafts else decodes
    logit_rows[:each_row] = np.arange(each_row)

    # Where there are drafts, all that decode are chunks.
    alone, chunks = ([], plan.decodes) if bucket.num_drafts else (plan.decodes, plan.chunks)
    count = len(alone)
    if count:  # column by column: numpy is slow at single numbers
        known = [(c.sequence, c.start, c.start < len(c.sequence.token_ids)) for c in alone]
        token_ids[:count] = [s.token_ids[start] if is_known else 0 for s, start, is_known in known]
        source[:count] = [-1 if is_known else feedback[s] for s, _, is_known in known]
        positions[:count] = where = np.asarray([start for _, start, _ in known], np.int32)
        kv_lens[:count] = where + 1
        rope_lens[:count] = np.maximum([s.rope_len for s, _, _ in known], where + 1)
        np.concatenate([s.page_table for s, _, _ in known], out=page_table[:count].reshape(-1))
        slots[:count] = page_table[np.arange(count), where // page_size] * page_size + where % page_size

    at = decodes
    for index, (sequence, start, length, _, draft) in enumerate(chunks):
        row = decodes + index
        tokens_of_chunk = [*sequence.token_ids[start : start + length], *draft]
        if not tokens_of_chunk:
            source[at], tokens_of_chunk = feedback[sequence], [0]
        length = len(tokens_of_chunk)
        page_table[row] = sequence.page_table
        kv_lens[row] = start + length
        where = np.arange(start, start + length, dtype=np.int32)
        positions[at : at + length] = where
        rope_lens[at : at + length] = np.maximum(sequence.rope_len, where + 1)
        slots[at : at + length] = sequence.page_table[where // page_size] * page_size + where % page_size
        token_ids[at : at + length] = tokens_of_chunk
        at += length
        cu_q_lens[index + 1 :] = at - decodes
        if not bucket.num_drafts:
            logit_rows[row] = at - 1
    if plan.forks:
        wanted = {id(chunk): logit_rows[row] for row, chunk in enumerate(plan.decodes)}
        wanted |= {id(chunk): logit_rows[row] for row, chunk in enumerate(plan.chunks, decodes)}
        logit_rows[count : count + len(plan.forks)] = [wanted[id(fork.of)] for fork in plan.forks]
    return StepInputs(token_ids, source, positions, rope_lens, slots, page_table, kv_lens, cu_q_lens, logit_rows)


def pack_adapters(plan: Plan, bucket: Bucket) -> np.ndarray:
    """The slot of each token's adapter; -1: none."""
    slots: np.ndarray = _full(bucket.num_tokens, -1)
    for _, first, chunk in tokens_of(plan, bucket):
        if (adapter := chunk.sequence.adapter) is not None:
            slots[first : first + chunk.length + len(chunk.draft)] = adapter.slot
    return slots


def pack_copies(plan: Plan, num_pages: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Source and target pages in pieces of `COPIES_PER_CALL`, the last one padded with targets past the pool."""
    return _in_pieces(plan.copies, COPIES_PER_CALL, (0, num_pages))


def no_copies(num_pages: int) -> tuple[np.ndarray, np.ndarray]:
    """A piece that copies nothing."""
    return _full(COPIES_PER_CALL, 0), _full(COPIES_PER_CALL, num_pages)


def pack_moves_out(plan: Plan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pages and host slots in pieces of `MOVES_PER_CALL`, the last one padded with slots -1."""
    return _in_pieces(plan.moves_out, MOVES_PER_CALL, (0, -1))


def pack_moves_in(plan: Plan, num_pages: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pages and host slots in pieces of `MOVES_PER_CALL`, the last one padded with pages past the pool."""
    return _in_pieces(plan.moves_in, MOVES_PER_CALL, (num_pages, 0))


def pack_sampling(plan: Plan, bucket: Bucket, vocab_size: int) -> SamplingInputs:
    """How each row is sampled; rows without a sequence are greedy."""
    rows = bucket.num_rows
    temperature = _full(rows, 0, np.float32)
    top_k = _full(rows, vocab_size)
    top_p = _full(rows, 1, np.float32)
    min_p = _full(rows, 0, np.float32)
    seeds = _full((rows, 2), 0, np.uint32)
    positions = _full(rows, 0)
    drawn, where, follows = [], [], []  # what is not greedy, written at once: numpy is slow at single numbers
    for row, (sequence, start, length, samples, _) in rows_of(plan, bucket):
        if not samples:
            continue
        if sequence.draw is not None:
            drawn.append(sequence.draw)
            where.append(row)
            follows.append(start + length)
    if drawn:
        at, table = np.asarray(where), np.concatenate(drawn).reshape(len(drawn), -1)
        temperature[at], limits, top_p[at], min_p[at] = table[:, :4].T
        top_k[at] = np.where(limits > 0, np.minimum(limits, vocab_size), vocab_size)
        positions[at] = follows
        seeds[at] = table[:, 4:]
    return SamplingInputs(temperature, top_k, top_p, min_p, seeds, positions)


def pack_score_temperature(plan: Plan, bucket: Bucket) -> np.ndarray | None:
    """Over what each row's logits are divided for its logprobs: 1, but for beams; None where no row wants logprobs."""
    sampled = [(row, chunk.sequence) for row, chunk in rows_of(plan, bucket) if chunk.samples]
    wanted = [(row, sequence) for row, sequence in sampled if sequence.params.logprobs is not None]
    if not wanted:
        return None
    temperature: np.ndarray = _full(bucket.num_rows, 1, np.float32)
    for row, sequence in wanted:
        temperature[row] = sequence.score_temperature
    return temperature


def prompt_pieces(plan: Plan, bucket: Bucket) -> Iterator[PromptPiece]:
    """What is to be computed of prompt logprobs: the tokens that follow the plan's, where a request wants theirs."""
    for _, first, (sequence, start, length, *_) in tokens_of(plan, bucket):
        if sequence.params.prompt_logprobs is None:
            continue
        end = min(start + length, sequence.prompt_len - 1)
        for begin in range(start, end, PROMPT_ROWS):
            count = min(PROMPT_ROWS, end - begin)
            rows, targets = np.zeros((2, PROMPT_ROWS), np.int32)
            rows[:count] = first + np.arange(begin - start, begin - start + count)
            targets[:count] = sequence.token_ids[begin + 1 : begin + 1 + count]
            yield PromptPiece(sequence, begin + 1, count, rows, targets)


def pack_edits(edits: Mapping[int, RowEdits], num_rows: int) -> Iterator[Edits]:
    """All rows' edits in pieces of `EDITS_PER_CALL`, the last one padded with a row past the end."""
    if not edits:
        return
    row = np.concatenate([np.full(len(e.token_ids), row, np.int32) for row, e in edits.items()])
    tokens, factor, add = (np.concatenate(parts) for parts in zip(*edits.values(), strict=True))
    for begin in range(0, len(row), EDITS_PER_CALL):
        size = min(EDITS_PER_CALL, len(row) - begin)
        padded = no_edits(num_rows)
        for to, values in zip(padded, (row, tokens, factor, add), strict=True):
            to[:size] = values[begin : begin + size]
        yield padded


def no_edits(num_rows: int) -> Edits:
    """A piece that edits nothing."""
    return Edits(
        _full(EDITS_PER_CALL, num_rows),
        _full(EDITS_PER_CALL, 0),
        _full(EDITS_PER_CALL, 1, np.float32),
        _full(EDITS_PER_CALL, 0, np.float32),
    )


def pack_allowed(plan: Plan, bucket: Bucket, vocab_size: int) -> np.ndarray | None:
    """A bit per row and token: may it be sampled? None where every row may sample everything."""
    sampled = [(row, chunk.sequence) for row, chunk in rows_of(plan, bucket) if chunk.samples]
    limited = [(row, s) for row, s in sampled if s.matcher is not None or s.params.allowed_token_ids is not None]
    if not limited:
        return None
    words = -(-vocab_size // 32)
    bits = np.full((bucket.num_rows, words), 0xFFFFFFFF, np.uint32)
    for row, sequence in limited:
        if sequence.params.allowed_token_ids is not None:
            ids = np.asarray(sequence.params.allowed_token_ids, np.int64)
            bits[row] = 0
            np.bitwise_or.at(bits[row], ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
        if sequence.matcher is not None:
            bits[row] &= sequence.matcher.allowed[:words]
    return bits


def _in_pieces(
    pairs: Sequence[tuple[int, int]], size: int, padding: tuple[int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The firsts and the seconds of the pairs, `size` at a time."""
    for begin in range(0, len(pairs), size):
        piece = pairs[begin : begin + size]
        firsts, seconds = np.asarray([*piece, *[padding] * (size - len(piece))], np.int32).T
        yield np.ascontiguousarray(firsts), np.ascontiguousarray(seconds)


def _full(shape: int | tuple[int, ...], value: float, dtype: Any = np.int32) -> Any:
    """A numpy array; not typed as one, since the step takes it where its signature says jax.Array."""
    return np.full(shape, value, dtype)
