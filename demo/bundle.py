"""The demo model in one small file: packed experts, bf16 for the rest, embedding rows for the tokens it knows.

All other tokens share one row, the last. `expand` makes an ordinary checkpoint of it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from demo import mxfp4
from demo.model import EXPERTS, Weights
from engine.checkpoint import CheckpointError
from kernels.reference import dequantize

TOKENS = "token_ids"  # [rows - 1] int32, the token of each embedding row but the last
SHARED = ("model.embed_tokens.weight", "lm_head.weight")


def write(path: Path, w: Weights, tokens: list[int]) -> str:
    """Pack and write trained weights; returns the file's SHA-256."""
    packed: Weights = {TOKENS: torch.tensor(tokens, dtype=torch.int32)}
    for name, p in w.items():
        if name.endswith(EXPERTS):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = mxfp4.pack(p.detach().float().cpu())
        else:
            packed[name] = p.detach().to("cpu", torch.bfloat16).contiguous()
    save_file(packed, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path, digest: str | None = None) -> dict[str, Tensor]:
    """The tensors of a bundle. Raises CheckpointError if the file is not the one with this SHA-256."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: found {error.strerror}, expected the demo model") from error
    found = hashlib.sha256(data).hexdigest()
    if digest is not None and found != digest:
        raise CheckpointError(
            f"{path}: found {len(data)} bytes with SHA-256 {found}, expected {digest} "
            "(a truncated or changed file: restore it from the repository)"
        )
    return load(data)


def trained(path: Path) -> tuple[Weights, list[int]]:
    """Weights in float32 and tokens, to train on from."""
    packed = read(path)
    tokens = packed.pop(TOKENS).tolist()
    w: Weights = {}
    for name, tensor in packed.items():
        if name.endswith("_blocks"):
            scales = packed[name.replace("_blocks", "_scales")]
            w[name.removesuffix("_blocks")] = dequantize(tensor, scales, torch.float32)
        elif not name.endswith("_scales"):
            w[name] = tensor.float()
    return w, tokens


def expand(packed: dict[str, Tensor], vocab: int, config: dict[str, Any], folder: Path) -> None:
    """Write an ordinary checkpoint of `vocab` tokens into `folder`."""
    packed = dict(packed)
    tokens = packed.pop(TOKENS).long()
    for name in SHARED:
        rows = packed[name]
        packed[name] = rows[-1].repeat(vocab, 1)
        packed[name][tokens] = rows[:-1]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
