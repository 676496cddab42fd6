"""The scheduler: examples that state its policy, and properties of whole runs on a device that is modelled."""

import struct
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from conf.limits import PAGE_TOKENS, SCRATCH_PAGE
from engine.messages import Delta, PromptLogprobs, Submit, TokenLogprobs
from engine.pages import PagePool, pages_for
from engine.scheduler import NO_SLOT, Scheduled, Scheduler
from graphs.buckets import Buckets
from graphs.plan import NO_PAGE, NO_TARGET, Chunk, DecodeStep, PrefillStep, SamplingParams, Step

VOCAB = 97

# --- the device -------------------------------------------------------------------------------------------------------


def draw(history: bytes, sampling: SamplingParams, seen: tuple[int, int]) -> int:
    """The model: the next token is a hash of every (position, token) before it. `seen`: prompt and answer tokens
    counted for penalties."""
    own = struct.pack("<qii", sampling.seed, *(seen if sampling.penalized else (0, 0)))
    return zlib.crc32(own, zlib.crc32(history)) % VOCAB


def entries(tokens: list[int], start: int = 0) -> bytes:
    """What a page holds of each token: eight bytes that depend on the token and its position."""
    return b"".join(struct.pack("<ii", start + i, token) for i, token in enumerate(tokens))


def alone(submit: Submit) -> list[int]:
    """The answer that a request gets without any scheduler."""
    sampling, prompt = submit.sampling, len(submit.prompt)
    answer: list[int] = []
    history = entries(submit.prompt)
    while len(answer) < sampling.max_tokens and (not answer or answer[-1] not in sampling.stop_token_ids):
        answer.append(draw(history, sampling, (prompt, len(answer))))
        history += entries(answer[-1:], prompt + len(answer) - 1)
    return answer


def scores_alone(submit: Submit) -> list[PromptLogprobs]:
    """The log probabilities that a request's prompt gets without any scheduler."""
    count = submit.sampling.prompt_logprobs
    ends = range(1, len(submit.prompt)) if count is not None else ()
    return [score(entries(submit.prompt[:end]), submit.prompt[end], count) for end in ends]


def score(history: bytes, target: int, count: int) -> PromptLogprobs:
    return PromptLogprobs(float(zlib.crc32(history)), [target] * count, [0.0] * count, target)


@dataclass
class Slot:
    sampling: SamplingParams | None = None
    page_table: list[int] = field(default_factory=list)
    last: int = -1
    prompt_seen: int = 0  # since the last chunk that began at position 0
    answer_seen: int = 0


