"""Whole steps on H100s or H200s, through graphs: `make gpu-bench`. Prints tables and writes benchmarks/h100.json, or
h200.json.

The floor of a decode step is the bytes a rank must read once, over the read bandwidth measured in the same run. Of the
experts' weights only those count that the rows of the timed step chose. With `--tp` every rank times the same steps;
the figures are rank 0's.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
import triton

from conf.schema import BucketsConfig, Config, KernelsConfig, ModelConfig, RandomShape, Weights
from engine.architecture import Architecture
from engine.messages import Submit
from engine.parallel import Ranks
from engine.start import start
from graphs.plan import SamplingParams
from sweep.bandwidth import read_bandwidth, seconds
from sweep.steps import decode_bytes, step_ms
from tests.ranks import together

SHAPES = {"20b": RandomShape(), "120b": RandomShape(num_hidden_layers=36, num_local_experts=128)}
RESULTS = Path(__file__).parents[2] / "benchmarks"


def matmul_rate() -> float:
    """Operations a second of the library's product of two random 8192 x 8192 bfloat16 matrices."""
    left, right = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / seconds(lambda: left @ right)


def engine(shape, decode_rows, prefill_tokens, max_context, ranks, device):
    config = Config(
        model=ModelConfig(name="bench", weights=Weights.random, random_shape=shape),
        buckets=BucketsConfig(decode_rows, prefill_tokens, [], 64, max_context, page_memory=0.8),
        kernels=KernelsConfig(),
        tp=ranks.size,
    )
    built = start(config, ranks, device)
    built.buffers.keys.normal_()
    built.buffers.values.normal_()
    return built


@torch.inference_mode()
def loop_ms(built, prompt=1024, tokens=400) -> float:
    """Milliseconds a token of one request through the whole engine loop, without HTTP; median of hundreds."""
    core = built.core(lambda _: None)
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, seed=0)
    core.handle(Submit(0, torch.randint(0, 199000, (prompt,)).tolist(), sampling))
    ends = []
    while core.turn():
        ends.append(time.perf_counter())
    return 1e3 * statistics.median(end - begin for begin, end in pairwise(ends[20:-20]))


@torch.inference_mode()
def tokens_per_s(built, requests, prompt=1024, tokens=512) -> float:
    """Tokens a second, of prompts and answers together, of requests that come at once and go through the whole engine
    loop, without HTTP. Their prompts are random, so that none is found in the prefix cache."""
    core = built.core(lambda _: None)
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, seed=0)
    prompts = torch.randint(0, 199000, (requests, prompt)).tolist()
    begin = time.perf_counter()
    for number, ids in enumerate(prompts):
        core.handle(Submit(number, ids, sampling))
    while core.turn():
        pass
    return requests * (prompt + tokens) / (time.perf_counter() - begin)


