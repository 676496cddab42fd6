"""What rows become: a verdict, files, a comparison, commands that give the configuration again."""

import math
import shlex

import pytest
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from conf.schema import BucketsConfig, Config, KernelsConfig, ModelConfig, Weights, load
from sweep import compare, plots, settings, verdict
from sweep.command import identity, overrides
from sweep.fit import misfit
from sweep.report import html, markdown
from sweep.settings import SweepConfig


def row(name, level=1, tpot=10.0, throughput=100.0, status="ok", spread=0.1, **more):
    figures = {
        "tpot_p99_ms": tpot,
        "tpot_mean_ms": tpot,
        "tpot_p50_ms": tpot,
        "ttft_p50_ms": 5.0,
        "ttft_p90_ms": 6.0,
        "ttft_p99_ms": 7.0,
        "e2e_mean_ms": 100 * tpot,
        "tokens_per_s": throughput,
        "tokens_per_s_per_gpu": throughput,
        "tokens_per_s_per_user": 1e3 / tpot,
        "errors": 0,
        "n": 200,
    }
    return {
        "key": f"{name}{level}",
        "identity": name,
        "configuration": name,
        "overrides": name.split(),
        "mode": "closed",
        "level": level,
        "load": f"{level} users",
        "status": status,
        "reason": None,
        "figures": figures,
        "intervals": {name: (number - spread, number + spread) for name, number in figures.items()},
        "device": "H100",
        "on_gpu": True,
        "gpus": 2,
        "start": {},
        "memory": {},
        "buckets_config": {"decode_rows": [1, 2], "pages": None},
        **more,
    }


ROWS = [
    row("buckets=latency", 1, 2.0, 500),
    row("buckets=latency", 8, 4.001, 900),
    row("buckets=balanced", 8, 4.1, 850),
    row("buckets=balanced", 64, 9.0, 4000),
    row("tp=2", 64, 1.0, 9000, "wrong"),
    row("tp=2", 8, 1.0, 900, "limits"),
]


def test_the_front_is_what_nothing_without_fault_beats():
    assert [point["key"] for point in verdict.front(ROWS, "tpot_p99_ms")] == [
        "buckets=latency1",
        "buckets=latency8",
        "buckets=balanced64",
    ]


def test_of_rows_alike_in_cost_or_in_gain_only_the_better_is_on_the_front():
    rows = [row("a", 1, 2.0, 500), row("b", 1, 2.0, 600), row("c", 1, 3.0, 600), row("d", 1, 4.0, 601)]
    assert [point["key"] for point in verdict.front(rows, "tpot_p99_ms")] == ["b1", "d1"]


def test_small_steps_in_cost_do_not_add_up_to_a_choice_that_costs_more():
    rows = [row("a", 1, 2.0, 500), row("b", 1, 2.03, 510), row("c", 1, 2.06, 520)]
    assert [choice["key"] for choice in verdict.choices(rows)] == ["b1"]


def test_choices_differ_by_enough_to_choose_between_them():
    rows = [row("a", 1, 2.0, 500), row("b", 1, 2.03, 510), row("a", 8, 4.0, 530), row("a", 16, 8.0, 700)]
    assert len(verdict.front(rows, "tpot_p99_ms")) == 4
    assert [choice["key"] for choice in verdict.choices(rows)] == ["b1", "a16"]


def test_the_verdict_names_a_target_and_a_command():
    sentences = verdict.words(ROWS)
    assert len(sentences) == 3
    assert sentences[1].startswith("For p99 TPOT ≤ 4.01 ms: `python serve.py buckets=latency` with 8 users (")
    none = verdict.words([row("tp=2", status="failed", reason="it did not start")])
    assert none == ["No configuration can be recommended: tp=2: it did not start"]


