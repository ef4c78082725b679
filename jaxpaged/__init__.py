"""jaxpaged: an LLM inference engine native to JAX, with paged attention."""

from jaxpaged.config import EngineConfig
from jaxpaged.engine.engine import Engine, EngineStats
from jaxpaged.errors import CheckpointError, ConfigError, JaxpagedError, PoolError, QueueFullError, RequestError
from jaxpaged.llm import LLM
from jaxpaged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "JaxpagedError",
    "Logprob",
    "PoolError",
    "QueueFullError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]
