"""What /metrics says, for Prometheus: vLLM's names under `jaxpaged:`. The engine's counts are read, not kept."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxpaged.engine.stats import EngineStats
from jaxpaged.outputs import RequestOutput

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)

GAUGES = {
    "num_requests_running": "Sequences that run.",
    "num_requests_waiting": "Requests that wait.",
    "kv_cache_usage_perc": "Share of the pages that are held, 0 to 1.",
}
COUNTERS = {
    "num_preemptions": "Sequences whose pages were taken back.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens found there.",
    "spec_decode_num_drafts": "Drafts checked.",
    "spec_decode_num_draft_tokens": "Tokens of those drafts.",
    "spec_decode_num_accepted_tokens": "Tokens of drafts that came true.",
    "prompt_tokens": "Tokens of prompts taken in.",
    "generation_tokens": "Tokens generated.",
    "iterations": "Steps of the engine.",
    "compilations": "Functions compiled; does not grow once the engine has started.",
}


class Metrics:
    """Histograms of finished requests, and the engine's own counts as of the last snapshot."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._stats: EngineStats | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"jaxpaged:{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
            return made.labels(model)

        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self._between = histogram("request_time_per_output_token_seconds", "Mean time of a later token.", SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self._queued = histogram("request_queue_time_seconds", "From arrival until it ran.", SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._success = Counter(
            "jaxpaged:request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def observe(self, output: RequestOutput, num_generated: int) -> None:
        """Count a request that has finished."""
        self._success.labels(self._model, output.outputs[0].finish_reason or "abort").inc()
        self._prompt.observe(len(output.prompt_token_ids))
        self._generated.observe(num_generated)
        times = output.metrics
        if times is None or times.finished_time is None:
            return
        self._whole.observe(times.finished_time - times.arrival_time)
        if times.time_in_queue is not None:
            self._queued.observe(times.time_in_queue)
        if times.first_token_time is None or times.last_token_time is None:
            return
        self._first.observe(times.first_token_time - times.arrival_time)
        if num_generated > 1:
            self._between.observe((times.last_token_time - times.first_token_time) / (num_generated - 1))

    def text(self, stats: EngineStats | None) -> bytes:
        """All of it in Prometheus' text format; without `stats`, the last ones stand."""
        self._stats = stats or self._stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        stats = self._stats
        if stats is None:
            return
        values = {
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage_perc": stats.pages_held / stats.pages_total,
            "num_preemptions": stats.num_preemptions,
            "prefix_cache_queries": stats.prefix_cache_queries,
            "prefix_cache_hits": stats.prefix_cache_hits,
            "spec_decode_num_drafts": stats.num_drafts,
            "spec_decode_num_draft_tokens": stats.num_drafted_tokens,
            "spec_decode_num_accepted_tokens": stats.num_accepted_tokens,
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.generation_tokens,
            "iterations": stats.num_steps,
            "compilations": stats.num_compilations,
        }
        families: list[GaugeMetricFamily | CounterMetricFamily] = [
            *(GaugeMetricFamily(f"jaxpaged:{name}", text, labels=["model_name"]) for name, text in GAUGES.items()),
            *(CounterMetricFamily(f"jaxpaged:{name}", text, labels=["model_name"]) for name, text in COUNTERS.items()),
        ]
        for family in families:
            family.add_metric([self._model], values[family.name.removeprefix("jaxpaged:")])
            yield family
