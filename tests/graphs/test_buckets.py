"""Choosing a bucket, and what packing puts into it."""

import pytest
import torch
from msgspec.structs import replace

from graphs.buckets import Bucket, Buckets
from graphs.buffers import Buffers
from graphs.plan import NO_PAGE, NO_TARGET, Chunk, DecodeStep, PrefillStep, SamplingParams
from kernels import reference
from kernels.ops import Chunks, KvPages, TokenCounts, TokenPlaces

BUCKETS = Buckets.of([1, 4, 16], [64, 256], 3, [64, 128])
SAMPLING = SamplingParams(
    max_tokens=4,
    seed=2**63 - 1,
    temperature=0.5,
    min_tokens=2,
    presence_penalty=0.5,
    stop_token_ids=(7, 8),
    logit_bias={3: 1.5},
    logprobs=2,
)


@pytest.fixture
def buffers():
    return Buffers(
        buckets=BUCKETS,
        layers=1,
        kv_heads=1,
        head_dim=32,
        vocab=64,
        max_context=512,
        pages=10,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def install(buffers, bucket):
    """What a prefill step of `bucket` does to the state by slot -> the positions that it draws for."""
    inputs = buffers.inputs[bucket]
    chunks = Chunks(inputs.sequence_slots, inputs.starts, inputs.last, inputs.page_table, inputs.sampling)
    places = TokenPlaces(inputs.positions, inputs.slots)
    counts = TokenCounts(buffers.output_counts, buffers.in_prompt)
    return reference.install(chunks, inputs.tokens, places, buffers.page_table, buffers.sampling, counts)


@pytest.mark.parametrize(
    ("kind", "tokens", "size"),
    [
        ("decode", 1, 1),
        ("decode", 2, 4),
        ("decode", 4, 4),
        ("decode", 16, 16),
        ("prefill", 1, 64),
        ("prefill", 65, 256),
        ("score", 65, 128),
    ],
)
def test_the_smallest_bucket_that_holds_the_step_is_chosen(kind, tokens, size):
    assert BUCKETS.choose(kind, tokens).tokens == size


@pytest.mark.parametrize(("kind", "tokens"), [("decode", 17), ("prefill", 257), ("decode", 0), ("score", 129)])
def test_a_step_that_fits_no_bucket_is_an_error(kind, tokens):
    with pytest.raises(ValueError, match=str(tokens)):
        BUCKETS.choose(kind, tokens)


def test_spare_decode_rows_name_the_spare_slot_and_no_page(buffers):
    bucket, staging = BUCKETS.decode[1], buffers.staging()
    staging.words.fill_(12345)
    buffers.fill(DecodeStep([5, 2], [70, 128], [NO_PAGE, 9]), bucket, staging)
    inputs = staging.inputs[bucket]
    assert inputs.slots.tolist() == [5, 2, 16, 16]
    assert inputs.positions.tolist() == [70, 128, 0, 0]
    assert inputs.new_pages.tolist() == [NO_PAGE, 9, NO_PAGE, NO_PAGE]


def test_prefill_packs_chunks_and_installs_them_in_their_slots(buffers):
    bucket, staging = BUCKETS.prefill[0], buffers.staging()
    staging.words.fill_(12345)
    step = PrefillStep(
        [
            Chunk(3, [10, 11, 12], 64, 66, [4, 5], True, SAMPLING),
            Chunk(1, [20, 21], 0, 100, [6], False, SamplingParams(max_tokens=1, seed=0)),
        ]
    )
    buffers.fill(step, bucket, staging)
    inputs = staging.inputs[bucket]
    assert inputs.tokens[:6].tolist() == [10, 11, 12, 20, 21, 0]
    assert inputs.positions[:6].tolist() == [64, 65, 66, 0, 1, 0]
    assert inputs.slots[:6].tolist() == [3, 3, 3, 1, 1, 16]
    assert inputs.sequence_slots.tolist() == [3, 1, 16]
    assert inputs.sample_slots.tolist() == [3, 16, 16]
    assert inputs.last.tolist() == [2, 4, 0]

    buffers.words.copy_(staging.words)
    assert install(buffers, bucket).tolist() == [67, 2, 65]
    assert buffers.page_table[3, :3].tolist() == [4, 5, 0]
    assert buffers.sampling.temperature[3] == 0.5
    assert buffers.sampling.seed[3].tolist() == [-1, 2**31 - 1]
    assert buffers.sampling.logprobs[[3, 1]].tolist() == [3, 0]
    assert buffers.sampling.bias_ids[3, :4].tolist() == [3, 7, 8, 0]
    assert buffers.sampling.bias_until[3, :4].tolist() == [2**31 - 1, 68, 68, 0]
    assert buffers.in_prompt[3].nonzero().flatten().tolist() == [10, 11]
    assert buffers.output_counts[3].nonzero().flatten().tolist() == [12]
    assert not buffers.in_prompt[[1, 16]].any()  # no penalties
    assert not buffers.output_counts[[1, 16]].any()


def test_targets_are_packed_beside_their_tokens_where_the_bucket_scores(buffers):
    chunks = [
        Chunk(3, [10, 11, 12], 64, 200, [4, 5], False, SAMPLING, targets=[NO_TARGET, 12, 13]),
        Chunk(1, [20, 21], 0, 2, [6], True, SAMPLING, targets=[21]),
        Chunk(2, [30], 0, 1, [7], True, SAMPLING),
    ]
    staging = buffers.staging()
    staging.words.fill_(12345)
    buffers.fill(PrefillStep(chunks), BUCKETS.score[0], staging)
    targets = staging.inputs[BUCKETS.score[0]].targets
    assert targets[:7].tolist() == [NO_TARGET, 12, 13, 21, NO_TARGET, NO_TARGET, NO_TARGET]
    assert buffers.words_of(BUCKETS.score[0]) == buffers.words_of(BUCKETS.prefill[0]) + 64
    assert len(staging.inputs[BUCKETS.prefill[0]].targets) == 0


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.5}, {"frequency_penalty": -0.5}, {"presence_penalty": 0.5}]
)
def test_the_counts_of_a_request_with_penalties_begin_with_its_first_chunk(buffers, penalty):
    bucket, staging = BUCKETS.prefill[0], buffers.staging()
    plain = replace(SAMPLING, presence_penalty=0.0)
    penalized = replace(plain, **penalty)

    def counts_after(start, tokens, sampling):
        """After a chunk of a request with a prompt of 65 tokens: tokens of the prompt, and the generated ones."""
        buffers.fill(PrefillStep([Chunk(2, tokens, start, 65, [1, 2], False, sampling)]), bucket, staging)
        buffers.words.copy_(staging.words)
        install(buffers, bucket)
        generated = buffers.output_counts[2]
        return (
            buffers.in_prompt[2].nonzero().flatten().tolist(),
            {token: int(generated[token]) for token in generated.nonzero().flatten().tolist()},
        )

    assert counts_after(0, [10, 9, 10], penalized) == ([9, 10], {})
    assert counts_after(64, [11, 12, 12], penalized) == ([9, 10, 11], {12: 2})
    assert counts_after(0, [13], plain) == ([9, 10, 11], {12: 2})  # nobody reads them
    assert counts_after(0, [14], penalized) == ([14], {})


