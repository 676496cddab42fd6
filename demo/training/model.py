"""GPT-OSS in plain torch for training: every expert computed for every token, packed documents, a compact vocabulary.

The vocabulary is the tokens that the demo knows and, last, one row for all others. Knows neither data nor optimisers.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.limits import VOCABULARY
from demo.training import mxfp4
from demo.training.packing import EXPERTS, Weights
from engine.architecture import Architecture

EMBEDDING = "model.embed_tokens.weight"


def initial(a: Architecture, rows: int, seed: int, device: torch.device | str) -> Weights:
    """Random float32 weights for a vocabulary of `rows`."""
    generator = torch.Generator().manual_seed(seed)
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim

    def normal(*size: int, deviation: float) -> Tensor:
        return torch.empty(size).normal_(0.0, deviation, generator=generator).to(device)

    def dense(*size: int, gain: float = 1.0) -> Tensor:
        return normal(*size, deviation=gain / math.sqrt(size[-1]))

    def flat(*size: int, value: float = 0.0) -> Tensor:
        return torch.full(size, value, device=device)

    small = (2 * a.layers) ** -0.5  # for the layers whose output is added to the residual stream
    w = {EMBEDDING: normal(rows, a.hidden, deviation=0.5)}
    for n in range(a.layers):
        layer, attention, mlp = (f"model.layers.{n}.{part}" for part in ("", "self_attn.", "mlp."))
        w |= {
            f"{layer}input_layernorm.weight": flat(a.hidden, value=1.0),
            f"{attention}q_proj.weight": dense(q, a.hidden),
            f"{attention}q_proj.bias": flat(q),
            f"{attention}k_proj.weight": dense(kv, a.hidden),
            f"{attention}k_proj.bias": flat(kv),
            f"{attention}v_proj.weight": dense(kv, a.hidden),
            f"{attention}v_proj.bias": flat(kv),
            f"{attention}sinks": flat(a.heads),
            f"{attention}o_proj.weight": dense(a.hidden, q, gain=small),
            f"{attention}o_proj.bias": flat(a.hidden),
            f"{layer}post_attention_layernorm.weight": flat(a.hidden, value=1.0),
            f"{mlp}router.weight": dense(a.experts, a.hidden),
            f"{mlp}router.bias": flat(a.experts),
            f"{mlp}experts.gate_up_proj": dense(a.experts, 2 * a.intermediate, a.hidden),
            f"{mlp}experts.gate_up_proj_bias": flat(a.experts, 2 * a.intermediate),
            f"{mlp}experts.down_proj": dense(a.experts, a.hidden, a.intermediate, gain=small),
            f"{mlp}experts.down_proj_bias": flat(a.experts, a.hidden),
        }
    w["model.norm.weight"] = flat(a.hidden, value=1.0)
    w["lm_head.weight"] = dense(rows, a.hidden, gain=0.5)
    return w


def computed(w: Weights, dtype: torch.dtype, quantised: bool) -> Weights:
    """The weights as the forward uses them: in `dtype`, the experts rounded to MXFP4 if `quantised`.

    Embeddings stay in float32 and are rounded after the lookup: a frequent token's gradient is a sum of thousands.
    """
    return {
        name: p if name == EMBEDDING else (mxfp4.rounded(p) if quantised and name.endswith(EXPERTS) else p).to(dtype)
        for name, p in w.items()
    }


def embedded(w: Weights, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> x [B, T, H] in the dtype of the forward."""
    return F.embedding(tokens, w[EMBEDDING]).to(w["lm_head.weight"].dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, D]; cos, sin [T, 1, D/2] float32."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def queries_keys_values(
    w: Weights, a: Architecture, name: str, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, H] -> rotated queries, scaled, [B, kv, group * T, D]; rotated keys and values [B, kv, T, D]."""
    batch, length, _ = x.shape
    q, k, v = (
        F.linear(x, w[f"{name}{part}_proj.weight"], w[f"{name}{part}_proj.bias"]).unflatten(-1, (-1, a.head_dim))
        for part in "qkv"
    )
    q = rotate(q, cos, sin) * a.head_dim**-0.5
    q = q.view(batch, length, a.kv_heads, -1, a.head_dim).permute(0, 2, 3, 1, 4)  # [B, kv, group, T, D]
    return q.reshape(batch, a.kv_heads, -1, a.head_dim), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, seen: Tensor) -> Tensor:
    """q [B, kv, group * T, D]; k, v [B, kv, S, D]; sinks [heads]; seen [B or 1, T, S] -> [B, T, heads * D]."""
    batch, kv_heads, _, dim = q.shape
    length = seen.shape[1]
    scores = (q @ k.mT).view(batch, kv_heads, -1, length, k.shape[2]).float()
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    sink = sinks.float().view(1, kv_heads, -1, 1, 1)
    peak = torch.maximum(scores.amax(-1, keepdim=True), sink).detach()
    weights = torch.exp(scores - peak)
    weights = weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - peak))
    out = weights.to(v.dtype).view(batch, kv_heads, -1, k.shape[2]) @ v  # [B, kv, group * T, D]
    return out.view(batch, kv_heads, -1, length, dim).permute(0, 3, 1, 2, 4).reshape(batch, length, -1)


def experts(w: Weights, a: Architecture, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, H] -> the chosen experts' weighted sum [B, T, H], and how uneven the choice of experts is; 1: even.

    All experts are computed; those that were not chosen have the routing weight 0.
    """
    logits = F.linear(x, w[f"{name}router.weight"], w[f"{name}router.bias"]).float()  # [B, T, E]
    top, chosen = logits.topk(a.experts_per_token)
    routing = torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))
    load = (routing > 0).float().mean((0, 1)) * a.experts / a.experts_per_token
    uneven = (load.detach() * logits.softmax(-1).mean((0, 1))).sum()
    name += "experts."
    both = F.linear(x, w[f"{name}gate_up_proj"].flatten(0, 1), w[f"{name}gate_up_proj_bias"].flatten())
    gate, up = both.view(*x.shape[:2], a.experts, a.intermediate, 2).float().unbind(-1)
    gate, up = gate.clamp(max=a.swiglu_limit), up.clamp(-a.swiglu_limit, a.swiglu_limit)
    inner = gate * torch.sigmoid(1.702 * gate) * (up + 1) * routing.unsqueeze(-1)  # [B, T, E, I]
    down = w[f"{name}down_proj"].permute(1, 0, 2).flatten(1)  # [H, E * I]
    out = F.linear(inner.to(x.dtype).flatten(2), down)
    return out + routing.to(x.dtype) @ w[f"{name}down_proj_bias"], uneven


