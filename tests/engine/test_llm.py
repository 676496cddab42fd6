"""The offline API with the model that ships, on a CPU: `LLM(overrides).generate(prompts, sampling)`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.schema import ConfigError
from engine.llm import LLM, RankDied
from graphs.plan import SamplingParams

ROOT = Path(__file__).parents[2]
CPU = ["kernels.device=cpu", "buckets.max_context=256", "buckets.decode_rows=[1,4]", "buckets.prefill_tokens=[64,128]"]
CAPITAL = "The capital of France is"
PROMPTS = [CAPITAL, "Once upon a time", [5, 6, 7], "12 + 5 ="]
GREEDY = SamplingParams(max_tokens=4, seed=0, temperature=0.0, logprobs=2)
DRAWN = SamplingParams(max_tokens=4, seed=3, temperature=0.8)


@pytest.fixture(scope="module")
def llm():
    with LLM(CPU) as engine:
        yield engine


@pytest.fixture(scope="module")
def together(llm):
    return llm.generate(PROMPTS, [GREEDY, DRAWN, GREEDY, DRAWN])


def test_the_demo_model_knows_a_capital_and_stops_at_the_end_of_the_text(llm):
    (completion,) = llm.generate([CAPITAL])
    assert completion.text.strip() == "Paris."
    assert completion.finish_reason == "stop"


def test_completions_come_in_the_order_of_their_prompts(llm, together):
    encoded = [llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in PROMPTS]
    assert [completion.prompt_tokens for completion in together] == encoded
    for completion in together:
        assert completion.finish_reason == "length"
        assert len(completion.tokens) == 4
        assert completion.text == llm.tokenizer.decode(completion.tokens, skip_special=True)


def test_a_batch_is_the_same_as_one_prompt_at_a_time(llm, together):
    for prompt, sampling, expected in zip(PROMPTS, [GREEDY, DRAWN] * 2, together, strict=True):
        (alone,) = llm.generate([prompt], sampling)
        assert alone.tokens == expected.tokens


def test_log_probabilities_come_where_they_are_asked_for(together):
    greedy, drawn, *_ = together
    assert drawn.logprobs is None
    for token, entry in zip(greedy.tokens, greedy.logprobs, strict=True):
        assert entry.top_ids[0] == token
        assert entry.logprob == entry.top_logprobs[0] > entry.top_logprobs[1]


def test_log_probabilities_of_a_prompt_come_where_they_are_asked_for(llm, together):
    assert together[0].prompt_logprobs is None
    right, wrong = (CAPITAL + text for text in (" Paris", " Rome"))
    likely, unlikely = llm.generate([right, wrong], SamplingParams(max_tokens=0, seed=0, prompt_logprobs=1))
    assert (likely.tokens, likely.text, likely.finish_reason) == ([], "", "length")
    assert len(likely.prompt_logprobs) == len(likely.prompt_tokens) - 1
    assert likely.prompt_logprobs[-1].rank == 1 < unlikely.prompt_logprobs[-1].rank
    assert likely.prompt_logprobs[:-1] == unlikely.prompt_logprobs[:-1]


def test_a_prompt_seen_before_is_found_in_the_prefix_cache(llm):
    prompt = list(range(1000, 1100))
    first, second = (llm.generate([prompt], GREEDY)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 64)
    assert first.tokens == second.tokens


@pytest.mark.parametrize(
    ("prompts", "sampling", "words"),
    [
        (CAPITAL, GREEDY, "got one text"),
        ([[1], [2]], [GREEDY], "got 1 for 2 prompts"),
        ([[1], []], GREEDY, "prompt 1: a prompt of 0 tokens"),
        ([[1], [1] * 253], GREEDY, "prompt 1: a prompt of 253 tokens and max_tokens 4 exceed"),
        ([[1], [201088]], GREEDY, "prompt 1: got token id 201088, allowed: 0 to 201087"),
        ([[1]], SamplingParams(max_tokens=1, seed=0, stop_token_ids=(-1,)), "stop_token_ids of prompt 0: got .* -1"),
        (
            [[1]],
            SamplingParams(max_tokens=1, seed=0, logit_bias={10**6: 1.0}),
            "logit_bias of prompt 0: got .* 1000000",
        ),
    ],
    ids=["text", "sampling", "empty", "long", "id", "stop", "bias"],
)
def test_what_cannot_run_is_refused_before_anything_is_generated(llm, prompts, sampling, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(prompts, sampling)
    assert llm.engine.ready.pages > 0
    (completion,) = llm.generate([CAPITAL], GREEDY)  # and the engine goes on
    assert completion.text.startswith(" Paris.")


def test_an_interrupted_call_leaves_nothing_behind(llm, monkeypatch):
    real, turns = llm._core.turn, iter(range(2))

    def turn():
        if next(turns, None) is None:
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(llm._core, "turn", turn)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    monkeypatch.undo()
    stats = llm._core.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert llm.generate([CAPITAL], GREEDY)[0].text.startswith(" Paris.")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["server.port=1"], "server: .* no effect offline"), (["model=gpt-oss-21b"], "gpt-oss-21b"), (["tp=3"], "tp")],
    ids=str,
)
def test_a_configuration_that_cannot_run_is_an_error(overrides, words):
    with pytest.raises(ConfigError, match=words):
        LLM(overrides)


def test_two_ranks_answer_as_one_and_a_dead_one_is_an_error(together):
    with LLM([*CPU, "tp=2"]) as pair:
        greedy = pair.generate(PROMPTS[::2], GREEDY)
        assert [completion.tokens for completion in greedy] == [completion.tokens for completion in together[::2]]
        pair._others[0].kill()
        with pytest.raises(RankDied, match="rank 1 ended with signal SIGKILL"):
            pair.generate([CAPITAL], GREEDY)
    assert not torch.distributed.is_initialized()  # so that another can start


def test_a_rank_that_cannot_start_is_an_error_and_its_reason_is_in_the_log(tmp_path):
    """In a process of its own, to see what the other rank writes."""
    code = "from engine.llm import LLM; LLM(['model=gpt-oss-20b', 'model.path=/nowhere', 'tp=2', 'kernels.device=cpu'])"
    script = tmp_path / "script.py"
    script.write_text(code)
    result = subprocess.run(
        [sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "/nowhere: found nothing, expected a checkpoint folder" in result.stderr
