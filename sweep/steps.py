"""Every bucket's decode or prefill step on its own, without HTTP: `python -m sweep.steps PROMPT CONTEXT OVERRIDES…`
prints one line of JSON. Prefill steps hold prompts of PROMPT tokens, decode steps rows at CONTEXT.

On a GPU a decode step is compared with its floor: the bytes a rank must read once, over the read bandwidth measured in
the same run. Of the experts' weights only those count that the rows of the timed step chose. Every rank times the same
steps; the figures are rank 0's. A process of its own, because it takes the memory that the server will need.
"""

import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from conf.limits import PAGE_TOKENS
from conf.schema import Config, ConfigError, compose
from demo.bundle import with_demo_folder
from engine.architecture import Architecture
from engine.lifetime import die_with
from engine.parallel import Ranks
from engine.run_folder import RunFolder
from engine.start import Engine, device_of, start
from graphs.buckets import Bucket
from graphs.buffers import DecodeInputs, Staging
from graphs.plan import full_step
from kernels.ops import TokenPlaces

SAMPLES = 6  # of each step: their range holds the median in 97 % of cases, 1 - 2 / 2**6


def decode_bytes(shape: Architecture, rows: int, context: int, experts: float, tp: int) -> float:
    """Bytes that each rank must read once in a decode step; `experts`: how many the rows chose, over all layers."""
    width = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    expert = 3 * shape.hidden * shape.intermediate * 4.25 / 8
    token = 2 * 2 * shape.kv_heads * shape.head_dim
    cached = sum(min(context, window or context) for window in shape.windows)
    dense = shape.layers * 2 * shape.hidden * width + rows * token * cached
    return (dense + experts * expert + 2 * shape.hidden * shape.vocab) / tp


@torch.inference_mode()
def chosen_experts(built: Engine, bucket: Bucket, staging: Staging) -> int:
    """How many experts a decode step's rows choose, over all layers; the forward runs once, eagerly."""
    model, buffers = built.model, built.buffers
    buffers.words.copy_(staging.words)
    inputs = buffers.inputs[bucket]
    assert isinstance(inputs, DecodeInputs)
    places = TokenPlaces(inputs.positions, inputs.slots)
    tokens, _ = model.advance(buffers, places, inputs.new_pages)
    counts: list[int] = []
    model.forward("decode", buffers, tokens, places, lambda routing: counts.append(len(routing.expert_ids.unique())))
    synchronize(built)
    return sum(counts)