@pytest.mark.parametrize(
    ("number", "target"),
    [(4.001, "4.01"), (4.0, "4"), (1.1, "1.1"), (12.34, "12.4"), (1234.5, "1240"), (0.01234, "0.0124")],
)
def test_a_target_is_never_below_what_was_measured(number, target):
    assert verdict.round_up(number) == target


def test_a_verdict_without_a_p99_of_every_row_is_by_the_median():
    few = row("b", 1, 3.0, 600)
    few["figures"] |= {"tpot_p99_ms": None, "ttft_p99_ms": None, "n": 24}
    sentences = verdict.words([row("a", 1, 2.0, 500), few])
    assert sentences[1].startswith("For a median TPOT ≤ 3 ms: `python serve.py b` with 1 users (")
    assert sentences[1].endswith("p90 TTFT 6 ms, 24 requests).")
    assert verdict.words([row("a", status="undecided", reason="p99 TTFT")]) == [
        "No configuration can be recommended: a: p99 TTFT"
    ]


def test_the_knee_has_the_most_throughput_by_delay():
    loads = [row("a", 1, 10, 100), row("a", 4, 12, 380), row("a", 16, 40, 500), row("a", 64, 160, 510)]
    assert verdict.knee(loads)["level"] == 4


def test_latencies_of_every_size_can_be_told_apart_in_the_picture(tmp_path, monkeypatch):
    scales = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: scales.append([a.get_yscale() for a in self.axes]))
    alike, slow = row("a", 1, 10.0), row("a", 8, 20.0)
    for late in (7.0, 7000.0, 0.0):
        slow["figures"] = slow["figures"] | {"ttft_p99_ms": late}
        assert plots.draw(tmp_path, [alike, slow], {}) == ["pareto.png", "latency.png"]
    assert [panels[0] for panels in scales[1::2]] == ["linear", "log", "linear"]
    assert {panels[1] for panels in scales[1::2]} == {"linear"}


def test_files_to_use_as_they_are():
    best = verdict.choices(ROWS)[-1]
    assert OmegaConf.create(verdict.buckets_yaml(best)) == {"decode_rows": [1, 2]}
    assert OmegaConf.create(verdict.kubernetes_values(best)) == {
        "args": ["server.host=0.0.0.0", "buckets=balanced"],
        "resources": {"limits": {"nvidia.com/gpu": 2}},
    }
    assert "resources" not in OmegaConf.create(verdict.kubernetes_values(best | {"on_gpu": False}))


def test_a_comparison_tells_what_lies_beyond_noise():
    old = [row("a", 1, 10.0), row("b", 1, 10.0), row("c"), row("d")]
    new = [row("a", 1, 9.0), row("b", 1, 10.13), row("c", status="failed", figures={}), row("e")]
    lines = compare.changes(old, new)
    assert lines[0] == (
        "a · 1 users: tpot_p50_ms 10 → 9 (-10.0%, noise ±1.4%), tpot_p99_ms 10 → 9 (-10.0%, noise ±1.4%)"
    )
    assert lines[1] == "b · 1 users: nothing beyond noise"  # 0.13, within the root of 0.1² + 0.1²
    assert lines[2] == "c · 1 users: ok → failed"
    assert lines[-2:] == ["e · 1 users: new", "d · 1 users: no longer there"]
    once = [row("a", 1, 10, spread=math.nan)]  # one repeat: nobody knows its noise
    assert compare.changes(once, [row("a", 1, 1)]) == ["a · 1 users: nothing beyond noise"]


