"""Rounding to MXFP4 and packing: 32 values along the last dimension share one power of two.

The format is that of OCP Microscaling Formats 1.0; `kernels.reference.dequantize` reads what is packed here.
"""

import torch
from torch import Tensor

BLOCK, BIAS, LARGEST = 32, 127, 6.0


def _rounded(values: Tensor, exponents: Tensor) -> Tensor:
    """values [..., 32], exponents [..., 1] -> the nearest E2M1 value of values / 2^exponent; ties to even, clipped."""
    x = torch.ldexp(values, -exponents)
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((size / step).round() * step).clamp(max=LARGEST).copysign(x)


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., K] float32 -> E2M1 values [..., K/32, 32] and exponents [..., K/32, 1] int32.

    The largest value has the exponent of 4 or, where that leaves less squared error, of the next power of two.
    """
    values = weight.unflatten(-1, (-1, BLOCK))
    largest = values.abs().amax(-1, keepdim=True)
    low = (torch.frexp(largest).exponent - 3).clamp(min=-BIAS)  # frexp: largest = m 2^e, 0.5 <= m < 1
    fits = []
    for exponents in (low, low + 1):
        rounded = _rounded(values, exponents)
        fits.append((rounded, exponents, (torch.ldexp(rounded, exponents) - values).square().sum(-1, keepdim=True)))
    (small, low, error), (large, high, other) = fits
    better = other < error
    return torch.where(better, large, small), torch.where(better, high, low)


def rounded(weight: Tensor) -> Tensor:
    """weight [..., K] float32 as it is after packing; the gradient passes straight through."""
    with torch.no_grad():
        values, exponents = _quantise(weight)
        change = torch.ldexp(values, exponents).flatten(-2) - weight
    return weight + change


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., K] float32 -> blocks [..., K/32, 16] and scales [..., K/32], both uint8."""
    values, exponents = _quantise(weight)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=weight.device)
    codes = torch.searchsorted(grid, values.abs()) + 8 * torch.signbit(values)
    even, odd = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return even | odd << 4, (exponents.squeeze(-1) + BIAS).to(torch.uint8)
