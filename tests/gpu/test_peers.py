"""Ranks that exchange through each other's memory: sharing one GPU, and on a GPU each where there are two."""

import random
import time
from statistics import median

import pytest
import torch

from kernels import hopper
from kernels.hopper import decode, join, sample
from kernels.hopper import prefill as of_prefill
from kernels.hopper.linear import pack
from kernels.ops import Norm, Peers, Router
from tests.gpu.test_sampler import OPTIONS, case
from tests.harness import ALONE, FULL_WIDTH, SMALL, InProcess, prompt_of
from tests.ranks import together

pytestmark = pytest.mark.gpu

EPS = 1e-5
HIDDEN = 2880
MOST_ROWS, MOST_TOKENS = 128, 2048
on_gpus = pytest.mark.parametrize(
    "gpus",
    [
        pytest.param(1, id="one_gpu"),
        pytest.param(
            2,
            id="two_gpus",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host"),
        ),
    ],
)


def draws(*shape, seed, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16()


def summed(partials):
    """Each rank's outputs [T, n, H] -> what the ranks must add up to, as one [T, 1, H]: in order, rounded twice."""
    total = None
    for own in partials:
        row = own[:, 0].float()
        for n in range(1, own.shape[1]):
            row = row + own[:, n].float()
        row = row.bfloat16().float()
        total = row if total is None else total + row
    return total.bfloat16().unsqueeze(1)


def check_sums(ranks, device):
    alone = Peers(ALONE)
    for hidden, experts in ((HIDDEN, 32), (HIDDEN, 128), (256, 8)):
        peers = join(ranks, MOST_ROWS, MOST_TOKENS, 16, 0, hidden, device)
        norm = Norm(draws(hidden, seed=1).float(), EPS)
        router = Router(draws(experts, hidden, seed=2, scale=0.03), draws(experts, seed=3), 4)
        identity = pack(torch.eye(hidden, device=device).bfloat16())
        for turn in range(3):
            for tokens, prefill in [
                (1, False),
                (2, False),
                (7, False),
                (17, True),
                (64, False),
                (100, False),
                (1, True),
                (300, True),
                (MOST_ROWS, False),
                (MOST_TOKENS, True),
            ]:
                ops, x = of_prefill if prefill else decode, draws(tokens, hidden, seed=turn)
                partials = [draws(tokens, 1, hidden, seed=10 * tokens + rank) for rank in range(ranks.size)]
                own = partials[ranks.rank][:, 0]
                if not prefill:  # then the kernel that computes it sends it
                    own = ops.linear_partial(own, identity, peers)
                *rows, routing = ops.add_norm_route(x, own, norm, router, peers)
                *expected, expected_routing = ops.add_norm_route(x, summed(partials)[:, 0], norm, router, alone)
                for left, right in zip((*rows, *routing), (*expected, *expected_routing), strict=True):
                    assert torch.equal(left, right), (hidden, tokens, prefill, "route")
                outputs = [draws(tokens, 4, hidden, seed=20 * tokens + rank) for rank in range(ranks.size)]
                rows = ops.add_norm(x, outputs[ranks.rank], norm, peers)
                for left, right in zip(rows, ops.add_norm(x, summed(outputs), norm, alone), strict=True):
                    assert torch.equal(left, right), (hidden, tokens, prefill)
    with pytest.raises(ValueError, match="more rows"):
        decode.add_norm(draws(5000, 256, seed=0), draws(5000, 1, 256, seed=0), norm, peers)


@on_gpus
def test_every_rank_holds_the_sum_in_the_order_of_ranks(gpus):
    together(check_sums, 2, gpus=gpus)


def check_replays(ranks, device, replays):
    """A chain whose result depends on every exchange before, in graphs of many sizes; one rank dawdles now and then."""
    peers = join(ranks, MOST_ROWS, 256, 16, 0, HIDDEN, device)
    norm = Norm(draws(HIDDEN, seed=1).float(), EPS)
    router = Router(draws(32, HIDDEN, seed=2, scale=0.03), draws(32, seed=3), 4)
    identity = pack(torch.eye(HIDDEN, device=device).bfloat16())
    buckets = [(1, False), (2, False), (8, False), (64, False), (100, True), (256, True)]
    every = [draws(256, 1, HIDDEN, seed=10 + rank) for rank in range(ranks.size)]
    total = summed(every)

    def chain(state, partial, peers, tokens, prefill):
        ops, own = of_prefill if prefill else decode, partial[:tokens, 0]
        own = own if prefill else ops.linear_partial(own, identity, peers)
        _, h, routing = ops.add_norm_route(state[:tokens], own, norm, router, peers)
        # What is fed to the next exchange is the same on every rank, but for its partial sum.
        _, h = ops.add_norm(h, partial[:tokens], norm, peers)
        state[:tokens] = h * routing.weights[:, :1].bfloat16()

    def captured(state, partial, peers):
        graphs = []
        for tokens, prefill in buckets:
            chain(state, partial, peers, tokens, prefill)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain(state, partial, peers, tokens, prefill)
            graphs.append(graph)
        return graphs

    states = [draws(256, HIDDEN, seed=4) for _ in range(2)]
    graphs = captured(states[0], every[ranks.rank], peers)
    expected = captured(states[1], total, Peers(ALONE))
    assert torch.equal(*states)
    order, pauses, stream = random.Random(5), random.Random(6 + ranks.rank), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for number in range(replays):
            bucket, late = order.randrange(len(buckets)), pauses.randrange(50)
            if late == 0:
                torch.cuda._sleep(pauses.randrange(1_000_000))  # cycles
            elif late == 1:
                time.sleep(pauses.random() / 100)
            graphs[bucket].replay()
            expected[bucket].replay()
            if number % 500 == 499:
                assert torch.equal(*states), number
    assert torch.equal(*states)


@on_gpus
def test_ten_thousand_replays_of_changing_buckets_and_a_late_rank(gpus):
    together(check_replays, 2, 10_000, gpus=gpus)


def check_samples(ranks, device):
    peers, seen = join(ranks, MOST_ROWS, 64, 16, 0, 256, device), []
    for vocab, rows in ((201088, 64), (201088, 3), (1001, 13), (1000, 64), (39, 3), (201088, 13)):
        names = [list(OPTIONS)[(row + rows) % len(OPTIONS)] for row in range(rows)]
        for dtype in (torch.bfloat16, torch.float32):
            logits, *rest = case(vocab, names, dtype, masked=True)
            width = -(-vocab // ranks.size)
            shard = torch.full((rows, width), torch.nan, dtype=dtype, device=device)  # past the last: never read
            own = logits[:, ranks.rank * width : (ranks.rank + 1) * width]
            shard[:, : own.shape[1]] = own
            for _ in range(3):
                torch.cuda.synchronize()
                ranks.smallest(0)  # in a step the other exchanges lie between
                sampled, expected = sample(shard, *rest, peers), sample(logits, *rest, Peers(ALONE))
                assert torch.equal(sampled[0], expected[0]), (vocab, rows, dtype)
                assert torch.equal(sampled[2], expected[2]), (vocab, rows, dtype)
                for n in (1, 3):
                    torch.testing.assert_close(sampled[n], expected[n], atol=1e-5, rtol=1e-5)
                seen.append([values.cpu().tolist() for values in sampled])
    return seen


@on_gpus
def test_a_vocabulary_in_shards_draws_what_a_whole_one_does(gpus):
    first, second = together(check_samples, 2, gpus=gpus)
    assert first == second


def generate(ranks, device, shape, prompts, options):
    engine = InProcess(shape, dtype=torch.bfloat16, device=device, ops=hopper, poison=False, ranks=ranks, **options)
    together = [engine.submit(prompt, max_tokens=24, logprobs=5, **extra) for prompt, extra in prompts]
    engine.run()
    alone = []
    for prompt, extra in prompts:
        alone.append(engine.submit(prompt, max_tokens=24, logprobs=5, **extra))
        engine.run()
    answer = [[(delta.tokens, delta.logprobs) for delta in engine.deltas[id]] for id in (*together, *alone)]
    return answer[: len(prompts)], answer[len(prompts) :]


@on_gpus
@pytest.mark.parametrize("shape", ["small", "full width"])
def test_two_ranks_answer_as_one_does_with_the_same_bytes_on_both(gpus, shape):
    shape = {"small": SMALL, "full width": FULL_WIDTH}[shape]
    options = {"decode_rows": (1, 4, 16), "prefill_tokens": (64, 256), "prefix_cache": False}
    prompts = [(prompt_of(1 + 37 * n % 300, shape.vocab, n), {}) for n in range(6)]
    prompts += [(prompt, {"temperature": 0.8, "top_p": 0.9, "seed": n}) for n, (prompt, _) in enumerate(prompts)]
    whole, _ = together(generate, 1, shape, prompts, options, gpus=1)[0]
    answers = together(generate, 2, shape, prompts, options, gpus=gpus)
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][1]  # alone as among others
    same, apart = 0, []
    for one, two, (_, extra) in zip(whole, answers[0][0], prompts, strict=True):
        for (token, left), (other, right) in zip(one, two, strict=True):
            best = dict(zip(left[0].top_ids, left[0].top_logprobs, strict=True))
            apart += [
                abs(best[id] - value)
                for id, value in zip(right[0].top_ids, right[0].top_logprobs, strict=True)
                if id in best
            ]
            if token != other:  # sums in another order: of greedy tokens a near tie
                assert extra or left[0].logprob - best[other[0]] < 0.5
                break
            same += 1
    assert median(apart) < 0.1
    assert same > 0.5 * sum(len(one) for one in whole)
