"""How the engine runs: pages, limits, budgets. What a model is belongs to its spec, where arrays lie to the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from jaxpaged.errors import ConfigError
from jaxpaged.settings import Settings
from jaxpaged.speculative_config import SpeculativeConfig

CacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8", "fp8_e4m3"]
Quantization = Literal["int8", "fp8", "int4"]
AttentionBackend = Literal["auto", "reference", "triton", "mosaic"]
SchedulingPolicy = Literal["fcfs", "priority"]

PARALLEL_SIZES = (
    *("tensor_parallel_size", "data_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"),
)
"""The fields that ask for a mesh."""


@dataclass(frozen=True)
class EngineConfig(Settings):
    """Everything that steers the engine. Raises ConfigError, naming field, value and range, where one is wrong.

    page_size                     tokens of one KV page
    num_pages                     pages of the pool, the null page included; None: as many as the memory allows
    tensor_parallel_size          devices over which each layer is cut (LLM's `mesh` says more)
    data_parallel_size            shards over which sequences and pages are split; limits and `num_pages` are each one's
    prefill_context_parallel_size  devices over which a step's tokens are split where it computes prompts
    pipeline_parallel_size        stages of layers, each on devices of its own
    memory_utilization            share of the device's memory that weights and pool may take
    max_model_len                 most tokens of one sequence, prompt and answer; None: what the model was made for
    max_num_seqs                  most sequences computed in one step
    max_num_batched_tokens        most tokens computed in one step; None: the runner's choice for the device
    enable_prefix_caching         reuse full pages of equal beginnings
    host_cache_gb                 GiB of host memory where pages are kept that the pool had to give away; 0: none
    scheduling_policy             fcfs: who came first is served first; priority: who has the lowest priority is
    long_prefill_token_threshold  most tokens of one prompt computed in one step; None: as many as the step may have
    max_num_partial_prefills      most prompts under way that need another step; None: no limit
    max_num_queued_requests       most requests that wait, preempted ones included; None: no limit
    seed                          for requests that bring none
    quantization                  8 or 4 bits for the weights of products, of floats in memory or as they are loaded
    cache_dtype                   of the pool; auto: the weights' dtype, on CPUs float32; fp8 is fp8_e4m3
    attention_backend             auto: the kernels that fit the device, else plain jnp, which is "reference"
    enable_lora                   serve LoRA adapters beside the model: requests name theirs
    max_loras                     adapters whose requests run together; room for so many is kept on the device
    max_lora_rank                 highest rank of an adapter
    speculative_config            guess tokens ahead and check several in one step: a SpeculativeConfig, or its fields
    batch_invariant               a token's logprob has the same bits in any batch; slower (docs/training.md)
    warmup                        compile every bucket at the start rather than when it is first met
    compilation_cache_dir         where compiled steps are kept between runs; None: JAX's setting, else the user's cache
    """

    error: ClassVar[type[ConfigError]] = ConfigError

    page_size: int = 16
    num_pages: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    host_cache_gb: float = 0.0
    scheduling_policy: SchedulingPolicy = "fcfs"
    long_prefill_token_threshold: int | None = None
    max_num_partial_prefills: int | None = None
    max_num_queued_requests: int | None = None
    seed: int = 0
    quantization: Quantization | None = None
    cache_dtype: CacheDtype = "auto"
    attention_backend: AttentionBackend = "auto"
    enable_lora: bool = False
    max_loras: int = 4
    max_lora_rank: int = 16
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None
    batch_invariant: bool = False
    warmup: bool = True
    compilation_cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        """Check every field, and the fields that must fit each other."""
        self._check_int("page_size", 1, 1024)
        self._check_float("memory_utilization", 0, 1, above=True)
        self._check_float("host_cache_gb", 0)
        self._check_int("max_num_seqs", 1)
        for name in PARALLEL_SIZES:
            self._check_int(name, 1)
        self._check_int("seed")
        at_least_one = ("max_model_len", "max_num_batched_tokens", "long_prefill_token_threshold")
        limits = (*at_least_one, "max_num_partial_prefills", "max_num_queued_requests")
        for name, low in (("num_pages", 2), *((name, 1) for name in limits)):
            if getattr(self, name) is not None:
                self._check_int(name, low)
        self._check_bool("enable_prefix_caching")
        self._check_bool("batch_invariant")
        self._check_bool("enable_lora")
        self._check_int("max_loras", 1)
        self._check_int("max_lora_rank", 1)
        if self.enable_lora and self.batch_invariant:
            raise ConfigError("enable_lora does not work with batch_invariant yet; leave out one of them")
        if isinstance(self.speculative_config, Mapping):
            self._set("speculative_config", SpeculativeConfig(**self.speculative_config))
        if not isinstance(self.speculative_config, (SpeculativeConfig, type(None))):
            raise ConfigError(
                f"speculative_config is {self.speculative_config!r:.80}; give a SpeculativeConfig or its fields, "
                'such as {"method": "ngram"}'
            )
        self._check_bool("warmup")

        if self.host_cache_gb and not self.enable_prefix_caching:
            raise ConfigError(
                f"host_cache_gb is {self.host_cache_gb:g} but enable_prefix_caching is False, and the host keeps "
                "prefixes; enable it, or set host_cache_gb to 0"
            )
        if self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size is {self.page_size:,}; it must be a power of two, such as 16")
        if self.quantization is not None:
            self._check_choice("quantization", Quantization)
        self._check_choice("cache_dtype", CacheDtype)
        self._check_choice("attention_backend", AttentionBackend)
        self._check_choice("scheduling_policy", SchedulingPolicy)
        if not isinstance(self.compilation_cache_dir, (str, Path, type(None))):
            raise ConfigError(f"compilation_cache_dir is {self.compilation_cache_dir!r}; it must be a path")
        self._check_pool_holds_one_sequence()

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config` as it was checked."""
        return cast(SpeculativeConfig | None, self.speculative_config)

    def _check_pool_holds_one_sequence(self) -> None:
        if self.num_pages is None or self.max_model_len is None:
            return
        room = (self.num_pages - 1) * self.page_size  # page 0 is the null page
        if room < self.max_model_len:
            need = -(-self.max_model_len // self.page_size) + 1
            raise ConfigError(
                f"num_pages={self.num_pages:,} holds {room:,} tokens but max_model_len is {self.max_model_len:,}; "
                f"raise num_pages to {need:,} or lower max_model_len to {room:,}"
            )