def test_a_decode_step_notes_new_pages_and_reads_the_last_tokens(buffers):
    bucket, staging = BUCKETS.decode[1], buffers.staging()
    buffers.page_table[5, 1], buffers.last_token[5], buffers.last_token[2] = 8, 33, 44
    buffers.fill(DecodeStep([5, 2], [70, 128], [NO_PAGE, 9]), bucket, staging)
    buffers.words[: buffers.words_of(bucket)] = staging.words[: buffers.words_of(bucket)]
    inputs = buffers.inputs[bucket]
    pages = KvPages(buffers.keys[0], buffers.values[0], buffers.page_table)
    places = TokenPlaces(inputs.positions, inputs.slots)
    tokens, next_positions = reference.advance(places, inputs.new_pages, pages, buffers.last_token)
    assert tokens.tolist() == [33, 44, 0, 0]
    assert next_positions.tolist() == [71, 129, 1, 1]
    assert buffers.page_table[5, 1] == 8
    assert buffers.page_table[2, 2] == 9


@pytest.mark.parametrize(
    ("step", "bucket"),
    [
        (DecodeStep([0] * 5, [0] * 5, [0] * 5), BUCKETS.decode[1]),
        (DecodeStep([0], [0], [0]), BUCKETS.prefill[0]),
        (PrefillStep([Chunk(0, [1] * 65, 0, 65, [1, 2], True, SAMPLING)]), BUCKETS.prefill[0]),
        (PrefillStep([Chunk(0, [1], 0, 1, [1], True, SAMPLING)] * 4), BUCKETS.prefill[0]),
    ],
    ids=["rows", "kind", "tokens", "chunks"],
)
def test_a_step_that_does_not_fit_its_bucket_is_never_cut(buffers, step, bucket):
    with pytest.raises(ValueError, match="do not fit"):
        buffers.fill(step, bucket, buffers.staging())


def test_a_bucket_of_few_tokens_packs_no_more_sequences_than_tokens():
    assert Buckets.of([1], [2, 64], 8).prefill[0] == Bucket("prefill", 2, 2)