@dataclass
class Device:
    """Executes steps on pages and slots as the real one does: history is read back through the page table."""

    pages: int
    memory: list[bytearray] = field(init=False)
    slots: dict[int, Slot] = field(default_factory=dict)
    scored: list[tuple[bytes, int]] = field(default_factory=list)  # by token of the last prefill: history and target

    def __post_init__(self) -> None:
        self.memory = [bytearray(b"\xee" * 8 * PAGE_TOKENS) for _ in range(self.pages)]

    def run(self, step: Step) -> list[int]:
        return self.prefill(step.chunks) if isinstance(step, PrefillStep) else self.decode(step)

    def read(self, page_table: list[int], tokens: int) -> bytes:
        return b"".join(self.memory[page] for page in page_table)[: 8 * tokens]

    def write(self, page_table: list[int], start: int, tokens: list[int]) -> None:
        for position, token in enumerate(tokens, start):
            page = page_table[position // PAGE_TOKENS]
            assert page != SCRATCH_PAGE
            struct.pack_into("<ii", self.memory[page], 8 * (position % PAGE_TOKENS), position, token)

    def prefill(self, chunks: list[Chunk]) -> list[int]:
        before = [self.read(chunk.pages, chunk.start) for chunk in chunks]  # chunks don't see each other
        drawn, self.scored = [], []
        for chunk, history in zip(chunks, before, strict=True):
            if chunk.start == 0 or chunk.slot not in self.slots:
                self.slots[chunk.slot] = Slot()
            slot = self.slots[chunk.slot]
            slot.sampling, slot.page_table = chunk.sampling, list(chunk.pages)
            own_prompt = max(0, min(chunk.prompt_tokens - chunk.start, len(chunk.tokens)))
            slot.prompt_seen += own_prompt
            slot.answer_seen += len(chunk.tokens) - own_prompt
            self.write(chunk.pages, chunk.start, chunk.tokens)
            slot.last = draw(
                history + entries(chunk.tokens, chunk.start), chunk.sampling, (slot.prompt_seen, slot.answer_seen)
            )
            drawn.append(slot.last if chunk.samples else VOCAB + 1)
            for place in range(len(chunk.tokens)):
                target = chunk.targets[place] if place < len(chunk.targets) else NO_TARGET
                self.scored.append((history + entries(chunk.tokens[: place + 1], chunk.start), target))
        return drawn

    def decode(self, step: DecodeStep) -> list[int]:
        for name, position, page in zip(step.slots, step.positions, step.new_pages, strict=True):
            slot = self.slots[name]
            if page != NO_PAGE:
                assert len(slot.page_table) == position // PAGE_TOKENS
                slot.page_table.append(page)
            self.write(slot.page_table, position, [slot.last])
            slot.answer_seen += 1
        for name, position in zip(step.slots, step.positions, strict=True):
            slot = self.slots[name]
            history = self.read(slot.page_table, position + 1)
            slot.last = draw(history, slot.sampling, (slot.prompt_seen, slot.answer_seen))
        return [self.slots[name].last for name in step.slots]


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """The core's loop: `ahead` steps are in flight when the next one is planned. Checks each step as it goes."""

    scheduler: Scheduler
    buckets: Buckets
    device: Device
    ahead: int = 1
    now: int = 0
    in_flight: deque[Scheduled] = field(default_factory=deque)
    steps: list[Step] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    silent: set[int] = field(default_factory=set)  # finished or aborted: no Delta may follow

    @classmethod
    def of(cls, pages=64, rows=4, prefill=(256,), sequences=4, max_context=1024, prefix_cache=True, ahead=1, score=()):
        buckets = Buckets.of([rows], list(prefill), sequences, score)
        return cls(Scheduler(PagePool(pages), buckets, max_context, prefix_cache), buckets, Device(pages), ahead)

    def add(self, *submits: Submit) -> None:
        for submit in submits:
            self.scheduler.add(submit, self.now)

    def abort(self, id: int) -> None:
        self.scheduler.abort(id)
        self.silent.add(id)

    def launch(self) -> Step | None:
        """Plans a step and puts it in flight."""
        self.now += 1
        preemptions = self.scheduler.preemptions
        streams = [r for r in self.scheduler._running if r.prefill_end <= r.computed < r.last_position]
        scheduled = self.scheduler.schedule(self.now)
        step = scheduled.step if scheduled else None
        preempted = self.scheduler.preemptions - preemptions
        if isinstance(step, PrefillStep):
            self.check_prefill(step)
            if self.steps and isinstance(self.steps[-1], PrefillStep):
                assert preempted >= len(streams), "a stream waits for more than one prefill step"
        elif isinstance(step, DecodeStep):
            assert len(step.slots) == len(set(step.slots)) <= self.buckets.max_rows
            starts = [position % PAGE_TOKENS == 0 for position in step.positions]
            assert starts == [page != NO_PAGE for page in step.new_pages]
            assert [r for r in streams if r.slot != NO_SLOT] == scheduled.rows, "a stream is left out"
        else:
            assert preempted >= len(streams), "streams, but no step"
        self.check_holders()
        if scheduled:
            self.steps.append(step)
            self.in_flight.append(scheduled)
        return step

    def collect(self) -> list[Delta]:
        """The device executes the oldest step in flight; its tokens arrive."""
        scheduled = self.in_flight.popleft()
        drawn = self.device.run(scheduled.step)  # as late as can be: later planning must not have touched the step
        scored = list(self.device.scored)
        deltas = self.scheduler.update(
            scheduled,
            drawn,
            lambda row, count: TokenLogprobs(-drawn[row], [*range(count)], [0.0] * count),
            lambda token, count: score(*scored[token], count),
        )
        for delta in deltas:
            assert delta.id not in self.silent
            if delta.finish_reason:
                self.silent.add(delta.id)
        self.deltas += deltas
        return deltas

    def turn(self) -> bool:
        """One round of the loop. False: nothing planned and nothing in flight."""
        step = self.launch()
        if len(self.in_flight) > (self.ahead if step else 0):
            self.collect()
            return True
        return step is not None

    def drain(self) -> None:
        while self.turn():
            pass

    def answer(self, id: int) -> list[int]:
        return [token for delta in self.deltas if delta.id == id for token in delta.tokens]

    def scores(self, id: int) -> list[PromptLogprobs]:
        return [entry for delta in self.deltas if delta.id == id for entry in delta.prompt_logprobs or []]

    def check_prefill(self, step: PrefillStep) -> None:
        bucket = self.buckets.choose(step.kind, step.tokens)  # raises where no bucket holds the step
        assert len(step.chunks) <= bucket.sequences
        assert len({chunk.slot for chunk in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            end = chunk.start + len(chunk.tokens)
            assert chunk.tokens
            assert chunk.start % PAGE_TOKENS == 0
            assert chunk.samples or end % PAGE_TOKENS == 0
            assert len(chunk.pages) >= pages_for(end)

    def check_holders(self) -> None:
        """A page has several holders only through the prefix cache, and then nobody writes to it any more."""
        running = self.scheduler._running
        holders = Counter(page for request in running for page in request.pages)
        assert SCRATCH_PAGE not in holders
        assert len(holders) == self.scheduler.pool.used
        for request in running:
            for page in request.pages[request.registered :]:
                assert holders[page] == 1
        slots = [request.slot for request in running]
        assert len(set(slots)) == len(slots)
        assert set(slots).isdisjoint(self.scheduler._free_slots)
        assert len(slots) + len(self.scheduler._free_slots) == self.buckets.max_rows


def submit(id: int, prompt: int | list[int], max_tokens: int = 8, **sampling) -> Submit:
    """A request; a prompt given as a number is that many tokens that no other id has."""
    tokens = prompt if isinstance(prompt, list) else [(id * 31 + i) % VOCAB for i in range(prompt)]
    return Submit(id, tokens, SamplingParams(max_tokens=max_tokens, seed=id, **sampling))


def lengths(step: Step) -> list[tuple[int, int]]:
    """(start, tokens) of each chunk of a prefill step."""
    assert isinstance(step, PrefillStep)
    return [(chunk.start, len(chunk.tokens)) for chunk in step.chunks]


# --- one request ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_and_its_tokens_are_decoded_from_the_position_behind_it():
    loop = Loop.of()
    loop.add(submit(1, prompt=10, max_tokens=4))
    loop.drain()
    assert lengths(loop.steps[0]) == [(0, 10)]
    assert [step.positions for step in loop.steps[1:]] == [[10], [11], [12]]
    assert loop.answer(1) == alone(submit(1, prompt=10, max_tokens=4))
    assert [delta.finish_reason for delta in loop.deltas] == [None, None, None, "length"]


def test_steps_are_planned_before_the_tokens_of_the_step_before_are_known():
    loop = Loop.of()
    loop.add(submit(1, prompt=10, max_tokens=4))
    assert [type(loop.launch()) for _ in range(4)] == [PrefillStep, DecodeStep, DecodeStep, DecodeStep]
    assert loop.launch() is None


class Anything:
    """A constraint that every token meets."""

    error = ""

    def accept(self, token: int) -> bool:
        return False


def test_requests_with_a_grammar_wait_for_their_tokens_and_for_each_other_while_others_run_ahead():
    scheduler, flying = Scheduler(PagePool(16), Buckets.of([4], [256], 4), 1024), deque()

    def add(id: int, constraint: Anything | None) -> None:
        scheduler.add(submit(id, prompt=10, max_tokens=30), 0, constraint)

    def turn() -> list[int] | str:
        """Plans the next step, then collects the one before -> the requests with a row, by id."""
        if scheduled := scheduler.schedule(0):
            flying.append(scheduled)
        if len(flying) > (scheduled is not None):
            done = flying.popleft()
            scheduler.update(done, [5] * len(done.rows), lambda *_: None, lambda *_: None)
        if not scheduled:
            return "nothing"
        return [request.id for request in scheduled.rows] if scheduled.step.kind == "decode" else "prefill"

    add(1, Anything())
    add(2, Anything())
    assert [turn() for _ in range(5)] == ["prefill", "nothing", [1, 2], "nothing", [1, 2]]
    add(3, None)
    assert [turn() for _ in range(6)] == ["prefill", [1, 2, 3], [3], [1, 2, 3], [3], [1, 2, 3]]
    add(4, Anything())
    assert [turn() for _ in range(5)] == ["prefill", [1, 2, 3], [3], [1, 2, 3, 4], [3]]


def test_a_request_for_one_token_never_takes_a_decode_row():
    loop = Loop.of()
    loop.add(submit(1, prompt=10, max_tokens=1))
    loop.drain()
    assert len(loop.steps) == 1
    assert loop.deltas[0].finish_reason == "length"


def test_a_stop_token_ends_the_answer_and_the_token_of_the_row_in_flight_is_dropped():
    free = alone(submit(1, prompt=10, max_tokens=8))
    assert free[2] not in free[:2]
    loop = Loop.of()
    loop.add(submit(1, prompt=10, max_tokens=8, stop_token_ids=(free[2],)))
    loop.drain()
    assert loop.answer(1) == free[:3]
    assert loop.deltas[-1].finish_reason == "stop"
    assert len(loop.steps) == 4  # the fourth was in flight when the stop token arrived
    assert loop.scheduler.running == loop.scheduler.pool.used == 0


def test_a_stop_token_that_is_the_last_allowed_one_counts_as_stop():
    last = alone(submit(1, prompt=10, max_tokens=3))[-1]
    loop = Loop.of()
    loop.add(submit(1, prompt=10, max_tokens=3, stop_token_ids=(last,)))
    loop.drain()
    assert loop.deltas[-1].finish_reason == "stop"


def test_decode_takes_a_new_page_at_each_page_boundary():
    loop = Loop.of()
    loop.add(submit(1, prompt=PAGE_TOKENS, max_tokens=PAGE_TOKENS + 2))
    loop.drain()
    pages = {step.positions[0]: step.new_pages[0] for step in loop.steps[1:]}
    assert [at for at, page in pages.items() if page != NO_PAGE] == [64, 128]


def test_the_first_delta_alone_tells_the_cached_tokens_and_the_time_in_the_queue():
    loop = Loop.of()
    loop.now = 5
    loop.add(submit(1, prompt=10, max_tokens=2))
    loop.now = 8
    loop.drain()
    assert [(delta.cached_tokens, delta.queue_seconds) for delta in loop.deltas] == [(0, 4), (None, None)]


def test_log_probabilities_come_only_where_they_are_asked_for():
    loop = Loop.of()
    loop.add(submit(1, prompt=10, max_tokens=1), submit(2, prompt=10, max_tokens=1, logprobs=3))
    loop.drain()
    token = loop.answer(2)[0]
    assert [delta.logprobs for delta in loop.deltas] == [None, [TokenLogprobs(-token, [0, 1, 2], [0.0] * 3)]]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        (0, 1, "a prompt of 0 tokens and max_tokens 1: at least 1 and 0 are allowed"),
        (1, -1, "max_tokens -1: at least 1 and 0 are allowed"),
        (100, 200, "exceed the context of 256 tokens"),
        (130, 64, "need 4 pages of 64 tokens; the server has 3"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_a_reason(prompt, max_tokens, words):
    loop = Loop.of(pages=4, max_context=256)
    with pytest.raises(ValueError, match=words):
        loop.add(submit(1, prompt, max_tokens))
    assert loop.scheduler.waiting == 0


def test_the_last_token_needs_no_page_and_a_full_context_can_be_used():
    loop = Loop.of(pages=4, max_context=193)
    loop.add(submit(1, prompt=100, max_tokens=93))  # 193 tokens, of which 192 lie in 3 pages
    loop.drain()
    assert loop.answer(1) == alone(submit(1, prompt=100, max_tokens=93))


def test_with_no_token_allowed_the_prompt_alone_is_computed():
    loop = Loop.of(pages=3, max_context=128)
    loop.add(submit(1, prompt=128, max_tokens=0, logprobs=2, stop_token_ids=tuple(range(20))))
    loop.drain()
    assert loop.deltas == [Delta(1, [], "length", logprobs=[], cached_tokens=0, queue_seconds=1)]
    assert [lengths(step) for step in loop.steps] == [[(0, 128)]]


# --- log probabilities of prompts -------------------------------------------------------------------------------------


def test_a_prompts_log_probabilities_come_chunk_by_chunk_the_last_with_the_first_token():
    loop = Loop.of(score=(64,))
    loop.add(wanted := submit(1, prompt=150, max_tokens=2, prompt_logprobs=1))
    loop.drain()
    assert [len(delta.prompt_logprobs or []) for delta in loop.deltas] == [64, 64, 21, 0]
    assert [len(delta.tokens) for delta in loop.deltas] == [0, 0, 1, 1]
    assert [delta.cached_tokens for delta in loop.deltas] == [0, None, None, None]
    assert loop.scores(1) == scores_alone(wanted)


def test_a_step_scores_where_the_oldest_prompt_wants_it_and_others_may_share_it():
    loop = Loop.of(score=(128,))
    loop.add(submit(1, 10), submit(2, 10, prompt_logprobs=0), submit(3, 10), submit(4, 200, prompt_logprobs=0))
    loop.drain()
    steps = [(step.kind, lengths(step)) for step in loop.steps if isinstance(step, PrefillStep)]
    assert steps == [("prefill", [(0, 10)]), ("score", [(0, 10), (0, 10), (0, 64)]), ("score", [(64, 128)]), *steps[3:]]
    assert sum(kind == "score" for kind, _ in steps) == 3


def test_a_prompt_that_is_to_be_scored_is_not_taken_from_the_cache_but_others_may_read_it():
    loop = Loop.of(score=(256,))
    prompt = list(range(70)) * 2
    for id, options in enumerate(({}, {"prompt_logprobs": 0}, {})):
        loop.add(submit(id, prompt, max_tokens=1, **options))
        loop.drain()
    assert [delta.cached_tokens for delta in loop.deltas] == [0, 0, 128]
    assert loop.scheduler.prefix_query_tokens == 2 * len(prompt)
    assert loop.scores(1) == scores_alone(submit(1, prompt, prompt_logprobs=0))


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_after_preemption_no_log_probability_comes_twice(prefix_cache):
    """A page that a stream needs while the other prompt, of 70 pages, has had 66 of its chunks."""
    loop = Loop.of(pages=74, rows=2, prefill=(64,), score=(64,), max_context=8192, prefix_cache=prefix_cache)
    loop.add(submit(0, prompt=126, max_tokens=100), wanted := submit(1, prompt=4480, max_tokens=1, prompt_logprobs=0))
    loop.drain()
    assert loop.scheduler.preemptions == 1
    assert loop.scores(1) == scores_alone(wanted)
    chunks = [chunk.start for step in loop.steps if isinstance(step, PrefillStep) for chunk in step.chunks]
    assert len(chunks) == 2 + 70 + (0 if prefix_cache else 66)  # what is scored already may come from the cache


def test_a_server_without_a_bucket_for_them_refuses_them():
    with pytest.raises(ValueError, match=r"prompt_logprobs: this server has no bucket"):
        Loop.of().add(submit(1, 10, prompt_logprobs=0))


# --- packing and alternation ------------------------------------------------------------------------------------------


def test_prompts_are_packed_first_come_first_served():
    loop = Loop.of(prefill=(256,), sequences=4)
    loop.add(*(submit(id, prompt=40) for id in range(4)))
    assert lengths(loop.launch()) == [(0, 40)] * 4


def test_a_step_takes_no_more_prompts_than_its_bucket_has_sequences():
    loop = Loop.of(rows=8, sequences=3)
    loop.add(*(submit(id, prompt=5) for id in range(4)))
    assert len(loop.launch().chunks) == 3


def test_a_prompt_that_does_not_fit_is_cut_at_a_page_boundary_and_goes_on_in_the_next_prefill():
    loop = Loop.of(prefill=(200,))
    loop.add(submit(1, prompt=300))
    assert lengths(loop.launch()) == [(0, 192)]
    assert not loop.steps[0].chunks[0].samples
    assert lengths(loop.launch()) == [(192, 108)]
    assert loop.steps[1].chunks[0].samples


def test_what_is_left_beside_a_cut_prompt_goes_to_a_whole_one():
    loop = Loop.of(prefill=(200,))
    loop.add(submit(1, prompt=300), submit(2, prompt=8))
    assert lengths(loop.launch()) == [(0, 192), (0, 8)]


def test_packing_stops_at_a_prompt_that_reaches_neither_its_end_nor_a_page_boundary():
    loop = Loop.of(prefill=(100,))
    loop.add(submit(1, prompt=50), submit(2, prompt=70), submit(3, prompt=5))
    assert lengths(loop.launch()) == [(0, 50)]
    assert loop.scheduler.running == 1


def test_prefill_and_decode_alternate_while_there_is_work_for_both():
    loop = Loop.of(prefill=(64,))
    loop.add(submit(1, prompt=10), submit(2, prompt=200))
    kinds = [type(loop.launch()) for _ in range(8)]
    assert kinds == [PrefillStep, DecodeStep] * 4


def test_a_request_without_a_slot_waits_until_one_is_free():
    loop = Loop.of(rows=1)
    loop.add(submit(1, prompt=10, max_tokens=2), submit(2, prompt=10, max_tokens=2))
    loop.launch()
    assert (loop.scheduler.running, loop.scheduler.waiting) == (1, 1)
    loop.drain()
    assert loop.answer(2) == alone(submit(2, prompt=10, max_tokens=2))


def test_nobody_overtakes_a_request_that_waits_for_pages():
    loop = Loop.of(pages=6)
    loop.add(submit(1, prompt=100), submit(2, prompt=250), submit(3, prompt=10))
    assert lengths(loop.launch()) == [(0, 100)]
    assert loop.scheduler.waiting == 2


def test_an_admission_leaves_one_page_for_each_running_request_to_grow_into():
    loop = Loop.of(pages=5)
    loop.add(submit(1, prompt=60), submit(2, prompt=60), submit(3, prompt=60))
    assert len(loop.launch().chunks) == 2  # two pages taken, two in reserve


# --- prefix cache -----------------------------------------------------------------------------------------------------


def test_a_prompt_seen_before_is_computed_from_the_first_page_that_differs():
    loop = Loop.of()
    shared = [7] * 130
    loop.add(submit(1, [*shared, 1], max_tokens=1))
    loop.drain()
    loop.add(submit(2, [*shared, 2], max_tokens=1))
    assert lengths(loop.launch()) == [(128, 3)]
    loop.drain()
    assert loop.deltas[-1].cached_tokens == 128
    assert loop.answer(2) == alone(submit(2, [*shared, 2], max_tokens=1))
    assert (loop.scheduler.prefix_query_tokens, loop.scheduler.prefix_hit_tokens) == (262, 128)


def test_a_prompt_is_found_by_requests_of_the_same_salt_alone():
    loop = Loop.of()
    cached = []
    for id, salt in enumerate((b"a", b"b", b"", b"a")):
        loop.add(Submit(id, [7] * 130, SamplingParams(max_tokens=1, seed=id), salt))
        loop.drain()
        cached.append(loop.deltas[-1].cached_tokens)
    assert cached == [0, 0, 0, 128]


def test_a_prompt_that_is_cached_whole_still_computes_its_last_page():
    loop = Loop.of()
    loop.add(submit(1, [7] * 128, max_tokens=1))
    loop.drain()
    loop.add(submit(2, [7] * 128, max_tokens=1))
    assert lengths(loop.launch()) == [(64, 64)]


def test_prompts_of_one_step_do_not_read_each_others_pages_but_those_of_the_next_step_do():
    loop = Loop.of(sequences=2)
    loop.add(*(submit(id, [7] * 70, max_tokens=1) for id in range(3)))
    assert lengths(loop.launch()) == [(0, 70), (0, 70)]
    assert lengths(loop.launch()) == [(64, 6)]


def test_an_answer_can_be_the_prefix_of_the_next_turn():
    loop = Loop.of()
    first = submit(1, prompt=100, max_tokens=40)
    loop.add(first)
    loop.drain()
    loop.add(submit(2, first.prompt + loop.answer(1) + [5], max_tokens=4))
    assert lengths(loop.launch()) == [(128, 13)]


def test_requests_with_penalties_compute_their_whole_prompt_but_others_may_read_it():
    loop = Loop.of()
    for id, penalty in enumerate([0.0, 0.5, 0.0]):
        loop.add(submit(id, [7] * 100, max_tokens=1, presence_penalty=penalty))
        loop.drain()
    assert [lengths(step) for step in loop.steps] == [[(0, 100)], [(0, 100)], [(64, 36)]]
    loop.add(submit(3, [9] * 100, max_tokens=1, presence_penalty=0.5))
    loop.drain()
    loop.add(submit(4, [9] * 100, max_tokens=1))
    assert lengths(loop.launch()) == [(64, 36)]


def test_without_the_prefix_cache_every_prompt_is_computed_whole():
    loop = Loop.of(prefix_cache=False)
    for id in range(2):
        loop.add(submit(id, [7] * 100, max_tokens=1))
        loop.drain()
    assert [lengths(step) for step in loop.steps] == [[(0, 100)]] * 2


# --- preemption and abort ---------------------------------------------------------------------------------------------


def crowded() -> Loop:
    """Two requests of a page each, four tokens short of its end, in a pool of three; the second will give way."""
    loop = Loop.of(pages=4, prefix_cache=False)
    loop.add(submit(1, prompt=60, max_tokens=100), submit(2, prompt=60, max_tokens=100))
    for _ in range(6):  # the prompts and four tokens more
        loop.launch()
        if loop.scheduler.preemptions == 0 and len(loop.in_flight) > 1:
            loop.collect()
    assert loop.scheduler.preemptions == 1
    return loop


def test_where_pages_run_out_the_youngest_gives_way_and_comes_back_with_its_answer():
    loop = crowded()
    assert (loop.scheduler.running, loop.scheduler.waiting) == (1, 1)
    loop.drain()
    again = [chunk for step in loop.steps[1:] if isinstance(step, PrefillStep) for chunk in step.chunks]
    assert [(chunk.start, chunk.prompt_tokens) for chunk in again] == [(0, 60)]
    assert len(again[0].tokens) > 60
    for id in (1, 2):
        assert loop.answer(id) == alone(submit(id, prompt=60, max_tokens=100))


def test_a_preempted_request_is_not_admitted_before_its_tokens_in_flight_have_arrived():
    loop = crowded()
    loop.abort(1)  # now there is room
    assert loop.launch() is None
    while loop.in_flight:
        loop.collect()
    assert lengths(loop.launch()) == [(0, 65)]


def test_a_preempted_request_can_end_on_a_token_in_flight():
    stop = alone(submit(2, prompt=60, max_tokens=5))[-1]
    loop = Loop.of(pages=4)
    loop.add(submit(1, prompt=60, max_tokens=100), submit(2, prompt=60, max_tokens=100, stop_token_ids=(stop,)))
    loop.drain()
    assert loop.scheduler.preemptions == 1
    assert loop.answer(2) == alone(submit(2, prompt=60, max_tokens=100, stop_token_ids=(stop,)))


def test_a_request_can_give_way_before_its_first_token_has_arrived():
    loop = Loop.of(pages=4)
    loop.add(submit(1, prompt=64, max_tokens=10), submit(2, prompt=64, max_tokens=10))
    loop.launch()
    loop.launch()
    assert (loop.scheduler.preemptions, len(loop.in_flight)) == (1, 2)
    loop.drain()
    for id in (1, 2):
        assert loop.answer(id) == alone(submit(id, prompt=64, max_tokens=10))
    assert loop.deltas[1].cached_tokens == 0
    assert (loop.scheduler.prefix_query_tokens, loop.scheduler.prefix_hit_tokens) == (128, 0)  # the first try counts


def test_preempted_requests_wait_in_the_order_in_which_they_came():
    loop = Loop.of(pages=9, rows=4)
    loop.add(*(submit(id, prompt=60, max_tokens=300) for id in range(4)))
    while len(loop.scheduler._running) != 1:
        loop.turn()
    assert [request.id for request in loop.scheduler._waiting] == sorted(r.id for r in loop.scheduler._waiting)
    loop.add(submit(9, prompt=10))
    loop.drain()
    for id in range(4):
        assert loop.answer(id) == alone(submit(id, prompt=60, max_tokens=300))


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 8])
def test_an_abort_frees_slot_and_pages_at_once_and_nothing_follows(turns):
    loop = Loop.of(prefill=(64,))
    loop.add(submit(1, prompt=150, max_tokens=50))
    for _ in range(turns):
        loop.turn()
    loop.abort(1)
    assert loop.scheduler.running == loop.scheduler.waiting == loop.scheduler.pool.used == 0
    loop.drain()


def test_an_unknown_or_finished_id_is_ignored_by_abort():
    loop = Loop.of()
    loop.add(submit(1, prompt=5, max_tokens=1))
    loop.drain()
    loop.abort(1)
    loop.abort(77)


def test_a_request_may_take_the_slot_and_pages_of_one_that_is_aborted_in_flight():
    loop = Loop.of(pages=3, rows=1)
    loop.add(submit(1, prompt=100, max_tokens=20))
    for _ in range(3):
        loop.launch()
    loop.abort(1)
    loop.add(submit(2, prompt=100, max_tokens=20))
    loop.drain()
    assert loop.answer(2) == alone(submit(2, prompt=100, max_tokens=20))


# --- properties of whole runs -----------------------------------------------------------------------------------------


@st.composite
def submissions(draw_from) -> list[Submit]:
    """Requests that share prefixes in every way: families of prompts, and turns that go on from another's answer."""
    submits: list[Submit] = []
    for id in range(draw_from(st.one_of(st.integers(4, 12), st.integers(1, 4)))):
        previous = draw_from(st.integers(0, 2 * len(submits)))
        if previous < len(submits):
            prefix = submits[previous].prompt + alone(submits[previous])
            prefix = prefix[: draw_from(st.integers(0, len(prefix)))]
        else:
            family = draw_from(st.integers(0, 1))
            prefix = [(family + i) % VOCAB for i in range(draw_from(st.sampled_from([64, 0, 63, 65, 127, 128, 250])))]
        tail = draw_from(st.one_of(st.integers(1, 50), st.just(PAGE_TOKENS - len(prefix) % PAGE_TOKENS)))
        sampling = SamplingParams(
            max_tokens=draw_from(st.one_of(st.integers(100, 200), st.integers(30, 150), st.integers(0, 6))),
            seed=draw_from(st.integers(0, 2)),
            stop_token_ids=tuple(draw_from(st.lists(st.integers(0, VOCAB - 1), max_size=1))),
            presence_penalty=draw_from(st.sampled_from([0.0, 0.0, 0.0, 1.0])),
            logprobs=draw_from(st.sampled_from([None, None, 2])),
            prompt_logprobs=draw_from(st.sampled_from([None, None, 0, 1])),
        )
        submits.append(Submit(id, prefix + [(tail * 7 + i) % VOCAB for i in range(tail)], sampling))
    return submits


@st.composite
def loops(draw_from, submits: list[Submit]) -> Loop:
    """Buckets of all kinds over a pool that may be too small for one of the requests, and often is for all at once."""
    largest = max(pages_for(len(s.prompt) + max(s.sampling.max_tokens, 1) - 1) for s in submits)
    return Loop.of(
        pages=max(2, largest + draw_from(st.integers(0, 4))),
        rows=draw_from(st.sampled_from([5, 8, 3, 2, 1])),
        prefill=draw_from(st.sampled_from([(64,), (16, 64), (100,), (32, 200), (512,), (128, 1000)])),
        sequences=draw_from(st.integers(1, 8)),
        max_context=draw_from(st.sampled_from([1024, 1024, 1024, 192])),
        prefix_cache=draw_from(st.sampled_from([True, True, False])),
        ahead=draw_from(st.sampled_from([1, 1, 1, 0, 2])),
        score=draw_from(st.sampled_from([(64,), (100,), (16, 64), (32, 200), (512,)])),
    )


@settings(max_examples=1000, deadline=None)
@given(submissions(), st.data())
def test_every_request_ends_with_the_tokens_it_gets_alone_and_leaves_nothing_behind(submits, data):
    loop = data.draw(loops(submits))
    scheduler, pool = loop.scheduler, loop.scheduler.pool
    together = data.draw(st.booleans())
    arrivals = [0 if together else data.draw(st.integers(0, 60)) for _ in submits]
    aborts = {
        id: (arrivals[id] + data.draw(st.integers(0, 80)), data.draw(st.booleans()))  # (turn, with its step in flight?)
        for id in data.draw(st.sets(st.integers(0, len(submits) - 1), max_size=3))
    }
    refused, aborted = set(), set()
    # The oldest request is in every second step, whatever the others do: that bounds all of them together.
    work = sum(2 * (pages_for(len(s.prompt)) + 1 + s.sampling.max_tokens) + 4 + 2 * loop.ahead for s in submits)
    for turn in range(max(arrivals) + work + 4):
        for s, arrival in zip(submits, arrivals, strict=True):
            if arrival == turn:
                total = len(s.prompt) + s.sampling.max_tokens
                most = len(s.prompt) + max(s.sampling.max_tokens, 1) - 1
                if total > scheduler._max_context or pages_for(most) > pool.total:
                    refused.add(s.id)
                    with pytest.raises(ValueError, match="prompt"):
                        loop.add(s)
                else:
                    loop.add(s)
        for late in (False, True):
            step = loop.launch() if late else None
            for id, when in aborts.items():
                if when == (turn, late):
                    loop.abort(id)
                    aborted.add(id)
        if len(loop.in_flight) > (loop.ahead if step else 0):
            loop.collect()
        elif step is None and turn >= max(arrivals):
            break
    else:
        pytest.fail("requests are still not done")
    event(f"preemptions: {min(scheduler.preemptions, 3)}")
    event(f"prefix hits: {scheduler.prefix_hit_tokens > 0}")

    assert scheduler.running == scheduler.waiting == pool.used == 0
    assert pool.available == pool.total
    assert len(scheduler._free_slots) == loop.buckets.max_rows
    assert not scheduler._requests
    readers = [s for s in submits if s.id not in refused and not s.sampling.penalized]
    assert scheduler.prefix_hit_tokens <= scheduler.prefix_query_tokens <= sum(len(s.prompt) for s in readers)
    for s in submits:
        deltas = [delta for delta in loop.deltas if delta.id == s.id]
        expected = [] if s.id in refused else alone(s)
        if s.id in aborted and not (deltas and deltas[-1].finish_reason):
            assert loop.answer(s.id) == expected[: len(loop.answer(s.id))]
            assert loop.scores(s.id) == scores_alone(s)[: len(loop.scores(s.id))]
            continue
        assert loop.answer(s.id) == expected
        if s.id not in refused | aborted:
            assert loop.scores(s.id) == scores_alone(s)
        for position, delta in enumerate(deltas):
            assert (delta.cached_tokens is not None) == (delta.queue_seconds is not None) == (position == 0)
            assert (delta.finish_reason is not None) == (position == len(deltas) - 1)
            if s.sampling.logprobs is not None:
                assert [entry.logprob for entry in delta.logprobs] == [-token for token in delta.tokens]
        if deltas:
            stopped = expected[-1:] and expected[-1] in s.sampling.stop_token_ids
            assert deltas[-1].finish_reason == ("stop" if stopped else "length")
            assert deltas[0].cached_tokens % PAGE_TOKENS == 0
            assert deltas[0].cached_tokens < len(s.prompt)
