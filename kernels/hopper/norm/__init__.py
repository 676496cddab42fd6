"""Embedding, residual add, RMSNorm and routing on Hopper: the operations of that name in `kernels.ops`.

With several ranks, what is added is the sum over all of them, each rank's partial sum rounded to bf16 and so is the
sum: the same bytes on every rank. One difference from the reference: routing keeps its logits in float32 instead of
rounding them to bf16. How the kernels work is in decode.cu, prefill.cu and row.cuh.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernels.build import Kernel, load_kernel
from kernels.hopper.exchange import exchange_arguments, one_shot_rows, two_shot_rows
from kernels.ops import ExchangeArea, Norm, Peers, Router, Routing

FOLDER = Path(__file__).parent
ROW_THREADS = 384  # of the block of a row: 360 pieces of 16 bytes at 2880
MOST_EXPERTS = 128
MOST_TOP_K = 32
ROUTER_BLOCKS = 8  # of a router's cluster
FEW_ROUTED = 1024  # experts of all tokens, at least 32 of each, for which a token has a cluster of its own
ROUTE_TOKENS, ROUTE_EXPERTS = 8, 32  # whose logits a block of a prefill's router computes at once
MOST_ROUTED = 48 * 64  # columns of a prefill's router: as much as shared memory holds


def embed_norm(tokens: Tensor, table: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """tokens [T] int32, each a row of table [V, H] bf16 -> the rows [T, H], and their RMSNorm."""
    _, hidden = _rows("table", table)
    _check_norm(norm, hidden)
    if tokens.dtype != torch.int32 or tokens.dim() != 1 or not tokens.is_contiguous():
        raise ValueError(f"tokens {tuple(tokens.shape)} {tokens.dtype}: a contiguous [T] int32 is what can be embedded")
    count = tokens.shape[0]
    x, out = (torch.empty(count, hidden, dtype=table.dtype, device=table.device) for _ in range(2))
    if count:
        arguments = (tokens, table, norm.weight, x, out, float(norm.eps))
        _decode_kernel("embed_norm", hidden, 1).launch(grid=(count, 1, 1), block=ROW_THREADS, args=arguments)
    return x, out


def decode_add_norm(x: Tensor, expert_outputs: Tensor, norm: Norm, peers: Peers) -> tuple[Tensor, Tensor]:
    """x [T, H] + the sum of expert outputs [T, n, H] bf16 over n and the ranks, rounded to bf16; and its RMSNorm.

    Each rank sends its rows to all others: right for few rows.
    """
    tokens, hidden, count = _outputs(x, expert_outputs)
    kernel = _decode_kernel("add_norm", hidden, peers.size)
    rows = one_shot_rows(tokens, peers.size)
    return _add_norm(kernel, x, expert_outputs, count, norm, peers, peers.mlp, rows)


def prefill_add_norm(x: Tensor, expert_outputs: Tensor, norm: Norm, peers: Peers) -> tuple[Tensor, Tensor]:
    """`decode_add_norm` for many rows: each is summed by one rank, which sends the others the sum. The same bytes."""
    return _prefill_add_norm(x, expert_outputs, norm, peers, peers.mlp)


def decode_add_norm_route(
    x: Tensor, delta: Tensor, norm: Norm, router: Router, peers: Peers
) -> tuple[Tensor, Tensor, Routing]:
    """x [T, H] + delta [T, H], which `decode_linear_partial` computed and sent to the others; its norm; and routing.

    -> x, h [T, H] bf16, routing.
    """
    tokens, hidden = _rows("x", x)
    _check_norm(norm, hidden)
    experts = _check_router(router, hidden)
    if _rows("delta", delta) != (tokens, hidden):
        raise ValueError(f"delta {tuple(delta.shape)} is added to x {tuple(x.shape)}: their shapes must be equal")
    if peers.size > 1 and experts < ROUTER_BLOCKS:
        raise ValueError(f"{experts} experts: with several ranks, each of the {ROUTER_BLOCKS} blocks must have one")
    residual, out, routing = torch.empty_like(x), torch.empty_like(x), _empty_routing(x, router)
    if tokens:
        arguments = (
            x,
            delta,
            norm.weight,
            router.weight,
            router.bias,
            residual,
            out,
            routing.expert_ids,
            routing.weights,
            tokens,
            experts,
            router.top_k,
            float(norm.eps),
            *exchange_arguments(peers, peers.attention, 2 * hidden * one_shot_rows(tokens, peers.size)),
        )
        threads = -(-experts // ROUTER_BLOCKS) * 32
        few = tokens * max(experts, 32) <= FEW_ROUTED
        kernel = _decode_kernel("add_norm_route" if few else "add_norm_route_many", hidden, peers.size)
        clusters = tokens if few else -(-tokens // ROUTER_BLOCKS)
        kernel.launch(grid=(ROUTER_BLOCKS, clusters, 1), block=threads, args=arguments)
    return residual, out, routing


def prefill_add_norm_route(
    x: Tensor, delta: Tensor, norm: Norm, router: Router, peers: Peers
) -> tuple[Tensor, Tensor, Routing]:
    """`decode_add_norm_route` for many tokens: sums as `prefill_add_norm`, routing by tensor cores. Bytes differ."""
    residual, out = _prefill_add_norm(x, delta.unsqueeze(1), norm, peers, peers.attention)
    tokens, hidden = out.shape
    experts, routing = _check_router(router, hidden), _empty_routing(x, router)
    if tokens:
        if hidden > MOST_ROUTED:
            raise ValueError(f"a router of {hidden} columns: a prefill step takes at most {MOST_ROUTED}")
        warps = route_warps(hidden)
        kernel = _prefill_kernel("route", hidden, peers.size, route_shared(hidden))
        arguments = (
            out,
            router.weight,
            router.bias,
            routing.expert_ids,
            routing.weights,
            tokens,
            experts,
            router.top_k,
        )
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        blocks = min(-(-tokens // ROUTE_TOKENS), multiprocessors)
        kernel.launch(grid=(blocks, 1, 1), block=32 * warps, args=arguments)
    return residual, out, routing


def decode_defines(hidden: int, ranks: int) -> dict[str, int]:
    """The macros of decode.cu."""
    return {
        "HIDDEN": hidden,
        "RANKS": ranks,
        "ROW_THREADS": ROW_THREADS,
        "MOST_EXPERTS": MOST_EXPERTS,
        "ROUTER_BLOCKS": ROUTER_BLOCKS,
    }


def prefill_defines(hidden: int, ranks: int) -> dict[str, int]:
    """The macros of prefill.cu."""
    return {
        "HIDDEN": hidden,
        "RANKS": ranks,
        "ROW_THREADS": ROW_THREADS,
        "MOST_EXPERTS": MOST_EXPERTS,
        "ROUTE_TOKENS": ROUTE_TOKENS,
        "ROUTE_EXPERTS": ROUTE_EXPERTS,
        "ROUTE_WARPS": route_warps(hidden),
    }


def route_warps(hidden: int) -> int:
    """Warps of a block of a prefill's router: two runs of 64 columns each."""
    return -(-hidden // 128)


def route_shared(hidden: int) -> int:
    """Bytes of dynamic shared memory of a prefill's router: its weights, and the sums of its warps."""
    warps = route_warps(hidden)
    return ROUTE_EXPERTS * 256 * warps + ROUTE_TOKENS * (ROUTE_EXPERTS + 4) * 4 * warps


def _prefill_add_norm(
    x: Tensor, outputs: Tensor, norm: Norm, peers: Peers, area: ExchangeArea
) -> tuple[Tensor, Tensor]:
    tokens, hidden, count = _outputs(x, outputs)
    kernel = _prefill_kernel("prefill_add_norm", hidden, peers.size)
    return _add_norm(kernel, x, outputs, count, norm, peers, area, two_shot_rows(tokens, peers.size))


def _add_norm(
    kernel: Kernel, x: Tensor, outputs: Tensor, count: int, norm: Norm, peers: Peers, area: ExchangeArea, rows: int
) -> tuple[Tensor, Tensor]:
    """`count` outputs a token; `rows` of the area are needed."""
    tokens, hidden = x.shape
    _check_norm(norm, hidden)
    residual, out = torch.empty_like(x), torch.empty_like(x)
    if tokens:
        area_arguments = exchange_arguments(peers, area, 2 * hidden * rows)
        arguments = (x, outputs, norm.weight, residual, out, count, float(norm.eps), *area_arguments)
        kernel.launch(grid=(tokens, 1, 1), block=ROW_THREADS, args=arguments)
    return residual, out


def _empty_routing(x: Tensor, router: Router) -> Routing:
    shape = x.shape[0], router.top_k
    ids = torch.empty(shape, dtype=torch.int64, device=x.device)
    return Routing(ids, torch.empty(shape, dtype=torch.float32, device=x.device))


def _rows(name: str, x: Tensor) -> tuple[int, int]:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] % 8 or not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(
            f"{name} {tuple(x.shape)} {x.dtype}: a contiguous, 16-byte aligned bfloat16 matrix of rows of "
            "a multiple of 8 is what this takes"
        )
    return x.shape[0], x.shape[1]


