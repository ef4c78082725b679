"""What does not work with which mesh: asked before anything is placed, so that the answer is one line."""

from __future__ import annotations

import jax

from jaxpaged.config import EngineConfig
from jaxpaged.errors import ConfigError
from jaxpaged.model.sharding import Placement


def processes_of(placement: Placement | None) -> set[int]:
    """The processes that the mesh's devices belong to, by index."""
    if placement is None or jax.process_count() == 1:
        return {0}  # whatever the mesh: its devices may be shapes to compile for
    return {device.process_index for device in placement.mesh.devices.flat}


def check_mesh(placement: Placement, config: EngineConfig) -> None:
    """Raise ConfigError where an engine cannot do on this mesh what its config asks for."""
    shards, stages = placement.num_shards("data"), placement.num_shards("layers")
    num_processes = len(processes_of(placement))
    if num_processes > 1:
        _check_processes(num_processes, shards, stages)
    if config.host_cache_gb:
        many = f"over {num_processes} processes" if num_processes > 1 else f"with {shards} data shards"
        if num_processes > 1 or shards > 1:
            raise ConfigError(
                f"host_cache_gb is {config.host_cache_gb:g} {many}, whose pages the host does not keep yet; set it to "
                "0, or take 1"
            )
    if config.speculative_config is not None:
        sizes = ("data", "data_parallel_size"), ("sequence", "prefill_context_parallel_size")
        for logical, size in (*sizes, ("layers", "pipeline_parallel_size")):
            if (count := placement.num_shards(logical)) > 1:
                raise ConfigError(f"speculative_config does not work with {size} {count} yet; leave it out, or take 1")
    if config.enable_lora:
        check_adapters(placement)
        if num_processes > 1:
            raise ConfigError(f"enable_lora does not work over {num_processes} processes yet; leave it out, or run one")
    if config.batch_invariant:
        _check_invariant(placement, num_processes)


def check_adapters(placement: Placement) -> None:
    """Raise ConfigError where a mesh does not serve adapters."""
    if (count := placement.num_shards("layers")) > 1:
        raise ConfigError(f"enable_lora does not work with pipeline_parallel_size {count} yet; leave it out, or take 1")


def _check_processes(count: int, shards: int, stages: int) -> None:
    if count < jax.process_count():
        raise ConfigError(
            f"the mesh has devices of {count} of the {jax.process_count()} processes; use devices of all, or of one"
        )
    if shards > 1 and stages > 1:
        raise ConfigError(
            f"{shards} data shards and {stages} pipeline stages do not work together over {count} processes yet; "
            "use 1 of either"
        )


def _check_invariant(placement: Placement, num_processes: int) -> None:
    """Whether devices compute a row alike in any company."""
    for logical, size in (("sequence", "prefill_context_parallel_size"), ("layers", "pipeline_parallel_size")):
        if (count := placement.num_shards(logical)) > 1:
            raise ConfigError(f"batch_invariant does not work with {size} {count} yet; leave it out, or take 1")
    if num_processes > 1:
        raise ConfigError(f"batch_invariant does not work over {num_processes} processes yet; leave it out, or run one")
    platform = placement.mesh.devices.flat[0].platform
    count = max(placement.num_shards(logical) for logical in ("heads", "ffn", "vocab"))
    if count > 2 and platform != "cpu":
        # A ring adds in an order that depends on the place in the array. The sum of two has no order.
        raise ConfigError(
            f"batch_invariant on {count} {platform}s that sum together, where the last bits of a sum depend on a row's "
            "place; take tensor_parallel_size 2 at most, and data_parallel_size for the rest"
        )
