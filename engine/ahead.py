"""Compile every kernel that the GPT-OSS models need ahead of time, for machines without a compiler.

    python -m engine.ahead --tp 1 2 --to kernels/cubins

gpt-oss-20b and gpt-oss-120b differ in layers and experts, which no kernel is compiled for: one set serves both.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from conf.limits import BIAS_ENTRIES, MAX_TOP_LOGPROBS
from conf.schema import RandomShape
from engine.architecture import BLOCK, Architecture
from engine.weights import expert_blocks
from kernels import hopper
from kernels.build import AHEAD, BuildError, compile_ahead
from kernels.hopper.linear import shares_of
from kernels.hopper.prefill import KINDS

FOLDER = Path(hopper.__file__).parent


class Unit(NamedTuple):
    """A file and the macros that it is compiled with."""

    file: str
    defines: tuple[tuple[str, int], ...]


def units(shape: Architecture, rank: int, tp: int) -> set[Unit]:
    """What a rank's steps ask `kernels.build.compile_module` for."""
    found = set()

    def unit(file: str, **defines: int) -> None:
        found.add(Unit(file, tuple(sorted(defines.items()))))

    first, last = expert_blocks(shape, rank, tp)
    heads, kv_heads, inner = shape.heads // tp, shape.kv_heads // tp, max(last - first, 1) * BLOCK
    attended, qkv_rows = heads * shape.head_dim, (heads + 2 * kv_heads) * shape.head_dim
    for rows, columns, ranks in (
        (qkv_rows, shape.hidden, 1),
        (shape.hidden, attended, tp),
        (-(-shape.vocab // tp), shape.hidden, 1),
    ):
        unit("linear.cu", COLUMNS=columns, SHARES=shares_of(rows, columns), RANKS=ranks)
    for kind, columns in (("dense", shape.hidden), ("dense", attended), ("up", shape.hidden), ("down", inner)):
        unit("prefill.cu", KIND=KINDS[kind], COLUMNS=columns)
    for ranks in (1, tp):  # what exchanges nothing is compiled for one
        unit("norm.cu", HIDDEN=shape.hidden, RANKS=ranks)
    unit("attention.cu", GROUP=heads // kv_heads)
    unit("prefill_attention.cu", GROUP=heads // kv_heads)
    unit("experts.cu", HIDDEN=shape.hidden, INTER=inner)
    unit("experts.cu")  # the sort by expert
    unit("sampler.cu", BF16=1, TOP=min(MAX_TOP_LOGPROBS, shape.vocab), BIAS_ENTRIES=BIAS_ENTRIES, RANKS=tp)
    unit("step.cu")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels of GPT-OSS ahead of time.")
    parser.add_argument("--tp", type=int, nargs="+", choices=(1, 2, 4, 8), default=[1, 2, 4, 8])
    parser.add_argument("--to", type=Path, default=AHEAD, metavar="FOLDER", help="by default where the server looks")
    asked = parser.parse_args(arguments)
    shape = Architecture.from_random_shape(RandomShape())
    wanted = sorted(set().union(*(units(shape, rank, tp) for tp in asked.tp for rank in range(tp))))
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda unit: compile_ahead(FOLDER / unit.file, dict(unit.defines), asked.to), wanted))
    except BuildError as error:
        sys.exit(str(error))
    print(f"{len(made)} cubins, {sum(path.stat().st_size for path in made) / 2**20:.1f} MiB, in {asked.to}")


if __name__ == "__main__":
    main()
