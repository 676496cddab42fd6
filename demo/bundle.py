"""The demo model as it ships: one small file, its hash beside it; and the checkpoint made of it in the user's cache.

The file holds the experts in MXFP4, the rest in bf16, and rows of embedding and head for the tokens that the model
knows. All other tokens share one row, the last. Knows nothing of training.
"""

import fcntl
import hashlib
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from demo import mxfp4
from demo.checkpoint import DEMO, config_json
from engine.architecture import CheckpointError
from kernels.reference import dequantize

SHIPPED = Path(__file__).with_name("model.safetensors")
EXPERTS = (".gate_up_proj", ".down_proj")  # how the names of packed weights end
TOKENS = "token_ids"  # [rows - 1] int32, the token of each row but the last
SHARED = ("model.embed_tokens.weight", "lm_head.weight")  # [rows, hidden]

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


def read(path: Path, digest: str) -> dict[str, Tensor]:
    """The packed tensors. Raises CheckpointError if the file is not the one with this SHA-256."""
    data = _bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CheckpointError(
            f"{path}: found {len(data)} bytes with SHA-256 {found}, expected {digest}; "
            "the file is cut or changed, install it again"
        )
    return load(data)


def digest_of(path: Path) -> str:
    """What the file beside the bundle says. Raises CheckpointError."""
    beside = path.with_suffix(".sha256")
    digest = _bytes(beside).decode("ascii", "replace").partition(" ")[0].strip()
    if len(digest) != 64 or not {*digest} <= {*"0123456789abcdef"}:
        raise CheckpointError(f"{beside}: found {digest[:64]!r}, expected a SHA-256; install it again")
    return digest


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: found {error.strerror!r}, expected a file of the demo model") from error


def unpacked(packed: dict[str, Tensor]) -> tuple[Weights, list[int]]:
    """Weights in float32 and the tokens that have rows: what `write` took, but for the rounding."""
    w: Weights = {}
    for name, tensor in packed.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            w[base] = dequantize(tensor, packed[f"{base}_scales"], torch.float32)
        elif name != TOKENS and not name.endswith("_scales"):
            w[name] = tensor.float()
    return w, packed[TOKENS].tolist()


def expand(packed: dict[str, Tensor], vocab: int, config: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint of `vocab` tokens in the Hugging Face layout into `folder`, which may exist."""
    packed = dict(packed)
    tokens = packed.pop(TOKENS).long()
    for name in SHARED:
        rows = packed[name]
        packed[name] = rows[-1].repeat(vocab, 1)
        packed[name][tokens] = rows[:-1]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def demo_folder(shipped: Path = SHIPPED) -> Path:
    """The checkpoint of the demo model, made in the user's cache by the first who asks: about 220 MB.

    Its name holds a hash of the bundle's hash and of what is made of it, so that a new model never meets old files. It
    appears complete, by a rename; the lock keeps other processes waiting until then, and dies with its holder, whose
    leftovers the next holder removes. Raises CheckpointError, with nothing left behind, for a damaged bundle or a
    cache that cannot be written.
    """
    digest, config = digest_of(shipped), config_json(DEMO, "huggingface")
    recipe = f"{digest} {config} {inspect.getsource(expand)}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-vllm"
    folder = cache / f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    packed, partial = read(shipped, digest), cache / f"{folder.name}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    expand(packed, DEMO.vocab, config, partial)
                    _sync(*partial.iterdir(), partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{partial}: {error}; the demo model needs about 220 MB there") from error
    return folder


def _sync(*paths: Path) -> None:
    """To the disk: a rename may reach it before the data does."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
