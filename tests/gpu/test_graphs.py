"""The captured steps on a GPU, with the reference kernels: graphs replay what the eager step does."""

import pytest
import torch

from demo.checkpoint import write_checkpoint
from graphs import capture
from graphs.plan import NO_PAGE
from tests.harness import TINY, InProcess

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, TINY, seed=7)
    return path


def prompts():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, TINY.vocab, (n,), generator=draw).tolist() for n in (1, 5, 64, 65, 130, 256, 300)]


def answers(engine):
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "logprobs": 5, "prompt_logprobs": 3}
    ids = [engine.submit(prompt, max_tokens=20, **({} if n % 2 else sampled)) for n, prompt in enumerate(prompts())]
    engine.run()
    assert engine.pool.used == 0
    return [
        (engine.tokens(id), [delta.logprobs for delta in engine.deltas[id]], engine.prompt_logprobs(id)) for id in ids
    ]


def test_every_bucket_is_captured_and_replays_the_eager_step(folder, monkeypatch):
    graphs = InProcess(folder, dtype=torch.bfloat16, device=CUDA, prompt_logprobs=(64, 256))
    assert isinstance(graphs.steps, capture.GraphSteps)
    monkeypatch.setattr("engine.start.steps_for", capture.EagerSteps)  # takes the same arguments
    eager = InProcess(folder, dtype=torch.bfloat16, device=CUDA, prompt_logprobs=(64, 256))
    assert answers(graphs) == answers(eager)
    used = {(b.kind, b.size): b.steps for b in graphs.core.stats().buckets}
    assert sum(steps > 0 for steps in used.values()) >= 4, used


def test_one_bucket_after_the_other_equals_its_eager_twin_tensor_by_tensor(folder):
    engine = InProcess(folder, dtype=torch.bfloat16, device=CUDA, poison=False, prompt_logprobs=(64,))
    engine.buffers.keys.normal_()
    engine.buffers.values.normal_()
    engine.generate(*prompts(), max_tokens=3)
    table = torch.arange(1, 1 + 8 * engine.buffers.context_pages).view(8, -1)  # no two slots share a page
    engine.buffers.page_table[:8] = table
    state = [engine.buffers.keys, engine.buffers.values, engine.buffers.page_table, engine.buffers.last_token]
    for bucket in engine.buckets.all:
        staging = engine.buffers.staging()
        inputs = staging.inputs[bucket]
        inputs.slots[:] = torch.arange(bucket.tokens).numpy() % engine.buckets.max_rows
        inputs.positions[:] = 100 + torch.arange(bucket.tokens).numpy() // engine.buckets.max_rows
        if bucket.kind == "decode":
            inputs.new_pages[:] = NO_PAGE
        else:
            inputs.sequence_slots[:] = inputs.sample_slots[:] = torch.arange(bucket.sequences).numpy()
            inputs.page_table[:] = table[: bucket.sequences].numpy()
            inputs.tokens[:] = torch.arange(bucket.tokens).numpy() % TINY.vocab
            inputs.targets[:] = inputs.tokens[: len(inputs.targets)]
            sampling = inputs.sampling
            sampling.temperature[:] = sampling.repetition_penalty[:] = sampling.top_p[:] = 1
        before = [tensor.clone() for tensor in state]
        torch.cuda.synchronize()  # graphs run on a stream of their own
        engine.steps.launch(bucket, staging)()
        replayed = [staging.outputs.clone(), staging.scores.clone()] + [tensor.clone() for tensor in state]
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        eager = capture.EagerSteps(engine.buffers, 1)
        eager.capture(bucket, engine.model.step(bucket, engine.buffers))
        eager.launch(bucket, staging)()
        torch.cuda.synchronize()
        for left, right in zip(replayed, [staging.outputs, staging.scores, *state], strict=True):
            assert torch.equal(left, right), bucket


def test_the_gpu_computes_what_the_cpu_does(folder):
    prompt = prompts()[-1]
    with torch.inference_mode():
        exact = InProcess(folder, dtype=torch.float32, poison=False).all_logits(prompt, chunk=256)
        logits = InProcess(folder, dtype=torch.bfloat16, device=CUDA, poison=False).all_logits(prompt, chunk=256).cpu()
    assert ((logits - exact).norm(dim=1) / exact.norm(dim=1)).median() < 3e-2
