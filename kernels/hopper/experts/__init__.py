"""The MXFP4 mixture of experts on Hopper: packing the weights once, and launching decode.cu, stream.cu, prefill.cu
and group.cu.

Knows shapes and launches. How the packed words are laid out is explained in layout.cuh, and read by the kernels.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.build import Argument, Kernel, TensorMap, load_kernel
from kernels.ops import PackedExperts, Routing

FOLDER = Path(__file__).parent
COLUMN_BLOCK, TILE_COLUMNS, STRIP_ROWS = 32, 64, 16
SCALE_OFFSET = 94  # 126 for the position of the value's bits, less 32 that the epilogue multiplies back
MAX_SCALE = 254 - SCALE_OFFSET
MAX_COLUMNS = 4096  # a warp holds an eighth of a strip's columns in registers
MAX_EXPERTS = 1024

# Decode. WARPS work on a strip together, or each on one of its own.
WARPS = 8
THREADS = 32 * WARPS
FEW_TOKENS, FEW_PAIRS = 8, 32  # that the kernels experts_*_few take
FEW_BLOCKS = 3  # of them share a multiprocessor
SMALL_TOKENS, SMALL_PAIRS = 48, 256  # that the kernels experts_*_small take
TEAMS, TOKEN_TILES = 2, 3  # of experts_*_small: teams of 8 warps, and tiles of 8 tokens of an expert at once
SUMS_BYTES = 2 * TEAMS * THREADS * TOKEN_TILES * 16  # two turns' partial sums
MOST_SHARED = 223 * 1024  # bytes that a block of experts_*_small asks for at most; 4 KB are left for its own
GROUP_THREADS = 1024

# Prefill.
CONSUMERS = 3  # warpgroups of a block that multiply, 64 weight rows each
PREFILL_THREADS = 128 * (CONSUMERS + 1)
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 152, 56  # of a thread: together the 512 x 128 that a block starts with
LOAD_TURNS = 3  # turns of 64 columns whose weights a warp asks for at once
UNROLL = 9  # turns in which a product is always under way; a multiple of LOAD_TURNS
STAGED_TOKENS = 80  # whose outputs a warpgroup stages at a time
CLUSTER = 2  # blocks that share a tile's tokens
PREFILL_TOKENS, PREFILL_STAGES, PREFILL_LOADS = 144, 7, 3  # of a tile; of tokens; of weights, in a warp's ring

# Many rows of decode, and short prompts.
STREAM_CHUNK = 3  # turns of 64 columns that are asked for at once
STREAM_PAIRS = 32  # pairs an expert, on average, up to which a prompt takes stream.cu


class StreamGeometry(NamedTuple):
    """How stream.cu cuts its tokens, and what it keeps in shared memory and registers."""

    tokens: int  # of a tile
    consumers: int  # warpgroups of a block that multiply
    stages: int  # of STREAM_CHUNK turns
    consumer_registers: int  # of a thread
    producer_registers: int


STREAM_SMALL = StreamGeometry(32, 4, 5, 104, 64)
STREAM_LARGE = StreamGeometry(48, 4, 4, 112, 32)
PAIRS_FOR_SMALL = 24  # pairs an expert, on average, up to which STREAM_SMALL is faster


def stream_geometry(pairs: int, experts: int) -> StreamGeometry:
    """Which is faster, as measured on the 20b. A function of shapes alone; both give the same bytes."""
    return STREAM_SMALL if pairs <= PAIRS_FOR_SMALL * experts else STREAM_LARGE


class Cut(NamedTuple):
    """How the decode kernels cut the columns of a projection, a function of their number alone."""

    splits: int
    row_pitch: int  # bytes from one token's columns to the next in shared memory


def cut_of(columns: int) -> Cut:
    """As few splits as give a warp at most 6 tiles, all of whose loads are in flight, but no more than warps."""
    tiles, splits = -(-columns // TILE_COLUMNS), 1
    while splits < WARPS and -(-tiles // splits) > 6:
        splits *= 2
    return Cut(splits, 2 * TILE_COLUMNS * tiles + 16)  # no bank twice


def decode_defines(hidden: int, inner: int) -> dict[str, int]:
    """The macros of decode.cu. inner: of this rank's shard."""
    up, down = cut_of(hidden), cut_of(inner)
    return {
        "HIDDEN": hidden,
        "INTER": inner,
        "WARPS": WARPS,
        "UP_SPLITS": up.splits,
        "UP_ROW_PITCH": up.row_pitch,
        "DOWN_SPLITS": down.splits,
        "DOWN_ROW_PITCH": down.row_pitch,
        "FEW_BLOCKS": FEW_BLOCKS,
        "SMALL_PAIRS": SMALL_PAIRS,
        "TEAMS": TEAMS,
        "TOKEN_TILES": TOKEN_TILES,
        "SUMS_BYTES": SUMS_BYTES,
    }


