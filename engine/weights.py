"""One rank's weights: their shapes, how each full tensor is cut for a rank, and random ones from a seed.

Knows neither files nor how a kernel wants its weights packed.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.architecture import BLOCK, Architecture, mismatch

DTYPE_BYTES = {"BF16": 2, "F32": 4, "U8": 1}  # the dtypes a GPT-OSS checkpoint uses, in safetensors' words

Read = Callable[[str, tuple[slice, ...]], torch.Tensor]  # (Hugging Face name, index) -> full_tensor[index]


@dataclass
class LayerWeights:
    """One layer of one rank. H hidden, d head_dim, q and kv this rank's heads, E experts, C the compute dtype.

    I is this rank's shard of the intermediate size in whole blocks of 32; where the blocks do not divide, some ranks
    have one more than others. A rank that would have none has one of zeros in weights, scales and biases: gate = up = 0
    gives 0 · sigmoid(0) · (0 + 1) = 0.
    """

    attention_norm: torch.Tensor  # [H] float32
    qkv_weight: torch.Tensor  # [(q + 2 kv) d, H] C, rows of the q heads, then k, then v
    qkv_bias: torch.Tensor  # [(q + 2 kv) d] C
    sinks: torch.Tensor  # [q] float32
    o_weight: torch.Tensor  # [H, q d] C
    o_bias: torch.Tensor  # [H] C, zero on all ranks but the first: the ranks' partial sums are added up
    mlp_norm: torch.Tensor  # [H] float32
    router_weight: torch.Tensor  # [E, H] C
    router_bias: torch.Tensor  # [E] C
    gate_up_blocks: torch.Tensor  # [E, 2 I, H / 32, 16] uint8, even rows gate, odd rows up
    gate_up_scales: torch.Tensor  # [E, 2 I, H / 32] uint8
    gate_up_bias: torch.Tensor  # [E, 2 I] C
    down_blocks: torch.Tensor  # [E, H, I / 32, 16] uint8
    down_scales: torch.Tensor  # [E, H, I / 32] uint8
    down_bias: torch.Tensor  # [E, H] C, zero on all ranks but the first


@dataclass
class ModelWeights:
    """One rank's weights, V the vocabulary."""

    layers: list[LayerWeights]
    embedding: torch.Tensor  # [V, H] C, whole on every rank
    norm: torch.Tensor  # [H] float32
    lm_head: torch.Tensor  # [ceil(V / tp), H] C, rows from rank · ceil(V / tp); rows past the vocabulary are zero

    @property
    def bytes(self) -> int:
        tensors = [self.embedding, self.norm, self.lm_head, *(t for layer in self.layers for t in vars(layer).values())]
        return sum(tensor.nbytes for tensor in tensors)


