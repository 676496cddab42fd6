"""Every bucket's step on its own."""

import json
import subprocess
import sys

import pytest

from conf.schema import RandomShape
from engine.architecture import Architecture
from sweep.steps import decode_bytes
from tests.served import ROOT

TINY = [
    "model.name=tiny",
    "model.weights=random",
    "model.random_shape.num_hidden_layers=2",
    "model.random_shape.num_local_experts=4",
    "model.random_shape.hidden_size=64",
    "model.random_shape.intermediate_size=64",
    "model.random_shape.num_attention_heads=4",
    "model.random_shape.num_key_value_heads=2",
    "model.random_shape.head_dim=16",
    "model.random_shape.vocab_size=512",
    "kernels.device=cpu",
]


@pytest.mark.parametrize("tp", [1, 2])
def test_every_bucket_is_timed_at_a_context_that_its_shape_holds(tp):
    buckets = [
        "buckets.decode_rows=[1,4]",
        "buckets.prefill_tokens=[64,256]",
        "buckets.prefill_sequences=2",
        "buckets.max_context=128",
        "buckets.pages=6",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "sweep.steps", "60", "100", *TINY, *buckets, f"tp={tp}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["read_bandwidth"] is None
    assert [(step["kind"], step["size"], step["context"]) for step in found["steps"]] == [
        ("decode", 1, 100),
        ("decode", 4, 64),
        ("prefill", 64, 64),
        ("prefill", 256, 128),
    ]
    for step in found["steps"]:
        low, high = step["ms_range"]
        assert 0 < low <= step["ms"] <= high
    assert found["steps"][1]["experts_per_layer"] <= 4


def test_the_demo_models_steps_are_timed_too():
    small = ["buckets.decode_rows=[1]", "buckets.prefill_tokens=[64]", "buckets.pages=4", "kernels.device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "sweep.steps", "32", "40", *small], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [step["kind"] for step in json.loads(done.stdout.splitlines()[-1])["steps"]] == ["decode", "prefill"]


def test_what_cannot_start_says_why():
    done = subprocess.run(
        [sys.executable, "-m", "sweep.steps", "64", "64", "model=gpt-oss-20b", "model.path=/nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "/nowhere" in done.stderr


def test_a_steps_bytes_are_what_must_be_read_once():
    shape = Architecture.from_random_shape(RandomShape())
    expert = 2880 * 2880 * 3 * 4.25 / 8
    attention = 2 * 2880 * 64 * (2 * 64 + 2 * 8)
    cache = 2 * 2 * 8 * 64 * (12 * 1024 + 12 * 128)  # every other layer sees its window only
    whole = 24 * attention + 96 * expert + 2 * 201088 * 2880 + cache
    assert decode_bytes(shape, 1, 1024, 96, 1) == pytest.approx(whole)
    assert decode_bytes(shape, 1, 1024, 96, 2) == pytest.approx(whole / 2)
    assert decode_bytes(shape, 3, 1024, 96, 1) - whole == pytest.approx(2 * cache)
