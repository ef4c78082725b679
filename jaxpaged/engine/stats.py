"""What an engine says of itself, at one moment."""

from __future__ import annotations

from typing import NamedTuple


class EngineStats(NamedTuple):
    """A snapshot. Page counts leave out the null page; token counts run from the engine's start."""

    num_waiting: int
    num_running: int
    pages_total: int
    pages_free: int
    pages_cached: int  # hold a prefix that nobody uses now
    pages_held: int
    pages_leaked: int  # held by no sequence that runs: 0, or the engine is at fault
    page_size: int
    page_bytes: int
    kv_waste: float  # share of the held slots that held no token, over all steps so far
    num_preemptions: int
    prefix_cache_queries: int  # tokens looked up
    prefix_cache_hits: int  # tokens found
    host_pages_total: int
    host_pages_held: int  # hold a page that the pool gave away
    host_pages_moved_out: int  # from the pool to the host
    host_pages_moved_in: int
    host_cache_hits: int  # tokens found that were on the host
    num_drafts: int  # checked by steps
    num_drafted_tokens: int
    num_accepted_tokens: int  # those of them that came true
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    num_compilations: int
    max_model_len: int
