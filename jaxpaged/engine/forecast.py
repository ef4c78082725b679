"""What a model will take on devices that need not be here: memory as the engine shares it out, a step by arithmetic.

Memory comes from what the engine itself asks (the table of weights, the pool's shapes, the placement, the budget). A
step's time is the least that the given speeds allow: the slower of computing and reading, then the links. Launches,
latencies and the host are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from jaxpaged.config import EngineConfig
from jaxpaged.engine.exports import as_if_on
from jaxpaged.engine.memory_budget import fitting_model_len, pages_within, pool_budget
from jaxpaged.engine.mesh_limits import check_adapters
from jaxpaged.engine.pool_fit import PoolFit
from jaxpaged.engine.weights import check_readable
from jaxpaged.errors import ConfigError
from jaxpaged.model.cache import KVCache, cache_shapes, pool_dtype
from jaxpaged.model.lora import stack_shapes
from jaxpaged.model.params import flatten, leaf_bytes, param_specs, quantized_as
from jaxpaged.model.sharding import Placement, ShardingRules, mesh_axes
from jaxpaged.model.spec import Attention, Decoder, LatentAttention, Moe
from jaxpaged.model.stages import Stage, holders, make_stages


class Speeds(NamedTuple):
    """What a device does in a second, at best. The defaults are an H100 SXM's data sheet: given, not measured."""

    flops: float = 989e12  # bfloat16, dense
    hbm: float = 3.35e12  # bytes of its memory
    link: float = 450e9  # bytes to other devices, and as many from them at the same time


class Forecast(NamedTuple):
    """What each device holds, and for how many tokens there is room on the devices that share one copy of the model."""

    weight_bytes: int
    adapter_bytes: int  # of all slots, whoever is in them
    page_bytes: int
    pool_bytes: int
    free_bytes: int  # which the pool could have, if it were of use
    num_pages: int  # the null page included
    num_tokens: int
    max_model_len: int
    num_full_seqs: int  # of max_model_len tokens each


class DecodeStep(NamedTuple):
    """What one decode step costs each device: `context_len` tokens of each sequence are read."""

    num_seqs: int
    context_len: int
    flops: int
    weight_bytes: int  # read
    kv_bytes: int  # read
    num_sums: int  # all-reduces
    sum_bytes: int  # of the largest
    link_bytes: int  # sent over a device's links, and received

    def seconds(self, speeds: Speeds) -> tuple[float, float, float]:
        """Computing, reading and the links; the step takes the larger of the first two, and the third."""
        read = self.weight_bytes + self.kv_bytes
        return self.flops / speeds.flops, read / speeds.hbm, self.link_bytes / speeds.link

    def total(self, speeds: Speeds) -> float:
        """Seconds of the whole step."""
        computing, reading, links = self.seconds(speeds)
        return max(computing, reading) + links


class _Part(NamedTuple):
    """A device's part of a leaf."""

    path: str
    shape: tuple[int, ...]
    nbytes: int


