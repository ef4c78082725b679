"""Whether attention can read the pool on this device: asked before the pool is made, so that the answer is one line."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpaged.config import EngineConfig
from jaxpaged.errors import ConfigError
from jaxpaged.kernels.paged_attention import LARGEST_8_BIT_POOL, paged_attention, ragged_paged_attention, unreadable
from jaxpaged.kernels.tiles import current_device
from jaxpaged.model.cache import Pool, cache_shapes
from jaxpaged.model.spec import Decoder, LatentAttention, Mixer
from jaxpaged.model.step import attention_options

log = logging.getLogger("jaxpaged")


class PoolFit:
    """What holds for any number of pages is checked when made; ConfigError where the backend cannot serve the model."""

    def __init__(self, spec: Decoder, dtype: Any, cache_dtype: Any, config: EngineConfig) -> None:
        """`spec` has the heads of one device; `dtype` is the queries', `cache_dtype` the pool's."""
        self._config, self._cache_dtype = config, cache_dtype
        backend, device = config.attention_backend, current_device()
        if backend in ("triton", "mosaic") and device.platform != "gpu":
            raise ConfigError(
                f"attention_backend is {backend!r}, which needs an NVIDIA GPU, and this is a {device.platform}; "
                "use 'auto' or 'reference'"
            )
        latent = any(isinstance(block.mixer, LatentAttention) for block in spec.blocks)
        if latent and jnp.dtype(cache_dtype).itemsize == 1:
            raise ConfigError(
                f"cache_dtype is {config.cache_dtype!r}, but pages of latents cannot be of 8 bits yet; use 'auto'"
            )
        pools = cache_shapes(spec, 1, config.page_size, cache_dtype).pools
        self._layers = {(block.mixer, pool) for block, pool in zip(spec.blocks, pools, strict=True)}
        if backend == "reference" or device.platform != "gpu":
            return
        for mixer, pool in self._layers:
            try:
                _trace(mixer, pool, dtype, config)
            except ValueError as error:
                given = f"attention_backend is {backend!r} and cache_dtype {config.cache_dtype!r}"
                raise ConfigError(f"{given}: {error}") from None

    def check(self, num_pages: int) -> int:
        """`num_pages` itself. Raises ConfigError, naming numbers that would do, where attention cannot read as many."""
        if problem := self._problem(num_pages):
            raise ConfigError(f"num_pages is {num_pages:,}: {problem}")
        return num_pages

    def most(self, num_pages: int) -> int:
        """`num_pages`, or the most below it that attention reads."""
        problem = self._problem(num_pages)
        if problem is None:
            return num_pages
        most: int = min(LARGEST_8_BIT_POOL // pool.pages.size for _, pool in self._layers)
        log.warning("the pool gets %d pages, though there is memory for %d: %s", most, num_pages, problem)
        return most

    def _problem(self, num_pages: int) -> str | None:
        pages = {(num_pages, *pool.pages.shape[1:]) for _, pool in self._layers}
        shapes = (jax.ShapeDtypeStruct(shape, self._cache_dtype) for shape in sorted(pages))
        problems = (unreadable(shape, self._config.attention_backend) for shape in shapes)
        return next((problem for problem in problems if problem), None)


def _trace(mixer: Mixer, pool: Pool, dtype: Any, config: EngineConfig) -> None:
    """Both ops on one sequence; ValueError where one refuses."""
    options = attention_options(mixer) | {"backend": config.attention_backend}

    def ops(q: Array, pool: Pool, table: Array, cu_q_lens: Array, lens: Array) -> tuple[Array, Array]:
        one = paged_attention(q, pool.pages, table, lens, scales=pool.scales, **options)
        return one, ragged_paged_attention(q, pool.pages, table, cu_q_lens, lens, scales=pool.scales, **options)

    q = jax.ShapeDtypeStruct((1, mixer.heads, pool.pages.shape[-1]), dtype)
    table, cu_q_lens, lens = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1), (2,), (1,)))
    jax.eval_shape(ops, q, pool, table, cu_q_lens, lens)
