"""How many pages and tokens fit the memory: the device's for the pool, the host's for what the pool gave away."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxpaged.config import EngineConfig
from jaxpaged.errors import ConfigError
from jaxpaged.model.cache import page_bytes
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Decoder
from jaxpaged.model.stages import make_stages

_CPU_POOL_BYTES = 4 << 30  # the CPU's memory is other programs' too: more must be asked for with num_pages
_COMPILE_RESERVE = 0.02  # of a GPU's memory, for activations


def affordable_pages(config: EngineConfig, spec: Decoder, dtype: Any, placement: Placement | None) -> int:
    """Pages of `dtype` that fit the devices' free memory, and no more than all sequences at full length can use; of one
    data shard, of which each has devices of its own. Every pipeline stage holds its layers' part of each page.
    """
    if placement is None:
        return _of_stage(config, spec, dtype, jax.local_devices())
    stages = make_stages(len(spec.blocks), placement.num_shards("layers"))
    if placement.mesh.devices.flat[0].platform == "cpu":  # whose devices are one memory
        stages, places = make_stages(len(spec.blocks), 1), [placement]
        sharers = math.prod(map(placement.num_shards, ("data", "attention")))
    else:
        places, sharers = list(placement.stages), 1
    own = placement.on_one(spec)
    return min(  # whoever has no device of a stage, others ask theirs
        _of_stage(config, replace(own, blocks=own.blocks[s.begin : s.end]), dtype, p.mesh.devices.flat, sharers)
        for s, p in zip(stages, places, strict=True)
        if not {*p.mesh.devices.flat}.isdisjoint(jax.local_devices())
    )


def _of_stage(config: EngineConfig, spec: Decoder, dtype: Any, devices: Iterable[jax.Device], sharers: int = 1) -> int:
    """Pages of a stage's layers with one device's heads, in the memory of a device that so many have together."""
    own = jax.local_devices()
    stats = next(device for device in devices if device in own).memory_stats()
    if stats and "bytes_limit" in stats:
        budget = pool_budget(stats["bytes_limit"], stats["bytes_in_use"], config)
    else:
        budget = min(int(_free_host_memory() * config.memory_utilization), _CPU_POOL_BYTES)
    return pages_within(budget // sharers, config, spec, page_bytes(spec, config.page_size, dtype))


def pool_budget(memory: int, in_use: int, config: EngineConfig) -> int:
    """Bytes of a device's memory that the pool may take beside what is in use; below 0 where that is too much."""
    return int(memory * (config.memory_utilization - _COMPILE_RESERVE)) - in_use


def pages_within(budget: int, config: EngineConfig, spec: Decoder, bytes_each: int) -> int:
    """Pages, of each of which a device has so many bytes, that fit into its memory; and no more than are of use."""
    useful = config.max_num_seqs * -(-(config.max_model_len or spec.max_positions) // config.page_size) + 1
    affordable = max(budget, 0) // bytes_each
    if affordable < 2:
        raise ConfigError(
            f"a page takes {bytes_each:,} bytes but {max(budget, 0):,} are free for the pool; "
            "raise memory_utilization, or free memory"
        )
    return int(min(affordable, useful))


def host_pages(config: EngineConfig, bytes_each: int) -> int:
    """Pages that fit the memory of the host's share. Raises ConfigError where none does, or it is not there."""
    wanted, free = int(config.host_cache_gb * 2**30), _free_host_memory()
    if wanted > free:
        raise ConfigError(
            f"host_cache_gb is {config.host_cache_gb:g} but {free / 2**30:.1f} GiB of the host's memory are free; "
            "lower it"
        )
    if 0 < wanted < bytes_each:
        raise ConfigError(
            f"host_cache_gb is {config.host_cache_gb:g}, {wanted:,} bytes, but a page takes {bytes_each:,}; "
            "raise it, or set it to 0"
        )
    return wanted // bytes_each


def fitting_model_len(spec: Decoder, config: EngineConfig, num_pages: int) -> int:
    """The longest sequence: as asked for, else what model and pool allow. Raises ConfigError where it does not fit."""
    room = (num_pages - 1) * config.page_size
    if config.max_model_len is None:
        return min(spec.max_positions, room)
    if config.max_model_len > spec.max_positions:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,} but the model was made for {spec.max_positions:,} positions; "
            "lower max_model_len"
        )
    if config.max_model_len > room:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,} but the pool's {num_pages - 1:,} pages hold {room:,} tokens; "
            f"lower max_model_len to {room:,}, or raise num_pages or memory_utilization"
        )
    return config.max_model_len


def _free_host_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
