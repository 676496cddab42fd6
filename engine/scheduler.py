"""Which requests the next step computes: admission, chunked prefill, decode rows, preemption, finishing.

Knows requests, slots, pages and positions. Does not know the model, tensors, text or time beyond the numbers it is
given. It runs ahead of the device: `schedule` plans step n+1 before the tokens of step n are known, so decode rows
are planned from positions alone and the sampled token travels on the device. What is freed while a step is in flight
is safe to reuse at once, because steps run on the device in the order in which they were scheduled.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from conf.limits import PAGE_TOKENS
from engine.grammar import Constraint
from engine.messages import Delta, FinishReason, PromptLogprobs, Submit, TokenLogprobs
from engine.pages import PagePool, extend_chain, pages_for
from graphs.buckets import Buckets
from graphs.plan import NO_PAGE, NO_TARGET, Chunk, DecodeStep, PrefillStep, SamplingParams, Step

NO_SLOT = -1


@dataclass(slots=True, eq=False)
class Request:
    """One request from `add` until it finishes or is aborted. Written by the scheduler only."""

    id: int
    sampling: SamplingParams
    tokens: list[int]  # prompt, then the answer as far as it is known
    prompt_tokens: int
    arrival: float
    last_position: int  # of the last token it may draw, whose key and value are never computed
    prefill_end: int  # prefill computes the positions before this: the prompt, after preemption also the answer so far
    salt: bytes = b""  # of its digests
    constraint: Constraint | None = None  # what its next token may be; it follows those that have arrived
    to_score: int = 0  # the tokens behind the positions before this are to get log probabilities
    scored: int = 0  # those behind the positions before this get them in a scheduled step
    computed: int = 0  # the positions before this are in its pages once every scheduled step has run
    slot: int = NO_SLOT  # held while it runs
    pages: list[int] = field(default_factory=list)
    registered: int = 0  # leading pages that are in the prefix cache
    digests: list[bytes] = field(default_factory=list)  # of the leading full pages of `tokens`; no page is hashed twice
    cached_tokens: int | None = None  # found in the prefix cache at the first admission; None before it
    queue_seconds: float = 0.0  # from arrival to the first admission
    answered: bool = False  # it had a Delta
    done: bool = False  # finished or aborted: tokens that still arrive for it are dropped

    @property
    def unscored(self) -> bool:
        """Whether there are log probabilities of its prompt to compute yet."""
        return self.scored < self.to_score


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A step to launch, and the requests that its drawn tokens belong to, by row (decode) or chunk (prefill).

    None: the chunk is not the last of its prompt, and draws no token.
    """

    step: Step
    rows: Sequence[Request | None]
    scored: Sequence[tuple[Request, range]] = ()  # the step's tokens whose targets are the request's, in order


