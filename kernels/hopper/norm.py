"""RMSNorm, residual add, embedding and routing on Hopper: the operations of that name in `kernels.reference`.

Two differences from the reference: routing keeps its logits in float32 instead of rounding them to bf16, and
`add_rms_norm` does in one kernel what the model otherwise does in two steps.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module

ROW_THREADS = 384
RANKS = 8  # blocks of a router's cluster
MOST_EXPERTS = 128
MOST_TOKENS = 2  # that a cluster takes between two barriers
ROUTED_EXPERTS = 2048  # experts of all clusters at once: 132 multiprocessors with 16 warps each


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] bf16, weight [H] float32 -> x / rms(x) * weight [T, H] bf16."""
    tokens, hidden = _rows("x", x)
    _check_scale(weight, hidden)
    out = torch.empty_like(x)
    if tokens:
        _kernel("rms_norm", hidden).launch(grid=(tokens, 1, 1), block=ROW_THREADS, args=(x, weight, out, float(eps)))
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, H] bf16, weight [H] float32 -> x + delta rounded to bf16, and that normed as `rms_norm` does."""
    tokens, hidden = _rows("x", x)
    _check_scale(weight, hidden)
    if _rows("delta", delta) != (tokens, hidden):
        raise ValueError(f"delta {tuple(delta.shape)} is added to x {tuple(x.shape)}: their shapes must be equal")
    residual, out = torch.empty_like(x), torch.empty_like(x)
    if tokens:
        arguments = (x, delta, weight, residual, out, float(eps))
        _kernel("add_rms_norm", hidden).launch(grid=(tokens, 1, 1), block=ROW_THREADS, args=arguments)
    return residual, out


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """tokens [T] int32, each a row of table [V, H] bf16 -> [T, H] bf16."""
    _, hidden = _rows("table", table)
    if tokens.dtype != torch.int32 or tokens.dim() != 1 or not tokens.is_contiguous():
        raise ValueError(f"tokens {tuple(tokens.shape)} {tokens.dtype}: a contiguous [T] int32 is what embed takes")
    count = tokens.shape[0]
    out = torch.empty(count, hidden, dtype=table.dtype, device=table.device)
    if count:
        _kernel("embed", hidden).launch(grid=(count, 1, 1), block=ROW_THREADS, args=(tokens, table, out))
    return out


def route(x: Tensor, weight: Tensor, bias: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """x [T, H], weight [E, H], bias [E] bf16 -> expert ids [T, active] int64 and their weights [T, active] float32.

    The softmax runs over the chosen logits, float32. Of equal logits the lower expert id goes first.
    """
    tokens, hidden = _rows("x", x)
    experts = weight.shape[0]
    if _rows("weight", weight) != (experts, hidden) or bias.dtype != torch.bfloat16 or bias.shape != (experts,):
        raise ValueError(f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)} {bias.dtype}: [E, {hidden}] and [E] "
                         "bfloat16 are what x asks for")
    if not 1 <= active <= min(experts, 32) or experts > MOST_EXPERTS:
        raise ValueError(f"{active} of {experts} experts: at most 32 of at most {MOST_EXPERTS} can be chosen")
    ids = torch.empty(tokens, active, dtype=torch.int64, device=x.device)
    shares = torch.empty(tokens, active, dtype=torch.float32, device=x.device)
    if tokens:
        clusters, group = router_grid(tokens, experts)
        arguments = (x, weight, bias, ids, shares, tokens, experts, active, group)
        threads = -(-experts // RANKS) * 32
        _kernel("route", hidden).launch(grid=(RANKS, clusters, 1), block=threads, args=arguments)
    return ids, shares


def router_grid(tokens: int, experts: int) -> tuple[int, int]:
    """Clusters, and tokens a cluster takes at once: all clusters are resident, and few tokens spread over them."""
    clusters = min(tokens, ROUTED_EXPERTS // max(experts, 32))
    return clusters, min(-(-tokens // clusters), MOST_TOKENS)


def _rows(name: str, x: Tensor) -> tuple[int, int]:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] % 8 or not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(f"{name} {tuple(x.shape)} {x.dtype}: a contiguous, 16-byte aligned bfloat16 matrix of rows of "
                         "a multiple of 8 is what this takes")
    return x.shape[0], x.shape[1]


def _check_scale(weight: Tensor, hidden: int) -> None:
    if weight.dtype != torch.float32 or weight.shape != (hidden,) or weight.data_ptr() % 16:
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype}: a 16-byte aligned [{hidden}] float32 is what "
                         "this takes")


@cache
def _kernel(name: str, hidden: int) -> Kernel:
    return compile_module(Path(__file__).with_name("norm.cu"), {"HIDDEN": hidden}).kernel(name)
