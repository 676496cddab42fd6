"""How a rank gets ready: pages from the memory there is, the warm-up's bytes, what stops the start."""

import dataclasses

import pytest
import torch

from conf.limits import SCRATCH_PAGE
from conf.schema import ConfigError, compose
from engine import start
from engine.messages import Submit
from engine.parallel import Ranks
from graphs.buckets import Buckets
from graphs.buffers import Buffers
from graphs.plan import SamplingParams
from tests.harness import ALONE

TINY = [
    "model.weights=random",
    "kernels.device=cpu",
    "buckets.decode_rows=[1,2]",
    "buckets.prefill_tokens=[64,128]",
    "buckets.max_context=128",
    *(
        f"model.random_shape.{key}={value}"
        for key, value in {
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 300,
        }.items()
    ),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """Sets what /proc/meminfo says is available, in bytes."""
    file = tmp_path / "meminfo"
    monkeypatch.setattr(start, "MEMORY", file)
    return lambda size: file.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {size // 1024} kB\n")


def test_a_cpus_pages_are_a_fraction_of_the_available_memory_split_among_the_ranks(memory):
    memory(100 * MIB)
    config = compose([*TINY, "buckets.page_memory=0.5", "buckets.max_context=65536"])
    assert start._pages_that_fit(config, MIB, 0, CPU) == 50
    assert start._pages_that_fit(dataclasses.replace(config, tp=2), MIB, 0, CPU) == 25


def test_a_cpu_takes_no_more_pages_than_all_rows_can_fill(memory):
    memory(2**40)
    assert start._pages_that_fit(compose(TINY), MIB, 0, CPU) == 2 * (128 // 64) + 1


def test_a_gpus_pages_are_a_fraction_of_what_steps_and_graphs_leave(monkeypatch):
    free = 1000 * MIB + start.GRAPH_RESERVE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config = compose([*TINY, "buckets.page_memory=0.9"])
    assert start._pages_that_fit(config, 2 * MIB, 200 * MIB, GPU) == 360
    assert start._pages_that_fit(dataclasses.replace(config, tp=2), 2 * MIB, 200 * MIB, GPU) == 360  # a GPU each


class Recorder:
    """Stands in for the model: notes the inputs of each step that is run."""

    def __init__(self):
        self.ran = []

    def step(self, bucket, buffers):
        inputs = buffers.inputs[bucket]
        return lambda: self.ran.append((bucket, inputs.slots.tolist(), inputs.positions.tolist()))


@pytest.mark.parametrize(("rows", "sequences", "score"), [(4, 2, ()), (2, 4, (64, 128))])
def test_the_warm_up_fills_the_largest_steps_and_counts_what_they_take(monkeypatch, rows, sequences, score):
    """The peak counts from the warm-up's own begin: 700 bytes were there before, at most 1900 during it."""
    events = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: events.append("before") or 700)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: events.append("peak") or 1900)
    buckets = Buckets.of([1, rows], [64, 128], sequences, score)
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 2, "vocab": 8, "max_context": 64, "pages": 2}
    model = Recorder()
    buffers = Buffers(buckets=buckets, **shape, device=CPU, dtype=torch.float32)
    assert start._warm_up(model, buffers) == 1200
    assert events == ["before", "reset", "synchronize", "peak"]
    *scoring, (prefill, prefill_slots, positions), (decode, decode_slots, _) = model.ran
    assert [bucket for bucket, _, _ in scoring] == list(buckets.score[-1:])
    assert (prefill, decode) == (buckets.prefill[-1], buckets.decode[-1])
    assert prefill_slots == [0] * 64 + [1] * 64
    assert positions == [*range(64)] * 2
    assert decode_slots == list(range(rows))
    assert (buffers.page_table == SCRATCH_PAGE).all()


def test_without_buckets_for_them_prompts_have_no_log_probabilities():
    ready = start.start(compose([*TINY, "buckets.pages=7", "buckets.prompt_logprobs=[]"]), ALONE, CPU).ready
    assert ready.buckets == {"decode": [1, 2], "prefill": [64, 128]}
    assert not ready.scores_prompts


