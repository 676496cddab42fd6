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

import torch

from conf.limits import BIAS_ENTRIES, MAX_TOP_LOGPROBS, PAGE_TOKENS
from conf.schema import RandomShape
from engine.architecture import BLOCK, Architecture
from engine.weights import expert_blocks
from kernels import hopper
from kernels.build import AHEAD, BuildError, compile_ahead
from kernels.hopper import attention, experts, linear, norm, sampler, scorer, step
from kernels.hopper.linear.prefill import GEOMETRIES as PREFILL_TILES

FOLDER = Path(hopper.__file__).parent


class Unit(NamedTuple):
    """A file in kernels/hopper and the macros that it is compiled with."""

    file: str
    defines: tuple[tuple[str, int], ...]


def units(shape: Architecture, rank: int, tp: int) -> set[Unit]:
    """What a rank's steps ask `kernels.build.load_kernel` for."""
    needed = set()

    def unit(file: str, defines: dict[str, int]) -> None:
        needed.add(Unit(file, tuple(sorted(defines.items()))))

    first, last = expert_blocks(shape, rank, tp)
    heads, kv_heads, inner = shape.heads // tp, shape.kv_heads // tp, max(last - first, 1) * BLOCK
    attended, qkv_rows = heads * shape.head_dim, (heads + 2 * kv_heads) * shape.head_dim
    for rows, columns, ranks in (
        (qkv_rows, shape.hidden, 1),
        (shape.hidden, attended, tp),
        (-(-shape.vocab // tp), shape.hidden, 1),
    ):
        layer = linear.geometry(rows, columns)
        unit("linear/decode.cu", layer.defines(ranks))
        for tile in linear.tiles(rows, columns):
            unit("linear/tiled.cu", tile.defines(layer, ranks))
    for columns in (shape.hidden, attended):
        for tiles in PREFILL_TILES:
            unit("linear/prefill.cu", tiles.defines(columns))
    for ranks in (1, tp):  # embed_norm exchanges nothing, and is compiled for one rank
        unit("norm/decode.cu", norm.decode_defines(shape.hidden, ranks))
    unit("norm/prefill.cu", norm.prefill_defines(shape.hidden, tp))
    unit("attention/decode.cu", attention.decode_defines(heads // kv_heads, PAGE_TOKENS))
    unit("attention/prefill.cu", attention.prefill_defines(heads // kv_heads, PAGE_TOKENS))
    unit("experts/decode.cu", experts.decode_defines(shape.hidden, inner))
    for columns, up in ((shape.hidden, True), (inner, False)):
        unit("experts/prefill.cu", experts.prefill_defines(columns, up))
        for geometry in (experts.STREAM_SMALL, experts.STREAM_LARGE):
            for splits in {1, experts.cut_of(columns).splits}:
                unit("experts/stream.cu", experts.stream_defines(columns, up, splits, geometry))
    unit("experts/group.cu", experts.group_defines())
    top = min(MAX_TOP_LOGPROBS, shape.vocab)
    unit("sampler/sampler.cu", sampler.defines(torch.bfloat16, top, BIAS_ENTRIES, tp, -(-shape.vocab // tp) % 2 == 0))
    unit("scorer/scorer.cu", scorer.defines(top, tp))
    unit("step/install.cu", step.install_defines(BIAS_ENTRIES))
    unit("step/advance.cu", step.advance_defines(PAGE_TOKENS))
    unit("step/emit.cu", step.emit_defines())
    return needed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels of GPT-OSS ahead of time.")
    parser.add_argument("--tp", type=int, nargs="+", choices=(1, 2, 4, 8), default=[1, 2, 4, 8])
    parser.add_argument("--to", type=Path, default=AHEAD, metavar="FOLDER", help="by default where the server looks")
    options = parser.parse_args(arguments)
    shape = Architecture.from_random_shape(RandomShape())
    wanted = sorted(set().union(*(units(shape, rank, tp) for tp in options.tp for rank in range(tp))))
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            cubins = list(
                pool.map(lambda unit: compile_ahead(FOLDER / unit.file, dict(unit.defines), options.to), wanted)
            )
    except BuildError as error:
        sys.exit(str(error))
    print(f"{len(cubins)} cubins, {sum(path.stat().st_size for path in cubins) / 2**20:.1f} MiB, in {options.to}")


if __name__ == "__main__":
    main()
