"""The functions of a model whose layers lie in pipeline stages: called as those of one, each stage's in turn.

What a stage gives is put where the next one expects it, device to device, and nobody waits: a stage computes while the
one before it has begun with other rows. Sampling is the last stage's; what it drew goes back to the first.

Where stages lie in several processes, each calls them all, in the same order: what has no device there does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxpaged.engine import batch
from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.compilation import Compiler, kept
from jaxpaged.engine.links import Links
from jaxpaged.engine.relay import Function, Relay
from jaxpaged.engine.step_functions import RELAYED, StepFunctions, as_shape
from jaxpaged.model.cache import KVCache, Pool
from jaxpaged.model.params import Params
from jaxpaged.model.sampling import MAX_LOGPROBS, Logprobs, Sampled
from jaxpaged.model.sharding import Placement
from jaxpaged.model.stages import make_stages, part_on

T = TypeVar("T")


class StagedFunctions:
    """Of all stages together, as `StepFunctions` are of one."""

    def __init__(
        self,
        make: Callable[..., StepFunctions],
        params: Params,
        cache: KVCache,
        *,
        placement: Placement,
        compiler: Compiler,
        relay: Relay | None,
        **how: Any,
    ) -> None:
        """`make(params, cache, stage=, placement=, ...)` gives each stage's; `how` are its other arguments."""
        self._params, self._cache = jax.tree.map(as_shape, (params, cache))
        self._placements = placement.stages
        self._stages = make_stages(len(cache.pools), len(self._placements))
        self.compiler = compiler
        self.made: dict[Hashable, Any] = {}
        self._links = Links(compiler)
        self._relay = relay
        self._of = [
            make(
                **{"params": self._own(stage.index, params), "cache": stage.cache(cache), "stage": stage},
                **{"placement": its, "compiler": compiler, "relay": relay if stage.is_last else None},
                **how,
            )
            for stage, its in zip(self._stages, self._placements, strict=True)
        ]
        self._last = last = self._of[-1]
        self.sample: Callable[[int], Callable[..., Sampled]] = last.sample
        self.logprobs: Callable[[int], Callable[..., Logprobs]] = last.logprobs
        self.edit, self.restrict, self.sum_hidden = last.edit, last.restrict, last.sum_hidden
        self.max_rows, self.num_shards = last.max_rows, last.num_shards

    def jobs(self) -> list[Callable[[], object]]:
        """A call for each stage, function and bucket that compiles it, unless it has been."""
        jobs = [job for of in self._of[:-1] for job in of.layer_jobs()] + self._last.jobs()
        return jobs + [partial(self._links.permutation, *moved) for moved in self._moved()]

    def named(self, number: int, sizes: Sequence[int]) -> Any:
        """The function that the relay calls by a number, as of one stage."""
        match RELAYED[number]:
            case "forward":
                return self.forward(Bucket(*sizes))
            case "prompt_logprobs":
                return self.prompt_logprobs(sizes[0])
            case "scrub":
                return self.scrub()
            case "copy":
                return self.copy_pages()
            case "at_hand":
                return self._brought(sizes[0])
            case _:
                return self._last.named(number, sizes)

    @kept
    def forward(self, bucket: Bucket) -> Callable[..., tuple[KVCache, Any]]:
        """forward(params, cache, inputs, fed), as of one stage."""
        calls, (*_, inputs, _) = self._calls([of.forward(bucket) for of in self._of])
        fed_to = self._placements[0].sharding("data")
        places = [fed_to, *(of.carried(bucket).sharding for of in self._of[1:])]

        def through(params: Params, cache: KVCache, inputs: Any, fed: Any) -> tuple[KVCache, Any]:
            pools: tuple[Pool, ...] = ()
            carried = fed
            for index, (stage, call, place) in enumerate(zip(self._stages, calls, places, strict=True)):
                carried = self._done(self._links.move(carried, place))
                own, carried = self._done(call(self._own(index, params), stage.cache(cache), inputs, carried))
                pools += own.pools
            return KVCache(pools), carried

        fed = jax.ShapeDtypeStruct((self.num_shards * self.max_rows,), np.int32, sharding=fed_to)
        return self._relayed("forward", bucket, through, (self._params, self._cache, inputs, fed))

    @kept
    def prompt_logprobs(self, tokens: int) -> Callable[..., Logprobs]:
        """prompt_logprobs(params, hidden, rows, targets), by the last stage's head."""
        (told,), (_, *shapes) = self._calls([self._last.prompt_logprobs(tokens)])

        def by_last(params: Params, *args: Any) -> Logprobs:
            found: Logprobs = told(self._own(len(self._of) - 1, params), *args)
            return found

        return self._relayed("prompt_logprobs", (tokens,), by_last, (self._params, *shapes))

    @kept
    def scrub(self) -> Callable[..., KVCache]:
        """scrub(cache, pages)."""
        return self._over_cache("scrub", [of.scrub() for of in self._of])

    @kept
    def copy_pages(self) -> Callable[..., KVCache]:
        """copy_pages(cache, sources, targets)."""
        return self._over_cache("copy", [of.copy_pages() for of in self._of])

    @kept
    def read_pages(self) -> Callable[..., tuple[Pool, ...]]:
        """read_pages(cache, page_ids): of all layers."""
        calls = [of.read_pages() for of in self._of]

        def read(cache: KVCache, page_ids: Any) -> tuple[Pool, ...]:
            own = zip(self._stages, calls, strict=True)
            return _joined(call(stage.cache(cache), page_ids) for stage, call in own)

        return read

    @kept
    def write_pages(self) -> Callable[..., KVCache]:
        """write_pages(cache, page_ids, pages), pages of all layers."""
        calls = [of.write_pages() for of in self._of]

        def write(cache: KVCache, page_ids: Any, pages: tuple[Pool, ...]) -> KVCache:
            own = zip(self._stages, calls, strict=True)
            return KVCache(_joined(call(s.cache(cache), page_ids, pages[s.begin : s.end]).pools for s, call in own))

        return write

    def at_hand(self, *trees: Any) -> Any:
        """What functions gave, where process 0 can read it: on the first stage's devices."""
        if self._relay is None:
            return trees
        leaves, structure = jax.tree.flatten(trees)
        there = [index for index, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
        brought = self._brought(len(there))(*(leaves[index] for index in there))
        for index, array in zip(there, brought, strict=True):
            leaves[index] = array
        return jax.tree.unflatten(structure, leaves)

    @kept
    def _brought(self, count: int) -> Callable[..., Any]:
        def moved(*arrays: jax.Array) -> tuple[Any, ...]:
            return tuple(self._done(self._links.move(array, self._home(array.sharding))) for array in arrays)

        known = jax.ShapeDtypeStruct((), np.int32)  # never sent: these arrays are on the devices
        return self._relayed("at_hand", (count,), moved, (known,) * count)

    def _done(self, result: T) -> T:
        return result if self._relay is None else self._relay.done(result)

    def _home(self, sharding: Any) -> NamedSharding:
        return NamedSharding(self._placements[0].mesh, sharding.spec)

    def _moved(self) -> Iterator[tuple[Any, NamedSharding]]:
        """Every array that a step may move between stages, and where to."""
        for bucket in self._last.buckets:
            for before, after in zip(self._of, self._of[1:], strict=False):
                yield before.carried(bucket), after.carried(bucket).sharding
        if self._relay is None:
            return
        place = self._placements[-1].sharding("data")
        rows = {bucket.num_rows for bucket in self._last.buckets}
        wide = min(MAX_LOGPROBS, self._last.spec.vocab_size)
        sampled: set[tuple[Any, ...]] = {(np.int32, self.max_rows), *((np.bool_, n) for n in rows)}
        told = [(n, *more) for n in (*rows, batch.PROMPT_ROWS) for more in ((), (wide,))]
        for dtype, n, *more in sampled | {(dtype, *shape) for dtype in (np.int32, np.float32) for shape in told}:
            shape = jax.ShapeDtypeStruct((self.num_shards * n, *more), dtype, sharding=place)
            yield shape, self._home(place)

    def _over_cache(self, name: str, functions: list[Any]) -> Callable[..., KVCache]:
        calls, (_, *shapes) = self._calls(functions)

        def changed(cache: KVCache, *pages: Any) -> KVCache:
            own = zip(self._stages, calls, strict=True)
            return KVCache(_joined(call(stage.cache(cache), *pages).pools for stage, call in own))

        return self._relayed(name, (0,), changed, (self._cache, *shapes))

    def _calls(self, functions: list[Any]) -> tuple[list[Callable[..., Any]], tuple[Any, ...]]:
        """What stages call here, and what the last one's is compiled for."""
        *others, last = functions
        if isinstance(last, Function):
            return [*others, last.compiled], last.shapes
        return functions, (None,) * 4  # nobody asks

    def _relayed(
        self, name: str, sizes: tuple[int, ...], function: Callable[..., T], shapes: tuple[Any, ...]
    ) -> Callable[..., T]:
        if self._relay is None:
            return function
        return Function(self._relay, RELAYED.index(name), sizes, function, shapes)

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


def _joined(parts: Iterable[tuple[Pool, ...]]) -> tuple[Pool, ...]:
    """The pools of all layers, of each stage's."""
    return tuple(pool for part in parts for pool in part)
