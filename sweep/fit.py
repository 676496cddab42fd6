"""Does a configuration fit the memory there is? An estimate from shapes, made before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import torch

from conf.limits import PAGE_TOKENS
from conf.schema import Config, Device, Weights
from demo.checkpoint import DEMO
from engine.architecture import Architecture, CheckpointError
from engine.checkpoint import find_folder
from engine.start import GRAPH_RESERVE
from engine.weights import tensor_specs
from graphs.buffers import Buffers

GIB = 2**30


def misfit(config: Config, gpus: list[dict[str, Any]]) -> str | None:
    """Why the configuration cannot run, or None where nothing speaks against it.

    Of a GPU it asks for the weights, a full context of pages and the state by row; activations are not counted.
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
    rows = (config.buckets.decode_rows[-1] + 1) * shape.vocab * 5  # penalties' counts and marks
    needed = weights + pages + rows + (GRAPH_RESERVE if on_gpu else 0)
    if on_gpu:
        available, where = min(gpu["memory"] for gpu in gpus[: config.tp]), "a GPU"
    else:
        available, where, needed = _available(), "this machine", needed * config.tp
    if needed <= available:
        return None
    return (
        f"needs {needed / GIB:.1f} GiB (weights {weights / GIB:.1f}, pages {pages / GIB:.1f}, "
        f"state {rows / GIB:.1f} a rank), {where} has {available / GIB:.1f}"
    )


def _shape(config: Config) -> Architecture:
    if config.model.weights is Weights.demo:
        return DEMO
    if config.model.weights is Weights.random:
        return Architecture.from_random_shape(config.model.random_shape)
    return Architecture.from_config(json.loads((find_folder(Path(config.model.path)) / "config.json").read_text()))


def _available() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
