"""Dense layers on a Hopper GPU against the reference in float32, and byte for byte against themselves."""

from types import SimpleNamespace

import pytest
import torch

from kernels import reference
from kernels.hopper.decode import add_norm, linear, linear_partial
from kernels.hopper.linear import WIDE_TOKENS, launch, launch_tiled, pack, tile_for, tiles
from kernels.ops import ExchangeArea, Norm, Peers
from tests.harness import ALONE

pytestmark = pytest.mark.gpu

QKV = [(5120, 2880), (2560, 2880), (640, 2880)]  # at tp 1, 2, 8
OUT = [(2880, 4096), (2880, 2048), (2880, 512)]
ODD = [(1, 32), (5, 64), (17, 96), (130, 512), (1000, 2880)]
TOKENS = [1, 2, 3, 8, 17, 64, 77, 100, 160, 256]


def random(*shape, seed=0, scale=1.0):
    draw = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=draw, device="cuda") * scale).bfloat16()


def poison(*shape):
    """Leave NaN in the memory that the next allocation of this shape gets."""
    torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")


def error(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def check(tokens, rows, columns, with_bias=True):
    x, weight = random(tokens, columns), random(rows, columns, seed=1, scale=columns**-0.5)
    bias = random(rows, seed=2) if with_bias else None
    packed = pack(weight, bias)
    expected = reference.linear(x.float(), weight.float(), None if bias is None else bias.float())
    poison(tokens, rows)
    out = linear(x, packed)
    assert out.shape == (tokens, rows)
    assert out.dtype == torch.bfloat16
    assert error(out, expected) < 1e-2


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("rows", "columns"), QKV + OUT + ODD)
def test_linear_is_the_reference(tokens, rows, columns):
    check(tokens, rows, columns)


@pytest.mark.parametrize("tokens", [1, 8, 17, 64, 100, 256])
@pytest.mark.parametrize("rows", [201088, 100544])
def test_the_language_model_head_is_the_reference(tokens, rows):
    check(tokens, rows, 2880, with_bias=False)


@pytest.mark.parametrize(("rows", "columns"), [*QKV, *OUT, (1000, 2880), (8192, 2880), (20000, 2880)])
def test_a_token_alone_has_the_bytes_it_has_among_others(rows, columns):
    x, packed = random(300, columns), pack(random(rows, columns, seed=1), random(rows, seed=2))
    whole = linear(x, packed)
    parts = [(0, 1), (299, 300), (5, 7), (3, 11), (64, 80), (61, 93), (100, 164), (10, 275)]
    for start, end in [*parts, (30, 100), (7, 103), (80, 208), (90, 282), (44, 300)]:
        assert torch.equal(linear(x[start:end].clone(), packed), whole[start:end]), (start, end)


@pytest.mark.parametrize(("rows", "columns"), [QKV[0], OUT[0], OUT[2], (17, 96), (20000, 2880)])
def test_every_kernel_gives_the_same_bytes(rows, columns):
    x, packed = random(16, columns), pack(random(rows, columns, seed=1), random(rows, seed=2))
    names = ["narrow_2", "narrow_8"] + [f"wide_{tile}" for tile in WIDE_TOKENS]
    for tokens in (1, 5, 8, 16):  # 20000 rows have four K splits, and each cluster has several groups
        outs = [launch(n, x[:tokens], packed) for n in names if tokens <= int(n.split("_")[1])]
        assert all(torch.equal(out, outs[0]) for out in outs[1:])


@pytest.mark.parametrize(("rows", "columns"), [*QKV, *OUT, (4104, 288), (20000, 2880)])
def test_the_tiled_kernel_gives_the_bytes_of_the_wide_one(rows, columns):
    """All divisions that this weight has; 4104 rows leave a strip half empty, and 288 columns runs of one or two."""
    packed = pack(random(rows, columns, seed=1), random(rows, seed=2))
    zeros = pack(torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda"))
    assert tiles(rows, columns)
    for tile in tiles(rows, columns):
        most = tile.tile_tokens * tile.cluster_tokens
        for tokens in (1, most - 27, most):
            x = random(tokens, columns, seed=tokens)
            x[tokens // 3, 5], x[tokens // 2, 7], x[tokens - 1, 9] = torch.inf, torch.nan, -torch.inf
            for layer, rows_in in ((packed, x), (zeros, -x.abs())):  # of -0 too, signs must agree
                expected = launch("wide_64", rows_in, layer)
                poison(tokens, rows)
                out = launch_tiled(tile, rows_in, layer)
                assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), (tile, tokens)


def test_more_tokens_than_a_cluster_takes_are_refused():
    packed = pack(random(2880, 512))
    tile = tile_for(96, 2880, 512)
    with pytest.raises(ValueError, match="up to 96 tokens, not 97"):
        launch_tiled(tile, random(97, 512), packed)


@pytest.mark.parametrize("tokens", [1, 8, 40, 77, 128, 192, 256])
def test_a_partial_sum_is_sent_to_every_other_rank(tokens):
    """Rank 1 of four; all its kernels write what they store to each other rank's area, at this rank's rows."""
    rows, columns, ranks, rank, offset = 2880, 512, 4, 1, 256
    packed = pack(random(rows, columns, seed=1), random(rows, seed=2))
    own = tokens * rows * 2
    areas = torch.full((ranks, offset + ranks * own), 0xFF, dtype=torch.uint8, device="cuda")
    memories = torch.tensor([area.data_ptr() for area in areas], device="cuda")
    peers = Peers(SimpleNamespace(rank=rank, size=ranks), ExchangeArea(memories, offset, ranks * own))
    x = random(tokens, columns)
    out = linear_partial(x, packed, peers)
    assert torch.equal(out, linear(x, packed))
    begin = offset + rank * own
    for other in range(ranks):
        sent = areas[other, begin : begin + own].view(torch.bfloat16).view(tokens, rows)
        assert other == rank or torch.equal(sent, out)
        areas[other, begin : begin + own] = 0xFF
    assert (areas == 0xFF).all()  # nothing beside it, and nothing to itself


def test_neighbours_full_of_nan_leave_a_token_alone():
    x, packed = random(256, 2880), pack(random(2560, 2880, seed=1))
    clean = linear(x, packed)
    for tokens in (8, 64, 96, 256):
        dirty = x[:tokens].clone()
        dirty[1:] = torch.nan
        assert torch.equal(linear(dirty, packed)[0], clean[0])


def test_packing_on_the_device_needs_no_scratch_memory():
    weight = random(20000, 2880)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed = pack(weight)
    assert torch.cuda.max_memory_allocated() - before < packed.tiles.nbytes + 2**21
    assert torch.equal(packed.tiles.cpu(), pack(weight.cpu()).tiles)


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 96, 128, 256])
def test_a_captured_chain_replays_what_runs_one_by_one(tokens):
    """Each kernel starts before its predecessor has ended: none may read too early or write too soon."""
    qkv, o = pack(random(5120, 2880, seed=1, scale=0.02)), pack(random(2880, 4096, seed=2, scale=0.02))
    norm, peers = Norm(torch.ones(2880, device="cuda"), 1e-5), Peers(ALONE)
    x = random(tokens, 2880)

    def chain(pause):
        residual, h = add_norm(x, x.unsqueeze(1), norm, peers)
        for _ in range(12):
            wide = linear(h, qkv)
            pause()
            delta = linear(wide[:, :4096].contiguous(), o)
            pause()
            residual, h = add_norm(residual, delta.unsqueeze(1), norm, peers)
            pause()
        return residual

    expected = chain(torch.cuda.synchronize)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(lambda: None)
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
