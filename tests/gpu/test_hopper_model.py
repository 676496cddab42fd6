"""The whole model on the Hopper kernels: against reference and transformers, through graphs, alone and among others."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

from demo.checkpoint import write_checkpoint
from graphs import capture
from kernels import hopper, reference
from tests.harness import FULL_WIDTH, SMALL, InProcess, prompt_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def engine(shape, **options):
    return InProcess(shape, **{"dtype": torch.bfloat16, "device": CUDA, "ops": hopper, "poison": False} | options)


@pytest.mark.parametrize("shape", [SMALL, FULL_WIDTH], ids=["small", "full width"])
def test_logits_are_as_close_to_float32_as_the_references(shape):
    prompt = prompt_of(300, shape.vocab)
    with torch.inference_mode():
        ours = engine(shape).all_logits(prompt, chunk=256)
        plain = engine(shape, ops=reference).all_logits(prompt, chunk=256)
        exact = engine(shape, ops=reference, dtype=torch.float32).all_logits(prompt, chunk=256)

    def error(logits):
        return float(((logits - exact).norm(dim=1) / exact.norm(dim=1)).median())

    assert error(ours) <= 1.2 * error(plain), (error(ours), error(plain))


def test_logits_are_as_close_to_float32_as_those_of_transformers(tmp_path):
    """On the same files. Two bfloat16 forwards differ from each other as much as each does from float32: where two
    router logits are nearly equal, another expert is chosen.
    """
    write_checkpoint(tmp_path, replace(FULL_WIDTH, vocab=4096, experts=8), seed=3)
    prompts = [prompt_of(300, 4096, seed) for seed in range(4)]

    def transformers_logits(dtype):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype, attn_implementation="eager"
        ).to(CUDA)
        return torch.cat([model(torch.tensor([prompt], device=CUDA)).logits[0].float() for prompt in prompts])

    with torch.inference_mode():
        hopper_engine = engine(tmp_path)
        ours = torch.cat([hopper_engine.all_logits(prompt, chunk=256) for prompt in prompts])
        theirs, exact = transformers_logits(torch.bfloat16), transformers_logits(torch.float32)
        our_error, their_error = (((x - exact).norm(dim=1) / exact.norm(dim=1)).median() for x in (ours, theirs))
    assert our_error <= 1.2 * their_error, (our_error, their_error)


def test_graphs_replay_the_eager_step(monkeypatch):
    prompts = [prompt_of(length, SMALL.vocab) for length in (1, 5, 64, 65, 130, 256, 300)]
    replayed = engine(SMALL).generate(*prompts, max_tokens=20)
    monkeypatch.setattr("engine.start.steps_for", capture.EagerSteps)  # takes the same arguments
    eager = engine(SMALL)
    assert isinstance(eager.steps, capture.EagerSteps)
    assert eager.generate(*prompts, max_tokens=20) == replayed


def test_tokens_through_graphs_are_the_same_bytes_alone_and_among_63_others():
    options = {
        "decode_rows": (1, 2, 4, 8, 16, 32, 64),
        "prefill_tokens": (64, 256, 1024),
        "sequences": 16,
        "pages": 700,
    }
    prompts = [prompt_of(1 + (n * 37) % 300, SMALL.vocab, n) for n in range(64)]
    sampled = {"temperature": 0.9, "top_p": 0.95, "top_k": 200}
    together = engine(SMALL, **options)
    ids = [
        together.submit(prompt, max_tokens=8 + n % 30, **(sampled | {"seed": n} if n % 2 else {}))
        for n, prompt in enumerate(prompts)
    ]
    together.run()
    used = {(b.kind, b.size) for b in together.core.stats().buckets if b.steps}
    assert {("decode", rows) for rows in options["decode_rows"]} <= used
    alone = engine(SMALL, prefix_cache=False, **options)
    for n, (id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        extra = sampled | {"seed": n} if n % 2 else {}
        assert alone.generate(prompt, max_tokens=8 + n % 30, **extra)[0] == together.tokens(id), n


def test_unused_pages_and_table_entries_are_never_read():
    prompts = [prompt_of(length, SMALL.vocab) for length in (1, 63, 64, 65, 200, 300)]
    clean, poisoned = engine(SMALL), engine(SMALL, poison=True)
    assert clean.generate(*prompts, max_tokens=70) == poisoned.generate(*prompts, max_tokens=70)
