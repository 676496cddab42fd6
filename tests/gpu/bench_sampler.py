"""Microseconds of one call of the Hopper sampler: `python -m tests.gpu.bench_sampler`.

Medians of graph replays over rotating logits larger than L2; the floor is the logits' bytes, and the counts' where
there are penalties.
"""

from functools import partial

import torch

from graphs.buffers import sampling_state
from kernels.hopper.sampler import sample
from kernels.ops import NO_MASK, Peers, SamplingState, TokenCounts, TokenMasks, TokenPlaces
from tests.gpu.timing import BANDWIDTH, microseconds
from tests.harness import ALONE

VOCAB = 201088
ROWS = (1, 8, 64, 256)
MODES = {
    "greedy": {},
    "greedy, log probability": {"logprobs": 1},
    "greedy, 20 likeliest": {"logprobs": 21},
    "greedy, penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
    "temperature": {"temperature": 0.8},
    "temperature, 20 likeliest": {"temperature": 0.8, "logprobs": 21},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_p + top_k": {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
}
MASKED = ("greedy", "temperature", "top_p + top_k")  # these are timed with a mask a row, too, of every second token


def state_of(rows: int, options: dict) -> SamplingState[torch.Tensor]:
    state = sampling_state(lambda shape, kind: torch.zeros(shape, dtype=getattr(torch, kind), device="cuda"), rows)
    for name, value in {"top_p": 1.0, "repetition_penalty": 1.0, **options}.items():
        getattr(state, name).fill_(value)
    return state


def sample_time(rows: int, options: dict, dtype: torch.dtype, masked: bool = False) -> float:
    copies = max(4, int(400e6 // (rows * VOCAB * dtype.itemsize)))
    logits = (torch.randn(copies, rows, VOCAB, device="cuda") * 3).to(dtype)
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    output = torch.zeros(rows, VOCAB, dtype=torch.int32, device="cuda")
    counts = TokenCounts(output, torch.zeros(rows, VOCAB, dtype=torch.uint8, device="cuda"))
    words = torch.full((rows, -(-VOCAB // 32)), 0x55555555, dtype=torch.int32, device="cuda")
    masks = TokenMasks(slots if masked else torch.full_like(slots, NO_MASK), words)
    rest = (TokenPlaces(slots, slots), state_of(rows, options), counts, masks, 20, Peers(ALONE))
    return microseconds([partial(sample, copy, *rest) for copy in logits])


def bench() -> None:
    print(f"{'dtype':>15} {'rows':>4} {'mode':>25} {'us':>8} {'GB/s':>6} {'of 3.08 TB/s':>12}")
    for dtype in (torch.bfloat16, torch.float32):
        modes = [(mode, mode, False) for mode in MODES] + [(f"{mode}, mask", mode, True) for mode in MASKED]
        for mode, name, masked in modes:
            options = MODES[name]
            for rows in ROWS:
                us = sample_time(rows, options, dtype, masked)
                size = rows * VOCAB * (dtype.itemsize + (5 if "frequency_penalty" in options else 0))
                rate = size / us * 1e6
                speed = f"{rate / 1e9:>6.0f} {rate / BANDWIDTH:>12.1%}"
                print(f"{dtype!s:>15} {rows:>4} {mode:>25} {us:>8.1f} {speed}", flush=True)


if __name__ == "__main__":
    bench()