def test_a_started_engine_says_what_it_has():
    engine = start.start(compose([*TINY, "buckets.pages=7"]), ALONE, CPU)
    ready = engine.ready
    assert (ready.vocab_size, ready.max_context, ready.pages, ready.device, ready.tp) == (300, 128, 7, "cpu", 1)
    assert ready.buckets == {"decode": [1, 2], "prefill": [64, 128], "score": [64, 128]}
    assert ready.scores_prompts
    assert ready.memory["pages"] == 7 * 2 * 2 * 2 * 64 * 32 * 2  # keys and values, layers, kv heads, tokens, D, bytes
    experts = 4 * (3 * 64 * 64 * 17 / 32 + 2 * (2 * 64 + 64))  # MXFP4 and its scales, biases
    attention = 2 * (64 * (4 + 2 * 2) * 32 + (4 + 2 * 2) * 32 + 4 * 32 * 64 + 64) + 4 * 4
    layer = experts + attention + 2 * 4 * 64 + 2 * (4 * 64 + 4)  # norms, router
    assert ready.memory["weights"] == 2 * layer + 2 * 2 * 300 * 64 + 4 * 64
    assert list(ready.phases) == ["weights", "warm-up", "capture"]
    assert engine.core(lambda _: None).stats().pages_total == 6


def test_the_largest_steps_are_captured_first_so_that_the_others_fit_in_their_memory(monkeypatch):
    captured = []

    class Steps:
        def capture(self, bucket, body):
            captured.append(bucket.tokens)

    monkeypatch.setattr(start, "steps_for", lambda buffers, threads: Steps())
    start.start(compose([*TINY, "buckets.pages=7"]), ALONE, CPU)
    assert captured == [128, 128, 64, 64, 2, 1]


@pytest.mark.parametrize(
    ("overrides", "available", "words"),
    [
        (["buckets.max_context=131136"], 2**40, ["buckets.max_context", "131136", "131072"]),
        (["buckets.pages=100000000"], MIB, ["buckets.pages", "100000000"]),
        (["buckets.page_memory=0.01"], MIB, ["buckets.page_memory", "0.01"]),
    ],
)
def test_a_configuration_that_does_not_fit_the_model_or_the_memory_stops_the_start(memory, overrides, available, words):
    memory(available)
    with pytest.raises(ConfigError) as error:
        start.start(compose([*TINY, *overrides]), ALONE, CPU)
    assert all(word in str(error.value) for word in words)


def test_all_ranks_have_as_many_pages_as_the_one_with_the_least_memory():
    class Other(Ranks):
        def smallest(self, number):
            return min(number, 4)

    alone_in_the_group = Other(0, 1, None)
    assert start.start(compose([*TINY, "buckets.pages=7"]), alone_in_the_group, CPU).ready.pages == 4


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = compose([*TINY, "kernels.device=auto", "tp=2"])
    with pytest.raises(ConfigError, match="tp: got 2, allowed: at most 1"):
        start.device_of(config, 1)


def test_what_the_kernels_refuse_is_named_by_its_key():
    config = compose([*TINY, "kernels=hopper", "kernels.device=auto"])
    with pytest.raises(ConfigError, match=r"kernels\.name: got hopper, allowed: reference on a CPU"):
        start.start(config, ALONE, CPU)


def test_an_engines_loop_reads_the_prefix_cache_unless_it_is_told_not_to():
    engine, prompt = start.start(compose([*TINY, "buckets.pages=7"]), ALONE, CPU), [*range(100)]
    for prefix_cache, hits in ((True, 64), (False, 0)):
        core = engine.core(lambda _: None, prefix_cache=prefix_cache)
        for id in range(2):
            core.handle(Submit(id, prompt, SamplingParams(max_tokens=2, seed=0)))
            while core.turn():
                pass
        assert core.stats().prefix_hit_tokens == hits
