"""Writes GPT-OSS checkpoints with random weights in the published layouts, for tests and benchmarks.

Knows which files a published checkpoint consists of. Does not know how they are read or which values are sensible:
names, shapes and values come from `engine.weights`.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from conf.limits import ENDOFTEXT, RETURN
from demo.bundle import CONFIG
from engine.architecture import Architecture
from engine.checkpoint import stored_names
from engine.weights import random_tensor, tensor_specs

DEMO = Architecture.from_config(CONFIG)
# Fields of config.json that are the same for every GPT-OSS.
SHARED = (
    "architectures",
    "model_type",
    "attention_bias",
    "hidden_act",
    "tie_word_embeddings",
    "torch_dtype",
    "quantization_config",
)


def config_json(a: Architecture, layout: str) -> dict[str, Any]:
    """config.json of the architecture, in the words of `layout`: "huggingface" or "original"."""
    config: dict[str, Any] = {
        "num_hidden_layers": a.layers,
        "hidden_size": a.hidden,
        "intermediate_size": a.intermediate,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "vocab_size": a.vocab,
        "experts_per_token": a.experts_per_token,
        "sliding_window": next((window for window in a.windows if window is not None), None),
        "swiglu_limit": a.swiglu_limit,
        "rope_theta": a.rope_theta,
        "initial_context_length": a.rope_original_context,
    }
    if layout == "original":  # NTK's beta is YaRN's fast bound, its alpha the slow one
        return config | {
            "num_experts": a.experts,
            "rope_scaling_factor": a.rope_factor,
            "rope_ntk_beta": a.rope_beta_fast,
            "rope_ntk_alpha": a.rope_beta_slow,
        }
    config |= {name: CONFIG[name] for name in SHARED}
    config |= {
        "num_local_experts": a.experts,
        "num_experts_per_tok": a.experts_per_token,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in a.windows],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": a.rope_factor,
            "truncate": a.rope_truncate,
            "beta_fast": a.rope_beta_fast,
            "beta_slow": a.rope_beta_slow,
            "original_max_position_embeddings": a.rope_original_context,
        },
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_eps,
    }
    # A smaller vocabulary has no such tokens, and transformers refuses ids outside of it.
    return config | {"eos_token_id": RETURN, "pad_token_id": ENDOFTEXT} if a.vocab > RETURN else config


def write_checkpoint(
    folder: Path,
    a: Architecture,
    seed: int = 0,
    layout: Literal["huggingface", "original"] = "huggingface",
    shards: int = 1,
) -> None:
    """Write config.json and `shards` safetensors files, with an index if there are several. `folder` may exist.

    On the CPU the values are those of `engine.checkpoint.random_weights(a, ..., seed=seed)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = tensor_specs(a)
    pieces: dict[str, list[str]] = {}  # stored name -> the tensors that it holds, concatenated by rows
    for name, (stored, _) in stored_names(specs, layout == "huggingface").items():
        pieces.setdefault(stored, []).append(name)

    files: dict[str, list[str]] = {}  # file name -> stored names
    for n, stored in enumerate(pieces):
        number = 1 + n * shards // len(pieces)
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        files.setdefault(file, []).append(stored)
    for file, names in files.items():  # one file's tensors in memory at a time
        save_file(
            {
                stored: torch.cat([random_tensor(name, specs[name], a.layers, seed, "cpu") for name in pieces[stored]])
                for stored in names
            },
            folder / file,
            metadata={"format": "pt"},
        )
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(spec.bytes for spec in specs.values())},
            "weight_map": {stored: file for file, names in files.items() for stored in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_json(a, layout), indent=2), encoding="utf-8")
