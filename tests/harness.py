"""A whole engine in the test's own process: real scheduler, buffers, steps and model; only the sockets are missing."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import torch

from conf.schema import RandomShape
from engine import checkpoint
from engine.architecture import Architecture
from engine.core import Core
from engine.messages import Abort, Delta, StepReport, Submit
from engine.model import Model
from engine.pages import PagePool
from engine.parallel import Ranks
from engine.scheduler import Scheduler
from engine.weights import random_weights
from graphs.buckets import Buckets
from graphs.buffers import Buffers
from graphs.capture import steps_for
from graphs.plan import Chunk, PrefillStep, SamplingParams
from kernels import reference
from kernels.ops import TokenPlaces

GREEDY = {"max_tokens": 16, "seed": 0, "temperature": 0.0}
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, Path())


class InProcess:
    """One rank's engine.

    `source`: a checkpoint's folder, or a shape to fill with random weights. `ops`: the set of kernels. `poison`:
    unwritten pages hold NaN, and unused page table entries an index that no pool has.
    """

    def __init__(
        self,
        source: Path | Architecture,
        *,
        dtype=torch.float32,
        decode_rows=(1, 2, 4, 8),
        prefill_tokens=(64, 256),
        sequences=4,
        max_context=1024,
        pages=200,
        prefix_cache=True,
        poison=True,
        device=CPU,
        ops=reference,
        ranks=ALONE,
    ) -> None:
        shard = ranks.rank, ranks.size, device, dtype
        if isinstance(source, Architecture):
            self.shape, weights = source, random_weights(source, *shard)
        else:
            self.shape, weights = checkpoint.load(source, *shard)
        self.buckets = Buckets.of(list(decode_rows), list(prefill_tokens), sequences)
        peers = ops.join(ranks, self.buckets.max_rows, max(prefill_tokens), sequences, self.shape.hidden, device)
        self.model = Model(self.shape, weights, ops, peers, max_context)
        self.buffers = Buffers(
            buckets=self.buckets,
            layers=self.shape.layers,
            kv_heads=self.shape.kv_heads // ranks.size,
            head_dim=self.shape.head_dim,
            vocab=self.shape.vocab,
            max_context=max_context,
            pages=pages,
            device=device,
            dtype=dtype,
        )
        if poison:
            self.buffers.keys.fill_(float("nan"))
            self.buffers.values.fill_(float("nan"))
        self.steps = steps_for(self.buffers, max(1, os.cpu_count() // ranks.size))
        for bucket in sorted(self.buckets.all, key=lambda bucket: -bucket.tokens):
            self.steps.capture(bucket, self.body(bucket, poison))
        self.pool = PagePool(pages)
        self.scheduler = Scheduler(self.pool, self.buckets, max_context, prefix_cache)
        self.core = Core(self.scheduler, self.buffers, self.steps, lambda *_: None, self._published)
        self.deltas: dict[int, list[Delta]] = {}
        self.reports = 0
        self._ids = itertools.count()

    def body(self, bucket, poison):
        step, inputs = self.model.step(bucket, self.buffers), self.buffers.inputs[bucket]

        def run() -> None:
            if poison and bucket.kind == "prefill":
                real = inputs.page_table[:, :1] != 0
                unused = (inputs.page_table == 0) & real
                inputs.page_table.masked_fill_(unused, 10**9)
            step()

        return run

    def _published(self, message) -> None:
        assert isinstance(message, StepReport)
        self.reports += 1
        for delta in message.deltas:
            self.deltas[delta.id].append(delta)

    def submit(self, prompt: list[int], **sampling) -> int:
        id = next(self._ids)
        self.deltas[id] = []
        self.core.handle(Submit(id, prompt, SamplingParams(**GREEDY | sampling)))
        return id

    def abort(self, id: int) -> None:
        self.core.handle(Abort(id))

    def run(self) -> None:
        """Turn the loop until nothing is left to do."""
        while self.core.turn():
            pass

    def tokens(self, id: int) -> list[int]:
        return [token for delta in self.deltas[id] for token in delta.tokens]

    def generate(self, *prompts: list[int], **sampling) -> list[list[int]]:
        """Submit all prompts at once -> the tokens of each."""
        ids = [self.submit(prompt, **sampling) for prompt in prompts]
        self.run()
        return [self.tokens(id) for id in ids]

    def all_logits(self, prompt: list[int], chunk: int) -> torch.Tensor:
        """Logits [tokens, V] of each of a prompt's tokens, computed in chunks, through plan, buffers and forward."""
        pages, out = list(range(1, len(prompt) // 64 + 2)), []
        sampling = SamplingParams(max_tokens=1, seed=0)
        for start in range(0, len(prompt), chunk):
            tokens = prompt[start : start + chunk]
            step = PrefillStep([Chunk(0, tokens, start, len(prompt), pages, False, sampling)])
            bucket, staging = self.buckets.choose("prefill", len(tokens)), self.buffers.staging()
            self.buffers.fill(step, bucket, staging)
            words = self.buffers.words_of(bucket)
            self.buffers.words[:words] = staging.words[:words]
            inputs = self.buffers.inputs[bucket]
            self.buffers.install(inputs)
            places = TokenPlaces(inputs.positions, inputs.slots)
            hidden = self.model.forward("prefill", self.buffers, inputs.tokens, places)
            out.append(self.model.logits(hidden)[: len(tokens)].float())
        return torch.cat(out)


FULL_SIZE = Architecture.from_random_shape(RandomShape())
FULL_WIDTH = replace(FULL_SIZE, layers=2, windows=(128, None))
SMALL = replace(
    FULL_SIZE,
    layers=4,
    hidden=256,
    intermediate=256,
    heads=16,
    kv_heads=2,
    vocab=4096,
    experts=8,
    windows=(128, None, 128, None),
)
TINY = replace(
    FULL_SIZE,
    layers=4,
    hidden=96,
    intermediate=160,
    heads=8,
    kv_heads=4,
    head_dim=32,
    vocab=512,
    experts=6,
    windows=(128, None, 128, None),
)


def prompt_of(length: int, vocab: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, vocab, (length,), generator=draw).tolist()
