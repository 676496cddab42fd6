"""Log probabilities of given tokens on a GPU: those of kernels.reference, row by row, and of whole prompts."""

from statistics import median

import pytest
import torch

from kernels import hopper, reference
from kernels.hopper.peers import join
from kernels.hopper.scorer import score
from kernels.ops import Peers
from tests.harness import ALONE, FULL_WIDTH, SMALL, InProcess, prompt_of
from tests.ranks import together

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
TOP = 20
gpus_there = torch.cuda.device_count()
on_gpus = pytest.mark.parametrize(
    "gpus", [1, pytest.param(2, marks=pytest.mark.skipif(gpus_there < 2, reason="needs two GPUs"))]
)


def case(vocab, rows, seed=0):
    """Logits with many equals, and NaN past the vocabulary; and targets, of which some are none."""
    chance = torch.Generator().manual_seed(1000 * seed + vocab + rows)
    logits = torch.randn(rows, vocab, generator=chance) * 3
    logits[::3] = logits[::3].round()
    logits[1::4] = torch.linspace(5, -5, vocab)  # the best tokens are one thread's
    logits = torch.nn.functional.pad(logits, (0, -vocab % 8), value=torch.nan).bfloat16()
    targets = torch.randint(0, vocab, (rows,), generator=chance).int()
    targets[2::5] = logits[2::5, :vocab].float().argmax(1).int()
    targets[3::7] = -1
    return logits.to(DEVICE), targets.to(DEVICE)


def check(scored, expected, targets):
    wanted = targets >= 0
    assert torch.equal(scored.ranks[wanted], expected.ranks[wanted])
    assert torch.equal(scored.top_ids[wanted], expected.top_ids[wanted])
    for name in ("logprobs", "top_logprobs"):
        left, right = (getattr(found, name)[wanted] for found in (scored, expected))
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    first = wanted & (scored.ranks == 1)
    assert torch.equal(scored.logprobs[first], scored.top_logprobs[first, 0])  # clients look for the very same number


@pytest.mark.parametrize(("vocab", "rows"), [(20, 5), (100, 9), (512, 33), (1001, 64), (8200, 13), (201088, 40)])
def test_scores_are_those_of_the_reference(vocab, rows):
    logits, targets = case(vocab, rows)
    check(
        score(logits, targets, 0, vocab, TOP, Peers(ALONE)),
        reference.score(logits, targets, 0, vocab, TOP, Peers(ALONE)),
        targets,
    )


def test_a_row_alone_has_the_bytes_it_has_among_others():
    logits, targets = case(201088, 256)
    everyone = score(logits, targets, 0, 201088, TOP, Peers(ALONE))
    for row in (0, 1, 17, 255):
        if targets[row] >= 0:
            alone = score(logits[row : row + 1], targets[row : row + 1], 0, 201088, TOP, Peers(ALONE))
            assert all(torch.equal(mine[0], theirs[row]) for mine, theirs in zip(alone, everyone, strict=True))


def test_what_the_kernel_does_not_take_is_refused():
    logits, targets = case(512, 4)
    for arguments, words in (
        ((logits.float(), targets, 0, 512, TOP), "bfloat16"),
        ((logits[:, :508].contiguous(), targets, 0, 508, TOP), "multiple of 8"),
        ((logits, targets.long(), 0, 512, TOP), "int32"),
        ((logits, targets, 0, 512, 33), "top 33"),
        ((logits, targets, 0, 600, TOP), "too few for 600"),
    ):
        with pytest.raises(ValueError, match=words):
            score(*arguments, Peers(ALONE))


def check_shards(ranks, device):
    peers, seen = join(ranks, 16, 64, 16, 600, 256, device), []
    for number, (vocab, rows) in enumerate(((201088, 300), (201088, 13), (1001, 64), (48, 30), (24, 9))):
        logits, targets = case(vocab, rows, seed=number)
        width = -(-vocab // (8 * ranks.size)) * 8
        shard = torch.full((rows, width), torch.nan, dtype=logits.dtype, device=device)
        own = logits[:, ranks.rank * width : (ranks.rank + 1) * width]
        shard[:, : own.shape[1]] = own
        for first_row in (0, 300, 7):
            torch.cuda.synchronize()
            ranks.smallest(0)  # in a step the other exchanges lie between
            scored = score(shard, targets, first_row, vocab, TOP, peers)
            check(scored, reference.score(logits, targets, 0, vocab, TOP, Peers(ALONE)), targets)
            seen.append([values[targets >= 0].cpu().tolist() for values in scored])
    with pytest.raises(ValueError, match="more rows"):
        score(shard, targets, 1000, vocab, TOP, peers)
    return seen


@on_gpus
def test_a_vocabulary_in_shards_is_scored_as_a_whole_one_is(gpus):
    first, second = together(check_shards, 2, gpus=gpus)
    assert first == second


def of_prompts(ranks, device, shape):
    """Prompts scored at once and alone, through graphs and in chunks; and how far that is from what logits say."""
    options = {"decode_rows": (1, 4), "prefill_tokens": (64, 512), "prompt_logprobs": (64, 512), "max_context": 1024}
    engine = InProcess(shape, dtype=torch.bfloat16, device=device, ops=hopper, poison=False, ranks=ranks, **options)
    prompts = [prompt_of(length, shape.vocab) for length in (2, 64, 65, 300, 700)]

    def submit(prompt):
        return engine.submit(prompt, max_tokens=3, prompt_logprobs=5)

    at_once = [submit(prompt) for prompt in prompts]
    engine.run()
    alone = []
    for prompt in prompts:
        alone.append(submit(prompt))
        engine.run()
    answers = [[(engine.prompt_logprobs(id), engine.tokens(id)) for id in ids] for ids in (at_once, alone)]
    apart = []
    for prompt, (found, _) in zip(prompts, answers[0], strict=True):
        assert len(found) == len(prompt) - 1
        if ranks.size == 1:
            logprobs = engine.all_logits(prompt, chunk=64)[:-1].log_softmax(-1).cpu()
            expected = logprobs[torch.arange(len(found)), torch.tensor(prompt[1:])].tolist()
            apart += [abs(entry.logprob - value) for entry, value in zip(found, expected, strict=True)]
    return answers, apart


@pytest.mark.parametrize("shape", [SMALL, FULL_WIDTH], ids=["small", "full width"])
def test_prompts_get_the_log_probabilities_of_their_logits_alone_as_among_others(shape):
    ((at_once, alone), apart) = together(of_prompts, 1, shape, gpus=1)[0]
    assert at_once == alone
    assert median(apart) < 0.02  # the logits are those of the decode kernels: bfloat16 rounded elsewhere


@on_gpus
def test_two_ranks_score_prompts_as_one_does_with_the_same_bytes_on_both(gpus):
    whole, _ = together(of_prompts, 1, SMALL, gpus=1)[0]
    first, second = (answers for answers, _ in together(of_prompts, 2, SMALL, gpus=gpus))
    assert first == second
    assert first[0] == first[1]
    apart = [
        abs(one.logprob - two.logprob)
        for (left, _), (right, _) in zip(whole[0], first[0], strict=True)
        for one, two in zip(left, right, strict=True)
    ]
    assert median(apart) < 0.1
