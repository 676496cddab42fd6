"""The demo model's training forward and its rounding, against the engine that will serve it; and that it learns."""

from itertools import islice

import pytest
import torch

from conf.schema import RandomShape
from demo import bundle
from demo.checkpoint import config_json
from demo.training import model, mxfp4, packing
from demo.training.data import STOPS, index_of, rows, training
from demo.training.train import Muon, is_matrix
from engine.architecture import Architecture
from engine.model import rope_tables
from kernels.reference import dequantize
from tests.harness import InProcess

SMALL = Architecture.from_random_shape(
    RandomShape(
        num_hidden_layers=4,
        num_local_experts=6,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens():
    documents = training(0)
    return sorted({*STOPS} | {token for _ in range(300) for part in next(documents) for token in part})


@pytest.fixture(scope="module")
def weights(tokens):
    torch.manual_seed(0)
    drawn = model.initial(SMALL, len(tokens) + 1, 0, "cpu")
    for name, p in drawn.items():  # nothing stays at a value that hides a mistake
        if "bias" in name or "sinks" in name:
            p.normal_(0, 0.3)
        if "norm" in name:
            p.normal_(1, 0.2)
    return drawn


@pytest.fixture(scope="module")
def packed(weights, tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "model.safetensors"
    return path, packing.write(path, weights, tokens)


@pytest.fixture(scope="module")
def engine(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expanded")
    bundle.expand(bundle.read(*packed), config_json(SMALL, "huggingface"), folder)
    return InProcess(folder)


@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 300.0])
def test_packed_values_are_the_rounded_ones(scale):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 128, generator=generator) * torch.rand(40, 1, generator=generator) * scale
    weight[0] = 0
    blocks, scales = mxfp4.pack(weight)
    assert torch.equal(dequantize(blocks, scales, torch.float32), mxfp4.rounded(weight))
    assert torch.equal(dequantize(blocks, scales, torch.bfloat16), mxfp4.rounded(weight).bfloat16())


def test_rounding_again_changes_nothing_and_each_value_goes_to_its_nearest():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    once = mxfp4.rounded(weight)
    assert torch.equal(mxfp4.rounded(once), once)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([grid, -grid])
    _, scales = mxfp4.pack(weight)
    power = torch.ldexp(torch.ones(scales.shape), scales.int() - 127).repeat_interleave(32, -1)
    nearest = (weight.unsqueeze(-1) - grid * power.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((weight - once).abs(), nearest, rtol=1e-5, atol=1e-7)


def test_the_gradient_passes_the_rounding():
    weight = torch.randn(4, 32).requires_grad_()
    mxfp4.rounded(weight).square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * mxfp4.rounded(weight.detach()))


def test_a_bundle_gives_back_what_was_packed(packed, weights, tokens):
    unpacked, same_tokens = packing.unpack(bundle.read(*packed))
    assert same_tokens == tokens
    for name, p in weights.items():
        expected = mxfp4.rounded(p) if name.endswith(packing.EXPERTS) else p.bfloat16().float()
        assert torch.equal(unpacked[name], expected), name


def test_training_and_engine_compute_the_same_logits(packed, tokens, engine):
    weights, _ = packing.unpack(bundle.read(*packed))
    cos, sin = rope_tables(SMALL, 512, CPU)
    compact, documents, _ = next(rows(training(7), index_of(tokens)))
    row, numbers = torch.tensor(compact)[None].long(), torch.tensor(documents)[None]
    logits, _ = model.forward(weights, SMALL, row, numbers, cos, sin)
    known = [*tokens, next(token for token in range(1000) if token not in tokens)]
    for number in range(documents.max() + 1):
        at = documents == number
        expected = engine.all_logits([known[token] for token in compact[at]], 256)
        torch.testing.assert_close(logits[0, at], expected[:, known], rtol=1e-4, atol=1e-4)
        unknown = expected[:, [token for token in range(5000) if token not in tokens]]
        assert torch.equal(unknown, unknown[:, :1].expand_as(unknown))  # they share one row


def test_training_and_engine_say_the_same(packed, tokens, engine):
    weights, _ = packing.unpack(bundle.read(*packed))
    cos, sin = rope_tables(SMALL, 512, CPU)
    documents, index = training(8), index_of(tokens)
    prompts = list(islice((prompt for prompt, _ in documents if set(prompt) <= {*tokens}), 4))
    limit = max(map(len, prompts)) + 8
    compact, stops = [index[prompt].tolist() for prompt in prompts], index[list(STOPS)].tolist()
    generated = model.generate(weights, SMALL, compact, stops, limit, cos, sin)
    for prompt, compact_answer in zip(prompts, generated, strict=True):
        answer = [tokens[token] for token in compact_answer]
        (expected,) = engine.generate(prompt, max_tokens=len(answer))
        assert answer == expected


def test_a_few_steps_lower_the_loss(tokens):
    torch.manual_seed(0)
    weights = {n: p.requires_grad_() for n, p in model.initial(SMALL, len(tokens) + 1, 0, "cpu").items()}
    muon = Muon([p for name, p in weights.items() if is_matrix(name)])
    adam = torch.optim.AdamW([p for name, p in weights.items() if not is_matrix(name)], lr=3e-3)
    cos, sin = rope_tables(SMALL, 512, CPU)
    batch = [torch.tensor(part)[None] for part in next(rows(training(1), index_of(tokens)))]
    losses = []
    for step in range(8):
        ready = model.computed(weights, torch.float32, quantised=step >= 4)
        cross, uneven = model.loss(ready, SMALL, batch[0].long(), batch[1], batch[2], cos, sin)
        losses.append(cross.item())
        for p in weights.values():
            p.grad = None
        (cross + 0.01 * uneven).backward()
        muon.step(2e-3)
        adam.step()
    assert losses[-1] < 0.8 * losses[0]
