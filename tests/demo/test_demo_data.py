"""The demo model's conversations: the same for a seed, split by what they ask, read by harmony as they were meant."""

import re
from random import Random

import numpy as np
import pytest

from demo.training import skills, sums
from demo.training.data import ROW, STOPS, document, evaluation, held_out, index_of, rows, tokenizer, training
from demo.training.evaluate import read, right
from demo.training.skills import SKILLS, example
from serve.harmony import END, START


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_a_seed_determines_the_documents():
    assert take(training(1), 50) == take(training(1), 50)
    assert take(training(1), 50) != take(training(2), 50)


@pytest.mark.parametrize("skill", SKILLS)
def test_what_is_evaluated_is_never_trained_on(skill):
    examples = evaluation(skill, 20)
    assert len(examples) == 20
    assert all(held_out(e.keys) for e in examples)
    assert evaluation(skill, 20) == examples


def test_training_holds_nothing_that_is_held_out(monkeypatch):
    examples = []
    monkeypatch.setattr("demo.training.data.document", lambda e: examples.append(e) or document(e))
    take(training(5), 400)
    assert {e.skill for e in examples} == set(SKILLS)
    assert not any(held_out(e.keys + e.before) for e in examples)


@pytest.mark.parametrize("skill", SKILLS)
def test_the_wanted_answer_is_right_and_another_wrong(skill):
    for e, other in zip(evaluation(skill, 12), evaluation(skill, 12, seed=1), strict=True):
        completion, differing = document(e).completion, document(other).completion
        answer = read(e, completion)
        assert right(e, answer)
        assert answer.valid
        assert answer.reasoning == e.analysis
        assert not read(e, completion[:-1]).valid  # cut off
        if (e.final, e.call, e.text[1]) != (other.final, other.call, other.text[1]):
            assert not right(e, read(e, differing))


def test_prompt_and_answer_are_rendered_as_the_next_prompt_renders_them():
    t = tokenizer()
    for e in evaluation("arithmetic", 20):
        prompt, completion = document(e)
        assert prompt[-2:] == [START, *t.encode("assistant")]
        assert completion[-1] in STOPS
        assert completion.count(END) == 1  # that of the analysis


def test_effort_decides_how_long_the_analysis_is():
    tasks = [skills.arithmetic(Random(n)) for n in range(30)]
    for task in tasks:
        low, medium, high = (len(task.analysis(effort, task.final)) for effort in skills.EFFORTS)
        assert low < medium < high


@pytest.mark.parametrize("seed", range(5))
def test_the_work_shown_is_correct(seed):
    """Every a op b = c that an analysis states, whatever the skill."""
    rng, seen = Random(seed), 0
    for _ in range(300):
        e = example(rng)
        for a, op, b, c in re.findall(r"(?<![\d+*/-])(\d+)([+*-])(\d+)=(\d+)(?![\d+])", e.analysis):
            seen += 1
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(c), e.analysis
    assert seen > 100


def test_units_are_counted_up_to_the_quotient():
    """Back to a larger unit, every quotient below 100: each multiple is right, and no more of them than needed."""
    for b in (12, 16, 24, 60):
        for quotient in range(1, 100):
            steps = sums.count_steps(quotient * b, b)
            passed = [(int(n), int(product)) for n, product in re.findall(r"(\d+):(\d+)", steps)]
            assert all(n * b == product for n, product in passed)
            tens, ones = divmod(quotient, 10)
            wanted = [*range(10, 10 * (tens + (ones > 0)) + 1, 10), *range(1, ones + 1)]
            assert [n for n, _ in passed] == wanted
            assert re.split("[; =]", steps)[-1] == str(quotient)


def test_rows_hold_whole_documents_and_learn_completions_only():
    tokens = sorted({token for pair in take(training(3), 600) for part in pair for token in part})
    index = index_of(tokens)
    documents = take(training(3), 600)
    wanted = {(tuple(index[p + c]), len(p)) for p, c in documents}
    packed = rows(training(3), index)
    for compact, numbers, learned in take(packed, 20):
        assert compact.shape == numbers.shape == learned.shape == (ROW,)
        for number in range(numbers.max() + 1):
            at = np.nonzero(numbers == number)[0]
            assert (np.diff(at) == 1).all()
            assert (tuple(compact[at]), int((~learned[at]).sum())) in wanted
        assert not learned[numbers < 0].any()


def test_tokens_without_a_row_share_the_last():
    index = index_of([5, 9, 200002])
    assert index[[5, 9, 200002, 0, 6, 201087]].tolist() == [0, 1, 2, 3, 3, 3]
