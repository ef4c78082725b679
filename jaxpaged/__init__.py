"""jaxpaged: an LLM inference engine native to JAX, with paged attention."""

from typing import TYPE_CHECKING, Any

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
from jaxpaged.model.sharding import ShardingRules
from jaxpaged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from jaxpaged.server.async_engine import AsyncEngine

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
    "LogitsProcessor",
    "Logprob",
    "PoolError",
    "QueueFullError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ShardingRules",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> Any:
    """What scripts do without is imported when it is first asked for."""
    if name == "AsyncEngine":
        from jaxpaged.server.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module 'jaxpaged' has no attribute {name!r}")