class Scheduler:
    """First come, first served over one pool of pages. Every Scheduled that it returns must be launched, in order.

    Running requests are always older than waiting ones, and where pages run out the youngest running one is preempted.
    So the oldest request never waits for another, and every request ends.
    """

    def __init__(self, pool: PagePool, buckets: Buckets, max_context: int, prefix_cache: bool = True) -> None:
        self.pool = pool
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._max_context = max_context
        self._prefix_cache = prefix_cache
        self._largest = buckets.prefill[-1]
        self._largest_scored = buckets.score[-1] if buckets.score else None
        self._free_slots = list(range(buckets.max_rows - 1, -1, -1))
        self._requests: dict[int, Request] = {}
        self._running: list[Request] = []  # oldest first
        self._waiting: deque[Request] = deque()  # oldest first
        self._prefilled = False  # the last step was a prefill

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    def add(self, submit: Submit, now: float, constraint: Constraint | None = None) -> None:
        """Queues a request; `now` is in seconds. With a `constraint` it waits for each of its tokens to arrive before
        the next one is planned. Raises ValueError, fit for the client, for one that can never run."""
        prompt, limit = len(submit.prompt), submit.sampling.max_tokens
        if prompt < 1 or limit < 0:
            raise ValueError(f"a prompt of {prompt} tokens and max_tokens {limit}: at least 1 and 0 are allowed")
        scores = submit.sampling.prompt_logprobs is not None
        if scores and not self._largest_scored:
            raise ValueError("prompt_logprobs: this server has no bucket for them (buckets.prompt_logprobs)")
        if prompt + limit > self._max_context:
            raise ValueError(
                f"a prompt of {prompt} tokens and max_tokens {limit} exceed the context of {self._max_context} tokens"
            )
        last_position = prompt + max(limit, 1) - 1  # with max_tokens 0 a token is drawn too, and dropped
        if pages_for(last_position) > self.pool.total:
            raise ValueError(
                f"a prompt of {prompt} tokens and max_tokens {limit} need {pages_for(last_position)} pages of "
                f"{PAGE_TOKENS} tokens; the server has {self.pool.total}"
            )
        request = Request(
            submit.id, submit.sampling, list(submit.prompt), prompt, now, last_position, prompt, submit.salt, constraint
        )
        request.to_score = prompt - 1 if scores else 0
        self._requests[submit.id] = request
        self._waiting.append(request)

    def abort(self, id: int) -> None:
        """Forgets a request at any point of its life; tokens in flight for it are dropped when they arrive."""
        if id in self._requests:
            self._end(self._requests[id])

    def schedule(self, now: float) -> Scheduled | None:
        """The next step, or None where there is nothing to do before a token arrives or a request is added.

        Prefill and decode alternate while there is work for both: a running request waits for one prefill step at a
        time, never for a whole long prompt.
        """
        scheduled = self._decode() if self._prefilled else None
        scheduled = scheduled or self._prefill(now) or self._decode()
        self._prefilled = scheduled is not None and scheduled.step.kind != "decode"
        return scheduled

    def update(
        self,
        scheduled: Scheduled,
        tokens: list[int],
        logprobs: Callable[[int, int], TokenLogprobs],
        scores: Callable[[int, int], PromptLogprobs],
    ) -> list[Delta]:
        """Adds a step's drawn tokens to their requests; call it in the order in which steps were scheduled.

        tokens: one a row, ignored where the row draws none. `logprobs(row, count)` gives a row's log probabilities,
        `scores(token, count)` those of the target of one of the step's tokens; they are called only for requests that
        want them.
        """
        deltas = []
        parts = {
            request: [scores(token, request.sampling.prompt_logprobs or 0) for token in targets]
            for request, targets in scheduled.scored
            if not request.done
        }
        for row, (request, token) in enumerate(zip(scheduled.rows, tokens, strict=True)):
            if request is None or request.done:
                continue
            request.tokens.append(token)
            length, sampling = len(request.tokens), request.sampling
            drawn = [token] if sampling.max_tokens else []
            finish: FinishReason | None = None
            constraint = request.constraint if drawn else None
            ended = constraint is not None and constraint.accept(token)
            if constraint and constraint.error:
                deltas.append(Delta(request.id, [], "error", error=f"the grammar: {constraint.error}"))
                self._end(request)
                continue
            if drawn and (ended or token in sampling.stop_token_ids):
                finish = "stop"
            elif length > request.last_position:
                finish = "length"
            found = None if sampling.logprobs is None else [logprobs(row, sampling.logprobs) for _ in drawn]
            deltas.append(_delta(request, drawn, finish, found, parts.pop(request, None)))
            if length >= (request.registered + 1) * PAGE_TOKENS:
                self._register(request)
            if finish:
                self._end(request)
        return deltas + [
            _delta(request, [], None, None if request.sampling.logprobs is None else [], part)
            for request, part in parts.items()
        ]

    def _decode(self) -> Scheduled | None:
        """One row for each running request whose prompt is done and whose last token is not drawn yet."""
        rows, slots, positions, new_pages = [], [], [], []
        # They go on together: in turns, two halves of them would take twice as many steps.
        constrained_wait = any(r.constraint and r.prefill_end < r.computed >= len(r.tokens) for r in self._running)
        for request in self._running:  # preemption takes the youngest: never a request that has its row already
            position = request.computed
            if not request.prefill_end <= position < request.last_position:
                continue
            if request.constraint and (constrained_wait or position >= len(request.tokens)):
                continue  # what its next token may be is known once the last one has arrived
            page = self._grow(request) if position % PAGE_TOKENS == 0 else NO_PAGE
            if page is None:
                break  # it was the youngest and is preempted itself
            request.computed = position + 1
            rows.append(request)
            slots.append(request.slot)
            positions.append(position)
            new_pages.append(page)
        return Scheduled(DecodeStep(slots, positions, new_pages), rows) if rows else None

    def _prefill(self, now: float) -> Scheduled | None:
        """Chunks, oldest request first, until the largest bucket is full or the next request doesn't fit.

        The oldest decides whether the step scores; where it does not, a prompt that is to be scored waits.
        """
        unfinished = [request for request in self._running if request.computed < request.prefill_end]
        oldest = next(iter(unfinished or self._waiting), None)
        scores = oldest is not None and oldest.unscored
        largest = self._largest_scored if scores and self._largest_scored else self._largest
        budget = largest.tokens
        chosen: list[Request] = []
        chunks: list[Chunk] = []
        scored: list[tuple[Request, range]] = []
        while len(chunks) < largest.sequences:
            request = unfinished[len(chunks)] if len(chunks) < len(unfinished) else self._admit(budget, scores, now)
            if request is None or (request.unscored and not scores):
                break
            if (size := _chunk_size(request.prefill_end - request.computed, budget)) == 0:
                break
            start, end = request.computed, request.computed + size
            targets: list[int] = []
            if request.scored < (scored_end := min(end, request.to_score)):
                known = request.scored - start  # after preemption some positions are computed again
                targets = [NO_TARGET] * known + request.tokens[request.scored + 1 : scored_end + 1]
                first = largest.tokens - budget
                scored.append((request, range(first + known, first + len(targets))))
                request.scored = scored_end
            chunks.append(
                Chunk(
                    slot=request.slot,
                    tokens=request.tokens[start:end],
                    start=start,
                    prompt_tokens=request.prompt_tokens,
                    pages=request.pages[: pages_for(end)],
                    samples=end == request.prefill_end,
                    sampling=request.sampling,
                    targets=targets,
                )
            )
            chosen.append(request)
            request.computed = end
            budget -= size
        for request in chosen:  # only now: chunks of one step don't read each other's pages
            self._register(request)
        rows = [request if chunk.samples else None for request, chunk in zip(chosen, chunks, strict=True)]
        return Scheduled(PrefillStep(chunks), rows, scored) if chunks else None

    def _admit(self, budget: int, scores: bool, now: float) -> Request | None:
        """Moves the oldest waiting request to the running ones; None where it has to wait, and all behind it too.

        It needs a slot, a first chunk that fits the budget, and pages for all its tokens. One page more for each
        running request stays in reserve: without it an admission takes the page that the next decode step needs, and
        is preempted right away (in simulations of a pool too small a third of all prefill was wasted).
        """
        if not self._waiting or not self._free_slots:
            return None
        request = self._waiting[0]
        if request.unscored and not scores:
            return None
        if len(request.tokens) < request.prefill_end:
            return None  # preempted, and a token that was drawn for it has not arrived yet
        cached = self._cached_pages(request)
        cached_tokens = len(cached) * PAGE_TOKENS
        needed = pages_for(request.prefill_end) - len(cached)
        fits = _chunk_size(request.prefill_end - cached_tokens, budget) > 0
        pages = self.pool.allocate(needed) if fits and self.pool.available >= needed + len(self._running) else None
        if pages is None:
            self.pool.release(cached)
            return None
        self._running.append(self._waiting.popleft())
        request.slot = self._free_slots.pop()
        request.pages = cached + pages
        request.registered = len(cached)
        request.computed = cached_tokens
        if request.cached_tokens is None:
            request.cached_tokens = cached_tokens
            request.queue_seconds = now - request.arrival
            if self._reads_cache(request) and not request.unscored:
                self.prefix_query_tokens += request.prompt_tokens
                self.prefix_hit_tokens += cached_tokens
        return request

    def _reads_cache(self, request: Request) -> bool:
        """With penalties, prefill counts the tokens on the device, so it has to see all of them."""
        return self._prefix_cache and not request.sampling.penalized

    def _cached_pages(self, request: Request) -> list[int]:
        """The leading pages of a request that are in the prefix cache, at least one token short of all; now held.

        What is read from there is not computed: only positions that are scored already, where the prompt is to be.
        """
        if not self._reads_cache(request):
            return []
        extend_chain(request.digests, request.tokens, request.salt)
        most = request.scored if request.unscored else len(request.tokens) - 1
        return self.pool.match(request.digests, most // PAGE_TOKENS)

    def _register(self, request: Request) -> None:
        """Makes the pages findable whose tokens are all known and whose keys and values a scheduled step computes."""
        full = min(len(request.tokens), request.computed) // PAGE_TOKENS
        if not self._prefix_cache or full <= request.registered:
            return
        extend_chain(request.digests, request.tokens, request.salt)
        for index in range(request.registered, full):
            self.pool.register(request.pages[index], request.digests[index])
        request.registered = full

    def _grow(self, request: Request) -> int | None:
        """One more page for a running request, for which the youngest may be preempted; None if it was preempted."""
        while (pages := self.pool.allocate(1)) is None:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is request:
                return None
        request.pages += pages
        return pages[0]

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue, to compute its prompt and all tokens drawn so far again later."""
        if request.computed >= request.prefill_end:
            request.prefill_end = request.computed + 1  # with the tokens that are drawn but have not arrived
        self._stop(request)
        self._waiting.appendleft(request)
        self.preemptions += 1

    def _stop(self, request: Request) -> None:
        """Takes a running request off its slot and pages."""
        self._running.remove(request)
        self._free_slots.append(request.slot)
        self.pool.release(request.pages)
        request.slot, request.pages, request.registered, request.computed = NO_SLOT, [], 0, 0

    def _end(self, request: Request) -> None:
        """Forgets a request wherever it is: running, waiting, or preempted with tokens in flight."""
        request.done = True
        del self._requests[request.id]
        if request.slot == NO_SLOT:
            self._waiting.remove(request)
        else:
            self._stop(request)


def _delta(
    request: Request,
    tokens: list[int],
    finish: FinishReason | None,
    logprobs: list[TokenLogprobs] | None,
    prompt_logprobs: list[PromptLogprobs] | None,
) -> Delta:
    """What a step adds to a request; the first one says how it began."""
    first, request.answered = not request.answered, True
    return Delta(
        request.id,
        tokens,
        finish,
        logprobs,
        request.cached_tokens if first else None,
        request.queue_seconds if first else None,
        prompt_logprobs=prompt_logprobs,
    )


def _chunk_size(left: int, budget: int) -> int:
    """Tokens of the next chunk: all that are `left` if they fit the budget, else up to a page boundary, else 0.

    So chunks begin at page boundaries, and end there or with the prompt: a page's keys and values come from one chunk.
    What else is in the step decides only how many pages a chunk covers.
    """
    return left if left <= budget else budget // PAGE_TOKENS * PAGE_TOKENS
