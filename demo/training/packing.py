"""The demo model's bundle, written and read back by training: `demo.bundle` documents what the file holds."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from demo.bundle import TOKENS
from demo.training import mxfp4
from kernels.reference import dequantize

EXPERTS = (".gate_up_proj", ".down_proj")  # how the names of packed weights end

Weights = dict[str, Tensor]  # by Hugging Face names, experts unpacked and [experts, out, in]


def write(path: Path, w: Weights, tokens: list[int]) -> str:
    """Pack and write the weights, and beside them the SHA-256 of the file, which is returned."""
    packed: dict[str, Tensor] = {TOKENS: torch.tensor(tokens, dtype=torch.int32)}
    for name, p in w.items():
        if name.endswith(EXPERTS):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = mxfp4.pack(p.detach().float().cpu())
        else:
            packed[name] = p.detach().to("cpu", torch.bfloat16).contiguous()
    save_file(packed, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".sha256").write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return digest


def unpack(data: bytes) -> tuple[Weights, list[int]]:
    """A bundle's content -> weights in float32, and the tokens that have rows: what `write` took, but for rounding."""
    packed, w = load(data), Weights()
    for name, tensor in packed.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            w[base] = dequantize(tensor, packed[f"{base}_scales"], torch.float32)
        elif name != TOKENS and not name.endswith("_scales"):
            w[name] = tensor.float()
    return w, packed[TOKENS].tolist()
