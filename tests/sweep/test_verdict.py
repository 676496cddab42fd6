"""What rows become: a verdict, files, a comparison, commands that give the configuration again."""

import math
import shlex

import numpy as np
import pytest
import scipy.stats
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from conf.schema import BucketsConfig, Config, ConfigError, KernelsConfig, ModelConfig, Weights, load
from sweep import compare, plots, settings, verdict
from sweep.command import identity, overrides
from sweep.fit import misfit
from sweep.report import html, markdown
from sweep.settings import SweepConfig
from tests.sweep import drift


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
        "together": "now",
        "workload": {"prompt_tokens": 256},
        "settings": {"buckets.decode_rows": [1, 2], "buckets.pages": None, "tp": 2},
        "repeats": [figures | {"tpot_p50_ms": tpot + spread * shift} for shift in (-1, 0, 1, 0.5)],
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


def decide(*rows, **options):
    return verdict.decide(list(rows), SweepConfig(**options))


def test_what_is_better_over_all_loads_is_chosen():
    slow, fast = [row("a", n, 10.0) for n in (1, 8)], [row("b", n, 9.0, spread=0.2) for n in (1, 8)]
    decided = decide(*slow, *fast)
    assert decided.chosen is fast[0]
    assert decided.words[0] == "Run `python serve.py b`: over 2 loads it is better than a beyond noise."
    assert decided.words[1].startswith("b: tpot_p50_ms 9.9% less, ±")


def test_where_higher_is_better_more_is_chosen():
    decided = decide(row("a", throughput=100), row("b", throughput=110), objective="-tokens_per_s")
    assert decided.chosen["configuration"] == "b"
    assert decided.words[1] == "b: tokens_per_s 10.0% more, ±0.0% (over 1 load)"
    assert decide(row("a", throughput=100), row("b", throughput=90), objective="-tokens_per_s").words[0] == (
        "Keep `python serve.py a`: it is the best."
    )


def test_what_noise_may_explain_or_is_not_worth_it_keeps_the_first():
    noisy = row("b", tpot=9.5)
    noisy["repeats"] = [{"tpot_p50_ms": 9.5 + shift} for shift in (1, -1, 1, -1)]
    assert decide(row("a"), noisy).words[0] == ("Keep `python serve.py a`: the configurations cannot be told apart.")
    little = decide(row("a"), row("b", tpot=9.9))
    assert little.words[0] == "Keep `python serve.py a`: what is better is so by less than 2%."
    assert decide(row("a"), row("b", tpot=9.9), worth=0.005).chosen["configuration"] == "b"
    once = row("b", tpot=5.0)
    once["repeats"] = once["repeats"][:1]
    assert decide(row("a"), once).chosen["configuration"] == "a"


def test_a_configuration_that_is_out_at_one_load_is_not_chosen():
    rows = [
        row("a", 1),
        row("a", 8),
        row("b", 1, 5.0),
        row("b", 8, 5.0, status="overloaded", reason="overloaded: half"),
    ]
    decided = decide(*rows)
    assert decided.words == [
        "Keep `python serve.py a`: there is nothing else to choose.",
        "b is out at 8 users (overloaded: half).",
    ]
    assert decide(*rows[2:], *rows[:2]).words[0] == "Run `python serve.py a`: there is nothing else to choose."
    crossed = decide(
        row("a", 1),
        row("a", 8, status="limits", reason="late"),
        row("b", 1, status="limits", reason="late"),
        row("b", 8),
    )
    assert crossed.chosen is None
    assert crossed.words[1:] == ["a is out at 8 users (late).", "b is out at 1 users (late)."]
    assert decide(*rows[:3]).words[1] == "b is out: it was not measured there."


def test_a_load_at_which_no_configuration_is_ok_decides_nothing():
    over = [row(name, 64, status="limits", reason="late") for name in "ab"]
    decided = decide(row("a"), over[0], row("b", tpot=9.0), over[1])
    assert decided.chosen["configuration"] == "b"


def test_no_configuration_is_recommended_without_a_row_that_is_ok():
    none = decide(row("tp=2", status="failed", reason="it did not start"), row("a", status="undecided", reason="p99"))
    assert none.words == ["No configuration can be recommended: a: p99; tp=2: it did not start"]
    assert none.chosen is None


def test_only_what_was_measured_together_is_compared():
    decided = decide(row("a"), row("b", tpot=5.0) | {"together": "yesterday"})
    assert decided.chosen["configuration"] == "a"
    assert decided.words[1] == "b was measured at another time: sweep.fresh=true tells."


def test_an_objective_without_a_value_in_each_repeat_decides_nothing():
    few = row("b", tpot=5.0)
    few["repeats"] = [figures | {"tpot_p99_ms": None} for figures in few["repeats"]]
    decided = decide(row("a"), few, objective="tpot_p99_ms")
    assert decided.words == ["Keep `python serve.py a`: tpot_p99_ms has no value in each repeat of each load."]


def test_drift_between_repeats_is_no_noise():
    """The same difference in each repeat, whatever the level."""
    shares, half = verdict.differences(np.array([[1.0, 0.9], [2.0, 1.9], [3.0, 2.9], [9.0, 8.9]]))
    assert shares == pytest.approx([-0.1])
    assert half == pytest.approx(0, abs=1e-9)


def test_the_interval_of_a_single_difference_is_that_of_a_paired_t_test():
    pairs = np.array([[1.0, 1.2], [1.1, 1.0], [0.9, 1.3], [1.0, 1.1]])
    shares, half = verdict.differences(pairs)
    interval = scipy.stats.ttest_rel(pairs[:, 1], pairs[:, 0]).confidence_interval()
    assert (shares[0] - half, shares[0] + half) == pytest.approx(interval)


