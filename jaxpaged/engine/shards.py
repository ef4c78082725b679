"""The data shards: a scheduler with its page pool for each, which of them serves a new request, their counts' sums.

A sequence stays on the shard where it was placed, its forks with it: its pages lie there. Who comes first is told
within a shard. Without a data axis there is one shard, and nothing here costs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from jaxpaged.config import EngineConfig
from jaxpaged.engine.adapters import Adapter, Adapters
from jaxpaged.engine.drafts import Drafter, max_drafted_tokens
from jaxpaged.engine.host_tier import HostTier
from jaxpaged.engine.page_map import PageInfo, page_map
from jaxpaged.engine.page_pool import PagePool
from jaxpaged.engine.request import Sequence
from jaxpaged.engine.runner import Runner
from jaxpaged.engine.scheduler import Plan, Scheduler
from jaxpaged.model.spec import Attention, Decoder


@dataclass(frozen=True)
class Shard:
    """One of them, in the order in which its rows and pages stand in a step's arrays."""

    index: int
    scheduler: Scheduler

    @property
    def pool(self) -> PagePool:
        """Its own pages."""
        return self.scheduler.pool


class Shards:
    """All of them."""

    def __init__(self, schedulers: Seq[Scheduler]) -> None:
        """Each scheduler with a pool of its own; the pools are of one size."""
        self._shards = [Shard(index, scheduler) for index, scheduler in enumerate(schedulers)]
        self._loads: list[int] | None = None  # as `place` sees them, until the next step

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def add(self, sequence: Sequence) -> Shard:
        """Queue a sequence, its forks with it, where the fewest tokens are to be held and computed; that shard.

        Those are the tokens of all that run and wait there, pages held by several counted once, and what the prefix
        cache does not know of this one. So a conversation comes back to its pages unless others crowd that shard by
        more than they save, and a beginning that all requests share is soon on all shards.
        """
        shard = self._shards[0] if len(self) == 1 else self._best(sequence)
        shard.scheduler.add(sequence)
        return shard

    def schedule(self) -> list[Plan]:
        """Every shard's part of the next step."""
        self._loads = None
        return [shard.scheduler.schedule() for shard in self]

    def preempt_all(self, adapter: Adapter | None = None) -> None:
        """Take all pages back: every running sequence is computed anew; or every one with this adapter."""
        for shard in self:
            shard.scheduler.preempt_all(adapter)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running sequences are not touched."""
        for shard in self:
            shard.pool.reset_prefix_cache()

    @property
    def await_tokens(self) -> bool:
        """True where a draft could be made in the next step if all tokens were known."""
        return any(shard.scheduler.awaits_tokens for shard in self)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, preempted ones included."""
        return self.sum(lambda shard: len(shard.scheduler.waiting))

    @property
    def num_running(self) -> int:
        """Sequences that run."""
        return self.sum(lambda shard: len(shard.scheduler.running))

    @property
    def max_num_seqs(self) -> int:
        """Sequences that can run at once."""
        return self.sum(lambda shard: shard.scheduler.max_num_seqs)

    @property
    def num_leaked(self) -> int:
        """Pages held though nothing runs. Looked for where a shard is idle: then what is not free must be cached."""
        return self.sum(lambda shard: 0 if shard.scheduler.running else shard.pool.num_held)

    def sum(self, count: Callable[[Shard], int]) -> int:
        """A count of all shards together."""
        return sum(map(count, self._shards))

    def slots(self) -> tuple[int, int]:
        """Slots in held pages, and those of them with no token yet: at most the rest of each sequence's last page."""
        held = wasted = 0
        for shard in self:
            size, running = shard.pool.page_size, shard.scheduler.running
            last = {s.pages[-1]: len(s.pages) * size - s.num_computed_tokens for s in running if s.pages}
            held += shard.pool.num_held * size
            wasted += sum(last.values())
        return held, wasted

    def page_map(self) -> list[PageInfo]:
        """Who holds which page now; each page under its index in the pools' arrays, where shards stand end to end."""
        pages = []
        for shard in self:
            first = shard.index * shard.pool.num_pages
            own = page_map(shard.pool, shard.scheduler.running)
            pages += [info._replace(page=first + info.page) for info in own] if first else own
        return pages

    def _best(self, sequence: Sequence) -> Shard:
        if self._loads is None:
            self._loads = [_load(shard) for shard in self]
        loads = self._loads
        found = [_found(shard.pool, sequence) for shard in self]
        shard = min(self, key=lambda shard: (loads[shard.index] - found[shard.index], -found[shard.index]))
        loads[shard.index] += sequence.num_tokens
        return shard


def make_shards(
    spec: Decoder, config: EngineConfig, runner: Runner, host: HostTier | None, adapters: Adapters | None = None
) -> Shards:
    """As many shards as the runner computes, each with a pool of its own; `host` keeps what they give away, and they
    have the `adapters` in common.
    """

    speculative = config.speculation
    max_tokens = max_drafted_tokens(config, runner.max_num_batched_tokens)

    def scheduler() -> Scheduler:
        pool = PagePool(runner.num_pages, config.page_size, enable_caching=config.enable_prefix_caching, host=host)
        return Scheduler(
            pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=runner.max_num_batched_tokens,
            max_num_chunks=runner.max_num_chunks,
            max_pages=runner.max_pages,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            max_num_partial_prefills=config.max_num_partial_prefills,
            window=_widest_window(spec),
            drafter=None if speculative is None else Drafter(speculative, spec.vocab_size, max_tokens),
            adapters=adapters,
        )

    return Shards([scheduler() for _ in range(runner.num_shards)])


def _widest_window(spec: Decoder) -> int | None:
    """The most keys that any layer's query sees; None where a layer sees all."""
    windows = [block.mixer.window if isinstance(block.mixer, Attention) else None for block in spec.blocks]
    return None if None in windows else max(w for w in windows if w is not None)


def _load(shard: Shard) -> int:
    """Tokens held by those that run, and those of all that wait."""
    return shard.pool.num_held * shard.pool.page_size + sum(s.num_tokens for s in shard.scheduler.waiting)


def _found(pool: PagePool, sequence: Sequence) -> int:
    """Tokens of the sequence that the pool's prefix cache knows."""
    if sequence.is_computed_whole:
        return 0
    pages, _ = pool.find(sequence.token_ids, sequence.prefix_salt)
    return len(pages) * pool.page_size
