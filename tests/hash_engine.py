"""An engine of page tables around a model that is a hash of what it reads: whatever is mixed up, other tokens come out.

The model has two layers. Layer 0 keeps a key per token; layer 1 keeps, per position, a hash of the keys that it sees;
the next token is a hash of what it sees in layer 1, of the sequence's seed and of the position. `next_token` says so
without pages, steps or batches. `Device` does it from packed arrays alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

from jaxpaged.config import EngineConfig
from jaxpaged.engine import batch
from jaxpaged.engine.drafts import Drafter, max_drafted_tokens
from jaxpaged.engine.groups import Groups
from jaxpaged.engine.host_tier import HostTier
from jaxpaged.engine.page_pool import NULL_PAGE, PagePool
from jaxpaged.engine.request import Sequence, needs_history, seed_words
from jaxpaged.engine.scheduler import LONG_ROPE, Chunk, Plan, Scheduler
from jaxpaged.model.sampling import SamplingInputs
from jaxpaged.model.step import StepInputs
from jaxpaged.outputs import FinishReason
from jaxpaged.sampling_params import SamplingParams

VOCAB = 3  # few tokens, so that equal pages are common
FAR = 10**6


def key(token: int, position: int, is_long: bool, version: int) -> int:
    """All keys of a sequence are others once it is long, as with longrope, and with other weights."""
    return hash((token, position, is_long, version))


def attend(values: list[int], position: int, window: int) -> int:
    return hash(tuple(values[max(0, position + 1 - window) : position + 1]))


def choose(hidden: int, seed: tuple[int, int], position: int) -> int:
    return hash((hidden, seed, position)) % VOCAB


@lru_cache(100_000)
def next_token(token_ids: tuple[int, ...], seed: tuple[int, int], version: int, long_after: int, window: int) -> int:
    """What the model says after these tokens."""
    is_long = len(token_ids) > long_after
    keys = [key(token, position, is_long, version) for position, token in enumerate(token_ids)]
    deep = [attend(keys, position, window) for position in range(len(keys))]
    return choose(attend(deep, len(deep) - 1, window), seed, len(token_ids))


class Device:
    """Runs the model on packed arrays. In a layer all writes come before all reads, as on a real device."""

    def __init__(self, num_pages: int, page_size: int, long_after: int, window: int, host_pages: int) -> None:
        self.page_size = page_size
        self.long_after = long_after
        self.window = window
        self.version = 0  # of the weights
        noise = np.random.default_rng(0)
        self.pools = noise.integers(-(2**60), 2**60, (2, num_pages * page_size))
        self.host = noise.integers(-(2**60), 2**60, (2, host_pages, page_size))

    @property
    def pages(self) -> np.ndarray:
        return self.pools.reshape(2, -1, self.page_size)

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        real = targets < self.pages.shape[1]
        self.pages[:, targets[real]] = self.pages[:, sources[real]]

    def move_out(self, pages: np.ndarray, slots: np.ndarray) -> None:
        real = slots >= 0
        assert np.unique(slots[real]).size == real.sum(), "two pages moved out to one slot"
        self.host[:, slots[real]] = self.pages[:, pages[real]]

    def move_in(self, pages: np.ndarray, slots: np.ndarray) -> None:
        real = pages < self.pages.shape[1]
        assert np.unique(pages[real]).size == real.sum(), "two slots moved in to one page"
        self.pages[:, pages[real]] = self.host[:, slots[real]]

    def step(self, inputs: StepInputs, sampling: SamplingInputs, sampled: np.ndarray) -> np.ndarray:
        tokens = np.where(inputs.feedback >= 0, sampled[inputs.feedback], inputs.token_ids)
        written = inputs.slots < self.pools.shape[1]
        assert np.unique(inputs.slots[written]).size == written.sum(), "two tokens in one slot"
        assert (inputs.slots[written] >= self.page_size).all(), "written to the null page"
        is_long = inputs.rope_lens > self.long_after
        for at in np.flatnonzero(written):
            token, position = int(tokens[at]), int(inputs.positions[at])
            self.pools[0, inputs.slots[at]] = key(token, position, bool(is_long[at]), self.version)
        for row, queries in self.queries(inputs):
            keys = self.read(0, inputs, row)
            for at in queries:
                self.pools[1, inputs.slots[at]] = attend(keys, int(inputs.positions[at]), self.window)
        hidden = dict.fromkeys(range(len(tokens)), 0)
        wanted = set(inputs.logit_rows.tolist())
        for row, queries in self.queries(inputs):
            deep = self.read(1, inputs, row)
            hidden |= {at: attend(deep, int(inputs.positions[at]), self.window) for at in wanted.intersection(queries)}
        rows = zip(inputs.logit_rows.tolist(), sampling.seeds.tolist(), sampling.positions.tolist(), strict=True)
        return np.asarray([choose(hidden[token], tuple(seed), position) for token, seed, position in rows])

    def read(self, layer: int, inputs: StepInputs, row: int) -> list[int]:
        slots = inputs.page_table[row][:, None] * self.page_size + np.arange(self.page_size)
        return self.pools[layer, slots.reshape(-1)[: inputs.kv_lens[row]]].tolist()

    def queries(self, inputs: StepInputs) -> list[tuple[int, range]]:
        """The tokens of each row that is not padding."""
        decodes = len(inputs.kv_lens) - len(inputs.cu_q_lens) + 1
        spans = [range(n, n + 1) for n in range(decodes)]
        spans += [range(decodes + a, decodes + b) for a, b in pairwise(inputs.cu_q_lens.tolist())]
        return [(row, span) for row, span in enumerate(spans) if inputs.kv_lens[row] > 0]


class InFlight(NamedTuple):
    rows: list[tuple[int, Chunk]]
    tokens: np.ndarray
    version: int


class HashEngine:
    """What `jaxpaged.engine.engine` does with a scheduler: dispatch a step, then read the one before it."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 64,
        max_chunks: int | None = None,
        caching: bool = True,
        long_after: int = FAR,
        window: int | None = None,
        host_pages: int = 0,
        min_host_pages: int = 1,
        groups: int = 1,
        drafts: str | None = None,
        reads_first: bool = True,
        **limits: int | None,
    ) -> None:
        self.max_model_len = (num_pages - 1) * page_size
        self.host = HostTier(host_pages, min_host_pages)
        self.pool = PagePool(num_pages, page_size, enable_caching=caching, host=self.host if host_pages else None)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_num_chunks=max_chunks or batch.max_chunks(max_num_seqs),
            max_pages=num_pages - 1,
            window=window,
            drafter=self._drafter(drafts, max_num_seqs, budget),
            **limits,
        )
        self.reads_first = reads_first  # as the engine does where there may be drafts; else who had one sits out
        most = self.scheduler.drafter.max_tokens if self.scheduler.drafter else 0
        self.buckets = batch.make_buckets(max_num_seqs, budget, max_drafted_tokens=most)
        self.device = Device(num_pages, page_size, long_after, window or FAR, host_pages)
        self.sequences: list[Sequence] = []
        self.groups = Groups(groups, page_size)
        self.in_flight: list[InFlight | None] = [None] * groups
        self.choices: dict[Sequence, int] = {}  # of sequences whose tokens the host chooses
        self.stale: set[Sequence] = set()  # hold keys of old weights: what they say next is nobody's business
        self.num_operations = 0
        self._numbers = count()

    def _drafter(self, kind: str | None, max_num_seqs: int, budget: int) -> Drafter | None:
        """`ngram`, or an `oracle` that knows what comes but for the third token."""
        if kind is None:
            return None
        method = self._foretell if kind == "oracle" else "ngram"
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            speculative_config={"method": method, "num_speculative_tokens": 5, "prompt_lookup_min": 1},
        )
        return Drafter(config.speculative_config, VOCAB, max_drafted_tokens(config, budget))

    def _foretell(self, token_ids: tuple[int, ...], count: int) -> list[int]:
        known = list(token_ids)
        sequence = next(s for s in self.unfinished if s.token_ids == known)
        device = self.device
        for _ in range(count):
            known.append(next_token(tuple(known), sequence.seed, device.version, device.long_after, device.window))
        guesses = known[len(token_ids) :]
        return guesses[:2] + [(token + 1) % VOCAB for token in guesses[2:3]] + guesses[3:]

    # What callers do

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: bytes = b"",
        chosen_on_host: bool = False,
        **params: object,
    ) -> Sequence:
        self.num_operations += 1
        is_long = len(prompt) > self.device.long_after
        first = Sequence(
            request_id=str(next(self._numbers)),
            index=0,
            params=SamplingParams(**params),
            prompt_len=len(prompt),
            token_ids=list(prompt),
            max_tokens=min(max_tokens, self.max_model_len - len(prompt)),
            seed=self._seed(),
            salt=LONG_ROPE if is_long else b"",
            long_after=None if is_long else self.device.long_after,
            cache_salt=cache_salt,
            priority=priority,
            chosen_on_host=chosen_on_host,
        )
        first.forks = [first.fork(index, self._seed()) for index in range(1, n)]
        self.sequences += [first, *first.forks]
        self.scheduler.add(first)
        return first

    def fork(self, parent: Sequence, last_token: int | None = None) -> Sequence:
        """Another sequence that goes on from what is known of this one, its last token perhaps another."""
        self.num_operations += 1
        child = parent.fork(next(self._numbers), self._seed())
        if last_token is not None:
            child.token_ids[-1] = last_token
        self.sequences.append(child)
        self.stale |= {child} if parent in self.stale else set()
        self.scheduler.fork(parent, child)
        return child

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.num_operations += 1
        self.scheduler.finish(sequence, reason)
        self._advance(sequence.request_id)

    def update_weights(self, recompute: bool) -> None:
        self.num_operations += 1
        self.device.version += 1
        self.pool.reset_prefix_cache()
        if recompute:
            self.scheduler.preempt_all()
        else:
            self.stale |= set(self.scheduler.running)

    @property
    def unfinished(self) -> list[Sequence]:
        return [s for s in self.sequences if not s.finished]

    def step(self) -> Plan:
        self.num_operations += 1
        if self.reads_first and self.scheduler.awaits_tokens:
            self._read_all(self.in_flight)
            self.in_flight = [None] * len(self.in_flight)
        running = [(s, s.num_computed_tokens, s.num_preemptions) for s in self.scheduler.running]
        plan = self.scheduler.schedule()
        # One preempted and admitted again just now has nothing from before; it may match what this step writes.
        before = {s: computed for s, computed, preemptions in running if s.num_preemptions == preemptions}
        self.check(plan, before)
        self.stale |= {fork.sequence for fork in plan.forks if fork.of.sequence in self.stale}
        waited_for = self.in_flight
        assert any(waited_for) or not plan.is_empty or not self.unfinished, "nothing to compute or wait for, no end"
        parts = self.groups.split(plan)
        self.check_parts(plan, parts)
        self.in_flight = [
            None if part.is_empty else self._dispatch(part, before)
            for part, before in zip(parts, waited_for, strict=True)
        ]
        self._read_all(waited_for)
        return plan

    def _read_all(self, steps: list[InFlight | None]) -> None:
        for step in steps:
            if step is not None:
                self._read(step)

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Step until then, or until all have finished. The first moves on in one step of two: there is a bound."""
        done = until or (lambda: not self.unfinished and not any(self.in_flight))
        most = 2 + 2 * sum(2 * (s.prompt_len + s.max_tokens) + 4 for s in self.unfinished)
        for _ in range(most):
            if done():
                return
            self.step()
        assert done(), f"not there after {most} steps"

    def _seed(self) -> tuple[int, int]:
        return seed_words(next(self._numbers), 0)

    # A step

    def _dispatch(self, plan: Plan, before: InFlight | None) -> InFlight:
        bucket = batch.choose([plan], self.buckets)
        feedback = {chunk.sequence: row for row, chunk in before.rows if chunk.samples} if before else {}
        size, pages = self.pool.page_size, self.pool.num_pages
        for moved in batch.pack_moves_out(plan):
            self.device.move_out(*moved)
        for moved in batch.pack_moves_in(plan, pages):
            self.device.move_in(*moved)
        for copied in batch.pack_copies(plan, pages):
            self.device.copy(*copied)
        inputs = batch.pack(plan, bucket, feedback, max_pages=pages - 1, page_size=size, num_pages=pages)
        sampling = batch.pack_sampling(plan, bucket, VOCAB)
        tokens = self.device.step(inputs, sampling, before.tokens if before else np.zeros(1, np.int64))
        return InFlight(list(batch.first_rows(plan, bucket)), tokens, self.device.version)

    def _read(self, step: InFlight) -> None:
        for row, chunk in step.rows:
            sequence = chunk.sequence
            sequence.num_pending_tokens -= chunk.samples
            if not chunk.samples or sequence.finished:
                continue
            tokens = step.tokens[row:].tolist()
            confirmed = self.scheduler.confirm(chunk, tokens) if chunk.draft else 0
            for token in tokens[: 1 + confirmed]:
                if not sequence.finished:
                    self._read_token(step, sequence, token)

    def _read_token(self, step: InFlight, sequence: Sequence, token: int) -> None:
        if sequence not in self.stale:
            device, known = self.device, tuple(sequence.token_ids)
            assert token == next_token(known, sequence.seed, step.version, device.long_after, device.window)
        if sequence.chosen_on_host:
            self.choices[sequence] = token
            sequence.awaits_choice = True
            self._advance(sequence.request_id)
        else:
            self._take(sequence, token)

    def _advance(self, request_id: str) -> None:
        """Take the chosen tokens of a request once there is one for each of its sequences."""
        group = [s for s in self.unfinished if s.chosen_on_host and s.request_id == request_id]
        if all(s in self.choices for s in group):
            for sequence in group:
                sequence.awaits_choice = False
                self._take(sequence, self.choices.pop(sequence))

    def _take(self, sequence: Sequence, token: int) -> None:
        sequence.token_ids.append(token)
        if token in sequence.params.stop_token_ids:
            self.scheduler.finish(sequence, "stop", token)
        elif sequence.num_output_tokens == sequence.max_tokens:
            self.scheduler.finish(sequence, "length")

    # What holds of every plan, and of everybody's pages right after it was made

    def check(self, plan: Plan, before: dict[Sequence, int]) -> None:
        scheduler = self.scheduler
        planned = [*plan.decodes, *plan.chunks]
        assert sum(c.length for c in planned) + plan.num_drafted <= scheduler.max_num_batched_tokens
        assert len(plan.chunks) <= scheduler.max_num_chunks
        assert len(planned) + len(plan.forks) <= scheduler.max_num_seqs
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert {c.length for c in plan.decodes} <= {1}
        assert all(1 < c.length <= scheduler.max_chunk_len for c in plan.chunks)
        sequences = [c.sequence for c in planned] + [f.sequence for f in plan.forks]
        assert len(set(sequences)) == len(sequences)
        for sequence, start, length, samples, _ in planned:
            assert sequence in scheduler.running
            assert start + length == sequence.num_computed_tokens
            assert samples == (sequence.num_computed_tokens == sequence.num_tokens - samples)
            assert sequence.num_tokens - sequence.prompt_len <= sequence.max_tokens
            assert not sequence.awaits_choice
            if needs_history(sequence.params) or sequence.chosen_on_host:
                assert sequence.num_pending_tokens == samples
        for fork in plan.forks:
            assert fork.of in planned
            assert fork.of.samples
        self.check_pages()
        self.check_writes(planned, before)

    def check_parts(self, plan: Plan, parts: list[Plan]) -> None:
        for name in plan._fields:
            together = [one for part in parts for one in getattr(part, name)]
            assert sorted(map(id, together)) == sorted(map(id, getattr(plan, name)))
        assert plan.is_empty or not any(p.copies or p.moves_in or p.moves_out for p in parts if p.is_empty)

    def check_pages(self) -> None:
        size, running = self.pool.page_size, self.scheduler.running
        held = Counter(page for s in running for page in s.pages if page != NULL_PAGE)
        assert [self.pool.references(p) for p in range(self.pool.num_pages)] == [
            held[p] for p in range(self.pool.num_pages)
        ]
        assert self.pool.num_held == len(held)
        salts = {(page, s.prefix_salt) for s in running for page in s.pages if page != NULL_PAGE}
        assert len(salts) == len(held), "a page shared in spite of a salt"
        for sequence in running:
            pages = sequence.pages
            assert len(pages) == -(-(sequence.num_computed_tokens + sequence.num_drafted) // size)
            np.testing.assert_array_equal(sequence.page_table, pages + [0] * (self.pool.num_pages - 1 - len(pages)))
            real = [page for page in pages if page != NULL_PAGE]
            assert len(set(real)) == len(real)
            assert min(pages, default=0) >= 0, "a page that is still to come from the host"
        slots = [kept.slot for kept in self.host._kept.values()]
        assert sorted(slots + self.host._empty) == list(range(self.host.num_slots))
        assert [s.order for s in running] == sorted(s.order for s in running)
        for sequence in self.sequences:
            if sequence not in running:
                assert sequence.pages == []
                assert sequence.num_computed_tokens == 0

    def check_writes(self, planned: list[Chunk], before: dict[Sequence, int]) -> None:
        """Nobody writes where another sequence that runs has its tokens from before this step."""
        size, owners = self.pool.page_size, {}
        starts = {c.sequence: c.start for c in planned}
        for sequence in self.scheduler.running:
            kept = min(before.get(sequence, 0), starts.get(sequence, sequence.num_computed_tokens))
            owners |= {(sequence.pages[p // size], p % size): sequence for p in range(kept)}
        for sequence, start, length, _, draft in planned:
            length += len(draft)
            slots = {(sequence.pages[p // size], p % size) for p in range(start, start + length)}
            assert not slots & owners.keys(), "written over"
            assert all(page != NULL_PAGE for page, _ in slots)
