"""Microseconds that ranks take to add up rows: `python -m tests.gpu.bench_ranks --tp 2`.

Medians of graph replays of a chain of additions, as in a step: what is added comes out of the one before. For one shot
(each rank sends its rows to all) and two (each row is summed by one rank), their time less that of the same kernel on
one rank is what the exchange costs. The router comes with the O projection before it, which sends for it; its weights
stay in the L2. Beside them NCCL's all-reduce, which adds nothing and norms nothing.
"""

import argparse
from dataclasses import replace

import torch
import torch.distributed as dist

from kernels.hopper import decode, join, prefill
from kernels.hopper.linear import pack
from kernels.ops import Norm, Peers, Router
from tests.gpu.timing import microseconds
from tests.harness import ALONE
from tests.ranks import together

HIDDEN, EXPERTS, O_COLUMNS, EPS = 2880, 32, 2048, 1e-5
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MOST_ROWS = 512  # of one shot
CALLS = 100


def times(ranks, device) -> list[tuple]:
    peers = join(ranks, MOST_ROWS, max(ROWS), 16, 0, HIDDEN, device)
    turns = [peers, replace(peers, attention=peers.mlp, mlp=peers.attention)]  # the areas take turns
    nccl = dist.new_group(backend="nccl")
    alone = [Peers(ALONE)] * 2
    norm = Norm(torch.ones(HIDDEN, device=device), EPS)
    weight = (torch.randn(EXPERTS, HIDDEN, device=device) * 0.03).bfloat16()
    router = Router(weight, torch.zeros(EXPERTS, device=device).bfloat16(), 4)
    o = pack((torch.randn(HIDDEN, O_COLUMNS, device=device) * 0.02).bfloat16())
    heads = torch.randn(MOST_ROWS, O_COLUMNS, device=device).bfloat16()
    table = []
    for rows in ROWS:
        x, partial = torch.randn(2, rows, HIDDEN, device=device).bfloat16()
        whole = torch.randn(rows, HIDDEN, device=device).bfloat16()

        def chain(op, peers_by_turn, rows=rows, x=x, partial=partial):
            last = [partial]
            ranks.smallest(0)  # the chain before may have ended with the area in which this one begins

            def call(turn):
                outputs = last[0].view(rows, 1, HIDDEN)
                last[0] = op(x, outputs, norm, peers_by_turn[turn % 2])[1]

            return microseconds([lambda turn=turn: call(turn) for turn in range(CALLS)])

        def route(x, outputs, norm, peers, rows=rows):
            delta = decode.linear_partial(heads[:rows], o, peers)
            return decode.add_norm_route(outputs[:, 0], delta, norm, router, peers)

        few = rows <= MOST_ROWS
        row = [rows, chain(decode.add_norm, alone)]
        row += [chain(decode.add_norm, turns) if few else None, chain(prefill.add_norm, turns)]
        row += [chain(route, alone), chain(route, turns)] if rows <= 64 else [None, None]
        row += [microseconds([lambda whole=whole: dist.all_reduce(whole, group=nccl)] * CALLS)]
        table.append(tuple(row))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=torch.cuda.device_count())
    size = parser.parse_args().tp
    if size < 2:
        print("ranks are not timed: there is one GPU")
        return
    heads = ("rows", "norm", "one shot", "two shots", "O + router", "one shot", "NCCL")
    print(f"tp {size}, us:", " ".join(f"{head:>10}" for head in heads))
    for row in together(times, size, gpus=size)[0]:
        print(" " * 9, " ".join(f"{'' if cell is None else round(cell, 2):>10}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