@torch.inference_mode()
def step_ms(built: Engine, bucket: Bucket, context: int, launches: int = 40, samples: int = 5) -> tuple[float, float]:
    """Milliseconds of a launch of a bucket's step, launches back to back; and the experts that a decode step chooses,
    the mean of before and after the timing.

    The rows begin with random tokens at position `context`; a prefill step is full of prompts of that length.
    """
    buffers, vocab = built.buffers, built.ready.vocab_size
    staging = buffers.staging()
    slots = bucket.tokens if bucket.kind == "decode" else bucket.tokens // context
    width = -(-context // PAGE_TOKENS)
    pages = torch.randperm(buffers.keys.shape[1] - 1, device=buffers.device)[: slots * width] + 1
    buffers.page_table[:slots, :width] = pages.view(slots, width)
    buffers.last_token[:slots] = torch.randint(0, vocab, (slots,), device=buffers.device)
    buffers.fill(full_step(bucket, context, slots, vocab, pages.tolist()), bucket, staging)
    synchronize(built)
    if bucket.kind == "decode":
        buffers.sampling.repetition_penalty.fill_(1)
        buffers.sampling.top_p.fill_(1)
    times, experts = [], [chosen_experts(built, bucket, staging) if bucket.kind == "decode" else 0]
    for _ in range(samples):
        built.steps.launch(bucket, staging)()
        begin = time.perf_counter()
        for _ in range(launches):
            wait = built.steps.launch(bucket, staging)
        wait()
        times.append(1e3 * (time.perf_counter() - begin) / launches)
    experts.append(chosen_experts(built, bucket, staging) if bucket.kind == "decode" else 0)
    return statistics.median(times), statistics.mean(experts)


def synchronize(built: Engine) -> None:
    """Wait for all work on the engine's device."""
    if built.buffers.device.type == "cuda":
        torch.cuda.synchronize()


def measure(config: Config, ranks: Ranks, device: torch.device, prompt: int, context: int) -> dict[str, Any]:
    """{"read_bandwidth": bytes a second or None, "steps": [one row a bucket]}.

    The buckets take turns, forth and back, so that a machine that slows down favours none. `ms` is the median of
    SAMPLES, `ms_range` their range.
    """
    torch.manual_seed(0)  # the same on all ranks
    rate, launches = None, {"decode": 1, "prefill": 1}
    if device.type == "cuda":
        from sweep.bandwidth import read_bandwidth  # imported here: torch for CPUs comes without triton

        rate, launches = read_bandwidth(), {"decode": 20, "prefill": 2}
        torch.cuda.empty_cache()
    built = start(config, ranks, device)
    built.buffers.keys.normal_()
    built.buffers.values.normal_()
    buckets = built.buffers.buckets
    step_ms(built, buckets.decode[0], 1, 2, 1)  # warm
    timed = buckets.decode + buckets.prefill  # no load of a sweep asks for log probabilities of its prompts
    lengths = {bucket: _length(built, bucket, prompt, context) for bucket in timed}
    samples: dict[Bucket, list[tuple[float, float]]] = {bucket: [] for bucket in timed}
    for number in range(SAMPLES):
        for bucket in timed[:: -1 if number % 2 else 1]:
            samples[bucket].append(step_ms(built, bucket, lengths[bucket], launches[bucket.kind], 1))
    rows = []
    for bucket, taken in samples.items():
        times, experts = [ms for ms, _ in taken], statistics.mean(chosen for _, chosen in taken)
        ms = statistics.median(times)
        row: dict[str, Any] = {"kind": bucket.kind, "size": bucket.tokens, "context": lengths[bucket], "ms": ms}
        row |= {"ms_range": [min(times), max(times)], "tokens_per_s": 1e3 * bucket.tokens / ms}
        if bucket.kind == "decode":
            shape = built.model.architecture
            size = decode_bytes(shape, bucket.tokens, lengths[bucket], experts, ranks.size)
            row |= {
                "bytes": size,
                "experts_per_layer": experts / shape.layers,
                "share_of_floor": size / rate / (ms / 1e3) if rate else None,
            }
        rows.append(row)
    return {"read_bandwidth": rate, "steps": rows}


def _length(built: Engine, bucket: Bucket, prompt: int, context: int) -> int:
    """The position of a decode step's rows, or the length of a prefill step's prompts, that the bucket and the pages
    hold."""
    if bucket.kind == "decode":
        return min(context, built.ready.max_context, (built.ready.pages - 1) // bucket.tokens * PAGE_TOKENS)
    prompts = min(max(1, bucket.tokens // prompt), bucket.sequences, built.buffers.buckets.max_rows)
    return min(bucket.tokens // prompts, built.ready.max_context)


def _rank(config: Config, rank: int, folder: str, parent: int, lengths: tuple[int, int], out: Any) -> None:
    die_with(parent, ctypes.CDLL(None).prctl)  # an interrupted sweep leaves nothing behind
    device = device_of(config, rank)
    figures = measure(config, Ranks(rank, config.tp, Path(folder)), device, *lengths)
    if rank == 0:
        out.send(figures)


def main() -> None:
    """Time the steps on `tp` ranks and print rank 0's figures."""
    prompt, context, *overrides = sys.argv[1:]
    lengths = int(prompt), int(context)
    try:
        config = with_demo_folder(compose(overrides))
    except ConfigError as error:
        sys.exit(str(error))
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    folder = RunFolder()
    ranks = [
        spawn.Process(target=_rank, args=(config, rank, folder.path, os.getpid(), lengths, sender), daemon=True)
        for rank in range(config.tp)
    ]
    try:
        for process in ranks:
            process.start()
        sender.close()  # so that the end of rank 0 ends the wait
        print(json.dumps(receiver.recv()))
    except EOFError:
        sys.exit("a rank ended before its steps were timed")
    finally:
        folder.remove()


if __name__ == "__main__":
    main()
