"""Checkpoints: a folder of safetensors, or a seed, to the weights of one tensor-parallel rank.

Holds the architecture as config.json states it, the names and shapes of both published layouts, the checks that run
before any tensor is read, and how every tensor is cut for a rank. Does not know what a forward is, nor how a kernel
wants its weights packed.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open

from conf.schema import RandomShape

BLOCK = 32  # values that share one MXFP4 scale
DTYPE_BYTES = {"BF16": 2, "F32": 4, "U8": 1}  # the dtypes a GPT-OSS checkpoint uses, in safetensors' words
EVERY = slice(None)

Read = Callable[[str, tuple[slice, ...]], torch.Tensor]  # (Hugging Face name, index) -> that part of the full tensor

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names file, field or tensor, what was found and expected."""


def _mismatch(*where: Any, found: Any, expected: Any) -> CheckpointError:
    return CheckpointError(f"{': '.join(map(str, where))}: found {found}, expected {expected}")


@dataclass(frozen=True)
class Architecture:
    """What config.json says about the model, in either published layout."""

    layers: int
    hidden: int
    intermediate: int  # of one expert
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    experts_per_token: int
    windows: tuple[int | None, ...]  # by layer: keys a query sees, itself included; None sees all
    norm_eps: float
    swiglu_limit: float
    rope_theta: float
    rope_factor: float  # YaRN: how far the context is stretched
    rope_beta_fast: float
    rope_beta_slow: float
    rope_original_context: int
    rope_truncate: bool

    @property
    def rope_attention_factor(self) -> float:
        """YaRN's factor on cos and sin (arXiv 2309.00071, equation 22)."""
        return 0.1 * math.log(self.rope_factor) + 1.0

    @property
    def max_positions(self) -> int:
        return int(self.rope_factor * self.rope_original_context)

    @classmethod
    def from_random_shape(cls, shape: RandomShape) -> "Architecture":
        config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}, **asdict(shape)}
        return cls.from_config(config, "model.random_shape")

    @classmethod
    def from_config(cls, config: dict[str, Any], file: str = "config.json") -> "Architecture":
        """A parsed config.json of either layout. What GPT-OSS never varies may be absent. `file` is for messages.

        Raises CheckpointError for another architecture, or widths that cannot be served.
        """

        def require(holds: bool, field: str, found: Any, expected: str) -> None:
            if not holds:
                raise _mismatch(file, field, found=repr(found), expected=expected)

        def integer(*names: str) -> int:
            name = next((n for n in names if n in config), names[0])
            value = config.get(name)
            require(type(value) is int and value > 0, name, value, "a positive integer")
            return value

        def number(fields: dict[str, Any], name: str, default: float) -> float:
            value = fields.get(name, default)
            require(type(value) in (int, float) and 0 < value < math.inf, name, value, "a positive number")
            return float(value)

        if hugging_face := _is_hugging_face(config):
            kinds = config.get("architectures") or ["GptOssForCausalLM"]
            quantization = config.get("quantization_config")
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            require(config.get("model_type") == "gpt_oss", "model_type", config.get("model_type"), "'gpt_oss'")
            require("GptOssForCausalLM" in kinds, "architectures", kinds, "['GptOssForCausalLM']")
            require(method == "mxfp4", "quantization_config.quant_method", method, "'mxfp4'")
        else:  # OpenAI's file names no model: its own words for the experts stand in
            require("num_experts" in config, "model_type", None, "'gpt_oss', or num_experts as in the original layout")
        for name, value in (
            ("hidden_act", "silu"),
            ("attention_bias", True),
            ("tie_word_embeddings", False),
            ("swiglu_alpha", 1.702),
        ):
            require(config.get(name, value) == value, name, config.get(name), repr(value))

        layers = integer("num_hidden_layers")
        types = config.get("layer_types")
        if types is None:
            types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        known = ("sliding_attention", "full_attention")
        require(
            isinstance(types, list) and len(types) == layers and all(kind in known for kind in types),
            "layer_types",
            types,
            f"{layers} of {known}",
        )
        window = integer("sliding_window") if "sliding_attention" in types else None

        rope = config.get("rope_scaling") or config.get("rope_parameters")
        require(isinstance(rope, dict | None), "rope_scaling", rope, "an object")
        if rope is None:  # the original layout's flat names; NTK's beta is YaRN's fast bound, its alpha the slow one
            rope = {
                "rope_type": "yarn",
                "factor": config.get("rope_scaling_factor", 32.0),
                "beta_fast": config.get("rope_ntk_beta", 32.0),
                "beta_slow": config.get("rope_ntk_alpha", 1.0),
                "original_max_position_embeddings": config.get("initial_context_length", 4096),
                "truncate": False,
            }
        rope = {name: value for name, value in rope.items() if value is not None}
        kind = rope.get("rope_type", rope.get("type"))
        require(kind == "yarn", "rope_scaling.rope_type", kind, "'yarn'")
        theta = rope if "rope_theta" in rope else config
        made = cls(
            layers=layers,
            hidden=integer("hidden_size"),
            intermediate=integer("intermediate_size"),
            heads=integer("num_attention_heads"),
            kv_heads=integer("num_key_value_heads"),
            head_dim=integer("head_dim"),
            vocab=integer("vocab_size"),
            experts=integer("num_local_experts" if hugging_face else "num_experts"),
            experts_per_token=integer("num_experts_per_tok", "experts_per_token"),
            windows=tuple(window if kind == "sliding_attention" else None for kind in types),
            norm_eps=number(config, "rms_norm_eps", 1e-5),
            swiglu_limit=number(config, "swiglu_limit", 7.0),
            rope_theta=number(theta, "rope_theta", 150000.0),
            rope_factor=number(rope, "factor", 32.0),
            rope_beta_fast=number(rope, "beta_fast", 32.0),
            rope_beta_slow=number(rope, "beta_slow", 1.0),
            rope_original_context=int(number(rope, "original_max_position_embeddings", 4096)),
            rope_truncate=bool(rope.get("truncate", True)),  # YaRN's own default, as transformers reads it
        )
        for name, width in (("hidden_size", made.hidden), ("intermediate_size", made.intermediate)):
            require(width % BLOCK == 0, name, width, f"a multiple of {BLOCK}, the values of an MXFP4 block")
        require(made.head_dim % 2 == 0, "head_dim", made.head_dim, "an even number, RoPE turns pairs")
        require(
            made.heads % made.kv_heads == 0,
            "num_attention_heads",
            made.heads,
            f"a multiple of num_key_value_heads = {made.kv_heads}",
        )
        require(
            made.experts_per_token <= made.experts,
            "num_experts_per_tok",
            made.experts_per_token,
            f"at most the {made.experts} experts",
        )
        require(made.rope_factor >= 1, "rope_scaling.factor", made.rope_factor, "at least 1")
        factor = number(rope, "attention_factor", made.rope_attention_factor)
        require(
            math.isclose(factor, made.rope_attention_factor, rel_tol=1e-6),
            "rope_scaling.attention_factor",
            factor,
            f"0.1 ln(factor) + 1 = {made.rope_attention_factor}",
        )
        return made


