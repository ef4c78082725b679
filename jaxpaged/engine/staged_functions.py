"""The functions of a model whose layers lie in pipeline stages: called as those of one, each stage's in turn.

What a stage gives is put where the next one expects it, device to device, and nobody waits: a stage computes while the
one before it has begun with other rows. Sampling is the last stage's; what it drew goes back to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.step_functions import StepFunctions
from jaxpaged.model.cache import KVCache, Pool
from jaxpaged.model.params import Params
from jaxpaged.model.sampling import Logprobs, Sampled
from jaxpaged.model.stages import make_stages, part_on


class StagedFunctions:
    """Of all stages together, as `StepFunctions` are of one."""

    def __init__(self, make: Callable[..., StepFunctions], params: Params, cache: KVCache, **how: Any) -> None:
        """`make(params, cache, stage=, placement=, ...)` gives each stage's; `how` are its other arguments."""
        placement = how.pop("placement")
        self._placements = placement.stages
        self._stages = make_stages(len(cache.pools), len(self._placements))
        self._of = [
            make(params=self._own(index, params), cache=stage.cache(cache), stage=stage, placement=its, **how)
            for index, (stage, its) in enumerate(zip(self._stages, self._placements, strict=True))
        ]
        last = self._of[-1]
        self.max_rows = last.max_rows
        self.sample: Callable[[int], Callable[..., Sampled]] = last.sample
        self.logprobs: Callable[[int], Callable[..., Logprobs]] = last.logprobs
        self.edit, self.restrict, self.sum_hidden = last.edit, last.restrict, last.sum_hidden

    def jobs(self) -> list[Callable[[], object]]:
        """A call for each stage, function and bucket that compiles it, unless it has been."""
        every = [job for of in self._of[:-1] for job in of.layer_jobs()]
        return every + self._of[-1].jobs()

    def forward(self, bucket: Bucket) -> Callable[..., tuple[KVCache, Any]]:
        """forward(params, cache, inputs, fed), as of one stage."""
        calls = [of.forward(bucket) for of in self._of]
        places = [self._placements[0].sharding("data"), *(of.carried(bucket).sharding for of in self._of[1:])]

        def through(params: Params, cache: KVCache, inputs: Any, fed: Any) -> tuple[KVCache, Any]:
            pools: tuple[Pool, ...] = ()
            carried = fed
            for index, (stage, call, place) in enumerate(zip(self._stages, calls, places, strict=True)):
                carried = jax.device_put(carried, place)
                own, carried = call(self._own(index, params), stage.cache(cache), inputs, carried)
                pools += own.pools
            return KVCache(pools), carried

        return through

    def prompt_logprobs(self, tokens: int) -> Callable[..., Logprobs]:
        """prompt_logprobs(params, hidden, rows, targets), by the last stage's head."""
        last, told = len(self._of) - 1, self._of[-1].prompt_logprobs(tokens)
        return lambda params, *args: told(self._own(last, params), *args)

    def scrub(self) -> Callable[..., KVCache]:
        """scrub(cache, pages)."""
        return self._over_cache([of.scrub() for of in self._of])

    def copy_pages(self) -> Callable[..., KVCache]:
        """copy_pages(cache, sources, targets)."""
        return self._over_cache([of.copy_pages() for of in self._of])

    def read_pages(self) -> Callable[..., tuple[Pool, ...]]:
        """read_pages(cache, page_ids): of all layers."""
        calls = [of.read_pages() for of in self._of]

        def read(cache: KVCache, page_ids: Any) -> tuple[Pool, ...]:
            parts = [call(stage.cache(cache), page_ids) for stage, call in zip(self._stages, calls, strict=True)]
            return tuple(pool for part in parts for pool in part)

        return read

    def write_pages(self) -> Callable[..., KVCache]:
        """write_pages(cache, page_ids, pages), pages of all layers."""
        calls = [of.write_pages() for of in self._of]

        def write(cache: KVCache, page_ids: Any, pages: tuple[Pool, ...]) -> KVCache:
            own = zip(self._stages, calls, strict=True)
            parts = [call(s.cache(cache), page_ids, pages[s.begin : s.end]) for s, call in own]
            return KVCache(tuple(pool for part in parts for pool in part.pools))

        return write

    def _over_cache(self, calls: list[Callable[..., KVCache]]) -> Callable[..., KVCache]:
        def changed(cache: KVCache, *pages: Any) -> KVCache:
            parts = [call(stage.cache(cache), *pages) for stage, call in zip(self._stages, calls, strict=True)]
            return KVCache(tuple(pool for part in parts for pool in part.pools))

        return changed

    def _own(self, index: int, params: Params) -> Params:
        """A stage's weights. Of a table that several stages hold it is given its own copy."""
        own = dict(self._stages[index].params(params))
        if "embed" in own and "head" not in params:
            own["embed"] = {"w": self._view(index, params["embed"]["w"])}
        return own

    def _view(self, index: int, table: Any) -> Any:
        sharding = self._placements[index].sharding("vocab", "embed")
        if isinstance(table, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=sharding)
        return part_on(table, sharding)
