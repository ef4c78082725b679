"""The functions that steps are made of: what each computes, for which shapes, and where its arrays lie.

Each is compiled ahead of time, once per bucket, and asked for by name: `functions.forward(bucket)(params, cache, ...)`.
Where a placement cuts data, each is one data shard's, run for all of them by `Placement.over_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.config import EngineConfig
from jaxpaged.engine import batch
from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.compilation import Build, Compiler, Jitted, kept, traced
from jaxpaged.engine.relay import Function, Relay
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import sampling
from jaxpaged.model.cache import KVCache
from jaxpaged.model.embedding import sum_by_owner
from jaxpaged.model.lora import Adapter, Factors, columns_of, put_in_slot, with_adapter
from jaxpaged.model.params import Params
from jaxpaged.model.sampling import Edits, Logprobs, Sampled, SamplingInputs
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Decoder
from jaxpaged.model.stages import Stage
from jaxpaged.model.step import ForwardOutputs, StepInputs, forward, forward_stage

_ALWAYS_TRACED = ("read_pages", "write_pages", "sum_hidden")  # they know nothing of the model, and are small
RELAYED = (
    *("forward", "sample", "logprobs", "edit", "restrict", "prompt_logprobs", "sum_hidden"),
    *("scrub", "copy", "at_hand"),
)
"""What other processes can be asked to call, by number."""


class StepFunctions:
    """Of one model, for the buckets of one engine."""

    def __init__(
        self,
        spec: Decoder,
        params: Params,
        cache: KVCache,
        config: EngineConfig,
        buckets: Sequence[Bucket],
        *,
        dtype: Any,
        max_pages: int,
        compiler: Compiler,
        placement: Placement | None = None,
        build: Build = traced,
        relay: Relay | None = None,
        stage: Stage | None = None,
        adapters: Adapter | None = None,
    ) -> None:
        """Of `params` and `cache`, arrays or shapes, only shapes and places are looked at; `dtype` is that of hidden
        states. With a `relay` a call is made in all processes. The functions of a `stage` are for its part of params
        and cache, and the placement is its own. With `adapters`, a stack of as many as the config says, each token of
        a step may have one.
        """
        self.spec = spec
        self.stage = stage
        self.dtype = dtype
        self.params, self.cache, self.adapters = jax.tree.map(as_shape, (params, cache, adapters))
        self.stack_size = config.max_loras, config.max_lora_rank
        self.buckets = buckets
        self.max_rows = max(bucket.num_rows for bucket in buckets)
        self.max_pages = max_pages
        self.placement = placement
        self.num_shards = 1 if placement is None else placement.num_shards("data")
        self.attention_backend = config.attention_backend
        self.batch_invariant = config.batch_invariant
        self.moves_pages = config.host_cache_gb > 0
        self.compiler = compiler
        self.made: dict[Hashable, Any] = {}
        self._build = build
        self._relay = relay

    def jobs(self) -> list[Callable[[], object]]:
        """A call for each function and bucket that compiles it, unless it has been."""
        jobs: list[Callable[[], object]] = []
        for bucket in reversed(self.buckets):  # the largest take longest
            jobs.append(partial(self.forward, bucket))
            if bucket.num_chunk_tokens:
                jobs.append(partial(self.prompt_logprobs, bucket.num_tokens))
        for rows in {bucket.num_rows for bucket in self.buckets}:
            jobs += [partial(f, rows) for f in (self.sample, self.logprobs, self.edit, self.restrict)]
        if self.adapters is not None:
            jobs.append(self.put_in_slot)
        return jobs + self._page_jobs()

    def layer_jobs(self) -> list[Callable[[], object]]:
        """Those of `jobs` that a stage needs which is not the last one."""
        return [partial(self.forward, bucket) for bucket in reversed(self.buckets)] + self._page_jobs()

    def _page_jobs(self) -> list[Callable[[], object]]:
        moves = [self.read_pages, self.write_pages] if self.moves_pages else []
        return [self.scrub, self.copy_pages, *moves]

    def _compile(self, key: tuple[str, int | Bucket], jitted: Jitted, *shapes: Any) -> Callable[..., Any]:
        """The function compiled for these shapes, now or before."""
        name, size = key
        sizes = size if isinstance(size, Bucket) else (size,)
        build = traced if name in _ALWAYS_TRACED else self._build
        shapes = jax.tree.map(self._on_mesh, shapes)
        of = () if self.stage is None else (f"stage {self.stage.index}",)
        compiled = self.compiler.get((name, (*sizes, *of)), build, jitted, shapes)
        if self._relay is None:
            return compiled
        return Function(self._relay, RELAYED.index(name), sizes, compiled, shapes)

    def named(self, number: int, sizes: Sequence[int]) -> Any:
        """The function that the relay calls by a number, for sizes of which a bucket has four."""
        name = RELAYED[number]
        if name in ("scrub", "copy"):
            return self.scrub() if name == "scrub" else self.copy_pages()
        return getattr(self, name)(Bucket(*sizes) if name in ("forward", "sum_hidden") else sizes[0])

    def _jit(
        self, function: Callable[..., Any], outputs: Any, *, donate: int | None = None, whole: Sequence[int] = ()
    ) -> Jitted:
        """`function` of one data shard to be compiled, its `outputs` (a prefix of them, in shardings) where later calls
        expect them; arguments `whole` are the same for all shards.
        """
        donated = () if donate is None else (donate,)
        if self.placement is None:
            return function, {"donate_argnums": donated}
        return self.placement.over_data(function, whole), {"donate_argnums": donated, "out_shardings": outputs}

    def _on_mesh(self, shape: Any) -> Any:
        """A shape that does not say where it lies: of one data shard's rows, so that there are as many of each."""
        if self.placement is None or not isinstance(shape, jax.ShapeDtypeStruct) or shape.sharding is not None:
            return shape
        rows, *rest = shape.shape
        return jax.ShapeDtypeStruct((self.num_shards * rows, *rest), shape.dtype, sharding=self._told)

    def _everywhere(self, shape: Any) -> Any:
        """A shape of one data shard's rows, as those of all, a copy on every device."""
        rows, *rest = shape.shape
        sharding = None if self.placement is None else self.placement.sharding()
        return jax.ShapeDtypeStruct((self.num_shards * rows, *rest), shape.dtype, sharding=sharding)

    @property
    def _rows(self) -> Any:
        """The sharding of rows, of which each device of a data shard has a copy."""
        return None if self.placement is None else self.placement.sharding("data")

    @property
    def _told(self) -> Any:
        """That of rows that hosts give and are told: over several processes each has all, and so each device."""
        if self.placement is None or self._relay is None or self.num_shards == 1:
            return self._rows
        return self.placement.sharding()

    @property
    def _cut_logits(self) -> Any:
        return None if self.placement is None else self.placement.sharding("data", "vocab")

    @property
    def _cache_shardings(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.cache)

    @kept
    def forward(self, bucket: Bucket) -> Callable[..., tuple[KVCache, Any]]:
        """forward(params, cache, inputs, fed): the model on a step's tokens; `fed` are what the step before sampled, or
        what the stage before gave. With adapters, forward(params, cache, inputs, fed, adapters, slots).
        """
        step: Any = partial(forward, batch_invariant=self.batch_invariant)
        given, given_out = _shape(self.max_rows), ForwardOutputs(self._cut_logits, self._rows)
        if self.stage is not None:
            step = partial(forward_stage, stage=self.stage)
            given = given if self.stage.is_first else self.carried(bucket)
            given_out = given_out if self.stage.is_last else self.carried(bucket).sharding
        step = partial(step, spec=self.spec, attention_backend=self.attention_backend, placement=self.placement)
        adapted = () if self.adapters is None else (self.adapters, _shape(bucket.num_tokens))
        step = step if self.adapters is None else self._on_adapters(step)
        function = self._jit(step, (self._cache_shardings, given_out), donate=1, whole=(0, 4))
        tokens, rows, seqs = bucket.num_tokens, bucket.num_rows, bucket.num_seqs
        inputs = StepInputs(
            token_ids=_shape(tokens),
            feedback=_shape(tokens),
            positions=_shape(tokens),
            rope_lens=_shape(tokens),
            slots=_shape(tokens),
            page_table=_shape(seqs, self.max_pages),
            kv_lens=_shape(seqs),
            cu_q_lens=_shape(bucket.num_chunks + 1),
            logit_rows=_shape(rows),
        )
        return self._compile(("forward", bucket), function, self.params, self.cache, inputs, given, *adapted)

    def _on_adapters(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step of params with a stack of adapters, of which each token has the one in its slot."""

        def adapted(params: Params, cache: Any, inputs: Any, fed: Any, adapters: Adapter, slots: jax.Array) -> Any:
            return step(with_adapter(params, adapters, columns_of(slots, *self.stack_size)), cache, inputs, fed)

        return adapted

    @kept
    def put_in_slot(self) -> Callable[..., Adapter]:
        """put_in_slot(adapters, slot, adapter): the stack with another adapter, of all linears and the highest rank."""
        stack, (_, rank) = self.adapters or {}, self.stack_size

        def one(factors: Factors) -> Factors:
            a, b = factors
            a = jax.ShapeDtypeStruct((a.shape[0], rank), a.dtype, sharding=a.sharding)
            return Factors(a, jax.ShapeDtypeStruct((rank, b.shape[1]), b.dtype, sharding=b.sharding))

        adapter = {path: one(factors) for path, factors in stack.items()}
        slot = jax.ShapeDtypeStruct((1,), np.int32, sharding=self.placement and self.placement.sharding())
        function: Jitted = put_in_slot, {"donate_argnums": 0}
        if self.placement is not None:  # data shards have one stack together
            function[1]["out_shardings"] = jax.tree.map(lambda leaf: leaf.sharding, stack)
        return self._compile(("put_in_slot", 0), function, stack, slot, adapter)

    def carried(self, bucket: Bucket) -> Any:
        """What one stage hands to the next, and where it lies there."""
        rows = "tokens" if bucket.num_chunks else "data"
        sharding = None if self.placement is None else self.placement.sharding(rows)
        shape = self.num_shards * bucket.num_tokens, self.spec.dim
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)

    @kept
    def sample(self, rows: int) -> Callable[..., Sampled]:
        """sample(logits, inputs): a token a row. Of several data shards, each also takes the inputs of all."""

        def padded(logits: jax.Array, inputs: SamplingInputs, everyone: SamplingInputs | None = None) -> Sampled:
            """All buckets give as many tokens, so that the next step's shape does not depend on this one's."""
            if self.batch_invariant:
                sampled = sampling.sample_in_blocks(logits, inputs, everyone, self.placement)
            else:
                sampled = sampling.sample(logits, inputs, everyone, placement=self.placement)
            return sampled._replace(tokens=jnp.pad(sampled.tokens, (0, self.max_rows - rows)))

        inputs = SamplingInputs(
            temperature=_shape(rows, dtype=np.float32),
            top_k=_shape(rows),
            top_p=_shape(rows, dtype=np.float32),
            min_p=_shape(rows, dtype=np.float32),
            seeds=_shape(rows, 2, dtype=np.uint32),
            positions=_shape(rows),
        )
        everyone = () if self.num_shards == 1 else (jax.tree.map(self._everywhere, inputs),)
        function = self._jit(padded, self._told, whole=(2,))
        return self._compile(("sample", rows), function, self._logits(rows), inputs, *everyone)

    @kept
    def logprobs(self, rows: int) -> Callable[..., Logprobs]:
        """logprobs(logits, tokens, temperature) of sampled tokens and of the likeliest."""
        told = partial(sampling.logprobs_of, batch_invariant=self.batch_invariant, placement=self.placement)

        def unpadded(raw: jax.Array, tokens: jax.Array, temperature: jax.Array) -> Logprobs:
            return told(raw, tokens[:rows], temperature)

        shapes = self._logits(rows), _shape(self.max_rows), _shape(rows, dtype=np.float32)
        return self._compile(("logprobs", rows), self._jit(unpadded, self._told), *shapes)

    @kept
    def edit(self, rows: int) -> Callable[..., jax.Array]:
        """edit(logits, edits): the logits changed."""
        count = batch.EDITS_PER_CALL
        edits = Edits(_shape(count), _shape(count), _shape(count, dtype=np.float32), _shape(count, dtype=np.float32))
        return self._compile(("edit", rows), self._jit(sampling.edit, self._cut_logits), self._logits(rows), edits)

    @kept
    def restrict(self, rows: int) -> Callable[..., jax.Array]:
        """restrict(logits, allowed): the logits of all other tokens at -inf."""
        allowed = _shape(rows, -(-self.spec.vocab_size // 32), dtype=np.uint32)
        return self._compile(
            ("restrict", rows), self._jit(sampling.restrict, self._cut_logits), self._logits(rows), allowed
        )

    @kept
    def prompt_logprobs(self, tokens: int) -> Callable[..., Logprobs]:
        """prompt_logprobs(params, hidden, rows, targets) of tokens that the host knows."""
        found = partial(sampling.prompt_logprobs, spec=self.spec, placement=self.placement)
        found = partial(found, batch_invariant=self.batch_invariant)
        function = self._jit(found, self._told, whole=(0,))
        rows = _shape(batch.PROMPT_ROWS)
        return self._compile(("prompt_logprobs", tokens), function, self.params, self._hidden(tokens), rows, rows)

    @kept
    def sum_hidden(self, bucket: Bucket) -> Callable[..., jax.Array]:
        """sum_hidden(hidden, owners). Not among `jobs`: few engines are asked for embeddings, and it compiles fast."""
        summed = partial(sum_by_owner, num_owners=bucket.num_rows)
        shapes = self._hidden(bucket.num_tokens), _shape(bucket.num_tokens)
        return self._compile(("sum_hidden", bucket), self._jit(summed, self._told), *shapes)

    def _hidden(self, tokens: int) -> Any:
        return jax.ShapeDtypeStruct((self.num_shards * tokens, self.spec.dim), self.dtype, sharding=self._rows)

    @kept
    def scrub(self) -> Callable[..., KVCache]:
        """scrub(cache, pages): the cache with pages zeroed."""
        return self._compile(
            ("scrub", 0), self._jit(kv_cache.scrub, self._cache_shardings, donate=0), self.cache, _shape(self.max_pages)
        )

    @kept
    def copy_pages(self) -> Callable[..., KVCache]:
        """copy_pages(cache, sources, targets): the cache with pages copied."""
        pages = _shape(batch.COPIES_PER_CALL)
        return self._compile(
            ("copy", 0), self._jit(kv_cache.copy_pages, self._cache_shardings, donate=0), self.cache, pages, pages
        )

    @kept
    def read_pages(self) -> Callable[..., Any]:
        """read_pages(cache, page_ids), into pinned memory of the host where the device has a way there, so that nobody
        waits for the copy.
        """

        def beside(leaf: Any) -> Any:
            kinds = {memory.kind for d in leaf.sharding.device_set for memory in d.addressable_memories()}
            return leaf.sharding.with_memory_kind("pinned_host") if "pinned_host" in kinds else leaf.sharding

        jitted: Jitted = kv_cache.read_pages, {"out_shardings": jax.tree.map(beside, self.cache.pools)}
        return self._compile(("read_pages", 0), jitted, self.cache, _shape(batch.MOVES_PER_CALL))

    @kept
    def write_pages(self) -> Callable[..., KVCache]:
        """write_pages(cache, page_ids, pages): the cache with pages from the host."""
        count = batch.MOVES_PER_CALL
        pages = jax.tree.map(lambda leaf: _shape(count, *leaf.shape[1:], dtype=leaf.dtype), self.cache.pools)
        function = self._jit(kv_cache.write_pages, self._cache_shardings, donate=0)
        return self._compile(("write_pages", 0), function, self.cache, _shape(count), pages)

    def at_hand(self, *trees: Any) -> Any:
        """What functions gave, where process 0 can read it: it can."""
        return trees

    def _logits(self, rows: int) -> Any:
        shape = self.num_shards * rows, self.spec.vocab_size
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=self._cut_logits)


def as_shape(leaf: Any) -> Any:
    """What stands for an array: its shape, dtype and place."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _shape(*shape: int, dtype: Any = np.int32) -> Any:
    """Stands for an array while compiling; not typed, since signatures say jax.Array."""
    return jax.ShapeDtypeStruct(shape, dtype)