class TensorSpec(NamedTuple):
    """A full tensor as a checkpoint holds it, and where it is in the original layout."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # allowed, in safetensors' words; the published checkpoints hold the first
    original: str  # name in the original layout
    row: int = 0  # its first row there: q, k and v share one tensor

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtypes[0]]


def tensor_specs(a: Architecture) -> dict[str, TensorSpec]:
    """Every tensor by its Hugging Face name, in the order a forward uses them."""
    q, kv, e, h, i = a.heads * a.head_dim, a.kv_heads * a.head_dim, a.experts, a.hidden, a.intermediate
    dense, norm, packed = ("BF16",), ("BF16", "F32"), ("U8",)
    specs = {"model.embed_tokens.weight": TensorSpec((a.vocab, h), dense, "embedding.weight")}
    for n in range(a.layers):
        layer, attn, mlp = f"model.layers.{n}.", f"block.{n}.attn.", f"block.{n}.mlp."
        attention, experts = f"{layer}self_attn.", f"{layer}mlp.experts."
        specs |= {
            f"{layer}input_layernorm.weight": TensorSpec((h,), norm, f"{attn}norm.scale"),
            f"{attention}q_proj.weight": TensorSpec((q, h), dense, f"{attn}qkv.weight"),
            f"{attention}q_proj.bias": TensorSpec((q,), dense, f"{attn}qkv.bias"),
            f"{attention}k_proj.weight": TensorSpec((kv, h), dense, f"{attn}qkv.weight", q),
            f"{attention}k_proj.bias": TensorSpec((kv,), dense, f"{attn}qkv.bias", q),
            f"{attention}v_proj.weight": TensorSpec((kv, h), dense, f"{attn}qkv.weight", q + kv),
            f"{attention}v_proj.bias": TensorSpec((kv,), dense, f"{attn}qkv.bias", q + kv),
            f"{attention}sinks": TensorSpec((a.heads,), dense, f"{attn}sinks"),
            f"{attention}o_proj.weight": TensorSpec((h, q), dense, f"{attn}out.weight"),
            f"{attention}o_proj.bias": TensorSpec((h,), dense, f"{attn}out.bias"),
            f"{layer}post_attention_layernorm.weight": TensorSpec((h,), norm, f"{mlp}norm.scale"),
            f"{layer}mlp.router.weight": TensorSpec((e, h), dense, f"{mlp}gate.weight"),
            f"{layer}mlp.router.bias": TensorSpec((e,), dense, f"{mlp}gate.bias"),
        }
        for theirs, name, rows, columns in (("gate_up_proj", "mlp1", 2 * i, h), ("down_proj", "mlp2", h, i)):
            scales = (e, rows, columns // BLOCK)
            specs |= {
                f"{experts}{theirs}_blocks": TensorSpec((*scales, BLOCK // 2), packed, f"{mlp}{name}_weight.blocks"),
                f"{experts}{theirs}_scales": TensorSpec(scales, packed, f"{mlp}{name}_weight.scales"),
                f"{experts}{theirs}_bias": TensorSpec((e, rows), dense, f"{mlp}{name}_bias"),
            }
    specs["model.norm.weight"] = TensorSpec((h,), norm, "norm.scale")
    specs["lm_head.weight"] = TensorSpec((a.vocab, h), dense, "unembedding.weight")
    return specs


def expert_blocks(a: Architecture, rank: int, tp: int) -> tuple[int, int]:
    """A rank's blocks of intermediate columns, first and last + 1. Equal where there are fewer blocks than ranks."""
    blocks = a.intermediate // BLOCK
    return rank * blocks // tp, (rank + 1) * blocks // tp


def assemble(
    a: Architecture, rank: int, tp: int, device: torch.device | str, dtype: torch.dtype, read: Read
) -> ModelWeights:
    """Cut one rank's weights out of the full tensors, each of which `read` is asked for once at most.

    `dtype` is that of the matrices and biases. Raises CheckpointError where the heads do not divide among the ranks.
    """
    for field, count in (("num_attention_heads", a.heads), ("num_key_value_heads", a.kv_heads)):
        if count % tp:
            raise mismatch("tp", found=tp, expected=f"a divisor of {field} = {count}")
    specs = tensor_specs(a)
    heads, kv_heads, vocab = a.heads // tp, a.kv_heads // tp, math.ceil(a.vocab / tp)  # of one rank
    first, last = expert_blocks(a, rank, tp)

    def cut(
        name: str, kind: torch.dtype = dtype, dim: int = 0, shard: range | None = None, size: int | None = None
    ) -> torch.Tensor:
        """The entries `shard` of dimension `dim`, or all of them; padded with zeros to `size`."""
        shape = list(specs[name].shape)
        shard = range(shape[dim]) if shard is None else shard
        shape[dim] = size or len(shard)
        out = torch.zeros(shape, dtype=kind, device=device)
        if shard:
            index = (slice(None),) * dim + (slice(shard.start, shard.stop),)
            out.narrow(dim, 0, len(shard)).copy_(read(name, index))
        return out

    def shard(size: int) -> range:
        return range(rank * size, (rank + 1) * size)

    def cut_blocks(name: str, kind: torch.dtype, dim: int, width: int) -> torch.Tensor:
        """This rank's blocks, each of `width` entries of dimension `dim`."""
        return cut(name, kind, dim, range(first * width, last * width), max(last - first, 1) * width)

    def once(name: str) -> torch.Tensor:
        """A bias of a layer whose outputs the ranks add up: on the first rank alone."""
        return cut(name) if rank == 0 else torch.zeros(specs[name].shape, dtype=dtype, device=device)

    def layer(n: int) -> LayerWeights:
        name = f"model.layers.{n}."
        attention, experts = f"{name}self_attn.", f"{name}mlp.experts."
        qkv = {"q_proj": heads * a.head_dim, "k_proj": kv_heads * a.head_dim, "v_proj": kv_heads * a.head_dim}
        return LayerWeights(
            attention_norm=cut(f"{name}input_layernorm.weight", torch.float32),
            qkv_weight=torch.cat([cut(f"{attention}{key}.weight", shard=shard(rows)) for key, rows in qkv.items()]),
            qkv_bias=torch.cat([cut(f"{attention}{key}.bias", shard=shard(rows)) for key, rows in qkv.items()]),
            sinks=cut(f"{attention}sinks", torch.float32, shard=shard(heads)),
            o_weight=cut(f"{attention}o_proj.weight", dim=1, shard=shard(heads * a.head_dim)),
            o_bias=once(f"{attention}o_proj.bias"),
            mlp_norm=cut(f"{name}post_attention_layernorm.weight", torch.float32),
            router_weight=cut(f"{name}mlp.router.weight"),
            router_bias=cut(f"{name}mlp.router.bias"),
            gate_up_blocks=cut_blocks(f"{experts}gate_up_proj_blocks", torch.uint8, 1, 2 * BLOCK),
            gate_up_scales=cut_blocks(f"{experts}gate_up_proj_scales", torch.uint8, 1, 2 * BLOCK),
            gate_up_bias=cut_blocks(f"{experts}gate_up_proj_bias", dtype, 1, 2 * BLOCK),
            down_blocks=cut_blocks(f"{experts}down_proj_blocks", torch.uint8, 2, 1),
            down_scales=cut_blocks(f"{experts}down_proj_scales", torch.uint8, 2, 1),
            down_bias=once(f"{experts}down_proj_bias"),
        )

    rows = range(min(rank * vocab, a.vocab), min((rank + 1) * vocab, a.vocab))
    return ModelWeights(
        embedding=cut("model.embed_tokens.weight"),
        layers=[layer(n) for n in range(a.layers)],
        norm=cut("model.norm.weight", torch.float32),
        lm_head=cut("lm_head.weight", shard=rows, size=vocab),
    )