def forward(
    w: Weights, a: Architecture, tokens: Tensor, documents: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """tokens, documents [B, T]; cos, sin [T, D/2] -> logits [B, T, rows] and the layers' mean unevenness.

    A token sees only tokens of its own document.
    """
    at = torch.arange(tokens.shape[1], device=tokens.device)
    distance = at[:, None] - at[None]
    same = (documents[:, :, None] == documents[:, None]) & (distance >= 0)  # [B, T, T]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x, uneven = embedded(w, tokens), torch.zeros((), device=tokens.device)
    for n, window in enumerate(a.windows):
        layer, attention, mlp = (f"model.layers.{n}.{part}" for part in ("", "self_attn.", "mlp."))
        seen = same if window is None else same & (distance < window)
        h = rms_norm(x, w[f"{layer}input_layernorm.weight"], a.norm_eps)
        h = attend(*queries_keys_values(w, a, attention, h, cos, sin), w[f"{attention}sinks"], seen)
        x = x + F.linear(h, w[f"{attention}o_proj.weight"], w[f"{attention}o_proj.bias"])
        h, more = experts(w, a, mlp, rms_norm(x, w[f"{layer}post_attention_layernorm.weight"], a.norm_eps))
        x, uneven = x + h, uneven + more / a.layers
    return F.linear(rms_norm(x, w["model.norm.weight"], a.norm_eps), w["lm_head.weight"]), uneven


def loss(
    w: Weights, a: Architecture, tokens: Tensor, documents: Tensor, learned: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the `learned` tokens (bool [B, T]), and the layers' unevenness.

    The last row stands for all tokens that have no row of their own: its probability counts once for each of them.
    """
    logits, uneven = forward(w, a, tokens, documents, cos, sin)
    rows = logits.shape[-1]
    weight = torch.zeros(rows, device=logits.device)
    weight[-1] = math.log(max(VOCABULARY - rows + 1, 1))
    targets = tokens.roll(-1, 1)
    counted = learned.roll(-1, 1).float()  # no row begins with a learned token: its last position counts nothing
    counted, targets = counted.flatten(), targets.flatten()
    losses = F.cross_entropy((logits.float() + weight).flatten(0, 1), targets, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1), uneven


@torch.inference_mode()
def generate(
    w: Weights, a: Architecture, prompts: list[list[int]], stops: list[int], limit: int, cos: Tensor, sin: Tensor
) -> list[list[int]]:
    """Greedy continuations, each with its stop token; prompt and continuation have at most `limit` tokens together.

    All rows are at the same position in a step: a row still in its prompt takes the next prompt token, another one the
    token that it generated.
    """
    device, dtype, count = cos.device, w["lm_head.weight"].dtype, len(prompts)
    given = torch.full((count, limit), -1, device=device)
    for row, prompt in enumerate(prompts):
        given[row, : len(prompt)] = torch.tensor(prompt, device=device)
    cache = torch.zeros(a.layers, 2, count, a.kv_heads, limit, a.head_dim, device=device, dtype=dtype)
    stop, done = torch.tensor(stops, device=device), torch.zeros(count, dtype=torch.bool, device=device)
    at = torch.arange(limit, device=device)
    for t in range(limit - 1):
        x = embedded(w, given[:, t : t + 1])  # [B, 1, H]
        for n, window in enumerate(a.windows):
            layer, attention, mlp = (f"model.layers.{n}.{part}" for part in ("", "self_attn.", "mlp."))
            first = 0 if window is None else max(0, t + 1 - window)
            h = rms_norm(x, w[f"{layer}input_layernorm.weight"], a.norm_eps)
            q, k, v = queries_keys_values(w, a, attention, h, cos[t : t + 1, None], sin[t : t + 1, None])
            cache[n, 0, :, :, t : t + 1], cache[n, 1, :, :, t : t + 1] = k, v
            keys, values = cache[n, :, :, :, first : t + 1]
            seen = (at[first : t + 1] >= 0)[None, None]
            h = attend(q, keys, values, w[f"{attention}sinks"], seen)
            x = x + F.linear(h, w[f"{attention}o_proj.weight"], w[f"{attention}o_proj.bias"])
            x = x + experts(w, a, mlp, rms_norm(x, w[f"{layer}post_attention_layernorm.weight"], a.norm_eps))[0]
        logits = F.linear(rms_norm(x[:, 0], w["model.norm.weight"], a.norm_eps), w["lm_head.weight"])
        token = torch.where(given[:, t + 1] >= 0, given[:, t + 1], logits.argmax(-1))
        generated = given[:, t + 1] < 0
        given[:, t + 1] = torch.where(done, stop[0], token)
        done |= generated & torch.isin(token, stop)
        if t % 16 == 15 and bool(done.all()):
            break
    out = []
    for row, prompt in zip(given.tolist(), prompts, strict=True):
        answer = row[len(prompt) :]
        end = next((n + 1 for n, token in enumerate(answer) if token in stops or token < 0), len(answer))
        out.append([token for token in answer[:end] if token >= 0])
    return out
