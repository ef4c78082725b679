"""jaxpaged: an LLM inference engine native to JAX, with paged attention."""

from jaxpaged.config import EngineConfig
from jaxpaged.engine.engine import Engine, EngineStats
from jaxpaged.errors import CheckpointError, ConfigError, JaxpagedError, PoolError, RequestError
from jaxpaged.llm import LLM
from jaxpaged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxpaged.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "JaxpagedError",
    "Logprob",
    "PoolError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]