def test_the_report_tells_every_row_and_its_page_needs_no_other_file(tmp_path):
    (tmp_path / "pareto.png").write_bytes(b"picture")
    failed = row("tp=4", status="failed", reason="no GPU") | {"figures": {}}
    broke = row("tp=2", status="limits", reason="errors 1.0% > 0.0%", error="HTTP 500")
    environment = {"device": "H100", "gpus": [], "cores": 2, "commit": "abc", "python": "3.11", "packages": {}}
    steps = {
        "buckets=latency": {
            "read_bandwidth": 2e12,
            "steps": [
                {"kind": "decode", "size": 1, "ms": 1.0, "bytes": 1e9, "tokens_per_s": 1000, "share_of_floor": 0.5},
                {"kind": "decode", "size": 4, "ms": 3.0, "bytes": 1e9, "tokens_per_s": 1333, "share_of_floor": 0.17},
            ],
        }
    }
    used = [{"kind": "decode", "size": 1, "steps": 500, "rows_used": 500, "rows_padded": 0}]
    rows = [ROWS[0] | {"buckets": used}, failed, broke]
    page = markdown(rows, SweepConfig(), environment, steps, ["pareto.png"], None)
    assert "| buckets=latency | 1 users |" in page
    assert "- tp=4, 1 users: failed, no GPU" in page
    assert "- tp=2, 1 users: limits, errors 1.0% > 0.0%; HTTP 500" in page
    assert "| decode 1 | 1.00 | 1,000 | 1.00 | 50% | 500 | 100% | 0 | 2.00 ms (1.00 s) |" in page
    shown = html(page, tmp_path, "x")
    assert 'src="data:image/png;base64,cGljdHVyZQ=="' in shown
    assert "<table>" in shown


@pytest.fixture
def hydra():
    settings.register()
    with initialize_config_module("conf", version_base="1.3"):
        yield


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["buckets=latency", "tp=2"],
        ["model=gpt-oss-20b", "model.weights=random"],
        ["model=gpt-oss-20b", "model.path='/models/it is, here'"],
        ["buckets.decode_rows=[1,2]", "kernels.dtype=float32"],
        ["model=gpt-oss-120b", "model.weights=random", "buckets=small", "buckets.pages=7"],
        ["server.api_key_file=/keys", "server.drain_seconds=1.5", "server.port=9000"],
    ],
)
def test_overrides_give_the_configuration_again(hydra, given):
    def composed_of(arguments):
        composed = compose("config", overrides=arguments, return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        return load(OmegaConf.masked_copy(composed, ["model", "buckets", "kernels", "server", "tp"])), choices

    config, choices = composed_of(given)
    shortest = overrides(config, choices)
    again, _ = composed_of(shortest)
    assert identity(again) == identity(config)
    assert len(shortest) <= len(given)
    assert not [word for word in shortest if word.startswith(("server.host", "server.port"))]  # the sweep chooses them
    assert shlex.split(shlex.join(shortest)) == shortest


def test_another_address_is_the_same_server_and_anything_else_is_not():
    buckets = BucketsConfig([1], [64], prefill_sequences=1, max_context=512)
    plain = Config(model=ModelConfig("demo", Weights.demo), buckets=buckets, tp=1)
    assert identity(plain) != identity(Config(model=plain.model, buckets=buckets, tp=2))
    moved = Config(model=plain.model, buckets=buckets, tp=1)
    moved.server.port = 9000
    assert identity(plain) == identity(moved)


def test_what_cannot_fit_is_known_before_it_starts():
    gpu = {"name": "H100", "memory": 80 * 2**30}

    def fits(tp=1, gpus=1, experts=32, context=32768):
        config = Config(
            model=ModelConfig("x", Weights.random),
            kernels=KernelsConfig(),
            tp=tp,
            buckets=BucketsConfig([1, 64], [2048], prefill_sequences=16, max_context=context),
        )
        config.model.random_shape.num_local_experts = experts
        return misfit(config, [gpu] * gpus)

    assert fits() is None
    assert fits(tp=2) == "tp=2 needs 2 GPUs, there are 1"
    assert fits(experts=256).startswith("needs 80.9 GiB (weights 79.1, ")
    assert fits(experts=256).endswith("a GPU has 80.0")
    assert fits(tp=2, gpus=2) is None
    assert fits(tp=2, gpus=2, experts=256) is None
