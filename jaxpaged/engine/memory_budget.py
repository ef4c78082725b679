"""How many pages and tokens fit the memory: the device's for the pool, the host's for what the pool gave away."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from jaxpaged.config import EngineConfig
from jaxpaged.errors import ConfigError
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Decoder

_CPU_POOL_BYTES = 4 << 30  # the CPU's memory is other programs' too: more must be asked for with num_pages
_COMPILE_RESERVE = 0.02  # of a GPU's memory, for activations


def affordable_pages(config: EngineConfig, spec: Decoder, page_bytes: int, placement: Placement | None) -> int:
    """Pages that fit the device's free memory, and no more than all sequences at full length can use; of one data
    shard, of which each has devices of its own.
    """
    own = jax.local_devices()
    devices = own if placement is None else list(placement.mesh.devices.flat)
    here = next((device for device in devices if device in own), devices[0])
    stats = here.memory_stats()
    if stats and "bytes_limit" in stats:
        budget = pool_budget(stats["bytes_limit"], stats["bytes_in_use"], config)
    else:
        budget = min(int(_free_host_memory() * config.memory_utilization), _CPU_POOL_BYTES)
        budget //= 1 if placement is None else placement.num_shards("data")  # their devices are one memory
    shards = 1 if placement is None or here.platform == "cpu" else placement.num_shards("attention")
    return pages_within(budget, config, spec, page_bytes, shards)


def pool_budget(memory: int, in_use: int, config: EngineConfig) -> int:
    """Bytes of a device's memory that the pool may take beside what is in use; below 0 where that is too much."""
    return int(memory * (config.memory_utilization - _COMPILE_RESERVE)) - in_use


def pages_within(budget: int, config: EngineConfig, spec: Decoder, page_bytes: int, shards: int) -> int:
    """Pages, each cut into so many shards, that fit these bytes of a device, and no more than are of use."""
    useful = config.max_num_seqs * -(-(config.max_model_len or spec.max_positions) // config.page_size) + 1
    affordable = max(budget, 0) * shards // page_bytes
    if affordable < 2:
        raise ConfigError(
            f"a page takes {page_bytes:,} bytes but {max(budget, 0):,} are free for the pool; "
            "raise memory_utilization, or free memory"
        )
    return int(min(affordable, useful))


def host_pages(config: EngineConfig, page_bytes: int) -> int:
    """Pages that fit the memory of the host's share. Raises ConfigError where none does, or it is not there."""
    wanted, free = int(config.host_cache_gb * 2**30), _free_host_memory()
    if wanted > free:
        raise ConfigError(
            f"host_cache_gb is {config.host_cache_gb:g} but {free / 2**30:.1f} GiB of the host's memory are free; "
            "lower it"
        )
    if 0 < wanted < page_bytes:
        raise ConfigError(
            f"host_cache_gb is {config.host_cache_gb:g}, {wanted:,} bytes, but a page takes {page_bytes:,}; "
            "raise it, or set it to 0"
        )
    return wanted // page_bytes


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
