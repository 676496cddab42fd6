"""The GPT-OSS forward, one visible layer loop over weights, buffers and operations, and the step around it.

Knows tensors of static shapes; no requests, no graphs. `kernels` is the set of operations that was chosen at start.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from conf.limits import MAX_TOP_LOGPROBS
from engine.architecture import Architecture
from engine.weights import LayerWeights, ModelWeights
from graphs.buckets import Bucket
from graphs.buffers import Buffers, DecodeInputs, PrefillInputs
from kernels.ops import (
    AttentionParameters,
    Chunks,
    KernelSet,
    KvPages,
    Norm,
    PackedExperts,
    PackedLinear,
    Peers,
    Rope,
    Router,
    Routing,
    TokenCounts,
    TokenMasks,
    TokenPlaces,
)

SCORED_AT_ONCE = 256  # tokens: their logits are all that is held, 103 MB of a vocabulary of 201,088 in bfloat16


class Layer(NamedTuple):
    """One layer of one rank, in the form in which the operations take it."""

    attention_norm: Norm
    qkv: PackedLinear
    attention: AttentionParameters
    o: PackedLinear
    mlp_norm: Norm
    router: Router
    gate_up: PackedExperts
    down: PackedExperts


class Model:
    def __init__(
        self, architecture: Architecture, weights: ModelWeights, kernels: KernelSet, peers: Peers, max_context: int
    ) -> None:
        """Takes `weights` over: its layers are packed one by one, and what was packed is let go.

        peers: what `kernels.join` returned.
        """
        self.architecture = architecture
        self.kernels = kernels
        self.peers = peers
        self.rope = rope_tables(architecture, max_context, weights.embedding.device)
        self.embedding = weights.embedding
        self.norm = Norm(weights.norm, architecture.norm_eps)
        self.layers = [pack(kernels, architecture, window, weights.layers.pop(0)) for window in architecture.windows]
        self.lm_head = kernels.pack_linear(weights.lm_head)

    def step(self, bucket: Bucket, buffers: Buffers) -> Callable[[], None]:
        """The work of one step of a bucket, from packed inputs to packed outputs: what a graph captures."""
        inputs = buffers.inputs[bucket]
        if isinstance(inputs, DecodeInputs):
            return lambda: self._decode(buffers, inputs)
        return lambda: self._prefill(buffers, inputs, bucket.kind == "score")

    def _decode(self, buffers: Buffers, inputs: DecodeInputs[Tensor]) -> None:
        places = TokenPlaces(inputs.positions, inputs.slots)
        tokens, next_positions = self.advance(buffers, places, inputs.new_pages)  # [rows] both
        hidden = self.forward("decode", buffers, tokens, places)  # [rows, H]
        masks = TokenMasks(inputs.mask_rows, inputs.masks)
        self.sample(buffers, self.logits(hidden), TokenPlaces(next_positions, inputs.slots), masks)

    def _prefill(self, buffers: Buffers, inputs: PrefillInputs[Tensor], scores: bool) -> None:
        places = TokenPlaces(inputs.positions, inputs.slots)
        next_positions = self.install(buffers, inputs, places)  # [sequences]
        hidden = self.forward("prefill", buffers, inputs.tokens, places)  # [tokens, H]
        if scores:
            self.score(buffers, hidden, inputs.targets)
        logits = self.logits(hidden.index_select(0, inputs.last))  # [sequences, V / ranks]
        masks = TokenMasks(inputs.mask_rows, inputs.masks)
        self.sample(buffers, logits, TokenPlaces(next_positions, inputs.sample_slots), masks)

    def install(self, buffers: Buffers, inputs: PrefillInputs[Tensor], places: TokenPlaces) -> Tensor:
        """Notes a prefill step's chunks in their slots -> the positions [sequences] of the tokens it draws."""
        chunks = Chunks(inputs.sequence_slots, inputs.starts, inputs.last, inputs.page_table, inputs.sampling)
        counts = TokenCounts(buffers.output_counts, buffers.in_prompt)
        return self.kernels.install(chunks, inputs.tokens, places, buffers.page_table, buffers.sampling, counts)

    def advance(self, buffers: Buffers, places: TokenPlaces, new_pages: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [T] that a decode step computes at `places`, and the positions [T] of those it draws."""
        pages = KvPages(buffers.keys[0], buffers.values[0], buffers.page_table)
        return self.kernels.advance(places, new_pages, pages, buffers.last_token)

    def forward(
        self,
        kind: Literal["decode", "prefill"],
        buffers: Buffers,
        tokens: Tensor,
        places: TokenPlaces,
        on_routing: Callable[[Routing], None] | None = None,
    ) -> Tensor:
        """tokens [T] int32 -> normed hidden states [T, H]; appends keys and values to the pages.

        `on_routing` is given each layer's choice of experts, in order.
        """
        ops = self.kernels.decode if kind == "decode" else self.kernels.prefill
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.norm]
        x, h = ops.embed_norm(tokens, self.embedding, self.layers[0].attention_norm)  # [T, H] both
        for layer, next_norm, keys, values in zip(self.layers, next_norms, buffers.keys, buffers.values, strict=True):
            pages = KvPages(keys, values, buffers.page_table)
            qkv = ops.linear(h, layer.qkv)  # [T, (q heads + 2 kv heads) * D]
            h = ops.attention(qkv, places, self.rope, pages, layer.attention)  # [T, q heads * D]
            delta = ops.linear_partial(h, layer.o, self.peers)  # [T, H]
            x, h, routing = ops.add_norm_route(x, delta, layer.mlp_norm, layer.router, self.peers)
            if on_routing:
                on_routing(routing)
            outputs = ops.experts(h, routing, layer.gate_up, layer.down, self.architecture.swiglu_limit)  # [T, n, H]
            x, h = ops.add_norm(x, outputs, next_norm, self.peers)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [R, H] -> this rank's logits [R, V / ranks]. R is small in a prefill step too."""
        return self.kernels.decode.linear(hidden, self.lm_head)

    def score(self, buffers: Buffers, hidden: Tensor, targets: Tensor) -> None:
        """Normed hidden states [T, H] of a prefill, targets [T] int32 -> the targets' log probabilities, in buffers."""
        top = min(MAX_TOP_LOGPROBS, self.architecture.vocab)
        for first in range(0, len(hidden), SCORED_AT_ONCE):
            rows = slice(first, first + SCORED_AT_ONCE)
            logits = self.kernels.prefill.linear(hidden[rows], self.lm_head)  # [rows, V / ranks]
            scored = self.kernels.score(logits, targets[rows], first, self.architecture.vocab, top, self.peers)
            buffers.put_scores(first, scored)

    def sample(self, buffers: Buffers, logits: Tensor, places: TokenPlaces, masks: TokenMasks) -> None:
        """Draw and emit one token a row. Every option is a value in the state of the row's slot: one graph for all."""
        top = min(MAX_TOP_LOGPROBS, self.architecture.vocab)
        counts = TokenCounts(buffers.output_counts, buffers.in_prompt)
        sampled = self.kernels.sample(logits, places, buffers.sampling, counts, masks, top, self.peers)
        self.kernels.emit(sampled, places.slots, buffers.last_token, counts, buffers.outputs)


def pack(kernels: KernelSet, architecture: Architecture, window: int | None, layer: LayerWeights) -> Layer:
    """`layer` as `kernels` takes it; `window` is the layer's own."""
    eps = architecture.norm_eps
    return Layer(
        attention_norm=Norm(layer.attention_norm, eps),
        qkv=kernels.pack_linear(layer.qkv_weight, layer.qkv_bias),
        attention=AttentionParameters(layer.sinks, window),
        o=kernels.pack_linear(layer.o_weight, layer.o_bias),
        mlp_norm=Norm(layer.mlp_norm, eps),
        router=Router(layer.router_weight, layer.router_bias, architecture.experts_per_token),
        gate_up=kernels.pack_experts(layer.gate_up_blocks, layer.gate_up_scales, layer.gate_up_bias, interleaved=True),
        down=kernels.pack_experts(layer.down_blocks, layer.down_scales, layer.down_bias, interleaved=False),
    )


def rope_tables(shape: Architecture, positions: int, device: torch.device) -> Rope:
    """The tables of YaRN (Peng et al. 2023, "NTK-by-parts") for this many positions.

    Dimensions that turn fewer than beta_slow times over the original context are interpolated by `factor`, those that
    turn more than beta_fast times stay as they are, and a ramp lies between.
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
    return Rope(angles.cos() * shape.rope_attention_factor, angles.sin() * shape.rope_attention_factor)
