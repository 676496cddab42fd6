"""The demo model as it ships: one small file, its hash beside it; and the checkpoint made of it in the user's cache.

The file holds the experts in MXFP4 as a published checkpoint does, the rest in bf16, and rows of embedding and head for
the tokens that the model knows. All other tokens share one row, the last. Knows neither the engine, which reads the
checkpoint like any other, nor training. Torch is imported only while a checkpoint is made: `serve.py` runs without it.
"""

import fcntl
import hashlib
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from conf.limits import ENDOFTEXT, RETURN, VOCABULARY
from conf.schema import Config, ConfigError, Weights

SHIPPED = Path(__file__).with_name("model.safetensors")
TOKENS = "token_ids"  # [rows - 1] int32, the token of each row but the last
SHARED = ("model.embed_tokens.weight", "lm_head.weight")  # [rows, hidden]

CONFIG: dict[str, Any] = {  # config.json of the checkpoint
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "experts_per_token": 4,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "rope_theta": 150000.0,
    "initial_context_length": 4096,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "attention_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
    "eos_token_id": RETURN,
    "pad_token_id": ENDOFTEXT,
}


def read(path: Path, digest: str) -> bytes:
    """The file's content. Raises ConfigError if it is not the file with this SHA-256."""
    data = _bytes(path)
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise ConfigError(
            f"{path}: found {len(data)} bytes with SHA-256 {actual}, expected {digest}; "
            "the file is cut or changed, install it again"
        )
    return data


def digest_of(path: Path) -> str:
    """The SHA-256 that the file beside the bundle states. Raises ConfigError."""
    beside = path.with_suffix(".sha256")
    digest = _bytes(beside).decode("ascii", "replace").partition(" ")[0].strip()
    if len(digest) != 64 or not {*digest} <= {*"0123456789abcdef"}:
        raise ConfigError(f"{beside}: found {digest[:64]!r}, expected a SHA-256; install it again")
    return digest


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: found {error.strerror!r}, expected a file of the demo model") from error


def expand(data: bytes, config: dict[str, Any], folder: Path) -> None:
    """Write the bundle `data` as a checkpoint in the Hugging Face layout into `folder`, which may exist.

    Raises OSError or SafetensorError where the disk does not take it.
    """
    from safetensors.torch import load, save_file  # here, because serve.py's process does without torch

    tensors = load(data)
    tokens = tensors.pop(TOKENS).long()
    for name in SHARED:
        rows = tensors[name]
        tensors[name] = rows[-1].repeat(config["vocab_size"], 1)
        tensors[name][tokens] = rows[:-1]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def with_demo_folder(config: Config) -> Config:
    """The configuration that the engine takes: the demo model as a checkpoint folder, other models as they are.

    Raises ConfigError as `demo_folder` does.
    """
    return config.with_checkpoint(demo_folder()) if config.model.weights is Weights.demo else config


def demo_folder(shipped: Path = SHIPPED) -> Path:
    """The demo model's checkpoint folder in the user's cache; the first call makes it, about 220 MB.

    The folder's name holds a hash of the bundle's hash, of CONFIG and of the source of `expand`: after a change to any
    of them another folder is made. The folder appears by a rename once it is complete. A lock makes other processes
    wait for that; it is released when its holder dies, and the next holder removes the unfinished folder.

    Raises ConfigError for a damaged bundle or a cache that cannot be written, and leaves nothing behind.
    """
    digest = digest_of(shipped)
    recipe = f"{digest} {CONFIG} {inspect.getsource(expand)}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-vllm"
    folder = cache / f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    data, unfinished = read(shipped, digest), cache / f"{folder.name}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                shutil.rmtree(unfinished, ignore_errors=True)
                try:
                    expand(data, CONFIG, unfinished)
                    _sync(*unfinished.iterdir(), unfinished)
                    unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{unfinished}: {error}; the demo model needs about 220 MB there") from error
    return folder


def _sync(*paths: Path) -> None:
    """Flush files or folders to the disk: otherwise a rename may reach it before the data does."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
