"""jaxpaged: an LLM inference engine native to JAX, with paged attention."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpaged.config import EngineConfig
    from jaxpaged.engine.engine import Engine
    from jaxpaged.engine.stats import EngineStats
    from jaxpaged.errors import (
        CheckpointError,
        ConfigError,
        EngineDeadError,
        JaxpagedError,
        PoolError,
        QueueFullError,
        RequestError,
    )
    from jaxpaged.llm import LLM
    from jaxpaged.logits_processor import LogitsProcessor
    from jaxpaged.lora_request import LoRARequest
    from jaxpaged.model.sharding import ShardingRules
    from jaxpaged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
    from jaxpaged.server.async_engine import AsyncEngine
    from jaxpaged.speculative_config import SpeculativeConfig
    from jaxpaged.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "EngineStats",
    "JaxpagedError",
    "LoRARequest",
    "LogitsProcessor",
    "Logprob",
    "PoolError",
    "QueueFullError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ShardingRules",
    "SpeculativeConfig",
    "StructuredOutputsParams",
]

_HOMES = {
    "AsyncEngine": "jaxpaged.server.async_engine",
    "BeamSearchParams": "jaxpaged.sampling_params",
    "CompletionOutput": "jaxpaged.outputs",
    "Engine": "jaxpaged.engine.engine",
    "EngineConfig": "jaxpaged.config",
    "EngineStats": "jaxpaged.engine.stats",
    "LLM": "jaxpaged.llm",
    "LoRARequest": "jaxpaged.lora_request",
    "LogitsProcessor": "jaxpaged.logits_processor",
    "Logprob": "jaxpaged.outputs",
    "RequestMetrics": "jaxpaged.outputs",
    "RequestOutput": "jaxpaged.outputs",
    "SamplingParams": "jaxpaged.sampling_params",
    "ShardingRules": "jaxpaged.model.sharding",
    "SpeculativeConfig": "jaxpaged.speculative_config",
    "StructuredOutputsParams": "jaxpaged.structured_outputs",
}
"""Where each name is found; the others are errors."""


def __getattr__(name: str) -> Any:
    """A name is imported when it is first asked for: `jaxpaged --help` waits for no jax."""
    if name not in __all__:
        raise AttributeError(f"module 'jaxpaged' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES.get(name, "jaxpaged.errors")), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
