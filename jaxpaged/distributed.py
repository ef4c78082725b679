"""Many processes as one program: JAX's own runtime, started so that a process that dies takes the others with it.

jaxpaged.distributed.start("10.0.0.1:7777", num_processes=2, process_id=0)
llm = LLM(model, tensor_parallel_size=16)        # the devices of all processes
llm.generate(...) if jaxpaged.distributed.is_leader() else llm.follow()
"""

from __future__ import annotations

import os

import jax

from jaxpaged.errors import ConfigError

HEARTBEAT_TIMEOUT = 6
"""Seconds without a sign of life after which JAX ends all processes; its own default is 100."""

_CONNECT_TIMEOUT = 120


def start(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes; call this before anything touches a device.

    Process 0 is the leader, and listens at `coordinator_address` (host:port), nowhere else. JAX detects what is left
    out, under SLURM, Open MPI and Kubernetes. Raises ConfigError where the others are not met.
    """
    if coordinator_address is not None and not coordinator_address.rpartition(":")[2].isdigit():
        raise ConfigError(f"coordinator_address is {coordinator_address!r}; give host:port, such as 10.0.0.1:7777")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ConfigError(
            f"process_id is {process_id} and num_processes {num_processes}; it must be 0 to {num_processes - 1}"
        )
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator_address)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            coordinator_bind_address=bind,
            initialization_timeout=_CONNECT_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()[:40])
        raise ConfigError(
            f"cannot join the other processes ({reason}); give all of coordinator_address, num_processes and "
            "process_id, or start them under SLURM, Open MPI or Kubernetes"
        ) from error


def is_leader() -> bool:
    """Whether this is process 0, which schedules; also true where there is one process."""
    return jax.process_index() == 0


def num_processes() -> int:
    """How many processes JAX knows."""
    return int(jax.process_count())
