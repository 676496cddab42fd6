"""The GPT-OSS forward, one visible layer loop over (weights, buffers, operations), and the step around it.

Knows tensors of static shapes; no requests, no graphs. `ops` is the module that `kernels` chose at start.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from conf.limits import MAX_TOP_LOGPROBS
from engine.architecture import Architecture
from engine.weights import LayerWeights, ModelWeights
from graphs.buckets import Bucket
from graphs.buffers import Buffers


class Layer(NamedTuple):
    """One layer's weights in the form in which the operations want them; shapes are those of `LayerWeights`."""

    attention_norm: Tensor
    qkv: Any
    qkv_bias: Tensor
    sinks: Tensor
    o: Any
    o_bias: Tensor
    mlp_norm: Tensor
    router: Tensor
    router_bias: Tensor
    gate_up: Any
    down: Any


class Model:
    def __init__(
        self, architecture: Architecture, weights: ModelWeights, ops: ModuleType, peers: Any, max_context: int
    ) -> None:
        """Takes `weights` over: its layers are packed one by one, and what was packed is let go.

        peers: what `ops.join` returned.
        """
        self.architecture = architecture
        self.ops = ops
        self.peers = peers
        self.cos, self.sin = rope_tables(architecture, max_context, weights.embedding.device)
        self.embedding = weights.embedding
        self.norm = weights.norm
        self.layers = [pack(ops, weights.layers.pop(0)) for _ in range(architecture.layers)]
        self.lm_head = ops.pack_linear(weights.lm_head)

    def step(self, bucket: Bucket, buffers: Buffers) -> Callable[[], None]:
        """The work of one step of a bucket, from packed words to packed words: what a graph captures."""
        inputs, ops = buffers.inputs[bucket], self.ops

        def decode() -> None:
            table, last = buffers.page_table, buffers.last_token
            tokens, following = ops.advance(inputs.slots, inputs.positions, inputs.new_pages, table, last)  # [rows]
            hidden = self.forward(bucket.kind, buffers, tokens, inputs.positions, inputs.slots)  # [rows, H]
            self.sample(buffers, self.logits(hidden), inputs.slots, following)

        def prefill() -> None:
            buffers.install(inputs)
            hidden = self.forward(bucket.kind, buffers, inputs.tokens, inputs.positions, inputs.slots)  # [tokens, H]
            logits = self.logits(hidden[inputs.last])  # [sequences, V]
            self.sample(buffers, logits, inputs.sample_slots, inputs.positions[inputs.last] + 1)

        return decode if bucket.kind == "decode" else prefill

    def forward(
        self, kind: Literal["decode", "prefill"], buffers: Buffers, tokens: Tensor, positions: Tensor, slots: Tensor
    ) -> Tensor:
        """tokens, positions, slots [T] int32 -> normed hidden states [T, H]; appends keys and values to the pages."""
        ops, peers, shape, table = self.ops, self.peers, self.architecture, buffers.page_table
        if kind == "decode":  # each token of a request of its own
            linear, linear_part, attention = ops.linear, ops.linear_part, ops.decode_attention
            route, experts, add_norm = ops.add_norm_route, ops.experts, ops.add_norm
        else:
            linear, linear_part, attention = ops.prefill_linear, ops.prefill_linear_part, ops.prefill_attention
            route, experts, add_norm = ops.prefill_add_norm_route, ops.prefill_experts, ops.prefill_add_norm
        norms = [layer.attention_norm for layer in self.layers[1:]] + [self.norm]  # that follow each layer
        x, h = ops.embed_norm(tokens, self.embedding, self.layers[0].attention_norm, shape.norm_eps)  # [T, H] both
        for layer, window, keys, values, norm in zip(
            self.layers, shape.windows, buffers.keys, buffers.values, norms, strict=True
        ):
            qkv = linear(h, layer.qkv, layer.qkv_bias)  # [T, (q + 2 kv) heads * D]
            h = attention(
                qkv, self.cos, self.sin, positions, slots, table, keys, values, layer.sinks, window
            )  # [T, q heads * D]
            delta = linear_part(h, layer.o, layer.o_bias, peers)  # [T, H]
            x, h, chosen, shares = route(  # the ranks' parts added up first
                x,
                delta,
                layer.mlp_norm,
                shape.norm_eps,
                layer.router,
                layer.router_bias,
                shape.experts_per_token,
                peers,
            )
            parts = experts(h, chosen, shares, layer.gate_up, layer.down, shape.swiglu_limit)  # [T, n, H], likewise
            x, h = add_norm(x, parts, norm, shape.norm_eps, peers)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [R, H] -> this rank's logits [R, V / ranks]. R is small in a prefill step too."""
        return self.ops.linear(hidden, self.lm_head)

    def sample(self, buffers: Buffers, logits: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Draw and emit one token a row. Every option is a value in the state of the row's slot: one graph for all."""
        top = min(MAX_TOP_LOGPROBS, self.architecture.vocab)
        drawn = self.ops.sample(
            logits, slots, positions, buffers.sampling, buffers.output_counts, buffers.in_prompt, top, self.peers
        )
        self.ops.emit(slots, *drawn, buffers.last_token, buffers.output_counts, buffers.outputs)


def pack(ops: ModuleType, layer: LayerWeights) -> Layer:
    return Layer(
        layer.attention_norm,
        ops.pack_linear(layer.qkv_weight),
        layer.qkv_bias,
        layer.sinks,
        ops.pack_linear(layer.o_weight),
        layer.o_bias,
        layer.mlp_norm,
        layer.router_weight,
        layer.router_bias,
        ops.pack_experts(layer.gate_up_blocks, layer.gate_up_scales, layer.gate_up_bias, interleaved=True),
        ops.pack_experts(layer.down_blocks, layer.down_scales, layer.down_bias, interleaved=False),
    )


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
