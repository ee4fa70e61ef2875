"""What ``/metrics`` tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from mtnlg.generation.request import GenerationUsage
    from mtnlg.generation.statistics import EngineStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = tuple(4**power for power in range(9))

GAUGES = {
    "running": ("requests_running", "Sequences in the batch"),
    "waiting": ("requests_waiting", "Sequences in the queue"),
    "cache_tokens": ("cache_tokens", "Tokens whose keys and values running sequences hold"),
    "kept_tokens": ("cache_kept_tokens", "Tokens held for later prompts only"),
    "cache_capacity": ("cache_capacity_tokens", "Tokens there is memory for"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens taken in"),
    "cached_tokens": ("cached_prompt_tokens", "Of these, found in the prefix cache"),
    "new_tokens": ("generated_tokens", "Tokens generated"),
    "preempted": ("preemptions", "Times that a sequence gave its memory up, to be computed again"),
    "steps": ("engine_steps", "Steps of the engine"),
    "step_seconds": ("engine_step_seconds", "Time spent in steps"),
    "model_seconds": ("engine_model_seconds", "Of this, in the model's forward pass"),
}
HISTOGRAMS = {
    "first_token_seconds": ("time_to_first_token_seconds", "From submission to the first token"),
    "between_tokens_seconds": ("time_per_output_token_seconds", "Between two tokens of a sequence"),
    "queue_seconds": ("queue_time_seconds", "From submission to the first step"),
    "batch_rows": ("batch_size", "Sequences that a step worked on"),
}


class Metrics:
    """Counters and histograms of requests, and the engine's numbers at the time of asking."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.statistics: EngineStatistics | None = None
        self.is_ready = False
        self.requests = Counter(
            "mtnlg_requests", "Requests by path and status", ("path", "status"), registry=self.registry
        )
        self.disconnects = Counter(
            "mtnlg_disconnects", "Clients that left before the answer was whole", registry=self.registry
        )
        self.request_seconds = Histogram(
            "mtnlg_request_seconds",
            "From arrival to the last byte",
            ("path",),
            registry=self.registry,
            buckets=SECONDS,
        )
        self.prompt_sizes = self._sizes("prompt", "Tokens of a prompt")
        self.answer_sizes = self._sizes("answer", "Tokens of an answer")
        self.finished = Counter(
            "mtnlg_answers", "Finished sequences by reason", ("reason",), registry=self.registry
        )
        self.registry.register(_EngineCollector(self))  # type: ignore[arg-type]

    def _sizes(self, name: str, text: str) -> Histogram:
        return Histogram(f"mtnlg_{name}_size_tokens", text, registry=self.registry, buckets=TOKENS)

    def observe(self, usage: GenerationUsage, reason: str) -> None:
        """A sequence has ended."""
        self.finished.labels(reason).inc()
        self.prompt_sizes.observe(usage.prompt_tokens)
        self.answer_sizes.observe(usage.new_tokens)

    def text(self) -> bytes:
        """The whole in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Reads the engine's statistics when it is asked."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Every number of the engine."""
        yield GaugeMetricFamily("mtnlg_ready", "1 when requests are taken", self._metrics.is_ready)
        found = self._metrics.statistics
        if found is None:
            return
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(f"mtnlg_{name}", text, getattr(found, field))
        rate = found.cached_tokens / found.prompt_tokens if found.prompt_tokens else 0.0
        text = "Prompt tokens found in the prefix cache, of all since the start"
        yield GaugeMetricFamily("mtnlg_cache_hit_rate", text, rate)
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(f"mtnlg_{name}", text, getattr(found, field))
        for field, (name, text) in HISTOGRAMS.items():
            yield _family(f"mtnlg_{name}", text, getattr(found, field))


def _family(name: str, text: str, histogram: Any) -> Metric:
    buckets = [(floatToGoString(bound), count) for bound, count in histogram.cumulative()]
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, histogram.sum)
    return family
