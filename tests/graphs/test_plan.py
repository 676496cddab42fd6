"""Sampling parameters' limits, and steps that fill a bucket."""

import pytest
import torch

from conf.limits import BIAS_ENTRIES, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS, SCRATCH_PAGE
from graphs.buckets import Bucket, Buckets
from graphs.buffers import Buffers
from graphs.plan import NO_PAGE, Chunk, DecodeStep, PrefillStep, SamplingParams, full_step

BIAS = dict.fromkeys(range(MAX_LOGIT_BIAS), 0.5)
STOPS = tuple(range(MAX_STOP_TOKENS))


def filled(sampling):
    """The packed sampling parameters of one request."""
    buckets = Buckets.of([1], [64], 1)
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 2, "vocab": 512, "max_context": 64, "pages": 2}
    buffers = Buffers(buckets=buckets, **shape, device=torch.device("cpu"), dtype=torch.float32)
    bucket, staging = buckets.prefill[0], buffers.staging()
    buffers.fill(PrefillStep([Chunk(0, [1, 2], 0, 2, [1], True, sampling)]), bucket, staging)
    return staging.inputs[bucket].sampling


def test_the_packed_inputs_have_room_for_every_bias_and_stop_token_that_a_request_may_have():
    sampling = SamplingParams(max_tokens=9, seed=0, min_tokens=4, logit_bias=BIAS, stop_token_ids=STOPS)
    state = filled(sampling)
    assert state.bias_ids[0].tolist() == [*BIAS, *STOPS]
    assert state.bias_values[0].tolist() == [0.5] * MAX_LOGIT_BIAS + [float("-inf")] * MAX_STOP_TOKENS
    assert state.bias_until[0].tolist() == [2**31 - 1] * MAX_LOGIT_BIAS + [6] * MAX_STOP_TOKENS
    assert len(state.bias_ids[0]) == BIAS_ENTRIES


@pytest.mark.parametrize(("temperature", "installed"), [(0.0, 0.0), (1e-45, 0.0), (1e-38, 0.0), (0.25, 0.25)])
def test_a_temperature_that_no_logit_can_be_divided_by_is_greedy(temperature, installed):
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=temperature)
    assert filled(sampling).temperature[0] == installed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", BIAS | {MAX_LOGIT_BIAS: 1.0}),
        ("stop_token_ids", (*STOPS, MAX_STOP_TOKENS)),
        ("logprobs", MAX_TOP_LOGPROBS + 1),
        ("logprobs", -1),
        ("seed", 2**63),
        ("seed", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("prompt_logprobs", 21),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_out_of_range_makes_no_sampling_parameters(field, value):
    with pytest.raises(ValueError, match=f"{field}: got .*, allowed: "):
        SamplingParams(**{"max_tokens": 1, "seed": 0, field: value})


def test_steps_say_their_kind_and_how_many_tokens_they_compute():
    sampling = SamplingParams(max_tokens=1, seed=0)
    prefill = PrefillStep([Chunk(0, [1] * n, 0, n, [1], True, sampling) for n in (3, 4)])
    decode = DecodeStep([0, 1], [5, 6], [NO_PAGE, 3])
    scoring = PrefillStep([*prefill.chunks, Chunk(1, [1, 2], 0, 2, [2], True, sampling, targets=[2])])
    assert (prefill.kind, prefill.tokens) == ("prefill", 7)
    assert (scoring.kind, scoring.tokens) == ("score", 9)
    assert (decode.kind, decode.tokens) == ("decode", 2)


def test_a_full_decode_step_has_the_last_token_of_the_context_in_every_row():
    step = full_step(Bucket("decode", 4, 4), context=65, slots=8)
    assert step == DecodeStep(range(4), [64] * 4, [NO_PAGE] * 4)


@pytest.mark.parametrize(
    ("bucket", "context", "slots", "prompts"),
    [
        (Bucket("prefill", 256, 4), 64, 8, 4),
        (Bucket("prefill", 256, 4), 100, 8, 2),
        (Bucket("prefill", 256, 4), 64, 3, 3),
        (Bucket("prefill", 256, 2), 64, 8, 2),
    ],
)
def test_a_full_prefill_step_packs_as_many_prompts_as_fit(bucket, context, slots, prompts):
    step = full_step(bucket, context, slots, vocab=50)
    assert [chunk.slot for chunk in step.chunks] == list(range(prompts))
    assert {len(chunk.tokens) for chunk in step.chunks} == {context}
    assert all(chunk.start == 0 and chunk.samples for chunk in step.chunks)
    tokens = {token for chunk in step.chunks for token in chunk.tokens}
    assert tokens <= set(range(50))
    assert len(tokens) > 25
    assert {page for chunk in step.chunks for page in chunk.pages} == {SCRATCH_PAGE}


def test_a_full_step_of_a_bucket_that_scores_scores_every_token():
    step = full_step(Bucket("score", 256, 4), context=64, slots=8, vocab=50)
    assert step.kind == "score"
    assert [len(chunk.targets) for chunk in step.chunks] == [64] * 4


def test_a_full_prefill_steps_prompts_have_the_pages_that_are_dealt_out():
    step = full_step(Bucket("prefill", 256, 4), context=65, slots=8, pages=[7, 3, 9, 4, 5, 6])
    assert [list(chunk.pages) for chunk in step.chunks] == [[7, 3], [9, 4], [5, 6]]