def by_kernel(built, bucket, replays=20) -> list[tuple[str, int, float]]:
    """The kernels of a bucket's step: name and grid, launches, and microseconds a step.

    The step's packed inputs are already in the buffers. Kernels overlap, as each starts before its predecessor has
    ended: a kernel's time is by how much it ended after that one.
    """
    staging = built.buffers.staging()
    words = built.buffers.words_of(bucket)
    staging.words[:words].copy_(built.buffers.words[:words])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(replays):
            built.steps.launch(bucket, staging)()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"] + e["dur"])
    times, previous = defaultdict(list), 0.0
    for kernel in kernels:
        end = kernel["ts"] + kernel["dur"]
        begin = max(previous, kernel["ts"])  # time in which nothing ran belongs to no kernel
        grid = "x".join(str(n) for n in kernel["args"]["grid"])
        times[f"{kernel['name'][:60]} {grid}"].append(end - begin)
        previous = end
    table = [(name, len(spent) // replays, sum(spent) / replays) for name, spent in times.items()]
    return sorted(table, key=lambda row: -row[2])


def print_kernels(built, bucket) -> None:
    table = by_kernel(built, bucket)
    print(f"{bucket.kind} {bucket.tokens}: {sum(spent for *_, spent in table):.0f} us in kernels")
    for name, count, spent in table:
        if spent >= 1:
            print(f"  {name:<76} {count:>4} x {spent / max(count, 1):>8.2f} us = {spent:>8.1f}", flush=True)


def load(text: str) -> tuple[int, int, int]:
    requests, prompt, tokens = map(int, text.split(","))
    return requests, prompt, tokens


def measure(ranks: Ranks, device: torch.device, arguments: argparse.Namespace) -> dict:
    if ranks.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    torch.manual_seed(0)  # the same on all ranks
    shape, tp = SHAPES[arguments.model], ranks.size
    rate, products = read_bandwidth(), matmul_rate()
    torch.cuda.empty_cache()
    built = engine(shape, arguments.rows, arguments.prefill, max(32768, *arguments.contexts), ranks, device)
    rows = []
    print(
        f"read bandwidth {rate / 1e12:.2f} TB/s, matrix products {products / 1e12:.0f} TFLOP/s; "
        f"phases {built.ready.phases}"
    )
    print(f"{'bucket':>14} {'context':>8} {'ms':>8} {'experts':>8} {'GB':>7} {'GB/s':>6} {'of floor':>9}")
    for context in arguments.contexts:
        for bucket in built.buffers.buckets.decode:
            if context > 1024 and bucket.tokens > 1:
                continue
            ms, experts = step_ms(built, bucket, context)
            size = decode_bytes(Architecture.from_random_shape(shape), bucket.tokens, context, experts, tp)
            of_floor = size / rate / (ms / 1e3)
            rows.append(
                {
                    "kind": "decode",
                    "rows": bucket.tokens,
                    "context": context,
                    "ms": ms,
                    "bytes": size,
                    "experts_per_layer": experts / shape.num_hidden_layers,
                    "share_of_floor": of_floor,
                }
            )
            print(
                f"{'decode':>9} {bucket.tokens:>4} {context:>8} {ms:>8.3f} "
                f"{experts / shape.num_hidden_layers:>8.1f} {size / 1e9:>7.2f} "
                f"{size / ms / 1e6:>6.0f} {of_floor:>8.1%}",
                flush=True,
            )
            if context == arguments.contexts[0] and bucket.tokens in arguments.kernels:
                print_kernels(built, bucket)
    loop = loop_ms(built)
    replay = next((row["ms"] for row in rows if row["rows"] == 1), None)
    if replay is not None:
        print(
            f"one request in the engine's loop: {loop:.3f} ms a token, {loop / replay - 1:+.1%} over the replay alone"
        )
    loads = []
    for requests, prompt, tokens in arguments.loads:
        rate_of_all = tokens_per_s(built, requests, prompt, tokens)
        of_prompts, of_answers = (rate_of_all * part / (prompt + tokens) for part in (prompt, tokens))
        loads.append(
            {
                "requests": requests,
                "prompt": prompt,
                "tokens": tokens,
                "prompt_tokens_per_s": of_prompts,
                "output_tokens_per_s": of_answers,
            }
        )
        print(
            f"{requests} requests at once, {prompt} tokens in and {tokens} out, in the engine's loop: "
            f"{of_prompts:.0f} prompt tokens/s, {of_answers:.0f} output tokens/s",
            flush=True,
        )
    for bucket in built.buffers.buckets.prefill:
        for context in {bucket.tokens, min(1024, bucket.tokens)}:
            ms, _ = step_ms(built, bucket, context, launches=3)
            rows.append({"kind": "prefill", "tokens": bucket.tokens, "context": context, "ms": ms})
            speed = f"{bucket.tokens / ms * 1e3:>10.0f} tokens/s"
            print(f"{'prefill':>9} {bucket.tokens:>4} {context:>8} {ms:>8.2f} {speed}", flush=True)
            if context == bucket.tokens in arguments.kernels:
                print_kernels(built, bucket)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "read_bandwidth": rate,
        "matmul_rate": products,
        "phases": built.ready.phases,
        "loop_ms": loop,
        "loads": loads,
        "steps": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="20b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128, 192, 256])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 2048, 8192])
    parser.add_argument("--kernels", type=int, nargs="*", default=[1, 64, 2048], help="buckets to take apart")
    parser.add_argument(
        "--loads",
        type=load,
        nargs="*",
        default=[(64, 1024, 1), (256, 1024, 512), (512, 1024, 512)],
        help="REQUESTS,PROMPT,TOKENS: requests at once through the engine's loop",
    )
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024], help="longer ones at one row only")
    arguments = parser.parse_args()
    if arguments.tp == 1:
        figures = measure(Ranks(0, 1, Path()), torch.device("cuda", 0), arguments)
    else:
        figures, *_ = together(measure, arguments.tp, arguments, gpus=arguments.tp)
    out = RESULTS / ("h200.json" if "H200" in figures["device"] else "h100.json")
    results = json.loads(out.read_text()) if out.exists() else {}
    results[arguments.model + (f" tp {arguments.tp}" if arguments.tp > 1 else "")] = figures
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