class Forecaster:
    """A model on the devices of one data shard of `config`. Raises ConfigError where they cannot share it."""

    def __init__(self, spec: Decoder, dtype: Any, config: EngineConfig, rules: ShardingRules | None = None) -> None:
        """`dtype` is the weights'."""
        self.config, self.dtype = config, jax.numpy.dtype(dtype)
        sizes = config.tensor_parallel_size, 1, config.prefill_context_parallel_size, config.pipeline_parallel_size
        rules, axes = mesh_axes(*sizes, rules)
        self.placement = Placement(AbstractMesh(tuple(axes.values()), tuple(axes)), rules)
        self.spec = self.placement.fit(quantized_as(spec, config.quantization))
        if config.enable_lora:
            check_adapters(self.placement)
        self.stages = make_stages(len(spec.blocks), config.pipeline_parallel_size)
        self.cache_dtype = self.dtype if config.cache_dtype == "auto" else pool_dtype(config.cache_dtype)

    def fit(self, memory: int, gpu: str | None = None) -> Forecast:
        """What lies on devices of which JAX may use so much memory, of pipeline stages on the fullest. Raises
        ConfigError where it is too little.
        """
        config = self.config
        num_pages = min(self._most_pages(stage, memory, gpu) for stage in self.stages)
        fullest = max(self.stages, key=lambda stage: self._weight_bytes(stage) + self._pool_bytes(stage, num_pages))
        weights, each = self._weight_bytes(fullest), self._pool_bytes(fullest, 1)
        max_model_len = fitting_model_len(self.spec, config, num_pages)
        return Forecast(
            weight_bytes=weights,
            adapter_bytes=self.adapter_bytes(),
            page_bytes=each,
            pool_bytes=num_pages * each,
            free_bytes=pool_budget(memory, weights + self.adapter_bytes(), config) - num_pages * each,
            num_pages=num_pages,
            num_tokens=(num_pages - 1) * config.page_size,
            max_model_len=max_model_len,
            num_full_seqs=(num_pages - 1) // -(-max_model_len // config.page_size),
        )

    def _most_pages(self, stage: Stage, memory: int, gpu: str | None) -> int:
        """Pages that there is room for on a stage's devices."""
        config, weights = self.config, self._weight_bytes(stage) + self.adapter_bytes()
        budget = pool_budget(memory, weights, config)
        share, what = config.memory_utilization, "weights and adapters" if config.enable_lora else "weights"
        if budget <= 0:
            raise ConfigError(
                f"{what} take {weights:,} bytes of each device, and memory_utilization {share:g} leaves "
                f"{budget + weights:,} of {memory:,}; take more devices, or larger ones"
            )
        own = replace(self.spec, blocks=self.spec.blocks[stage.begin : stage.end])
        each = self._pool_bytes(stage, 1)
        with as_if_on("cuda", gpu):
            check_readable(own)
            fit = PoolFit(self.placement.on_one(own), self.dtype, self.cache_dtype, config)
            most = config.num_pages or pages_within(budget, config, self.spec, each)
            num_pages = fit.check(most) if config.num_pages else fit.most(most)
        if num_pages * each > budget:
            raise ConfigError(
                f"num_pages is {num_pages:,}, {num_pages * each:,} bytes of each device, and {budget:,} are free for "
                f"the pool; lower it to {budget // each:,}"
            )
        return num_pages

    def decode_step(self, num_seqs: int, context_len: int) -> DecodeStep:
        """A step in which so many sequences decode one token, and have `context_len` with it.

        Of pipeline stages, the one that reads most: it reads its weights for each group of sequences.
        """
        steps = [self._decode_step(stage, num_seqs, context_len) for stage in self.stages]
        return max(steps, key=lambda step: step.weight_bytes + step.kv_bytes)

    def _decode_step(self, stage: Stage, num_seqs: int, context_len: int) -> DecodeStep:
        weights = self._weights(stage)
        read = [w for w in weights if self._is_multiplied(w.path, stage)]
        products = [w.shape for w in read if len(w.shape) > 1 and not w.path.endswith(".scale")]
        flops = 2 * num_seqs * sum(map(math.prod, products))
        experts_flops, experts_read = self._experts(weights, num_seqs, stage)
        parts = self.placement.num_shards("sequence")
        kv_bytes = gathered = 0
        pools = self._cache(stage, 1).pools
        blocks = self.spec.blocks[stage.begin : stage.end]
        for block, pool in zip(blocks, pools, strict=True):
            heads, seen = block.mixer.heads // self.placement.num_shards("attention"), context_len
            match block.mixer:
                case Attention(head_dim=key_dim, window=window):
                    value_dim = key_dim
                    seen = context_len if window is None else min(context_len, window)
                case LatentAttention(row_dim=key_dim, kv_rank=value_dim):
                    pass
            gathered += (parts - 1) * heads * value_dim
            flops += 2 * num_seqs * seen * heads * (key_dim + value_dim)
            kv_bytes += num_seqs * seen * _bytes(pool) // self.config.page_size
        mixtures = [block.ffn for block in blocks if isinstance(block.ffn, Moe)]
        dense = len(blocks) - len(mixtures) + sum(moe.shared is not None for moe in mixtures)
        sums: list[tuple[tuple[str, ...], int, int]]  # cut along these axes, how many, bytes of each
        row = num_seqs * self.dtype.itemsize
        how, width = self.spec.quantization, self.spec.dim * row
        scaled = width if how is None or how.group_size else self.spec.dim * num_seqs * 4  # summed before its scale
        sums = [(("heads",), len(blocks), scaled), (("ffn",), dense, scaled)]
        sums += [(("experts", "expert_ffn"), len(mixtures), width)]
        sums += [(("vocab",), 1, self.spec.embed_dim * row)] if stage.is_first else []
        cut = [(math.prod(map(self.placement.num_shards, axes)), count, size) for axes, count, size in sums if count]
        handed_on = 0 if stage.is_last else width
        return DecodeStep(
            num_seqs=num_seqs,
            context_len=context_len,
            flops=flops + experts_flops,
            weight_bytes=stage.count * (sum(w.nbytes for w in read) + experts_read),
            kv_bytes=kv_bytes,
            num_sums=stage.count * sum(count for n, count, _ in cut if n > 1),
            sum_bytes=max((size // stage.count for n, _, size in cut if n > 1), default=0),
            link_bytes=sum(count * 2 * (n - 1) * size // n for n, count, size in cut) + gathered * row + handed_on,
        )

    def _experts(self, weights: Sequence[_Part], num_seqs: int, stage: Stage) -> tuple[int, int]:
        """Flops of a step's experts, and the bytes of their weights that a group of sequences reads, if all experts are
        as likely as each other: E experts of which a token has K are E (1 - (1 - K / E) ** tokens) different ones.
        """
        flops = read = 0.0
        for path, shape, nbytes in weights:
            if ".experts." in path and isinstance(moe := self.spec.blocks[int(path.split(".")[1])].ffn, Moe):
                chosen = moe.top_k / moe.experts
                flops += 0 if path.endswith(".scale") else 2 * num_seqs * chosen * math.prod(shape)
                read += nbytes * (1 - (1 - chosen) ** (num_seqs / stage.count))
        return round(flops), round(read)

    def weight_bytes(self) -> int:
        """Bytes of weights on each device, of pipeline stages on those that have most."""
        return max(map(self._weight_bytes, self.stages))

    def adapter_bytes(self) -> int:
        """Bytes of the slots for adapters, on each device."""
        if not self.config.enable_lora:
            return 0
        shapes = stack_shapes(self.spec, self.config.max_loras, self.config.max_lora_rank)
        leaves = [leaf for pair in shapes.values() for leaf in pair]
        count = sum(math.prod(self.placement.sharding(*leaf.axes).shard_shape(leaf.shape)) for leaf in leaves)
        return count * int(self.dtype.itemsize)

    def pool_bytes(self, num_pages: int) -> int:
        """Bytes of so many pages on each device, likewise."""
        return max(self._pool_bytes(stage, num_pages) for stage in self.stages)

    def _weight_bytes(self, stage: Stage) -> int:
        return sum(part.nbytes for part in self._weights(stage))

    def _pool_bytes(self, stage: Stage, num_pages: int) -> int:
        return _bytes(self._cache(stage, num_pages))

    def _weights(self, stage: Stage) -> list[_Part]:
        """What a device of the stage holds of each leaf."""
        found = flatten(param_specs(self.spec))
        own = [(path, leaf) for path, leaf in found if stage.index in holders(path, self.spec, self.stages)]
        shapes = [self.placement.sharding(*leaf.axes).shard_shape(leaf.shape) for _, leaf in own]
        sizes = [leaf_bytes(shape, leaf.dtype or self.dtype) for shape, (_, leaf) in zip(shapes, own, strict=True)]
        return [_Part(path, shape, size) for (path, _), shape, size in zip(own, shapes, sizes, strict=True)]

    def _is_multiplied(self, path: str, stage: Stage) -> bool:
        """Whether a step reads all of a matrix, not only rows or some experts."""
        if path == "embed.w":
            return self.spec.tied_head and stage.is_last
        return path != "positions.w" and ".experts." not in path

    def _cache(self, stage: Stage, num_pages: int) -> KVCache:
        """A device's part of the pool, in shapes."""
        whole = cache_shapes(self.spec, num_pages, self.config.page_size, self.cache_dtype).pools

        def part(leaf: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)

        return stage.cache(KVCache(jax.tree.map(part, whole, self.placement.cache_shardings(whole))))


def _bytes(shapes: Any) -> int:
    total: int = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return total
