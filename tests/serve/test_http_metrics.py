"""What /metrics says."""

import time

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import BucketStats, Delta, Stats
from serve.metrics import Meter, Metrics
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL, Live


def samples(live: Live) -> dict[tuple[str, str], float]:
    """(name without prefix, further labels) -> value. Every sample names the model."""
    values = {}
    response = live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == MODEL
            if not sample.name.endswith(("_bucket", "_created")):
                values[sample.name.removeprefix("mini_vllm:"), ",".join(labels.values())] = sample.value
            assert sample.name.startswith("mini_vllm:")
    return values


def test_the_engines_counts_are_read_when_scraped(serve):
    live = serve(FakeEngine([1]))
    live.engine.stats = Stats(
        running=3,
        waiting=2,
        pages_used=4,
        pages_total=16,
        prefix_query_tokens=100,
        prefix_hit_tokens=64,
        preemptions=1,
        buckets=[BucketStats("decode", 8, 10, 70, 10), BucketStats("prefill", 512, 2, 1000, 24)],
    )
    values = samples(live)
    expected = {
        ("num_requests_running", ""): 3,
        ("num_requests_waiting", ""): 2,
        ("kv_cache_usage_perc", ""): 0.25,
        ("prefix_cache_queries_total", ""): 100,
        ("prefix_cache_hits_total", ""): 64,
        ("num_preemptions_total", ""): 1,
        ("bucket_steps_total", "decode,8"): 10,
        ("bucket_rows_used_total", "decode,8"): 70,
        ("bucket_rows_padded_total", "decode,8"): 10,
        ("bucket_steps_total", "prefill,512"): 2,
        ("bucket_rows_used_total", "prefill,512"): 1000,
        ("bucket_rows_padded_total", "prefill,512"): 24,
    }
    assert {name: values[name] for name in expected} == expected


def test_the_starts_figures_are_there_once_the_engine_is_ready(serve):
    live = serve(FakeEngine([1]))
    ready, live.engine.ready = live.engine.ready, None
    assert not any(name.startswith(("startup", "memory")) for name, _ in samples(live))
    live.engine.ready = msgspec.structs.replace(ready, phases={"weights": 2.5, "capture": 0.5}, memory={"pages": 4096})
    values = samples(live)
    assert values["startup_phase_seconds", "weights"] == 2.5
    assert values["startup_phase_seconds", "capture"] == 0.5
    assert values["memory_bytes", "pages"] == 4096


def test_requests_are_counted_and_timed(serve):
    live = serve(FakeEngine([1, 2, 3, 200002]))
    live.complete(prompt=[1, 2])
    live.complete(prompt=[1, 2], max_tokens=2, stream=True)
    live.complete(prompt=[1], stop="$")  # "$" is token 3: the engine has to abort, the client gets "stop"
    values = samples(live)
    assert values["request_success_total", "stop"] == 2
    assert values["request_success_total", "length"] == 1
    assert values["prompt_tokens_total", ""] == 5
    assert values["generation_tokens_total", ""] == 9
    for name, count in (
        ("time_to_first_token_seconds", 3),
        ("e2e_request_latency_seconds", 3),
        ("inter_token_latency_seconds", 6),
        ("request_queue_time_seconds", 3),
    ):
        assert values[f"{name}_count", ""] == count, name
    assert values["request_queue_time_seconds_sum", ""] == 0.75


def test_tokens_that_arrive_together_share_their_time(monkeypatch):
    clock = iter([10.0, 11.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    metrics = Metrics(FakeEngine([]), MODEL)
    meter = Meter(metrics, 1)
    meter.observe(Delta(0, [1]))
    meter.observe(Delta(0, [1, 2, 3, 4]))
    text = metrics.render().decode()
    assert f'mini_vllm:time_to_first_token_seconds_sum{{model_name="{MODEL}"}} 1.0' in text
    assert f'mini_vllm:inter_token_latency_seconds_sum{{model_name="{MODEL}"}} 0.5' in text


def test_a_request_that_runs_out_of_time_counts_as_aborted(serve):
    engine = FakeEngine([1] * 100)
    engine.delay = 0.05
    live = serve(engine, request_timeout=0.1)
    live.complete(prompt=[1], max_tokens=100)
    live.complete(prompt=[1], max_tokens=100, stream=True)
    assert samples(live)["request_success_total", "abort"] == 2


def test_failures_are_counted_apart(serve):
    engine = FakeEngine([1, 2, 3])
    engine.break_after = 1
    live = serve(engine)
    live.complete(prompt=[1])
    assert samples(live)["request_success_total", "error"] == 1
