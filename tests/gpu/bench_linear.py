"""Times dense layers, norms and routing on a Hopper GPU: `python -m tests.gpu.bench_linear`.

Medians of graph replays over rotating copies of the weights, more than 400 MB of them, so that none comes from L2.
"""

import torch
from torch.nn import functional as F

from kernels.hopper.decode import add_norm, add_norm_route, embed_norm, linear
from kernels.hopper.linear import kernel_for, pack, tile_for
from kernels.ops import Norm, Peers, Router
from tests.gpu.timing import BANDWIDTH, microseconds
from tests.harness import ALONE

ROTATING = 400e6
SHAPES = {
    "qkv": (5120, 2880),
    "qkv tp2": (2560, 2880),
    "qkv tp8": (640, 2880),
    "o": (2880, 4096),
    "o tp2": (2880, 2048),
    "o tp8": (2880, 512),
    "lm_head": (201088, 2880),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
PREFILL = 2048


def bench() -> None:
    print(f"{'layer':10}{'tokens':>7}  {'kernel':10}{'us':>8}{'GB/s':>7}{'of peak':>9}{'cuBLAS us':>11}")
    for name, (rows, columns) in SHAPES.items():
        copies = -(-int(ROTATING) // (2 * rows * columns))
        weights = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(copies)]
        bias = torch.randn(rows, device="cuda").bfloat16()
        packed = [pack(weight, bias) for weight in weights]
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, device="cuda").bfloat16()
            library = microseconds([lambda w=weight, x=x, bias=bias: F.linear(x, w, bias) for weight in weights])
            ours = microseconds([lambda w=weight, x=x: linear(x, w) for weight in packed])
            kernel = "tiled" if tile_for(tokens, rows, columns) else kernel_for(tokens)
            rate = 2 * (rows * columns + tokens * (rows + columns)) / ours * 1e6
            print(
                f"{name:10}{tokens:7}  {kernel:10}{ours:8.2f}{rate / 1e9:7.0f}{rate / BANDWIDTH:9.1%}{library:11.2f}",
                flush=True,
            )
    bench_rows()


def bench_rows(layers: int = 36) -> None:
    """Norms and routing, a chain of `layers` calls, each layer with weights of its own."""
    print(f"\n{'tokens':>7}{'embed':>10}{'add 4':>10}{'route 32':>10}{'route 128':>10}   us")
    norms = [Norm(weight, 1e-5) for weight in torch.ones(layers, 2880, device="cuda")]
    peers = Peers(ALONE)
    table = torch.randn(201088, 2880, device="cuda", dtype=torch.bfloat16)
    for tokens in (*TOKENS, PREFILL):
        x = torch.randn(tokens, 2880, device="cuda").bfloat16()
        ids = torch.randint(0, 201088, (tokens,), dtype=torch.int32, device="cuda")
        outputs = torch.randn(tokens, 4, 2880, device="cuda").bfloat16()
        cells = [
            microseconds([lambda n=n, ids=ids: embed_norm(ids, table, n) for n in norms]),
            microseconds([lambda n=n, x=x, outputs=outputs: add_norm(x, outputs, n, peers) for n in norms]),
        ]
        for experts in (32, 128):
            routers = torch.randn(layers, experts, 2880, device="cuda").bfloat16()
            bias = torch.randn(experts, device="cuda").bfloat16()
            layers_of = [Router(weight, bias, 4) for weight in routers]
            calls = [lambda r=r, x=x: add_norm_route(x, x, norms[0], r, peers) for r in layers_of]
            cells.append(microseconds(calls))
        print(f"{tokens:7}" + "".join(f"{cell:10.2f}" for cell in cells), flush=True)


if __name__ == "__main__":
    bench()
