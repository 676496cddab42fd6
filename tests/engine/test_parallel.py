"""Ranks on the CPU, through gloo: the tokens of one rank, and the same bytes on all of them."""

from dataclasses import replace

import pytest
import torch

from demo.checkpoint import DEMO
from tests.harness import TINY, InProcess, prompt_of
from tests.ranks import together

# Neither the vocabulary nor the blocks of intermediate columns divide among the ranks; of 8 ranks 3 have no block.
ODD = replace(TINY, layers=2, heads=16, kv_heads=8, vocab=515, windows=(16, None))
SAMPLED = [{}, {"temperature": 0.9}, {"temperature": 1.1, "top_k": 40, "top_p": 0.9}, {"repetition_penalty": 1.2}]


def generate(ranks, device, shape):
    sizes = {"decode_rows": (1, 4), "prefill_tokens": (64,), "prompt_logprobs": (64,), "max_context": 256}
    engine = InProcess(shape, device=device, ranks=ranks, **sizes)
    ids = [
        engine.submit(prompt_of(1 + 29 * n, shape.vocab), max_tokens=5, logprobs=3, seed=n, **options)
        for n, options in enumerate(SAMPLED)
    ]
    scored = [engine.submit(prompt_of(50 * n, shape.vocab), max_tokens=0, prompt_logprobs=3) for n in (1, 2)]
    engine.run()
    answers = [(engine.tokens(id), [delta.logprobs for delta in engine.deltas[id]]) for id in ids]
    return answers, [engine.prompt_logprobs(id) for id in scored]


@pytest.mark.parametrize(("shape", "sizes"), [(replace(DEMO, vocab=4096), (2,)), (ODD, (4, 8))], ids=["demo", "odd"])
def test_ranks_answer_as_one_does(shape, sizes):
    (whole,) = together(generate, 1, shape, gpus=0)
    for size in sizes:
        answers = together(generate, size, shape, gpus=0)
        assert all(answer == answers[0] for answer in answers[1:]), size
        assert [tokens for tokens, _ in answers[0][0]] == [tokens for tokens, _ in whole[0]], size
        for mine, expected in zip(answers[0][1], whole[1], strict=True):
            assert len(mine) == len(expected) > 40
            for entry, other in zip(mine, expected, strict=True):
                torch.testing.assert_close(torch.tensor(entry.logprob), torch.tensor(other.logprob), atol=1e-4, rtol=0)
                torch.testing.assert_close(entry.top_logprobs, other.top_logprobs, atol=1e-4, rtol=0)
