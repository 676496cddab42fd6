"""The shipped demo model, asked what its training never saw: right, and the same in this engine and in transformers."""

import pytest
import torch

from demo.bundle import demo_folder
from demo.training.data import STOPS, document, evaluation
from demo.training.evaluate import read, right
from demo.training.skills import SKILLS
from tests.engine.test_model import transformers_model
from tests.harness import InProcess
from tests.served import Served

EACH = 2  # examples of a skill
TIE = 0.25  # between logits that are as good as equal: two steps of bfloat16 at their size


def size(e):
    return sum(map(len, document(e)))


@pytest.fixture(scope="module")
def examples():
    """Short ones: each token takes its time on a CPU."""
    return [e for skill in SKILLS for e in sorted(evaluation(skill, 4 * EACH), key=size)[:EACH]]


@pytest.fixture(scope="module")
def prompts(examples):
    return [document(e).prompt for e in examples]


@pytest.fixture(scope="module")
def generated(prompts):
    """By this engine."""
    engine = InProcess(demo_folder(), dtype=torch.bfloat16)
    return engine.generate(*prompts, max_tokens=256, stop_token_ids=STOPS)


@pytest.fixture(scope="module")
def behind():
    """How far each token of an answer is behind the best one, in transformers' float32 logits."""
    reference = transformers_model(demo_folder(), torch.float32)

    def of(prompt, answer):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
        return logits.max(-1).values - logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)

    return of


def test_answers_to_held_out_questions_are_right(examples, generated):
    answers = [read(e, tokens) for e, tokens in zip(examples, generated, strict=True)]
    assert all(answer.valid for answer in answers)
    wrong = [(e, answer) for e, answer in zip(examples, answers, strict=True) if not right(e, answer)]
    assert len(wrong) <= 0.1 * len(examples), wrong


def test_greedy_tokens_are_those_of_transformers_but_for_ties(prompts, generated, behind):
    for prompt, answer in zip(prompts, generated, strict=True):
        assert behind(prompt, answer).max() <= TIE, answer


def test_two_ranks_say_the_same_but_for_ties(examples, prompts, generated, behind):
    """Where they differ, what two ranks say is as good as the best."""
    with Served("tp=2", "kernels=reference", "kernels.dtype=bfloat16", "kernels.device=cpu").wait_ready() as server:
        assert len(server.ranks()) == 2
        for skill in ("countries", "lists", "plain"):
            n = next(n for n, e in enumerate(examples) if e.skill == skill)
            answer = server.complete(prompt=prompts[n], max_tokens=256).json()["choices"][0]["token_ids"]
            assert answer[-1] in STOPS
            assert answer == generated[n] or behind(prompts[n], answer).max() <= TIE, answer