def _outputs(x: Tensor, outputs: Tensor) -> tuple[int, int, int]:
    """T, H and n of x [T, H] and outputs [T, n, H]."""
    tokens, hidden = _rows("x", x)
    if outputs.dim() != 3 or outputs.shape[::2] != (tokens, hidden) or not outputs.shape[1]:
        raise ValueError(f"outputs {tuple(outputs.shape)}: [{tokens}, n, {hidden}] is what is summed")
    _rows("outputs", outputs.view(-1, hidden))
    return tokens, hidden, outputs.shape[1]


def _check_router(router: Router, hidden: int) -> int:
    experts, bias = router.weight.shape[0], router.bias
    if _rows("router", router.weight) != (experts, hidden) or bias.dtype != torch.bfloat16 or bias.shape != (experts,):
        raise ValueError(
            f"router {tuple(router.weight.shape)}, bias {tuple(bias.shape)} {bias.dtype}: [E, {hidden}] and [E] "
            "bfloat16 are what these rows need"
        )
    if not 1 <= router.top_k <= min(experts, MOST_TOP_K) or experts > MOST_EXPERTS:
        raise ValueError(
            f"{router.top_k} of {experts} experts: at most {MOST_TOP_K} of at most {MOST_EXPERTS} can be chosen"
        )
    return experts


def _check_norm(norm: Norm, hidden: int) -> None:
    weight = norm.weight
    if weight.dtype != torch.float32 or weight.shape != (hidden,) or weight.data_ptr() % 16:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype}: a 16-byte aligned [{hidden}] float32 is what this takes"
        )


def _decode_kernel(name: str, hidden: int, ranks: int) -> Kernel:
    return load_kernel(FOLDER / "decode.cu", name, decode_defines(hidden, ranks))


def _prefill_kernel(name: str, hidden: int, ranks: int, shared_bytes: int = 0) -> Kernel:
    return load_kernel(FOLDER / "prefill.cu", name, prefill_defines(hidden, ranks), shared_bytes)
