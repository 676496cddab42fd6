"""Whether a configuration fits the memory: an estimate from shapes, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import torch

from conf.limits import PAGE_TOKENS
from conf.schema import Config, Device, Weights
from demo.bundle import CONFIG
from engine.architecture import Architecture, CheckpointError
from engine.checkpoint import find_folder
from engine.start import GRAPH_RESERVE, host_memory
from engine.weights import tensor_specs
from graphs.buffers import Buffers

GIB = 2**30


def misfit(config: Config, gpus: list[dict[str, Any]]) -> str | None:
    """Why the configuration cannot run; None if it seems to fit.

    Counted are a rank's weights, the pages of one full context and the rows' sampling state, but no activations.
    `gpus`: as `environment.gpu_list` returns them.
    """
    on_gpu = bool(gpus) and config.kernels.device is not Device.cpu
    if on_gpu and config.tp > len(gpus):
        return f"tp={config.tp} needs {config.tp} GPUs, there are {len(gpus)}"
    try:
        shape = _shape(config)
    except (CheckpointError, ValueError, OSError) as error:
        return str(error)
    if shape.heads % config.tp or shape.kv_heads % config.tp:
        return f"tp={config.tp} does not divide {shape.kv_heads} key/value heads"
    specs = tensor_specs(shape)
    embedding = specs["model.embed_tokens.weight"].bytes
    weights = embedding + (sum(spec.bytes for spec in specs.values()) - embedding) // config.tp
    dtype = getattr(torch, config.kernels.dtype.name)
    page = Buffers.page_bytes(shape.layers, shape.kv_heads // config.tp, shape.head_dim, dtype)
    pages = (config.buckets.pages or config.buckets.max_context // PAGE_TOKENS + 1) * page
    rows = (
        (config.buckets.decode_rows[-1] + 1) * shape.vocab * 5
    )  # token counts (int32) and prompt flags (uint8) of the penalties
    needed = weights + pages + rows + (GRAPH_RESERVE if on_gpu else 0)
    if on_gpu:
        available, where = min(gpu["memory"] for gpu in gpus[: config.tp]), "a GPU"
    else:
        available, where, needed = host_memory(), "this machine", needed * config.tp
    if needed <= available:
        return None
    return (
        f"needs {needed / GIB:.1f} GiB (weights {weights / GIB:.1f}, pages {pages / GIB:.1f}, "
        f"state {rows / GIB:.1f} a rank), {where} has {available / GIB:.1f}"
    )


def _shape(config: Config) -> Architecture:
    if config.model.weights is Weights.demo:
        return Architecture.from_config(CONFIG)
    if config.model.weights is Weights.random:
        return Architecture.from_random_shape(config.model.random_shape)
    assert config.model.path is not None  # conf.schema.check
    return Architecture.from_config(json.loads((find_folder(Path(config.model.path)) / "config.json").read_text()))
