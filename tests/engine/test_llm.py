"""The offline API with the model that ships, on a CPU: `LLM(overrides).generate(prompts, sampling)`."""

from pathlib import Path

import pytest

from engine.llm import LLM
from graphs.plan import SamplingParams

ROOT = Path(__file__).parents[2]
CPU = ["kernels.device=cpu", "buckets.max_context=512", "buckets.decode_rows=[1,4]", "buckets.prefill_tokens=[64,256]"]
CHAT = (
    "<|start|>user<|message|>What is the capital of France?<|end|><|start|>assistant<|channel|>final<|message|>"  # text
)
PROMPTS = ["The capital of France is", "Once upon a time", [5, 6, 7], "The capital of France is"]


@pytest.fixture(scope="module")
def llm():
    with LLM(CPU) as engine:
        yield engine


def test_texts_and_tokens_go_in_and_completions_come_out_in_order(llm):
    completions = llm.generate(PROMPTS, SamplingParams(max_tokens=8, seed=0, temperature=0.0, logprobs=2))
    assert [c.prompt_tokens for c in completions[1:3]] == [llm.tokenizer.encode("Once upon a time"), [5, 6, 7]]
    for completion in completions:
        assert completion.finish_reason == "length"
        assert len(completion.tokens) == len(completion.logprobs) == 8
        assert completion.text == llm.tokenizer.decode(completion.tokens, skip_special=True)
        for token, entry in zip(completion.tokens, completion.logprobs, strict=True):
            assert entry.top_ids[0] == token
            assert entry.logprob == entry.top_logprobs[0]
    assert completions[0].tokens == completions[3].tokens