def test_a_machine_that_drifts_raises_few_false_alarms_and_hides_no_gain():
    """A bounded form of `python -m tests.sweep.drift`: drift of four deviations, a gain of three."""
    for configurations in (2, 6):
        alarms = {shape: drift.share_chosen(100, shape, configurations, 0) for shape in drift.SHAPES}
        assert np.mean(list(alarms.values())) <= 0.05, alarms
        assert max(alarms.values()) <= 0.09, alarms  # of a hundred trials
        for shape in drift.SHAPES:
            assert drift.share_chosen(100, shape, configurations, drift.GAIN) >= 0.6, shape


def test_the_report_tells_how_far_the_first_row_drifted():
    assert verdict.drift([row("x", status="failed") | {"repeats": []}, row("a")], "tpot_p50_ms") == (
        "a, 1 users, first and last of all: tpot_p50_ms 9.9 and 10.05 (+1.5%)."
    )


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
    best = ROWS[3]
    assert OmegaConf.create(verdict.buckets_yaml(best)) == {"decode_rows": [1, 2]}


def test_a_choice_is_deployed_with_its_buckets_and_never_with_random_weights(hydra):
    words = ["buckets=balanced", "model=gpt-oss-20b", "model.weights=random", "kernels.device=cuda", "tp=2"]
    patch = OmegaConf.to_container(
        OmegaConf.create(verdict.deploy_patch(row(" ".join([*words, "server.max_queue=9"]))))
    )
    assert patch[0] == {
        "op": "test",
        "path": "/spec/template/spec/containers/0/resources/limits/nvidia.com~1gpu",
        "value": "2",
    }
    assert {(step["op"], step["path"]) for step in patch[1:]} == {("add", "/spec/template/spec/containers/0/args/-")}
    assert [step["value"] for step in patch[1:]] == ["buckets.decode_rows=[1,2]", "server.max_queue=9"]


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
    once = [row("a", 1, 10, spread=math.nan)]  # too few requests: nobody knows the noise
    assert compare.changes(once, [row("a", 1, 1)]) == ["a · 1 users: nothing beyond noise"]


def test_a_comparison_goes_by_what_was_measured_and_not_by_its_name():
    renamed = row("defaults", 1, 10.0) | {"identity": "a"}
    assert compare.changes([row("a", 1, 9.0)], [renamed])[0].startswith("defaults · 1 users: tpot_p50_ms 9 → 10")
    longer = row("a") | {"workload": {"prompt_tokens": 512}}
    assert compare.changes([row("a")], [longer]) == ["a · 1 users: new", "a · 1 users: no longer there"]


def test_a_comparison_with_what_only_has_the_same_name_is_refused():
    other = row("defaults") | {"identity": "x", "settings": row("a")["settings"] | {"buckets.decode_rows": [4]}}
    longer = row("defaults") | {"workload": {"prompt_tokens": 512}}
    for before, message in (
        (other, r"another configuration in old: buckets\.decode_rows was \[4\], and is \[1, 2\]"),
        (longer, "another workload in old: prompt_tokens was 512, and is 256"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare.require_alike([before], row("defaults"), "old")
        compare.require_alike([before, row("defaults")], row("defaults"), "old")  # both were measured
        compare.require_alike([before], row("b"), "old")


def test_a_folder_without_a_sweep_or_of_an_older_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"sweep\.compare: got .*, allowed: a folder with the results\.jsonl"):
        compare.earlier(str(tmp_path))
    (tmp_path / "results.jsonl").write_text('{"key": "a", "status": "ok", "figures": {}}')
    with pytest.raises(ConfigError, match="measure it again"):
        compare.earlier(str(tmp_path))


def step(rows, ms, ends, share):
    figures = {"ms": ms, "ms_range": ends, "tokens_per_s": 1e3 * rows / ms, "bytes": 1e9, "share_of_floor": share}
    return {"kind": "decode", "size": rows} | figures


def test_the_report_tells_every_row_and_its_page_needs_no_other_file(tmp_path):
    (tmp_path / "pareto.png").write_bytes(b"picture")
    failed = row("tp=4", status="failed", reason="no GPU") | {"figures": {}}
    broke = row("tp=2", status="limits", reason="errors 1.0% > 0.0%", error="HTTP 500")
    environment = {"device": "H100", "gpus": [], "cores": 2, "commit": "abc", "python": "3.11", "packages": {}}
    steps = {
        "buckets=latency": {
            "read_bandwidth": 2e12,
            "steps": [step(1, 1.0, (0.9, 1.1), 0.5), step(2, 3.0, (2.0, 3.3), 0.17), step(4, 3.2, (3.1, 3.3), 0.16)],
        }
    }
    used = [
        {"kind": "decode", "size": size, "steps": 500, "rows_used": 500 * size, "rows_padded": 0} for size in (1, 2)
    ]
    rows = [ROWS[0] | {"buckets": used}, failed, broke]
    page = markdown(
        rows,
        SweepConfig(),
        environment,
        steps,
        ["pareto.png"],
        verdict.Verdict(["Keep `x`.", "b: 1% more"], None),
        None,
    )
    assert "Keep `x`.\n\n- b: 1% more" in page
    assert "| buckets=latency | 1 users |" in page
    assert "- tp=4, 1 users: failed, no GPU" in page
    assert "- tp=2, 1 users: limits, errors 1.0% > 0.0%; HTTP 500" in page
    assert "| decode 1 | 1.00 | 1,000 | 1.00 | 50% | 500 | 100% | 0 | 2.00 ms (1.00 s) |" in page
    assert "| decode 2 | 3.00 | 667 | 1.00 | 17% | 500 | 100% | 0 | noise |" in page
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
