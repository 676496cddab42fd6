"""The order of a step's kernels: what one reads before its wait must not be what its predecessors still write.

A wrong order shows as other bytes than those of the build in which every kernel waits at its first instruction.
"""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from kernels import build, hopper
from tests.harness import FULL_WIDTH, SMALL, InProcess, prompt_of
from tests.ranks import together

pytestmark = pytest.mark.gpu

SOURCES = {path.resolve() for path in Path(hopper.__file__).parent.rglob("*.cu")}
TILED = {path for path in SOURCES if path.name == "tiled.cu"}  # for many rows of a wide model only
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 200, "repetition_penalty": 1.1}


def run(ranks, device, shape, requests, options):
    """An engine that has answered a few requests alone and `requests` at once, and the answers."""
    engine = InProcess(shape, dtype=torch.bfloat16, device=device, ops=hopper, poison=False, ranks=ranks, **options)
    engine.buffers.keys.zero_()
    engine.buffers.values.zero_()
    torch.cuda.synchronize()  # graphs run on a stream of their own: the first step must not write before this
    for length in options["prefill_tokens"]:  # through every prefill bucket
        engine.generate(prompt_of(length, shape.vocab, seed=99), max_tokens=3)
    for length in options["prompt_logprobs"]:
        engine.generate(prompt_of(length, shape.vocab, seed=99), max_tokens=3, prompt_logprobs=5)
    for n in range(requests):
        sampling = SAMPLED | {"seed": n} if n % 2 else {}
        engine.submit(prompt_of(1 + 37 * n % 300, shape.vocab, n), max_tokens=8 + n % 30, logprobs=5, **sampling)
    engine.run()
    answers = {
        id: [(delta.tokens, delta.logprobs, delta.prompt_logprobs) for delta in deltas]
        for id, deltas in engine.deltas.items()
    }
    return engine, answers


def compare(ranks, device, sources, *arguments):
    """The same requests in both build modes; raises AssertionError where bytes differ, or where others than these
    sources were compiled to wait first."""
    loaded, cubin = set(), build.cubin

    def record(source, defines):
        if "WAIT_FIRST" in defines:
            loaded.add(source.resolve())
        return cubin(source, defines)

    usual, expected = run(ranks, device, *arguments)
    with patch.object(build, "cubin", record), build.wait_first():
        waiting, answers = run(ranks, device, *arguments)
    assert loaded == sources  # or the comparison would be of the usual build with itself
    assert all(bucket.steps for bucket in usual.core.stats().buckets)
    assert answers == expected
    for name in ("keys", "values"):
        written, other = getattr(usual.buffers, name), getattr(waiting.buffers, name)
        assert torch.equal(written[:, 1:], other[:, 1:]), name  # page 0 is the scratch page


@pytest.mark.parametrize(
    ("shape", "ranks", "rows", "sources"),
    [
        (SMALL, 1, (1, 2, 4, 8, 16, 32, 64), SOURCES - TILED),
        (SMALL, 2, (1, 4, 16), SOURCES - TILED),
        (FULL_WIDTH, 1, (1, 4, 16, 80), SOURCES),
    ],
    ids=["small, 64 requests", "small, two ranks", "full width"],
)
def test_a_step_has_the_same_bytes_when_every_kernel_waits_first(shape, ranks, rows, sources):
    options = {
        "decode_rows": rows,
        "prefill_tokens": (64, 256, 1024),
        "prompt_logprobs": (64, 512),
        "sequences": 16,
        "pages": 700,
        "max_context": 2048,
    }
    requests = max(20, rows[-1])
    together(compare, ranks, sources, shape, requests, options, gpus=1)