@dataclass
class LayerWeights:
    """One layer of one rank. H hidden, d head_dim, q and kv this rank's heads, E experts, C the compute dtype.

    I is this rank's share of the intermediate size in whole blocks of 32; where the blocks do not divide, some ranks
    have one more than others. A rank that would have none has one of zeros in weights, scales and biases: gate = up = 0
    gives 0 · sigmoid(0) · (0 + 1) = 0.
    """

    attention_norm: torch.Tensor  # [H] float32
    qkv_weight: torch.Tensor  # [(q + 2 kv) d, H] C, rows of the q heads, then k, then v
    qkv_bias: torch.Tensor  # [(q + 2 kv) d] C
    sinks: torch.Tensor  # [q] float32
    o_weight: torch.Tensor  # [H, q d] C
    o_bias: torch.Tensor  # [H] C, zero on all ranks but the first: the ranks' outputs are summed
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
    lm_head: torch.Tensor  # [ceil(V / tp), H] C, rows from rank · ceil(V / tp); the last ranks' spare rows are zero


class TensorSpec(NamedTuple):
    """A full tensor as a checkpoint holds it, and where the original layout keeps it."""

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


def stored_names(specs: dict[str, TensorSpec], hugging_face: bool) -> dict[str, tuple[str, int]]:
    """Hugging Face name -> (name in the layout's files, first row there)."""
    return {name: (name, 0) if hugging_face else (spec.original, spec.row) for name, spec in specs.items()}


def expert_blocks(a: Architecture, rank: int, tp: int) -> tuple[int, int]:
    """A rank's blocks of intermediate columns, first and last + 1. Equal where there are fewer blocks than ranks."""
    blocks = a.intermediate // BLOCK
    return rank * blocks // tp, (rank + 1) * blocks // tp