def prefill_defines(columns: int, up: bool) -> dict[str, int]:
    """The macros of prefill.cu: of gate and up, or of the down projection of this rank's shard."""
    loads = min(PREFILL_LOADS, -(-columns // (TILE_COLUMNS * LOAD_TURNS)))  # an item's at most
    stage_bytes = PREFILL_TOKENS * TILE_COLUMNS * 2
    out_bytes = STAGED_TOKENS * ((32 if up else 64) + 8) * 2  # a consumer's outputs of a token, 8 apart
    load_bytes = LOAD_TURNS * (512 + 32)  # a strip's values and scales
    shared = PREFILL_STAGES * stage_bytes + CONSUMERS * out_bytes + CONSUMERS * 4 * loads * load_bytes
    return {
        "UP": int(up),
        "COLUMNS": columns,
        "TOKENS": PREFILL_TOKENS,
        "CLUSTER": CLUSTER,
        "CONSUMERS": CONSUMERS,
        "DEPTH": TILE_COLUMNS,
        "STAGES": PREFILL_STAGES,
        "LOAD_TURNS": LOAD_TURNS,
        "LOADS": loads,
        "UNROLL": UNROLL,
        "STAGED_TOKENS": STAGED_TOKENS,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "SHARED_BYTES": shared + 1024,  # room to align the stages
    }


def stream_defines(columns: int, up: bool, splits: int, geometry: StreamGeometry) -> dict[str, int]:
    """The macros of stream.cu: of gate and up, or of the down projection of this rank's shard."""
    token_bytes = geometry.tokens * TILE_COLUMNS * 2
    weight_bytes = 4 * geometry.consumers * (512 + 32)  # values and scales of a turn
    out_bytes = geometry.tokens * ((32 if up else 64) + 8) * 2  # a consumer's outputs of a token, 8 apart
    shared = geometry.stages * STREAM_CHUNK * (token_bytes + weight_bytes) + geometry.consumers * out_bytes
    return {
        "UP": int(up),
        "K_COLUMNS": columns,
        "K_SPLITS": splits,
        "TOKENS": geometry.tokens,
        "CONSUMERS": geometry.consumers,
        "CHUNK": STREAM_CHUNK,
        "STAGES": geometry.stages,
        "CONSUMER_REGISTERS": geometry.consumer_registers,
        "PRODUCER_REGISTERS": geometry.producer_registers,
        "SHARED_BYTES": shared + 1024,  # room to align the stages
    }


def group_defines() -> dict[str, int]:
    """The macros of group.cu."""
    return {"GROUP_THREADS": GROUP_THREADS, "MOST_EXPERTS": MAX_EXPERTS}


def pack(blocks: Tensor, scales: Tensor, bias: Tensor, interleaved: bool) -> PackedExperts:
    """MXFP4 as in a checkpoint -> the order in which a warp reads it, on the same device.

    blocks [E, N, K/32, 16] uint8, scales [E, N, K/32] uint8, bias [E, N] bf16; interleaved: even rows are gates, odd
    rows ups, and a pair is to land in one lane. With lane (g, t) = (lane // 4, lane % 4), the result holds

        values [E, strips, tiles, 32 lanes, 4 words] int32, 8 values a word
        scales [E, strips, tiles, 8 g, 2 blocks, 2 row halves] uint8, the bf16 exponent of the multiplier

    Takes one expert's memory besides the result. Every value is kept exactly for scale bytes 27..160; below, in effect,
    it rounds to a multiple of 2^-101. Raises ValueError for a scale above 2^33 or NaN, which no real checkpoint has,
    and for shapes the kernels do not take.
    """
    count, rows, column_blocks, _ = blocks.shape
    columns = column_blocks * COLUMN_BLOCK
    if rows % STRIP_ROWS or not COLUMN_BLOCK <= columns <= MAX_COLUMNS or count > MAX_EXPERTS:
        raise ValueError(
            f"{count} experts of {rows} x {columns}: rows must be a multiple of {STRIP_ROWS}, columns "
            f"{COLUMN_BLOCK}..{MAX_COLUMNS}, experts at most {MAX_EXPERTS}"
        )
    if int(scales.max()) > MAX_SCALE:
        raise ValueError(
            f"MXFP4 scale byte {int(scales.max())}: at most {MAX_SCALE} (2^{MAX_SCALE - 127}) is supported"
        )
    strips, tiles = rows // STRIP_ROWS, -(-columns // TILE_COLUMNS)
    lookups = _word_lookups(blocks.device)
    values = torch.empty(count, strips, tiles, 32, 4, dtype=torch.int32, device=blocks.device)
    packed_scales = torch.empty(count, strips, tiles, 8, 2, 2, dtype=torch.uint8, device=blocks.device)
    spare = tiles * 2 - column_blocks  # half a tile of zeros, with any scale
    split_rows = (strips, 8, 2) if interleaved else (strips, 2, 8)
    for expert in range(count):
        pairs = torch.nn.functional.pad(blocks[expert], (0, 0, 0, spare))  # [N, 2 tiles, 16]: bytes of two columns
        pairs = pairs.view(*split_rows, tiles, 4, 2, 4)  # rows, tile, step, which pair of the step, t
        by_row = pairs.transpose(1, 2) if interleaved else pairs  # [strips, half, g, tiles, step, which, t]
        words = values[expert].view(strips, tiles, 8, 4, 4).permute(0, 2, 1, 4, 3)  # [strips, g, tiles, step, t]
        words.zero_()
        for which in range(2):
            for half in range(2):
                codes = by_row[:, half, ..., which, :]
                words |= lookups[2 * which + half].index_select(0, codes.flatten().int()).view(codes.shape)
        exponents = torch.nn.functional.pad(scales[expert], (0, spare)) + SCALE_OFFSET
        exponents = exponents.view(*split_rows, tiles, 2)
        by_row = exponents if interleaved else exponents.transpose(1, 2)  # [strips, g, half, tiles, block]
        packed_scales[expert] = by_row.permute(0, 3, 1, 4, 2)
    return PackedExperts(values, packed_scales, bias.contiguous(), rows, columns, interleaved)


def _word_lookups(device: torch.device) -> list[Tensor]:
    """For each of the four places in a word, what a byte of two columns adds to it: [256] int32.

    The low half of the word holds even columns, the high half odd ones.
    """
    byte = torch.arange(256, dtype=torch.int64, device=device)

    def place(code: Tensor, bits: tuple[int, ...]) -> Tensor:
        """A code's four bits, the sign first, at these bits of a word; past bit 31 comes bit 0."""
        word = torch.zeros_like(code)
        for code_bit, bit in zip((3, 2, 1, 0), bits, strict=True):
            word |= (code >> code_bit & 1) << bit % 32
        return word

    def halves(*bits: int) -> Tensor:
        word = place(byte & 15, bits) | place(byte >> 4, tuple(bit + 16 for bit in bits))
        return torch.where(word < 2**31, word, word - 2**32).int()

    return [halves(15, 8, 7, 6), halves(18, 11, 10, 9), halves(21, 14, 13, 12), halves(1, 0, 4, 3)]


def decode_experts(h: Tensor, routing: Routing, gate_up: PackedExperts, down: PackedExperts, limit: float) -> Tensor:
    """Each token through its chosen experts, weighted, not summed over the choices.

    h [T, H] bf16, routing of ids unlike each other within a token, gate_up interleaved -> [T, K, H] bf16. A token's
    bytes depend on its own row, ids and weights only, whichever of the kernels for few tokens, small batches and many
    rows T calls for. Raises ValueError for shapes that do not fit together.
    """
    check_shapes(h, routing, gate_up, down)
    tokens, top_k = routing.expert_ids.shape
    pairs, experts = tokens * top_k, gate_up.bias.shape[0]
    ids, weights = routing.expert_ids.contiguous(), routing.weights.contiguous()
    kernel_for = functools.partial(_decode_kernel, gate_up.columns, down.columns)

    if tokens <= FEW_TOKENS and pairs <= FEW_PAIRS:

        def launch(name: str, weight: PackedExperts, x: Tensor, out: Tensor) -> None:
            kernel = kernel_for(f"experts_{name}_few", tokens * cut_of(weight.columns).row_pitch)
            grid = _shared_strips(weight, FEW_BLOCKS, 1, min(pairs, experts))
            kernel.launch(grid, THREADS, (x, out, *_memory(weight), ids, weights, pairs, top_k, limit))

    elif tokens <= SMALL_TOKENS and pairs <= SMALL_PAIRS:

        def launch(name: str, weight: PackedExperts, x: Tensor, out: Tensor) -> None:
            pitch = cut_of(weight.columns).row_pitch
            capacity = min(8 * TOKEN_TILES, (MOST_SHARED - SUMS_BYTES) // pitch)
            kernel = kernel_for(f"experts_{name}_small", capacity * pitch + SUMS_BYTES)
            grid = _shared_strips(weight, 1, TEAMS, min(pairs, experts))
            args = (x, out, *_memory(weight), ids, weights, pairs, top_k, capacity, limit)
            kernel.launch(grid, TEAMS * THREADS, args)

    else:
        return _stream(h, routing, gate_up, down, limit, chain=False)

    activated = torch.empty(pairs, down.columns, dtype=torch.bfloat16, device=h.device)
    out = torch.empty(tokens, top_k, down.rows, dtype=torch.bfloat16, device=h.device)
    launch("up", gate_up, h.contiguous(), activated)
    launch("down", down, activated, out)
    return out


def prefill_experts(h: Tensor, routing: Routing, gate_up: PackedExperts, down: PackedExperts, limit: float) -> Tensor:
    """`decode_experts` for many tokens. A token's bytes depend on itself alone; they are not those of decode."""
    check_shapes(h, routing, gate_up, down)
    tokens, top_k = routing.expert_ids.shape
    pairs, experts = tokens * top_k, gate_up.bias.shape[0]
    if pairs <= STREAM_PAIRS * experts:
        return _stream(h, routing, gate_up, down, limit, chain=True)
    order, tiles = group(routing.expert_ids, experts, PREFILL_TOKENS)
    weights = routing.weights.contiguous()
    activated = torch.empty(pairs, down.columns, dtype=torch.bfloat16, device=h.device)
    out = torch.empty(tokens, top_k, down.rows, dtype=torch.bfloat16, device=h.device)
    clusters = torch.cuda.get_device_properties(h.device).multi_processor_count // CLUSTER
    for name, weight, x, result in (("up", gate_up, h.contiguous(), activated), ("down", down, activated, out)):
        defines = prefill_defines(weight.columns, name == "up")
        kernel = load_kernel(FOLDER / "prefill.cu", f"prefill_experts_{name}", defines, defines["SHARED_BYTES"])
        items = -(-weight.rows // (64 * CONSUMERS * CLUSTER)) * len(tiles)
        args = (*_memory(weight), x, result, tiles, order, weights, weight.rows, top_k, len(tiles), limit)
        kernel.launch((CLUSTER * min(items, clusters), 1, 1), PREFILL_THREADS, args)
    return out


def _stream(
    h: Tensor, routing: Routing, gate_up: PackedExperts, down: PackedExperts, limit: float, chain: bool
) -> Tensor:
    """Both projections by stream.cu. chain: K is summed in one chain, as in prefill; else as in decode."""
    (tokens, top_k), experts = routing.expert_ids.shape, gate_up.bias.shape[0]
    geometry = stream_geometry(tokens * top_k, experts)
    order, tiles = group(routing.expert_ids, experts, geometry.tokens)
    weights = routing.weights.contiguous()
    activated = torch.empty(tokens * top_k, down.columns, dtype=torch.bfloat16, device=h.device)
    out = torch.empty(tokens, top_k, down.rows, dtype=torch.bfloat16, device=h.device)
    for name, weight, x, result in (("up", gate_up, h.contiguous(), activated), ("down", down, activated, out)):
        splits = 1 if chain else cut_of(weight.columns).splits
        defines = stream_defines(weight.columns, name == "up", splits, geometry)
        kernel = load_kernel(FOLDER / "stream.cu", f"stream_experts_{name}", defines, defines["SHARED_BYTES"])
        values, scales = (  # a row of 8-byte words is a strip; a box is a unit's chunk
            TensorMap(packed.flatten(2).view(torch.int64).flatten(0, 1), (4, STREAM_CHUNK * words))
            for packed, words in ((weight.values, 64), (weight.scales, 4))
        )
        args = (values, scales, weight.bias, x, result, tiles, order, weights, weight.rows, top_k, limit)
        kernel.launch((_stream_blocks(weight, len(tiles)), 1, 1), 128 * (geometry.consumers + 1), args)
    return out


def _stream_blocks(weight: PackedExperts, tiles: int) -> int:
    """Blocks of stream.cu for at most so many tiles of tokens: no more than units of 64 rows."""
    multiprocessors = torch.cuda.get_device_properties(weight.values.device).multi_processor_count
    return min(-(-weight.rows // 64) * tiles, multiprocessors)


def check_shapes(h: Tensor, routing: Routing, gate_up: PackedExperts, down: PackedExperts) -> None:
    """Raises ValueError for tensors that do not fit together."""
    tokens, inner = routing.expert_ids.shape[0], down.columns
    fits = h.shape == (tokens, gate_up.columns) and gate_up.rows == 2 * inner and down.rows == gate_up.columns
    if not fits or not gate_up.interleaved:
        raise ValueError(
            f"h {tuple(h.shape)}, gate_up {gate_up.rows} x {gate_up.columns}, down {down.rows} x {down.columns} for "
            f"{tokens} tokens do not fit together"
        )


def group(expert_ids: Tensor, experts: int, tile_pairs: int) -> tuple[Tensor, Tensor]:
    """Sort (token, choice) pairs by expert, and cut them in even tiles of one expert and at most tile_pairs.

    expert_ids [T, K] int64 -> order [pairs] int32, each expert's pairs ascending; tiles [max_tiles, 4] int32, of
    (expert, first place in order, pairs, tiles that have pairs), as many as there could be: those left over come last,
    all 0.
    An expert's tiles are as few as can be, and each but its last a multiple of 16, as tile_pairs must be.
    """
    expert_ids = expert_ids.contiguous()
    pairs = expert_ids.numel()
    max_tiles = min(pairs, pairs // tile_pairs + experts)  # every expert may leave one tile partly empty
    order = torch.empty(pairs, dtype=torch.int32, device=expert_ids.device)
    tiles = torch.empty(max_tiles, 4, dtype=torch.int32, device=expert_ids.device)
    load_kernel(FOLDER / "group.cu", "experts_group", group_defines()).launch(
        grid=(experts, 1, 1),
        block=GROUP_THREADS,
        args=(expert_ids, order, tiles, pairs, experts, max_tiles, tile_pairs),
    )
    return order, tiles


def _decode_kernel(hidden: int, inner: int, name: str, shared_bytes: int) -> Kernel:
    return load_kernel(FOLDER / "decode.cu", name, decode_defines(hidden, inner), shared_bytes)


def _memory(weight: PackedExperts) -> tuple[Argument, ...]:
    """A projection as kernels take it."""
    return weight.values, weight.scales, weight.bias


def _shared_strips(weight: PackedExperts, resident: int, teams: int, distinct: int) -> tuple[int, int, int]:
    """A grid of blocks that share the strips of `distinct` experts, each at least a turn of its teams.

    resident: blocks of a multiprocessor. The grid changes no result.
    """
    strips_at_once = WARPS // cut_of(weight.columns).splits
    groups = -(-weight.rows // (STRIP_ROWS * strips_at_once))
    multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return min(multiprocessors * resident, -(-groups * distinct // teams)), 1, 1
