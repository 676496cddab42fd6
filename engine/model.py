"""The GPT-OSS forward, one visible layer loop over (weights, buffers, operations), and the step around it.

Knows tensors of static shapes; no requests, no graphs. `ops` is the module that `kernels` chose at start.
"""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from engine.checkpoint import Architecture, ModelWeights
from engine.parallel import Ranks
from engine.sampler import sample
from graphs.buckets import Bucket
from graphs.buffers import Buffers


class Model:
    def __init__(
        self, architecture: Architecture, weights: ModelWeights, ops: ModuleType, ranks: Ranks, max_context: int
    ) -> None:
        self.architecture = architecture
        self.weights = weights
        self.ops = ops
        self.ranks = ranks
        self.cos, self.sin = rope_tables(architecture, max_context, weights.embedding.device)

    def step(self, bucket: Bucket, buffers: Buffers) -> Callable[[], None]:
        """The work of one step of a bucket, from packed words to packed words: what a graph captures."""
        inputs = buffers.inputs[bucket]

        def decode() -> None:
            tokens = buffers.advance(inputs)  # [rows]
            hidden = self.forward(buffers, tokens, inputs.positions, inputs.slots)  # [rows, H]
            sample(self.ops, buffers, self.logits(hidden), inputs.slots, inputs.positions + 1)

        def prefill() -> None:
            buffers.install(inputs)
            hidden = self.forward(buffers, inputs.tokens, inputs.positions, inputs.slots)  # [tokens, H]
            logits = self.logits(hidden[inputs.last])  # [sequences, V]
            sample(self.ops, buffers, logits, inputs.sample_slots, inputs.positions[inputs.last] + 1)

        return decode if bucket.kind == "decode" else prefill

    def forward(self, buffers: Buffers, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """tokens, positions, slots [T] int32 -> hidden states [T, H]; appends their keys and values to the pages."""
        ops, ranks, shape, table = self.ops, self.ranks, self.architecture, buffers.page_table
        x = ops.embed(tokens, self.weights.embedding)  # [T, H]
        for layer, window, keys, values in zip(
            self.weights.layers, shape.windows, buffers.keys, buffers.values, strict=True
        ):
            h = ops.rms_norm(x, layer.attention_norm, shape.norm_eps)
            qkv = ops.linear(h, layer.qkv_weight, layer.qkv_bias)  # [T, (q + 2 kv) heads * D]
            q = ops.rope_append(qkv, self.cos, self.sin, positions, slots, table, keys, values)  # [T, q heads, D]
            h = ops.attention(q, keys, values, table, slots, positions, layer.sinks, window)  # [T, q heads * D]
            x = x + ranks.all_reduce(ops.linear(h, layer.o_weight, layer.o_bias))
            h = ops.rms_norm(x, layer.mlp_norm, shape.norm_eps)
            chosen, shares = ops.route(h, layer.router_weight, layer.router_bias, shape.experts_per_token)
            gate_up = (layer.gate_up_blocks, layer.gate_up_scales, layer.gate_up_bias)
            down = (layer.down_blocks, layer.down_scales, layer.down_bias)
            x = x + ranks.all_reduce(ops.experts(h, chosen, shares, gate_up, down, shape.swiglu_limit))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V] float32, whole on every rank."""
        h = self.ops.rms_norm(hidden, self.weights.norm, self.architecture.norm_eps)
        shard = self.ops.linear(h, self.weights.lm_head)  # [R, V / ranks]
        return self.ranks.all_gather(shard)[:, : self.architecture.vocab].float()


def rope_tables(shape: Architecture, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, D/2] float32 of YaRN (Peng et al. 2023, "NTK-by-parts"), its temperature multiplied in.

    Dimensions that turn fewer than beta_slow times over the original context are interpolated by `factor`, those
    that turn more than beta_fast times are left, a ramp lies between.
    """
    half = shape.head_dim // 2
    frequencies = shape.rope_theta ** -(torch.arange(half, dtype=torch.float32, device=device) / half)

    def dimension_turning(turns: float) -> float:
        return half * math.log(shape.rope_original_context / (turns * 2 * math.pi)) / math.log(shape.rope_theta)

    low, high = dimension_turning(shape.rope_beta_fast), dimension_turning(shape.rope_beta_slow)
    if shape.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.head_dim - 1)
    interpolated = ((torch.arange(half, device=device) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = frequencies / shape.rope_factor * interpolated + frequencies * (1 - interpolated)
    angles = torch.arange(positions, device=device).unsqueeze(1) * frequencies  # [positions, D/2]
    return angles.cos() * shape.rope_attention_factor, angles.sin() * shape.rope_attention_factor
