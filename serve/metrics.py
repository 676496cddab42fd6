"""Prometheus metrics, under vLLM's names with the prefix `mini_vllm:`.

The engine's own counts are read from its latest `Stats` at each scrape; times are measured here, in the HTTP process.
Each `Metrics` has its own registry. Knows nothing of text or of requests' contents.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import Delta, Ready
from serve.client import Engine

PREFIX = "mini_vllm:"
# Upper bounds of histogram buckets, in seconds.
_STEP = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_FIRST = (0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 3600)


class EngineCollector(Collector):
    """The engine's `Stats` as metrics: gauges for its state, counters for cumulative counts."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine, self._model = engine, model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, help, value in (
            ("num_requests_running", "Requests in the batch.", stats.running),
            ("num_requests_waiting", "Requests waiting to be admitted.", stats.waiting),
            (
                "kv_cache_usage_perc",
                "Share of the key/value pages in use, 0 to 1.",
                stats.pages_used / max(stats.pages_total, 1),
            ),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, help, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("num_preemptions", "Requests that gave their pages back and started anew.", stats.preemptions),
        ):
            counter = CounterMetricFamily(PREFIX + name, help, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        for name, help, counts in (
            ("bucket_steps", "Steps replayed with a bucket.", [b.steps for b in stats.buckets]),
            (
                "bucket_rows_used",
                "Rows of those steps that held a request (prefill: a token).",
                [b.rows_used for b in stats.buckets],
            ),
            ("bucket_rows_padded", "Rows of those steps that held nothing.", [b.rows_padded for b in stats.buckets]),
        ):
            counter = CounterMetricFamily(PREFIX + name, help, labels=["model_name", "kind", "size"])
            for bucket, count in zip(stats.buckets, counts, strict=True):
                counter.add_metric([self._model, bucket.kind, str(bucket.size)], count)
            yield counter
        if ready := self._engine.ready:
            yield from self._startup(ready)

    def _startup(self, ready: Ready) -> Iterator[Metric]:
        """The figures that never change once the engine is ready."""
        for name, help, label, values in (
            ("startup_phase_seconds", "Time that each phase of the start took.", "phase", ready.phases),
            ("memory_bytes", "A rank's memory by use, when it became ready.", "use", ready.memory),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, help, labels=["model_name", label])
            for key, value in values.items():
                gauge.add_metric([self._model, key], value)
            yield gauge


class Metrics:
    """All metrics of one server."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine, model_name))
        self._model = model_name

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(PREFIX + name, help, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model_name)

        def counter(name: str, help: str) -> Counter:
            return Counter(PREFIX + name, help, ["model_name"], registry=self._registry).labels(model_name)

        self.first_token = histogram("time_to_first_token_seconds", "From submission to the first token.", _FIRST)
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between tokens; those that arrive together share the time.", _STEP
        )
        self.request = histogram("e2e_request_latency_seconds", "From submission to the last token.", _REQUEST)
        self.queue = histogram("request_queue_time_seconds", "From arrival in the engine to the first step.", _FIRST)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of all requests.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens of all requests.")
        self._finished = Counter(
            PREFIX + "request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def finished(self, reason: str) -> None:
        """Count a request that ended; the reasons are those of `Meter.finish`."""
        self._finished.labels(self._model, reason).inc()

    def render(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        return generate_latest(self._registry)


class Meter:
    """Measures one request's latencies and counts its tokens."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._start = self._last = time.perf_counter()
        self._tokens = 0
        metrics.prompt_tokens.inc(prompt_tokens)

    def observe(self, delta: Delta) -> None:
        """A Delta has arrived."""
        if delta.queue_seconds is not None:
            self._metrics.queue.observe(delta.queue_seconds)
        if not delta.tokens:
            return
        now = time.perf_counter()
        if self._tokens:
            self._metrics.inter_token.observe((now - self._last) / len(delta.tokens))
        else:
            self._metrics.first_token.observe(now - self._start)
        self._last = now
        self._tokens += len(delta.tokens)

    def finish(self, reason: str) -> None:
        """The request has ended.

        `reason`: stop, tool_calls, length, error, or abort where the client went away or ran out of time.
        """
        self._metrics.request.observe(time.perf_counter() - self._start)
        self._metrics.generation_tokens.inc(self._tokens)
        self._metrics.finished(reason)