def assemble(
    a: Architecture, rank: int, tp: int, device: torch.device | str, dtype: torch.dtype, read: Read
) -> ModelWeights:
    """Cut one rank's weights out of the full tensors that `read` gives; every tensor is asked for once at most."""
    for field, count in (("num_attention_heads", a.heads), ("num_key_value_heads", a.kv_heads)):
        if count % tp:
            raise _mismatch("tp", found=tp, expected=f"a divisor of {field} = {count}")
    specs = tensor_specs(a)
    heads, kv_heads, vocab = a.heads // tp, a.kv_heads // tp, math.ceil(a.vocab / tp)  # of one rank
    first, last = expert_blocks(a, rank, tp)

    def cut(
        name: str, kind: torch.dtype = dtype, dim: int = 0, part: range | None = None, held: int | None = None
    ) -> torch.Tensor:
        """The entries `part` of dimension `dim`, or all; then zeros if more are to be `held`."""
        shape = list(specs[name].shape)
        part = range(shape[dim]) if part is None else part
        shape[dim] = held or len(part)
        out = torch.zeros(shape, dtype=kind, device=device)
        if part:
            out.narrow(dim, 0, len(part)).copy_(read(name, (EVERY,) * dim + (slice(part.start, part.stop),)))
        return out

    def share(size: int) -> range:
        return range(rank * size, (rank + 1) * size)

    def cut_blocks(name: str, kind: torch.dtype, dim: int, width: int) -> torch.Tensor:
        """This rank's blocks, each of `width` entries of dimension `dim`."""
        return cut(name, kind, dim, range(first * width, last * width), max(last - first, 1) * width)

    def once(name: str) -> torch.Tensor:
        """A bias behind a product whose parts the ranks add up: the first rank's alone."""
        return cut(name) if rank == 0 else torch.zeros(specs[name].shape, dtype=dtype, device=device)

    def layer(n: int) -> LayerWeights:
        name = f"model.layers.{n}."
        attention, experts = f"{name}self_attn.", f"{name}mlp.experts."
        qkv = {"q_proj": heads * a.head_dim, "k_proj": kv_heads * a.head_dim, "v_proj": kv_heads * a.head_dim}
        return LayerWeights(
            attention_norm=cut(f"{name}input_layernorm.weight", torch.float32),
            qkv_weight=torch.cat([cut(f"{attention}{part}.weight", part=share(rows)) for part, rows in qkv.items()]),
            qkv_bias=torch.cat([cut(f"{attention}{part}.bias", part=share(rows)) for part, rows in qkv.items()]),
            sinks=cut(f"{attention}sinks", torch.float32, part=share(heads)),
            o_weight=cut(f"{attention}o_proj.weight", dim=1, part=share(heads * a.head_dim)),
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

    return ModelWeights(
        embedding=cut("model.embed_tokens.weight"),
        layers=[layer(n) for n in range(a.layers)],
        norm=cut("model.norm.weight", torch.float32),
        lm_head=cut("lm_head.weight", part=range(*(min(n * vocab, a.vocab) for n in (rank, rank + 1))), held=vocab),
    )


def random_tensor(name: str, spec: TensorSpec, layers: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """The full tensor `name` of a random model, as a checkpoint would hold it; the same for the same arguments.

    Deviations keep activations near 1 at any depth: 1 / sqrt(fan-in), smaller by sqrt(layers) for what is added to the
    residual stream. Queries and keys are half as large again: attention then rests on few keys, as in a trained model,
    instead of averaging its values away, and a wrong key shows in the tokens.
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
        # Uniform nibbles deviate by sqrt(8.5625); exponents x-1, x, x+1 in equal parts add sqrt(1.75).
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
    """One rank's part of a random model. Every rank draws each full tensor and keeps its cut: one model for any tp."""
    specs = tensor_specs(a)
    return assemble(
        a, rank, tp, device, dtype, lambda name, index: random_tensor(name, specs[name], a.layers, seed, device)[index]
    )


def load(
    path: str | Path, rank: int, tp: int, device: torch.device | str, dtype: torch.dtype, progress: bool = False
) -> tuple[Architecture, ModelWeights]:
    """Read one rank's weights from a checkpoint folder of either layout.

    Names, dtypes, shapes and file sizes are all checked before the first tensor is read. `progress` draws a bar if
    standard error is a terminal. Raises CheckpointError.
    """
    folder = find_folder(Path(path))
    config = _json_object(folder / "config.json")
    a = Architecture.from_config(config, str(folder / "config.json"))
    specs = tensor_specs(a)
    places = stored_names(specs, _is_hugging_face(config))
    files = _check_tensors(folder, specs, places, warn=rank == 0)

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("loading weights"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    with ExitStack() as stack:
        try:
            opened = {file: stack.enter_context(safe_open(file, "pt")) for file in {*files.values()}}
        except SafetensorError as error:
            raise _mismatch(folder, found=error, expected="readable safetensors files") from error
        stack.enter_context(bar)
        task = bar.add_task("", total=sum(spec.bytes for spec in specs.values()))

        def read(name: str, index: tuple[slice, ...]) -> torch.Tensor:
            stored, row = places[name]
            first, stop, _ = index[0].indices(specs[name].shape[0])
            bar.advance(task, specs[name].bytes)  # the whole tensor: the other ranks take the rest of it
            return opened[files[stored]].get_slice(stored)[(slice(row + first, row + stop), *index[1:])]

        return a, assemble(a, rank, tp, device, dtype, read)


def find_folder(path: Path) -> Path:
    """`path` itself or its `original/`, whichever holds config.json and safetensors files."""
    if not path.is_dir():
        raise _mismatch(path, found="a file" if path.exists() else "nothing", expected="a checkpoint folder")
    for folder in (path, path / "original"):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder"
    raise _mismatch(path, found=found, expected="config.json and *.safetensors, here or in original/")


def _is_hugging_face(config: dict[str, Any]) -> bool:
    return "model_type" in config or "architectures" in config


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _mismatch(file, found=error, expected="JSON") from error
    if not isinstance(value, dict):
        raise _mismatch(file, found=type(value).__name__, expected="a JSON object")
    return value


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A safetensors file's tensors, name -> (dtype, shape), after checking that all their bytes are there.

    The format: eight bytes little-endian header length, a JSON header, the data its offsets count into.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if not 8 < start <= size:
            raise _mismatch(
                file,
                found=f"{size} bytes (truncated, or not a safetensors file)",
                expected=f"a header that ends at byte {start}",
            )
        raw = stream.read(start - 8)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: (str(t["dtype"]), tuple(map(int, t["shape"]))) for name, t in entries.items()}
        spans = {name: tuple(map(int, t["data_offsets"])) for name, t in entries.items()}
        spans = {name: (start + first, start + end) for name, (first, end) in spans.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _mismatch(file, found=repr(error), expected="a safetensors header") from error
    for name, (first, end) in sorted(spans.items(), key=lambda entry: entry[1]):
        dtype, shape = tensors[name]
        if end > size:
            raise _mismatch(file, name, found=f"{size} bytes in the file (truncated)", expected=f"{end} at its end")
        expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
        if dtype in DTYPE_BYTES and end - first != expected:
            raise _mismatch(file, name, found=f"{end - first} bytes", expected=f"{expected} for {dtype} {list(shape)}")
    if (end := max((end for _, end in spans.values()), default=start)) != size:
        raise _mismatch(file, found=f"{size} bytes", expected=f"{end} by its header")
    return tensors


def _check_tensors(
    folder: Path, specs: dict[str, TensorSpec], places: dict[str, tuple[str, int]], warn: bool
) -> dict[str, Path]:
    """Stored name -> file, after checking that the folder holds every tensor in its dtype and shape."""
    files: dict[str, Path] = {}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _header(file).items():
            if name in files:
                raise _mismatch(file, name, found=f"it in {files[name].name} too", expected="each tensor once")
            files[name], found[name] = file, tensor

    # In the order of `specs` v comes after q and k, so its end is the number of rows of the tensor they share.
    expected = {
        stored: ((row + specs[name].shape[0], *specs[name].shape[1:]), specs[name].dtypes)
        for name, (stored, row) in places.items()
    }
    for name, (shape, dtypes) in expected.items():
        wanted = f"{' or '.join(dtypes)} {list(shape)}"
        if name not in files:
            index = next(folder.glob("*.safetensors.index.json"), None)
            file = _json_object(index).get("weight_map", {}).get(name) if index else None
            where = f" in {file}, as {index.name} says" if file else ""
            raise _mismatch(folder, name, found="no such tensor", expected=f"{wanted}{where}")
        dtype, have = found[name]
        if dtype not in dtypes or have != shape:
            raise _mismatch(files[name], name, found=f"{dtype} {list(have)}", expected=wanted)
    if warn and (extra := sorted(found.keys() - expected.keys())):
        log.warning("%s: ignoring %d tensors GPT-OSS does not have, the first is %s", folder, len(extra), extra[0])
    return {name: files[name] for name in expected}