def random_tensor(name: str, spec: TensorSpec, layers: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """The full tensor `name` of a random model, as a checkpoint would hold it; the same for the same arguments.

    Standard deviations keep activations near 1 at any depth: 1 / sqrt(fan-in), divided by sqrt(layers) for what is
    added to the residual stream. Those of queries and keys are 1.5 times as large: attention then rests on a few keys,
    as in a trained model, and a wrong key changes the tokens.
    """
    shape = spec.shape
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
    gain = 1.0
    if ".o_proj." in name or ".down_proj_" in name:
        gain = layers**-0.5
    elif ".q_proj." in name or ".k_proj." in name:
        gain = 1.5
    if name.endswith("_scales"):
        # Uniform nibbles deviate by sqrt(8.5625); equally likely exponents x-1, x, x+1 add a factor of sqrt(1.75).
        deviation = gain / math.sqrt(shape[-1] * BLOCK)
        middle = 127 + round(math.log2(deviation / math.sqrt(8.5625 * 1.75)))
        return torch.empty(shape, dtype=torch.uint8, device=device).random_(middle - 1, middle + 2, generator=generator)
    if name.endswith("_blocks"):
        # Eight bytes a draw: from the lowest int64 with no upper end, so that all 64 bits are random.
        blocks = torch.empty(shape, dtype=torch.uint8, device=device)
        blocks.view(torch.int64).random_(-(2**63), None, generator=generator)
        return blocks
    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if name.endswith("norm.weight"):
        return values.normal_(1.0, 0.1, generator=generator)
    if name.endswith("bias"):
        return values.normal_(0.0, 0.1 * gain, generator=generator)
    unscaled = name.endswith((".sinks", ".embed_tokens.weight"))
    return values.normal_(0.0, 1.0 if unscaled else gain / math.sqrt(shape[-1]), generator=generator)


def random_weights(
    a: Architecture, rank: int, tp: int, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> ModelWeights:
    """One rank's shard of a random model. Every rank draws each full tensor and keeps its cut: one model for any tp."""
    specs = tensor_specs(a)
    return assemble(
        a, rank, tp, device, dtype, lambda name, index: random_tensor(name, specs[name], a.layers, seed, device)[index]
    )
