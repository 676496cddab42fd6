"""The forward against transformers' GPT-OSS on the same MXFP4 files."""

from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

from demo.checkpoint import write_checkpoint
from kernels import reference
from kernels.ops import TokenPlaces
from tests.harness import TINY, InProcess

SHAPES = {
    "tiny": TINY,
    "wide head, odd widths": replace(
        TINY, layers=2, hidden=160, intermediate=96, heads=4, kv_heads=2, head_dim=64, windows=(128, None)
    ),
    "other constants": replace(
        TINY, layers=2, norm_eps=0.1, swiglu_limit=0.5, experts_per_token=3, rope_truncate=True, windows=(20, None)
    ),
    "many experts": replace(TINY, layers=3, experts=24, heads=16, kv_heads=2, windows=(128, None, 128)),
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, SHAPES[request.param], seed=len(request.param))
    return path


def transformers_model(folder, dtype):
    quantization = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


def prompt_of(length, vocab):
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


# shorter than, equal to and longer than a page, the window and a chunk
LENGTHS = (1, 63, 64, 65, 128, 129, 256, 300)


def errors(logits, expected):
    """Relative error of each token's logits."""
    return (logits.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)


def test_logits_equal_those_of_transformers_in_float32(folder):
    ours, theirs = InProcess(folder, poison=False), transformers_model(folder, torch.float32)
    with torch.inference_mode():
        for length in LENGTHS:
            prompt = prompt_of(length, ours.shape.vocab)
            expected = theirs(torch.tensor([prompt])).logits[0]
            assert errors(ours.all_logits(prompt, chunk=256), expected).max() <= 1e-4, length


def test_logits_in_bfloat16_are_as_close_to_float32_as_those_of_transformers(folder):
    """Two bfloat16 forwards differ from each other as much as each does from float32: where two router logits are
    nearly equal, another expert is chosen. So both are compared with float32.
    """
    ours, theirs = InProcess(folder, dtype=torch.bfloat16, poison=False), transformers_model(folder, torch.bfloat16)
    exact = transformers_model(folder, torch.float32)
    our_errors, their_errors = [], []
    with torch.inference_mode():
        for length in LENGTHS:
            prompt = prompt_of(length, ours.shape.vocab)
            expected = exact(torch.tensor([prompt])).logits[0]
            our_errors.append(errors(ours.all_logits(prompt, chunk=256), expected))
            their_errors.append(errors(theirs(torch.tensor([prompt])).logits[0], expected))
    assert torch.cat(our_errors).median() <= 1.1 * torch.cat(their_errors).median()


def test_greedy_tokens_equal_those_of_transformers_but_for_ties(folder):
    ours, theirs = InProcess(folder), transformers_model(folder, torch.float32)
    prompts = [prompt_of(length, ours.shape.vocab) for length in (3, 64, 130, 300)]
    for prompt, tokens in zip(prompts, ours.generate(*prompts, max_tokens=24), strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        best = logits.max(-1).values
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert torch.all(best - chosen <= 1e-4 * logits.std()), (best - chosen, tokens)


def test_log_probabilities_of_prompts_equal_those_of_transformers(folder):
    ours, theirs = InProcess(folder, prompt_logprobs=(64, 256)), transformers_model(folder, torch.float32)
    prompts = [prompt_of(length, ours.shape.vocab) for length in LENGTHS]
    ids = [ours.submit(prompt, max_tokens=0, prompt_logprobs=5) for prompt in prompts]
    ours.run()
    for id, prompt in zip(ids, prompts, strict=True):
        with torch.inference_mode():
            expected = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found = ours.prompt_logprobs(id)
        assert len(found) == len(prompt) - 1
        for row, target, entry in zip(expected[:-1], prompt[1:], found, strict=True):
            best = row.topk(5)
            at_most = [entry.logprob, *entry.top_logprobs], [float(row[target]), *best.values.tolist()]
            torch.testing.assert_close(*map(torch.tensor, at_most), atol=2e-3, rtol=0)
            torch.testing.assert_close(row[entry.top_ids], best.values, atol=2e-3, rtol=0)
            clear = int((row > row[target] + 2e-3).sum()), int((row > row[target] - 2e-3).sum())
            assert clear[0] < entry.rank <= clear[1]


class Spied(NamedTuple):
    """The reference, with the names of the operations that each kind of step calls."""

    kernels: ModuleType
    calls: dict[str, list[str]]

    def __getattr__(self, name):
        if name not in ("decode", "prefill"):
            return getattr(self.kernels, name)
        return Namespace(getattr(self.kernels, name), self.calls[name])


class Namespace(NamedTuple):
    operations: object
    calls: list[str]

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.operations, name)


def test_each_kind_of_step_runs_its_own_operations():
    spied = Spied(reference, {"decode": [], "prefill": []})
    engine = InProcess(TINY, ops=spied, decode_rows=(1,), prefill_tokens=(64,))
    engine.generate([1, 2, 3], max_tokens=2)  # the first token is drawn by the prefill step
    layer = ["linear", "attention", "linear_partial", "add_norm_route", "experts", "add_norm"]
    head = ["linear"]  # the logits of few rows, by decode's product in both kinds of step
    forward = ["embed_norm", *TINY.layers * layer]
    assert spied.calls == {"decode": head + forward + head, "prefill": forward}


def test_a_token_is_drawn_for_the_position_after_those_that_were_computed(monkeypatch):
    positions, sample = [], reference.sample

    def record(logits, tokens, *arguments):
        positions.append(tokens.positions.tolist())
        return sample(logits, tokens, *arguments)

    monkeypatch.setattr(reference, "sample", record)
    InProcess(TINY, decode_rows=(1,), prefill_tokens=(64,), sequences=1).generate([1, 2, 3], max_tokens=3)
    assert positions == [[3], [4], [5]]


def test_routing_is_reported_layer_by_layer():
    engine, routings = InProcess(TINY, decode_rows=(2,)), []
    places = TokenPlaces(torch.zeros(2).int(), torch.arange(2).int())
    with torch.inference_mode():
        engine.model.forward("decode", engine.buffers, torch.tensor([3, 4]).int(), places, routings.append)
    assert [routing.expert_ids.shape for routing in routings] == [(2, TINY.experts_per_token)] * TINY.layers
    assert len({str(routing.expert_ids.tolist()) for routing in routings}) > 1
