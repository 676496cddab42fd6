"""Embedding, residual add, RMSNorm and routing on Hopper: the operations of that name in `kernels.reference`.

With several ranks, what is added is the sum over all of them, each rank's rounded to bf16 and so is the sum: the same
bytes on every rank. One difference from the reference: routing keeps its logits in float32 instead of rounding them to
bf16.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module
from kernels.hopper.peers import Area, Peers

ROW_THREADS = 384
ROUTER_BLOCKS = 8  # of a router's cluster
MOST_EXPERTS = 128
MOST_TOKENS = 2  # that a cluster takes between two barriers
MANY_TOKENS, MANY_WARPS = 16, 8  # of a block where tokens are many
ROUTED_EXPERTS = 2048  # experts of all clusters at once: 132 multiprocessors with 16 warps each


def embed_norm(tokens: Tensor, table: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """tokens [T] int32, each a row of table [V, H] bf16; weight [H] float32 -> the rows [T, H], and their RMSNorm."""
    _, hidden = _rows("table", table)
    _check_scale(weight, hidden)
    if tokens.dtype != torch.int32 or tokens.dim() != 1 or not tokens.is_contiguous():
        raise ValueError(f"tokens {tuple(tokens.shape)} {tokens.dtype}: a contiguous [T] int32 is what can be embedded")
    count = tokens.shape[0]
    x, out = (torch.empty(count, hidden, dtype=table.dtype, device=table.device) for _ in range(2))
    if count:
        arguments = (tokens, table, weight, x, out, float(eps))
        _kernel("embed_norm", hidden, 1).launch(grid=(count, 1, 1), block=ROW_THREADS, args=arguments)
    return x, out


def add_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float, peers: Peers) -> tuple[Tensor, Tensor]:
    """x [T, H], parts [T, n, H] bf16, weight [H] float32 -> x + the parts' sum, rounded to bf16, and its RMSNorm.

    Each rank sends its rows to all others: right for few rows.
    """
    return _add_norm("add_norm", x, parts, weight, eps, peers, peers.mlp)


def prefill_add_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float, peers: Peers) -> tuple[Tensor, Tensor]:
    """`add_norm` for many rows: each is summed by one rank, which sends the sum to the others. The same bytes."""
    return _add_norm("prefill_add_norm", x, parts, weight, eps, peers, peers.mlp)


def _add_norm(
    name: str, x: Tensor, parts: Tensor, weight: Tensor, eps: float, peers: Peers, area: Area
) -> tuple[Tensor, Tensor]:
    tokens, hidden = _rows("x", x)
    _check_scale(weight, hidden)
    count = _parts(parts, tokens, hidden)
    residual, out = torch.empty_like(x), torch.empty_like(x)
    if tokens:
        each = -(-tokens // peers.size)  # rows that a rank sums where it does so for the others
        slots = peers.size * tokens if name == "add_norm" else peers.size * each + tokens
        arguments = (x, parts, weight, residual, out, count, float(eps), *area.arguments(2 * hidden * slots))
        _kernel(name, hidden, peers.size).launch(grid=(tokens, 1, 1), block=ROW_THREADS, args=arguments)
    return residual, out


def add_norm_route(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, router: Tensor, bias: Tensor, active: int, peers: Peers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `add_norm`, with one part, delta [T, H], which `linear_part` made, and sent to the others; then router [E, H]
    and bias [E] bf16 choose experts for the normed rows.

    -> x + delta, its norm [T, H] bf16, expert ids [T, active] int64 and their weights [T, active] float32: a softmax
    over the chosen logits, in float32. Of equal logits the lower expert id goes first.
    """
    tokens, hidden = _rows("x", x)
    _check_scale(weight, hidden)
    experts = _check_router(router, bias, hidden, active)
    if _rows("delta", delta) != (tokens, hidden):
        raise ValueError(f"delta {tuple(delta.shape)} is added to x {tuple(x.shape)}: their shapes must be equal")
    if peers.size > 1 and experts < ROUTER_BLOCKS:
        raise ValueError(f"{experts} experts: with several ranks, each of the {ROUTER_BLOCKS} blocks must have one")
    residual, out = torch.empty_like(x), torch.empty_like(x)
    ids = torch.empty(tokens, active, dtype=torch.int64, device=x.device)
    shares = torch.empty(tokens, active, dtype=torch.float32, device=x.device)
    if tokens:
        clusters, group = router_grid(tokens, experts)
        arguments = (
            x,
            delta,
            weight,
            router,
            bias,
            residual,
            out,
            ids,
            shares,
            tokens,
            experts,
            active,
            group,
            float(eps),
            *peers.attention.arguments(2 * hidden * peers.size * tokens),
        )
        threads = -(-experts // ROUTER_BLOCKS) * 32
        kernel = _kernel("add_norm_route", hidden, peers.size)
        kernel.launch(grid=(ROUTER_BLOCKS, clusters, 1), block=threads, args=arguments)
    return residual, out, ids, shares


def prefill_add_norm_route(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, router: Tensor, bias: Tensor, active: int, peers: Peers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_norm_route` for many tokens: sums as `prefill_add_norm`, routing by tensor cores. The bytes differ."""
    residual, out = _add_norm("prefill_add_norm", x, delta.unsqueeze(1), weight, eps, peers, peers.attention)
    tokens, hidden = out.shape
    experts = _check_router(router, bias, hidden, active)
    ids = torch.empty(tokens, active, dtype=torch.int64, device=x.device)
    shares = torch.empty(tokens, active, dtype=torch.float32, device=x.device)
    kernel = _kernel("route", hidden, 1, MANY_WARPS * MANY_TOKENS * experts * 4)
    arguments = (out, router, bias, ids, shares, tokens, experts, active)
    kernel.launch(grid=(-(-tokens // MANY_TOKENS), 1, 1), block=MANY_WARPS * 32, args=arguments)
    return residual, out, ids, shares


def router_grid(tokens: int, experts: int) -> tuple[int, int]:
    """Clusters, and tokens a cluster takes at once: all clusters are resident, and few tokens spread over them."""
    most = ROUTED_EXPERTS // max(experts, 32)
    clusters = min(tokens if tokens <= most // 2 else -(-tokens // MOST_TOKENS), most)
    return clusters, min(-(-tokens // clusters), MOST_TOKENS)


def _rows(name: str, x: Tensor) -> tuple[int, int]:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] % 8 or not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(
            f"{name} {tuple(x.shape)} {x.dtype}: a contiguous, 16-byte aligned bfloat16 matrix of rows of "
            "a multiple of 8 is what this takes"
        )
    return x.shape[0], x.shape[1]


def _check_router(router: Tensor, bias: Tensor, hidden: int, active: int) -> int:
    experts = router.shape[0]
    if _rows("router", router) != (experts, hidden) or bias.dtype != torch.bfloat16 or bias.shape != (experts,):
        raise ValueError(
            f"router {tuple(router.shape)}, bias {tuple(bias.shape)} {bias.dtype}: [E, {hidden}] and [E] "
            "bfloat16 are what rows ask for"
        )
    if not 1 <= active <= min(experts, 32) or experts > MOST_EXPERTS:
        raise ValueError(f"{active} of {experts} experts: at most 32 of at most {MOST_EXPERTS} can be chosen")
    return experts


def _parts(parts: Tensor, tokens: int, hidden: int) -> int:
    if parts.dim() != 3 or parts.shape[::2] != (tokens, hidden) or not parts.shape[1]:
        raise ValueError(f"parts {tuple(parts.shape)}: [{tokens}, n, {hidden}] is what is summed")
    _rows("parts", parts.view(-1, hidden))
    return parts.shape[1]


def _check_scale(weight: Tensor, hidden: int) -> None:
    if weight.dtype != torch.float32 or weight.shape != (hidden,) or weight.data_ptr() % 16:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype}: a 16-byte aligned [{hidden}] float32 is what this takes"
        )


@cache
def _kernel(name: str, hidden: int, ranks: int, shared_bytes: int = 0) -> Kernel:
    module = compile_module(Path(__file__).with_name("norm.cu"), {"HIDDEN": hidden, "RANKS": ranks})
    return module.kernel(name, shared_bytes)
