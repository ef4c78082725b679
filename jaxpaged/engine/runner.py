"""The one place where the host meets the device: owns params and cache, and dispatches and reads steps.

Every function is compiled ahead of time (`step_functions.py`), so that a call cannot compile. A step is dispatched
without waiting for the one before: the tokens that one sampled stay on the device and are this one's input. `read`
waits.

Where a placement cuts data, each shard's plan is packed for itself, and the arrays of all lie end to end: row r of
shard s is row s * rows + r.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxpaged.config import EngineConfig
from jaxpaged.engine import batch
from jaxpaged.engine.adapters import Adapter
from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.compilation import Build, Compiler, traced, use_compilation_cache
from jaxpaged.engine.drafts import max_drafted_tokens
from jaxpaged.engine.embedding import Embedded, pack_embedded
from jaxpaged.engine.host_pages import HostPages, pages_worth_moving
from jaxpaged.engine.logit_edits import RowEdits, row_edits
from jaxpaged.engine.memory_budget import affordable_pages, fitting_model_len, host_pages
from jaxpaged.engine.mesh_limits import check_mesh
from jaxpaged.engine.pool_fit import PoolFit
from jaxpaged.engine.processors import Processors
from jaxpaged.engine.relay import AGREES, FOLLOWS, RELEASE, SLEEP, WAKE, Relay, Words, least, make_relay
from jaxpaged.engine.request import Sequence as TokenSequence
from jaxpaged.engine.scheduler import Chunk, Plan
from jaxpaged.engine.stacking import stack, stack_found, stack_pieces
from jaxpaged.engine.staged_functions import StagedFunctions
from jaxpaged.engine.step_functions import StepFunctions, as_shape
from jaxpaged.engine.weights import Layout, check_alive, check_readable, on_device, shape_of
from jaxpaged.errors import ConfigError
from jaxpaged.kernels.tiles import current_device
from jaxpaged.model.cache import (
    KVCache,
    auto_dtype,
    cache_shapes,
    page_bytes,
    pool_dtype,
)
from jaxpaged.model.head_layout import fitted_axes
from jaxpaged.model.lora import Factors, stack_shapes
from jaxpaged.model.params import Params, ParamSpec, check_params, flatten, in_floats, is_quantized, quantize_params
from jaxpaged.model.sampling import Logprobs
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Decoder

log = logging.getLogger("jaxpaged")

_axes_of = cache(fitted_axes)  # a linear's take a millisecond, and an adapter may have hundreds
_NOTHING: Any = np.empty(0)
_NO_LOGPROBS = Logprobs(_NOTHING, _NOTHING, _NOTHING, _NOTHING)
# On a GPU XLA makes products of one row in more pieces: 20 kernels a layer instead of 14. On a CPU it turns weights of
# bfloat16 into float32 for one: ten times the time.
_FEWEST_DECODES = 4


class PromptPart(NamedTuple):
    """Logprobs, from `first_row` on, of prompt tokens of one chunk: those at positions start .. start + num_rows."""

    sequence: TokenSequence
    start: int
    num_rows: int
    first_row: int
    logprobs: Logprobs


class StepOutputs(NamedTuple):
    """What a step says of its rows; no logprobs where no row wants them."""

    tokens: Any
    healthy: Any
    logprobs: Logprobs


class InFlight(NamedTuple):
    """A dispatched step: what was planned, and its results, perhaps still being computed."""

    num_rows: int  # of each data shard
    rows: list[tuple[int, Chunk]]  # counted over all shards; those of a draft follow its chunk's
    outputs: StepOutputs
    prompt_parts: list[PromptPart]
    embedded: Embedded
    param_version: int


class Runner:
    """Compiles, dispatches and reads steps."""

    def __init__(
        self,
        spec: Decoder,
        params: Params,
        config: EngineConfig,
        placement: Placement | None = None,
        build: Build = traced,
    ) -> None:
        """Take the weights and make the pool; sleep where `params` are shapes only. ConfigError where either does not
        fit. With a placement both lie on its mesh; the weights are then those of `placement.fit(spec)`. `build` says
        where compiled functions come from.
        """
        if placement is not None:
            check_mesh(placement, config)
        self.num_shards = 1 if placement is None else placement.num_shards("data")
        self.placement = placement
        self._asked = spec  # before heads are made to fit the mesh
        self._max_loras = config.max_loras
        self.spec = spec if placement is None else placement.fit(spec)
        if (problems := check_params(spec, params)) and (self.spec == spec or check_params(self.spec, params)):
            raise ConfigError("params do not fit the spec: " + "; ".join(problems))
        check_readable(spec)
        self.params = on_device(params) if placement is None else placement.place(params, spec)
        self._layout = Layout(self.params)
        spec = self.spec
        self.param_version = 0
        self.adapters = self._no_adapters(config) if config.enable_lora else None
        on_cpu = current_device().platform == "cpu"
        self.max_num_batched_tokens = config.max_num_batched_tokens or (512 if on_cpu else 8192)
        self.max_num_batched_tokens = max(self.max_num_batched_tokens, config.max_num_seqs)
        weights = params["embed"]["w"].dtype
        dtype = auto_dtype(weights) if config.cache_dtype == "auto" else pool_dtype(config.cache_dtype)
        if on_cpu and dtype != jnp.int8 and dtype.itemsize < 4:
            log.warning(
                "on a CPU XLA turns a pool of %s into float32 and back at every step, whole; "
                "give cache_dtype='auto' or 'int8'",
                dtype.name,
            )
        self.page_bytes = page_bytes(spec, config.page_size, dtype)
        on_one = spec if placement is None else placement.on_one(spec)
        fit = PoolFit(on_one, weights, dtype, config)
        self.num_pages = num_pages = (
            fit.check(config.num_pages)
            if config.num_pages
            else least(fit.most(affordable_pages(config, self.spec, dtype, placement)), placement)
        )
        self.max_model_len = fitting_model_len(spec, config, num_pages)
        self.max_pages = -(-self.max_model_len // config.page_size)
        self.cache = self._cache_shapes(num_pages, config.page_size, dtype)
        self._relay: Relay | None = None
        self.is_sleeping = True
        """While there is no pool: shapes stand for it, and no step may be dispatched."""
        if self.has_params:
            self._make_pool()
        self.num_host_pages = host_pages(config, self.page_bytes)
        self._host = HostPages(self.cache.pools, self.num_host_pages)
        fewest = 1 if on_cpu and weights != jnp.bfloat16 else _FEWEST_DECODES
        self.buckets = batch.make_buckets(
            config.max_num_seqs,
            self.max_num_batched_tokens,
            fewest_decodes=fewest,
            num_shards=self.num_shards,
            multiple=1 if placement is None else placement.num_shards("sequence"),
            max_drafted_tokens=max_drafted_tokens(config, self.max_num_batched_tokens),
        )
        self.max_num_chunks = batch.max_chunks(config.max_num_seqs)
        self._compiler = Compiler()
        same = self.spec, num_pages, self.buckets, self.max_model_len, config.page_size, dtype, config.attention_backend
        self._relay = make_relay(placement, repr(same))
        how: dict[str, Any] = {
            "dtype": params["embed"]["w"].dtype,
            "max_pages": self.max_pages,
            "compiler": self._compiler,
            "placement": placement,
            "build": build,
            "relay": self._relay,
        }
        how |= {} if self.adapters is None else {"adapters": self.adapters}
        make = partial(StepFunctions, spec=spec, config=config, buckets=self.buckets)
        self.num_stages = 1 if placement is None else placement.num_shards("layers")
        functions = make if self.num_stages == 1 else partial(StagedFunctions, make)
        self.functions: StepFunctions | StagedFunctions = functions(params=self.params, cache=self.cache, **how)
        self._nothing_sampled: Any = np.zeros(self.num_shards * self.functions.max_rows, np.int32)
        self.processors = Processors(self._compiler, spec.vocab_size, placement and placement.stages[-1])
        use_compilation_cache(config.compilation_cache_dir)
        self._param_numbers = self._adopted_params()
        self._adopt_pool()

    @property
    def num_compilations(self) -> int:
        """Functions compiled so far, each for a shape of its own."""
        return self._compiler.num_compiled

    @property
    def num_processes(self) -> int:
        """How many processes the weights and pages lie in."""
        return 1 if self._relay is None else jax.process_count()

    @property
    def is_compiling(self) -> bool:
        """True in the midst of a step only where nothing was compiled at the start."""
        return self._compiler.is_compiling

    @property
    def has_params(self) -> bool:
        """Whether there are weights rather than their shapes."""
        return _is_real(self.params)

    def update_params(self, params: Params, problem: str | None = None) -> None:
        """Use other weights from the next step on; ConfigError, and no change, where they do not fit. Floats are
        quantised where the engine's weights are.

        Over several processes all call this, outside `follow`, and it fails in all where it does in one, or where its
        caller has a `problem` in one.
        """
        if self._relay is not None:
            self._relay.agree(problem or self._problem(params), self._follow_until)
        elif problem is not None:
            raise ConfigError(problem)
        with self._guard():
            params = self._quantized(params)
            if self.placement is not None and not check_params(self._asked, params):
                params = self.placement.place(params, self._asked)
            params = self._layout.fit(params, self.spec)
        self._drop_params()
        self.params = params
        self._param_numbers = self._adopted_params()
        self.param_version += 1

    @property
    def has_lost_params(self) -> bool:
        """Whether another holder of the weights has deleted some, as a trainer does that donates them."""
        return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(self.params))

    def put_in_slot(self, adapter: Adapter) -> None:
        """Have the next step find the adapter's numbers in its slot, after all that has been dispatched."""
        whole: dict[str, Any] = {}
        for path, (a, b) in (self.adapters or {}).items():
            rank = a.shape[1] // self._max_loras
            whole[path] = Factors(np.zeros((a.shape[0], rank), a.dtype), np.zeros((rank, b.shape[1]), b.dtype))
            if path in adapter.factors:
                given_a, given_b = self._fitted(path, *adapter.factors[path])
                whole[path].a[:, : given_a.shape[1]], whole[path].b[: given_b.shape[0]] = given_a, given_b
        slot = np.asarray([adapter.slot], np.int32)
        put: Any = self.functions.put_in_slot()  # type: ignore[union-attr]  # no stages: see mesh_limits
        self.adapters = put(self.adapters, slot, whole)

    def sleep(self, *, drop_params: bool) -> None:
        """Free the pool, which nobody else holds, and let go of the weights, which others may hold."""
        if self._relay is not None and not self._relay.is_leader:
            self._follow_until(SLEEP, AGREES)
            return
        self._host.settle(wait=True)
        pools = [leaf for leaf in jax.tree.leaves(self.cache) if isinstance(leaf, jax.Array)]
        self.cache = jax.tree.map(as_shape, self.cache)
        while pools:
            pools.pop().delete()
        self.is_sleeping = True
        if self._relay is not None:
            self._relay.tell(SLEEP, int(drop_params))  # then followers let go of what nobody holds here
        if drop_params:
            self._drop_params()

    def wake(self) -> None:
        """Make the pool, if there is none."""
        if self._relay is not None and not self._relay.is_leader:
            self._follow_until(WAKE, AGREES)
            return
        if self._relay is not None:
            self._relay.tell(WAKE)
        self._make_pool()

    def follow(self) -> bool:
        """Do what process 0's runner does, until it releases this process (true) or ends (false)."""
        if self._relay is None:
            raise ConfigError(
                f"the model lies on devices of one process, of {jax.process_count()}; give a mesh over the devices of "
                "all, or tensor_parallel_size"
            )
        if self._relay.is_leader:
            raise ConfigError("process 0 leads: it takes requests, and the others follow")
        return self._follow_until(RELEASE) is not None

    def release(self) -> None:
        """Let the followers, if there are any, return from `follow`, which they will call again."""
        if self._relay is not None and self._relay.is_leader:
            self._relay.release()

    def end(self) -> None:
        """Let the followers, if there are any, return from `follow`."""
        if self._relay is not None:
            self._relay.end()

    def warm_up(self, *, show_progress: bool = True) -> None:
        """Compile every function for every bucket, so that no later step compiles, and take an empty step of each: the
        first call of what XLA has compiled takes 0.1 to 0.2 s longer on a CPU.
        """
        started = time.monotonic()
        before = self.num_compilations
        self._compiler.ahead(self.functions.jobs(), show_progress=show_progress)
        count, seconds = self.num_compilations - before, time.monotonic() - started
        log.info("compiled %d functions for %d buckets in %.1f s", count, len(self.buckets), seconds)
        if self.is_sleeping or self._relay is not None:  # without a pool, or with followers who do not follow yet
            return
        for bucket in tqdm(self.buckets, desc="first steps", unit="bucket", disable=not show_progress, leave=False):
            nothing = [Plan([], []) for _ in range(self.num_shards)]
            jax.block_until_ready(self._dispatch_in(bucket, nothing, None).outputs.tokens)

    def dispatch(self, plans: Sequence[Plan], before: InFlight | None) -> InFlight:
        """Start a step, planned by each data shard, and return at once. `before` is the step dispatched last, if it has
        not been read.
        """
        return self._dispatch_in(batch.choose(plans, self.buckets), plans, before)

    def _dispatch_in(self, bucket: Bucket, plans: Sequence[Plan], before: InFlight | None) -> InFlight:
        """As `dispatch`, in this bucket, which holds each of the plans."""
        rows = [
            (shard * bucket.num_rows + row, chunk)
            for shard, plan in enumerate(plans)
            for row, chunk in batch.first_rows(plan, bucket)
        ]
        fed_rows = {c.sequence: row % before.num_rows for row, c in before.rows if c.samples} if before else {}
        sizes = {"max_pages": self.max_pages, "page_size": self.cache.page_size, "num_pages": self.num_pages}
        inputs = stack([batch.pack(plan, bucket, fed_rows, **sizes) for plan in plans])
        self._move(plans)
        copies = [batch.pack_copies(plan, self.num_pages) for plan in plans]
        for pages in stack_pieces(copies, batch.no_copies(self.num_pages)):
            self.cache = self.functions.copy_pages()(self.cache, *pages)
        fed = before.outputs.tokens if before else self._nothing_sampled
        adapted: tuple[Any, ...] = ()
        if self.adapters is not None:
            adapted = self.adapters, stack([batch.pack_adapters(plan, bucket) for plan in plans])
        forward = self.functions.forward(bucket)
        self.cache, (raw, hidden) = forward(self.params, self.cache, inputs, fed, *adapted)
        logits, processed = self.processors.apply(self._edited(raw, plans, bucket), rows)
        drawn = stack([batch.pack_sampling(plan, bucket, self.spec.vocab_size) for plan in plans])
        everyone = () if self.num_shards == 1 else (drawn,)
        sampled = self.functions.sample(bucket.num_rows)(logits, drawn, *everyone)
        self.processors.observe(processed, sampled.tokens)
        # Logprobs are a call of their own, and not a condition on the device, which the host would have to wait for.
        temperature = stack_found([batch.pack_score_temperature(plan, bucket) for plan in plans], 1)
        logprobs = _NO_LOGPROBS
        if temperature is not None:
            logprobs = self.functions.logprobs(bucket.num_rows)(raw, sampled.tokens, temperature)
        outputs = StepOutputs(*sampled, logprobs)
        parts, embedded = self._prompt_parts(plans, bucket, hidden), self._embedded(plans, bucket, hidden)
        outputs, parts, embedded = self.functions.at_hand(outputs, parts, embedded)
        return InFlight(bucket.num_rows, rows, outputs, parts, embedded, self.param_version)

    def read(self, step: InFlight) -> InFlight:
        """The step with its results on the host, waited for."""
        wanted = step.outputs, [p.logprobs for p in step.prompt_parts], step.embedded.sums
        with self._guard():
            outputs, parts, sums = jax.device_get(wanted)
        self._host.settle(wait=False)
        tokens = outputs.tokens.reshape(self.num_shards, -1)[:, : step.num_rows].reshape(-1)
        return step._replace(
            outputs=outputs._replace(tokens=tokens),
            prompt_parts=[p._replace(logprobs=lp) for p, lp in zip(step.prompt_parts, parts, strict=True)],
            embedded=step.embedded._replace(sums=sums),
        )

    def scrub(self, pages: list[int], shard: int = 0) -> None:
        """Zero these pages of a data shard, after all that has been dispatched."""
        ids = np.full((self.num_shards, self.max_pages), self.num_pages, np.int32)
        ids[shard, : len(pages)] = pages
        self.cache = self.functions.scrub()(self.cache, ids.reshape(-1))

    @property
    def min_host_pages(self) -> int:
        """The fewest pages that it is worth to move in from the host."""
        num_params = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        most = batch.MOVES_PER_CALL
        return pages_worth_moving(most * self.page_bytes, self.cache.page_size, num_params, jax.default_backend(), most)

    def _problem(self, params: Params) -> str | None:
        """Why `update_params` cannot take these, told by their shapes alone: to move them takes all processes."""
        try:
            check_alive(params)
            given = self._quantized(jax.tree.map(shape_of, params))
            if self.placement is not None and not check_params(self._asked, params):
                given = self.placement.place(given, self._asked)
            self._layout.check(given, self.spec)
            if self.num_stages > 1:
                self._check_stages(params)
        except Exception as error:  # of whatever kind: the other processes wait to hear of it
            return str(error)
        return None

    def _quantized(self, params: Params) -> Params:
        """New weights as the engine has them: where it has them quantised and these are floats, they are quantised."""
        if self.spec.quantization is None or is_quantized(params):
            return params
        check_alive(params)
        return quantize_params(params, self._asked)

    def _check_stages(self, params: Params) -> None:
        """Raise ConfigError where weights would have to move to the devices of their stage from those of others."""
        places = dict(flatten(self.params))
        for path, leaf in flatten(params):
            is_shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
            place = places[path if path in places else f"{path}.values"]
            if is_shared and leaf.sharding.device_set != place.sharding.device_set:
                raise ConfigError(
                    f"{path} lies on other devices than its pipeline stage, and does not move between processes yet; "
                    "give it the sharding that it has in engine.params, or the host's array"
                )

    def _drop_params(self) -> None:
        """Let go of the weights; their shapes stay."""
        if self._relay is not None:
            self._relay.drop(self._param_numbers)
        self.params = jax.tree.map(as_shape, self.params)
        self._param_numbers = range(0)

    def _adopted_params(self) -> range:
        """The weights' numbers in the relay, which also holds them from now on where this process follows."""
        return self._relay.adopt(self.params) if self._relay is not None and self.has_params else range(0)

    def _make_pool(self) -> None:
        if self.is_sleeping:
            zeros = (jnp.zeros(s.shape, s.dtype, device=s.sharding) for s in jax.tree.leaves(self.cache))
            self.cache = jax.tree.unflatten(jax.tree.structure(self.cache), zeros)
            self.is_sleeping = False
            self._adopt_pool()

    def _adopt_pool(self) -> None:
        """Have the relay number the pool; where this process follows, only the relay holds it, until the leader lets go
        of it.
        """
        if self._relay is not None and not self.is_sleeping:
            self._relay.adopt(self.cache)
            if not self._relay.is_leader:
                self.cache = jax.tree.map(as_shape, self.cache)

    def _follow_until(self, until: int, answer: int = FOLLOWS) -> Words | None:
        """See `Relay.follow`."""

        def sleep(drop_params: int) -> None:
            self.is_sleeping = True
            if drop_params:
                self._drop_params()

        if self._relay is None:
            return None
        on = {SLEEP: sleep, WAKE: lambda _: self._make_pool()}
        return self._relay.follow(self.functions.named, on, until, answer)

    def _guard(self) -> AbstractContextManager[None]:
        """Around what fails in all processes where it fails in one."""
        return nullcontext() if self._relay is None else self._relay.guard()

    def _no_adapters(self, config: EngineConfig) -> Any:
        """An empty stack, which memory is taken for before the pool gets what is left."""
        dtype = self.params["embed"]["w"].dtype
        shapes = stack_shapes(self.spec, config.max_loras, config.max_lora_rank)
        if not shapes:
            raise ConfigError("enable_lora is True but no linear of this model takes an adapter; leave it out")
        stack = {
            path: Factors(*(jnp.zeros(leaf.shape, dtype, device=self._sharding_of(leaf)) for leaf in factors))
            for path, factors in shapes.items()
        }
        return jax.block_until_ready(stack)

    def _fitted(self, path: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A linear's factors for the heads that the devices compute."""
        if self.placement is None or self.spec == self._asked:
            return a, b
        rows, columns = _axes_of(f"{path}.w", in_floats(self._asked), self.placement.num_shards("attention"))
        return np.where(rows[:, None] < 0, 0, a[rows]), np.where(columns[None] < 0, 0, b[:, columns])

    def _sharding_of(self, leaf: ParamSpec) -> Any:
        return None if self.placement is None else self.placement.sharding(*leaf.axes)

    def _cache_shapes(self, num_pages: int, page_size: int, dtype: Any) -> KVCache:
        """What the cache is, `num_pages` for each data shard, and where: no device ever holds more than its part."""
        shapes = cache_shapes(self.spec, self.num_shards * num_pages, page_size, dtype)
        if self.placement is None:
            return shapes

        def placed(shape: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        return KVCache(jax.tree.map(placed, shapes.pools, self.placement.cache_shardings(shapes.pools)))

    def _move(self, plans: Sequence[Plan]) -> None:
        """Pages to the host, which the step may write over, then pages from there, which it may read."""
        if not self.num_host_pages:
            return
        (plan,) = plans
        for pages, slots in batch.pack_moves_out(plan):
            self._host.put(slots, self.functions.read_pages()(self.cache, pages))
        for pages, slots in batch.pack_moves_in(plan, self.num_pages):
            self.cache = self.functions.write_pages()(self.cache, pages, self._host.get(slots))

    def _edited(self, raw: jax.Array, plans: Sequence[Plan], bucket: Bucket) -> jax.Array:
        """The logits to sample from: `raw` itself unless a sequence wants some changed."""
        logits = raw
        edits = [batch.pack_edits(_edits_of(plan, bucket), bucket.num_rows) for plan in plans]
        for piece in stack_pieces(edits, batch.no_edits(bucket.num_rows)):
            logits = self.functions.edit(bucket.num_rows)(logits, piece)
        everything = np.iinfo(np.uint32).max
        allowed = stack_found([batch.pack_allowed(plan, bucket, self.spec.vocab_size) for plan in plans], everything)
        return logits if allowed is None else self.functions.restrict(bucket.num_rows)(logits, allowed)

    def _prompt_parts(self, plans: Sequence[Plan], bucket: Bucket, hidden: jax.Array) -> list[PromptPart]:
        """Logprobs of the prompt tokens that follow this step's tokens, where a request wants them."""
        parts = []
        for pieces in zip_longest(*(batch.prompt_pieces(plan, bucket) for plan in plans)):
            rows, targets = np.zeros((2, len(plans), batch.PROMPT_ROWS), np.int32)
            for shard, piece in enumerate(pieces):
                if piece is not None:
                    rows[shard], targets[shard] = piece.rows, piece.targets
            told = self.functions.prompt_logprobs(bucket.num_tokens)
            found = told(self.params, hidden, rows.reshape(-1), targets.reshape(-1))
            for shard, piece in enumerate(pieces):
                if piece is not None:
                    first = shard * batch.PROMPT_ROWS
                    parts.append(PromptPart(piece.sequence, piece.start, piece.num_rows, first, found))
        return parts

    def _embedded(self, plans: Sequence[Plan], bucket: Bucket, hidden: jax.Array) -> Embedded:
        """Sums of hidden states, where a request wants an embedding."""
        each = [pack_embedded(plan, bucket) for plan in plans]
        parts = [(shard * bucket.num_rows + row, c) for shard, (e, _) in enumerate(each) for row, c in e.parts]
        if not parts:
            return Embedded([])
        return Embedded(parts, self.functions.sum_hidden(bucket)(hidden, stack([owners for _, owners in each])))


def _edits_of(plan: Plan, bucket: Bucket) -> dict[int, RowEdits]:
    """Of the rows whose logits are to be changed."""
    found = {row: row_edits(chunk.sequence) for row, chunk in batch.rows_of(plan, bucket) if chunk.samples}
    return {row: edits for row, edits in found.items() if edits is not None}


def _is_real(tree: Any) -> bool:
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))
