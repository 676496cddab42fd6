"""A whole engine in the test's own process: real scheduler, buffers, steps and model; only the sockets are missing."""

import itertools
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from conf.limits import SCRATCH_PAGE
from conf.schema import BucketsConfig, Config, Dtype, KernelsConfig, ModelConfig, RandomShape, Weights
from engine.architecture import Architecture
from engine.messages import Abort, Delta, PromptLogprobs, StepReport, Submit
from engine.parallel import Ranks
from engine.start import start
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
        prompt_logprobs=(),
        max_context=1024,
        pages=200,
        prefix_cache=True,
        poison=True,
        device=CPU,
        ops=reference,
        ranks=ALONE,
    ) -> None:
        random = isinstance(source, Architecture)
        config = Config(
            model=ModelConfig(
                name="test",
                weights=Weights.random if random else Weights.checkpoint,
                path=None if random else str(source),
                random_shape=random_shape(source) if random else RandomShape(),
            ),
            buckets=BucketsConfig(
                decode_rows=list(decode_rows),
                prefill_tokens=list(prefill_tokens),
                prefill_sequences=sequences,
                prompt_logprobs=list(prompt_logprobs),
                max_context=max_context,
                pages=pages,
            ),
            kernels=KernelsConfig(dtype=Dtype[str(dtype).removeprefix("torch.")]),
            tp=ranks.size,
        )
        with patch("kernels.choose", lambda *_: ops):
            engine = start(config, ranks, device)
        self.model, self.buffers, self.steps = engine.model, engine.buffers, engine.steps
        self.shape, self.buckets = self.model.architecture, self.buffers.buckets
        if poison:
            self.buffers.keys.fill_(float("nan"))
            self.buffers.values.fill_(float("nan"))
            for bucket in self.buckets.prefill + self.buckets.score:
                self.steps.capture(bucket, self._poisoned(bucket))
        self.core = engine.core(self._published, prefix_cache=prefix_cache)
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.pool
        self.deltas: dict[int, list[Delta]] = {}
        self.reports = 0
        self._ids = itertools.count()

    def _poisoned(self, bucket):
        """A prefill step that finds an index no pool has in every unused entry of a request's page table."""
        step, inputs = self.model.step(bucket, self.buffers), self.buffers.inputs[bucket]

        def run() -> None:
            used = inputs.page_table[:, :1] != SCRATCH_PAGE
            inputs.page_table.masked_fill_((inputs.page_table == SCRATCH_PAGE) & used, 10**9)
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

    def prompt_logprobs(self, id: int) -> list[PromptLogprobs]:
        return [entry for delta in self.deltas[id] for entry in delta.prompt_logprobs or []]

    def generate(self, *prompts: list[int], **sampling) -> list[list[int]]:
        """Submit all prompts at once -> the tokens of each."""
        ids = [self.submit(prompt, **sampling) for prompt in prompts]
        self.run()
        return [self.tokens(id) for id in ids]

    def all_logits(self, prompt: list[int], chunk: int) -> torch.Tensor:
        """Logits [tokens, V] of each of a prompt's tokens, computed in chunks, through plan, buffers and forward."""
        pages, out = list(range(1, len(prompt) // 64 + 2)), []
        sampling = SamplingParams(max_tokens=1, seed=0)
        for first in range(0, len(prompt), chunk):
            tokens = prompt[first : first + chunk]
            step = PrefillStep([Chunk(0, tokens, first, len(prompt), pages, False, sampling)])
            bucket, staging = self.buckets.choose("prefill", len(tokens)), self.buffers.staging()
            self.buffers.fill(step, bucket, staging)
            words = self.buffers.words_of(bucket)
            self.buffers.words[:words] = staging.words[:words]
            inputs = self.buffers.inputs[bucket]
            places = TokenPlaces(inputs.positions, inputs.slots)
            self.model.install(self.buffers, inputs, places)
            hidden = self.model.forward("prefill", self.buffers, inputs.tokens, places)
            out.append(self.model.logits(hidden)[: len(tokens)].float())
        return torch.cat(out)


def random_shape(a: Architecture) -> RandomShape:
    """The `model.random_shape` of which `a` is the architecture."""
    shape = RandomShape(
        num_hidden_layers=a.layers,
        num_local_experts=a.experts,
        num_experts_per_tok=a.experts_per_token,
        hidden_size=a.hidden,
        intermediate_size=a.intermediate,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_dim,
        vocab_size=a.vocab,
        sliding_window=next(window for window in a.windows if window),
    )
    assert Architecture.from_random_shape(shape) == a, "not a shape that random weights can have"
    return shape


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
