"""What config.json says about the model, in either published layout, checked field by field.

Knows no tensors and no files.
"""

import math
import reprlib
import sys
from dataclasses import asdict, dataclass
from typing import Any

from conf.schema import RandomShape

BLOCK = 32  # values that share one MXFP4 scale
MOST = 2**24  # of any width or number in config.json
MOST_LAYERS = 1024


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names file, field or tensor, what was found and expected."""


def mismatch(*where: Any, found: Any, expected: Any) -> CheckpointError:
    """The error to raise where a file, field or tensor is not as it must be."""
    return CheckpointError(f"{': '.join(map(str, where))}: found {found}, expected {expected}")


def shortened(value: Any) -> str:
    """A value as an error shows it."""
    text = reprlib.repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


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
        """The longest context that the rotary embedding is made for."""
        return int(self.rope_factor * self.rope_original_context)

    @classmethod
    def from_random_shape(cls, shape: RandomShape) -> "Architecture":
        """The architecture of random weights. Raises CheckpointError, as from_config does."""
        config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}, **asdict(shape)}
        return cls.from_config(config, "model.random_shape")

    @classmethod
    def from_config(cls, config: dict[str, Any], file: str = "config.json") -> "Architecture":
        """A parsed config.json of either layout. Fields that are the same in all GPT-OSS models may be absent.

        `file` stands in messages only.

        Raises CheckpointError for another architecture, or widths that cannot be served.
        """

        def require(holds: bool, field: str, found: Any, expected: str) -> None:
            if not holds:
                raise mismatch(file, field, found=shortened(found), expected=expected)

        def integer(*names: str) -> int:
            name = next((n for n in names if n in config), names[0])
            value = config.get(name)
            if type(value) is not int or not 0 < value <= MOST:
                raise mismatch(file, name, found=shortened(value), expected=f"a positive integer, at most {MOST}")
            return value

        def number(fields: dict[str, Any], name: str, default: float) -> float:
            value = fields.get(name, default)
            require(type(value) in (int, float) and 0 < value <= sys.float_info.max, name, value, "a positive number")
            return float(value)

        if hugging_face := is_hugging_face(config):
            names = config.get("architectures") or ["GptOssForCausalLM"]
            quantization = config.get("quantization_config")
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            require(config.get("model_type") == "gpt_oss", "model_type", config.get("model_type"), "'gpt_oss'")
            require(
                isinstance(names, list) and "GptOssForCausalLM" in names,
                "architectures",
                names,
                "['GptOssForCausalLM']",
            )
            require(method == "mxfp4", "quantization_config.quant_method", method, "'mxfp4'")
        else:  # OpenAI's file does not name the model: it is known by its own word for the experts
            require("num_experts" in config, "model_type", None, "'gpt_oss', or num_experts as in the original layout")
        constants = {"hidden_act": "silu", "attention_bias": True, "tie_word_embeddings": False, "swiglu_alpha": 1.702}
        for name, value in constants.items():
            require(config.get(name, value) == value, name, config.get(name), repr(value))

        layers = integer("num_hidden_layers")
        require(layers <= MOST_LAYERS, "num_hidden_layers", layers, f"at most {MOST_LAYERS}")
        types = config.get("layer_types")
        if types is None:
            types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        known = ("sliding_attention", "full_attention")
        understood = isinstance(types, list) and len(types) == layers and all(kind in known for kind in types)
        require(understood, "layer_types", types, f"{layers} of {known}")
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
        a = cls(
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
            rope_theta=number(rope if "rope_theta" in rope else config, "rope_theta", 150000.0),
            rope_factor=number(rope, "factor", 32.0),
            rope_beta_fast=number(rope, "beta_fast", 32.0),
            rope_beta_slow=number(rope, "beta_slow", 1.0),
            rope_original_context=int(number(rope, "original_max_position_embeddings", 4096)),
            rope_truncate=bool(rope.get("truncate", True)),  # YaRN's own default, as transformers reads it
        )
        for name, width in (("hidden_size", a.hidden), ("intermediate_size", a.intermediate)):
            require(width % BLOCK == 0, name, width, f"a multiple of {BLOCK}, the values of an MXFP4 block")
        require(a.head_dim % 2 == 0, "head_dim", a.head_dim, "an even number: RoPE rotates pairs")
        whole = f"a multiple of num_key_value_heads = {a.kv_heads}"
        require(a.heads % a.kv_heads == 0, "num_attention_heads", a.heads, whole)
        enough = a.experts_per_token <= a.experts
        require(enough, "num_experts_per_tok", a.experts_per_token, f"at most the {a.experts} experts")
        require(a.rope_factor >= 1, "rope_scaling.factor", a.rope_factor, "at least 1")
        expected = a.rope_attention_factor
        factor = number(rope, "attention_factor", expected)
        close = math.isclose(factor, expected, rel_tol=1e-6)
        require(close, "rope_scaling.attention_factor", factor, f"0.1 ln(factor) + 1 = {expected}")
        return a


def is_hugging_face(config: dict[str, Any]) -> bool:
    """Whether a parsed config.json is of Hugging Face's layout; else it is of OpenAI's original one."""
    return "model_type" in config or "architectures" in config
