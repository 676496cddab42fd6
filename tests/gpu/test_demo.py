"""The quality gate on a GPU: the shipped demo model answers as trained, by the Hopper kernels through their graphs."""

from collections import Counter

import pytest
import torch

from demo.bundle import demo_folder
from demo.training.data import STOPS, document, evaluation
from demo.training.evaluate import read, right
from demo.training.skills import SKILLS
from kernels import hopper
from tests.harness import InProcess

pytestmark = pytest.mark.gpu
EACH = 40  # held-out examples of a skill, at most


def test_answers_to_held_out_questions_are_right():
    examples = [e for skill in SKILLS for e in evaluation(skill, EACH)]
    engine = InProcess(
        demo_folder(),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        ops=hopper,
        poison=False,
        decode_rows=(1, 2, 4, 8, 16, 32, 64),
        prefill_tokens=(64, 256, 1024),
        sequences=16,
        pages=700,
    )
    generated = engine.generate(*(document(e).prompt for e in examples), max_tokens=400, stop_token_ids=STOPS)
    answers = [read(e, tokens) for e, tokens in zip(examples, generated, strict=True)]
    assert all(answer.valid for answer in answers)
    total, correct = Counter(e.skill for e in examples), Counter()
    for e, answer in zip(examples, answers, strict=True):
        correct[e.skill] += right(e, answer)
    assert correct.total() >= 0.97 * len(examples), correct
    assert all(correct[skill] >= 0.8 * total[skill] for skill in total), correct
