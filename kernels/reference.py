"""Every operation of the forward in plain torch: the oracle of the tests, and what runs on a CPU.

Static shapes, no branch on a tensor's value and no host synchronisation, so that a step built from these can be
captured in a CUDA graph. Implements `kernels.ops.KernelSet`, with one implementation for both kinds of step; below it
stand the plain functions that it is made of. Shapes are written as in kernels.ops.

A token's bytes do not depend on its neighbours: every matrix product runs in tiles of TILE tokens, so the library
sees one shape whatever the batch, and attention reads keys in blocks that begin at fixed positions.
"""

import math
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import ops
from kernels.ops import (
    AttentionParameters,
    Chunks,
    KvPages,
    Norm,
    PackedExperts,
    PackedLinear,
    Peers,
    Ranks,
    Rope,
    Router,
    Routing,
    Sampled,
    SamplingState,
    Scored,
    TokenCounts,
    TokenMasks,
    TokenPlaces,
    UnsupportedError,
)

TILE = 8  # tokens a matrix product takes at once
KEY_BLOCK_PAGES = 8  # pages of keys attention reads at once
ATTENTION_TOKENS = 16  # queries attention holds keys for at once: bounds its scratch memory

Mxfp4 = tuple[Tensor, Tensor, Tensor]  # blocks, scales and bias of one projection of all experts, as in a checkpoint


# The contract ---------------------------------------------------------------------------------------------------------


class Operations:
    """`kernels.ops.Operations`, which says what arguments and results are."""

    def embed_norm(self, tokens: Tensor, table: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        x = F.embedding(tokens, table)
        return x, rms_norm(x, norm.weight, norm.eps)

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        return linear(x, weight.tiles, weight.bias)

    def linear_partial(self, x: Tensor, weight: PackedLinear, peers: Peers) -> Tensor:
        return linear(x, weight.tiles, weight.bias)

    def attention(
        self, qkv: Tensor, tokens: TokenPlaces, rope: Rope, pages: KvPages, parameters: AttentionParameters
    ) -> Tensor:
        keys, values, table = pages
        q = rope_append(qkv, rope.cos, rope.sin, tokens.positions, tokens.slots, table, keys, values)
        return attention(q, keys, values, table, tokens.slots, tokens.positions, parameters.sinks, parameters.window)

    def add_norm_route(
        self, x: Tensor, delta: Tensor, norm: Norm, router: Router, peers: Peers
    ) -> tuple[Tensor, Tensor, Routing]:
        x, h = self.add_norm(x, delta.unsqueeze(1), norm, peers)
        return x, h, route(h, router.weight, router.bias, router.top_k)

    def experts(self, h: Tensor, routing: Routing, gate_up: PackedExperts, down: PackedExperts, limit: float) -> Tensor:
        first, second = (gate_up.values, gate_up.scales, gate_up.bias), (down.values, down.scales, down.bias)
        return experts(h, routing.expert_ids, routing.weights, first, second, limit)

    def add_norm(self, x: Tensor, expert_outputs: Tensor, norm: Norm, peers: Peers) -> tuple[Tensor, Tensor]:
        delta = expert_outputs.float().sum(1)
        if peers.size > 1:  # rounded before they are added up over the ranks: that halves what crosses
            delta = peers.ranks.all_reduce(delta.to(x.dtype)).float()
        x = (x.float() + delta).to(x.dtype)
        return x, rms_norm(x, norm.weight, norm.eps)


name: str = "reference"
decode: ops.Operations = Operations()
prefill: ops.Operations = decode


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """The weight as it is."""
    rows, columns = weight.shape
    return PackedLinear(weight, bias, rows, columns)


def pack_experts(blocks: Tensor, scales: Tensor, bias: Tensor, interleaved: bool) -> PackedExperts:
    """The weights as they are."""
    return PackedExperts(blocks, scales, bias, scales.shape[1], scales.shape[2] * 32, interleaved)


def join(
    ranks: Ranks, decode_rows: int, prefill_tokens: int, sequences: int, scored: int, hidden: int, device: torch.device
) -> Peers:
    """The ranks as they are: CPUs exchange through their collectives. Raises UnsupportedError for several GPUs."""
    if ranks.size > 1 and device.type == "cuda":
        raise UnsupportedError("ranks", ranks.size, "1 with reference kernels on a GPU, which cannot exchange")
    return Peers(ranks)


def install(
    chunks: Chunks,
    tokens: Tensor,
    places: TokenPlaces,
    table: Tensor,
    state: SamplingState[Tensor],
    counts: TokenCounts,
) -> Tensor:
    """See `kernels.ops.KernelSet.install`."""
    table[chunks.slots] = chunks.page_table
    for field in fields(state):
        getattr(state, field.name)[chunks.slots] = getattr(chunks.sampling, field.name)
    repetition = state.repetition_penalty
    penalized = (repetition > 0) & (repetition != 1)  # the padding slot's is 0
    penalized |= (state.frequency_penalty != 0) | (state.presence_penalty != 0)  # [slots]
    forgotten = (penalized[chunks.slots] & (chunks.starts == 0)).unsqueeze(1)
    for count in counts:
        count[chunks.slots] = count[chunks.slots].masked_fill(forgotten, 0)
    counted, prompt = penalized[places.slots], places.positions < state.prompt_tokens[places.slots]  # [T]
    at = places.slots.long() * counts.output.shape[1] + tokens
    counts.in_prompt.view(-1).scatter_reduce_(0, at, (counted & prompt).byte(), "amax")
    counts.output.view(-1).scatter_add_(0, at, (counted & ~prompt).int())
    return places.positions[chunks.last] + 1


def advance(tokens: TokenPlaces, new_pages: Tensor, pages: KvPages, last_token: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.KernelSet.advance`."""
    positions, slots = tokens
    entries = positions // pages.keys.shape[2]
    pages.table[slots, entries] = torch.where(new_pages < 0, pages.table[slots, entries], new_pages)
    return last_token[slots], positions + 1


def sample(
    logits: Tensor,
    tokens: TokenPlaces,
    state: SamplingState[Tensor],
    counts: TokenCounts,
    masks: TokenMasks,
    top: int,
    peers: Peers,
) -> Sampled:
    """See `kernels.ops.KernelSet.sample`."""
    positions, slots = tokens
    raw = peers.ranks.all_gather(logits)[:, : counts.output.shape[1]].float()
    adjusted = penalize(
        raw.masked_fill(~allowed(masks, raw.shape[1]), -math.inf),
        counts.output[slots],
        counts.in_prompt[slots],
        state.repetition_penalty[slots],
        state.frequency_penalty[slots],
        state.presence_penalty[slots],
    )
    adjusted = add_bias(adjusted, state.bias_ids[slots], state.bias_values[slots], state.bias_until[slots], positions)
    drawn = draw(
        adjusted,
        state.temperature[slots],
        state.top_k[slots],
        state.top_p[slots],
        state.min_p[slots],
        state.seed[slots],
        positions,
    )
    logprobs, top_ids, top_values = top_logprobs(raw, drawn, top)
    wanted = state.logprobs[slots]
    without_top = (wanted <= 1).unsqueeze(1)
    return Sampled(
        drawn,
        logprobs.masked_fill(wanted <= 0, 0.0),
        top_ids.masked_fill(without_top, 0),
        top_values.masked_fill(without_top, 0.0),
    )


def score(logits: Tensor, targets: Tensor, first_row: int, vocab: int, top: int, peers: Peers) -> Scored:
    """See `kernels.ops.KernelSet.score`."""
    whole = peers.ranks.all_gather(logits)[:, :vocab]
    given = targets.clamp(min=0).long()
    rows = [_score_row(row.float(), target, top) for row, target in zip(whole, torch.split(given, 1), strict=True)]
    return Scored(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _score_row(logits: Tensor, target: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [V] float32, target [1] -> the fields of `Scored` for one row."""
    count = len(logits)
    keys = _order(logits + 0.0) * count - torch.arange(count, device=logits.device)  # no two are equal; -0 counts as 0
    best = keys.topk(top).indices
    values = logits - logits.logsumexp(0)
    rank = (keys > keys[target]).sum() + 1
    return rank.int(), values[target].squeeze(0), best.int(), values[best]


def emit(sampled: Sampled, slots: Tensor, last_token: Tensor, counts: TokenCounts, outputs: Tensor) -> None:
    """See `kernels.ops.KernelSet.emit`."""
    last_token[slots] = sampled.tokens
    flat = slots.long() * counts.output.shape[1] + sampled.tokens
    counts.output.view(-1).scatter_add_(0, flat, torch.ones_like(sampled.tokens))  # padding rows share a slot
    rows, top = sampled.top_ids.shape
    values = outputs.shape[1] // 2 + 1  # the column where log probabilities of the top begin
    outputs[:rows, 0] = sampled.tokens
    outputs[:rows, 1] = sampled.logprobs.view(torch.int32)
    outputs[:rows, 2 : 2 + top] = sampled.top_ids
    outputs[:rows, values : values + top] = sampled.top_logprobs.view(torch.int32)


# Norm and dense layers ------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H], weight [H] float32 -> x / rms(x) * weight, in x's dtype; float32 inside."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N], one product for each TILE tokens."""
    count = x.shape[0]
    x = F.pad(x, (0, 0, 0, -count % TILE))
    return torch.cat([F.linear(tile, weight, bias) for tile in torch.split(x, TILE)])[:count]


# Attention ------------------------------------------------------------------------------------------------------------


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Rotate queries and keys, store keys and values at their positions, return the queries.

    qkv [T, (heads + 2 kv_heads) * D], query rows first; cos, sin [positions, D/2] float32; positions, slots [T] int32;
    page_table [slots, P] int32; keys, values [pages, kv_heads, page, D], written in place. -> [T, heads, D].
    """
    _, kv_heads, page, dim = keys.shape
    q, k, v = qkv.view(len(qkv), -1, dim).tensor_split((-2 * kv_heads, -kv_heads), dim=1)  # each [T, heads, D]
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [T, 1, D/2]

    def rotate(x: Tensor) -> Tensor:
        low, high = x.float().chunk(2, dim=-1)  # split halves, not interleaved
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)

    pages = page_table[slots, positions // page]
    keys[pages, :, positions % page] = rotate(k)
    values[pages, :, positions % page] = v
    return rotate(q)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor,
    window: int | None,
) -> Tensor:
    """Causal attention of each token over its own request's pages, prefill and decode alike.

    q [T, heads, D]; keys, values [pages, kv_heads, page, D]; page_table [slots, P]; slots, positions [T] int32; sinks
    [heads] float32: one logit more in the softmax's denominator, with no value; window: keys a token sees, itself
    included, or None for all. -> [T, heads * D] in q's dtype. Table entries and keys past a token's position may hold
    anything, NaN and absurd indices included.
    """
    few = zip(*(torch.split(x, ATTENTION_TOKENS) for x in (q, slots, positions)), strict=True)
    return torch.cat(
        [_attend(queries, keys, values, page_table[rows], at.unsqueeze(1), sinks, window) for queries, rows, at in few]
    )


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, positions: Tensor, sinks: Tensor, window: int | None
) -> Tensor:
    """`attention` for a few tokens: table [T, P] their page table rows, positions [T, 1]."""
    count, heads, dim = q.shape
    _, kv_heads, page, _ = keys.shape
    queries = (q.float() / math.sqrt(dim)).view(count * kv_heads, heads // kv_heads, dim)
    if window is None:
        first_page, pages = torch.zeros_like(positions), table.shape[1]
    else:
        pages = (window + page - 2) // page + 1  # a window of keys ends anywhere in its last page
        first_page = (positions // page - pages + 1).clamp(min=0)
    peak = sinks.view(1, kv_heads, -1, 1).expand(count, -1, -1, 1).reshape(count * kv_heads, -1, 1)
    total = torch.ones_like(peak)  # the sink's own term: exp(sink - peak)
    out = torch.zeros_like(queries)
    for start in range(0, pages, KEY_BLOCK_PAGES):
        entries = first_page + torch.arange(start, min(start + KEY_BLOCK_PAGES, pages), device=q.device)  # [T, b]
        used = (entries * page <= positions) & (entries < table.shape[1])
        block = torch.where(used, table.gather(1, torch.where(used, entries, 0)), 0)
        at = (entries.unsqueeze(-1) * page + torch.arange(page, device=q.device)).flatten(1)  # [T, b * page]
        seen = (at <= positions) if window is None else (at <= positions) & (at > positions - window)
        hidden = ~seen.view(count, 1, -1, 1)

        def of_block(cache: Tensor, block: Tensor = block) -> Tensor:
            return cache[block].float().transpose(1, 2).flatten(2, 3)  # [T, kv_heads, b * page, D]

        scores = queries @ of_block(keys).flatten(0, 1).mT  # [T * kv_heads, heads a group, b * page]
        scores = scores.view(count, kv_heads, -1, at.shape[1]).masked_fill(hidden.mT, -math.inf).view_as(scores)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_peak)
        shrink = torch.exp(peak - new_peak)
        total = total * shrink + weights.sum(-1, keepdim=True)
        visible = of_block(values).masked_fill_(hidden, 0.0).flatten(0, 1)  # unused places may hold NaN
        out = out * shrink + weights @ visible
        peak = new_peak
    return (out / total).view(count, heads * dim).to(q.dtype)


# Experts --------------------------------------------------------------------------------------------------------------


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> Routing:
    """x [T, H], weight [E, H], bias [E] -> the top_k experts of each token and their routing weights.

    The softmax runs over the chosen logits only. Of equal logits the lower expert id goes first.
    """
    logits, expert_ids = linear(x, weight, bias).float().sort(dim=-1, descending=True, stable=True)
    return Routing(expert_ids[:, :top_k], logits[:, :top_k].softmax(-1))


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 -> dtype, exact: blocks [..., K/32, 16] uint8, low nibble first; scales [..., K/32] uint8, 2^(byte - 127).

    -> [..., K].
    """
    values = _fp4_values(blocks.device).to(dtype)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # both values of each byte [256, 2]
    whole = pairs.view(torch.int32 if dtype.itemsize == 2 else torch.int64).squeeze(-1)  # one lookup for a pair
    powers = torch.ldexp(torch.ones(256, device=blocks.device), torch.arange(-127, 129, device=blocks.device)).to(dtype)
    looked_up = whole.index_select(0, blocks.flatten().int()).view(dtype).view(*scales.shape, 32)
    return (looked_up * powers[scales.int()].unsqueeze(-1)).flatten(-2)


def _fp4_values(device: torch.device) -> Tensor:
    """The 16 values of E2M1 (OCP Microscaling Formats 1.0, table 5), made on the device: a capture cannot copy them."""
    code = torch.arange(16, device=device)
    exponent, mantissa = code >> 1 & 3, (code & 1) * 0.5
    magnitude = torch.where(exponent > 0, torch.ldexp(1 + mantissa, exponent - 1), mantissa)
    return torch.where(code < 8, magnitude, -magnitude)


def experts(
    x: Tensor, expert_ids: Tensor, routing_weights: Tensor, gate_up: Mxfp4, down: Mxfp4, limit: float
) -> Tensor:
    """Each token through its chosen experts, weighted and summed in the order of its choice.

    x [T, H]; expert_ids, routing_weights [T, K]; gate_up [E, 2I, H] with gate and up rows interleaved; down [E, H, I].
    -> [T, 1, H].

    The (token, choice) pairs are sorted by expert and cut into groups of one expert, in a number and of a size that
    depend on the shapes only; each group dequantises its own expert.
    """
    count, top_k = expert_ids.shape
    pairs, total = count * top_k, gate_up[0].shape[0]
    size = TILE * max(1, pairs // total // TILE)  # pairs in a group: about an expert's average, in whole tiles
    device = x.device
    order = expert_ids.flatten().argsort(stable=True)
    load = torch.zeros(total, dtype=torch.int64, device=device)
    load = load.scatter_add(0, expert_ids.flatten(), torch.ones_like(order))  # pairs by expert
    pairs_end = load.cumsum(0)
    groups_by_expert = (load + size - 1) // size
    groups_end = groups_by_expert.cumsum(0)
    groups = torch.arange(min(pairs, pairs // size + total), device=device)
    owner = torch.searchsorted(groups_end, groups, right=True).clamp(max=total - 1)  # expert of each group
    in_expert = groups - (groups_end - groups_by_expert)[owner]
    place = (pairs_end - load)[owner, None] + in_expert[:, None] * size + torch.arange(size, device=device)
    padding = place >= pairs_end[owner, None]  # lanes past the expert's pairs, and groups that hold none
    pair = torch.where(padding, pairs, order[place.clamp(max=pairs - 1)])  # [groups, size]; row `pairs` is not read
    out = torch.zeros(pairs + 1, x.shape[1], dtype=x.dtype, device=device)
    for expert, lanes in zip(torch.split(owner, 1), pair, strict=True):
        rows = x[(lanes // top_k).clamp(max=count - 1)]  # [size, H]
        gate, up = _expert_linear(rows, gate_up, expert).view(size, -1, 2).unbind(-1)  # even rows gate, odd up
        out[lanes] = _expert_linear(swiglu(gate, up, limit).to(x.dtype), down, expert)
    weighted = out[:pairs].view(count, top_k, -1).float() * routing_weights.unsqueeze(-1)
    return weighted.sum(1, keepdim=True).to(x.dtype)


def _expert_linear(x: Tensor, weights: Mxfp4, expert: Tensor) -> Tensor:
    blocks, scales, bias = (tensor.index_select(0, expert).squeeze(0) for tensor in weights)
    return linear(x, dequantize(blocks, scales, x.dtype), bias)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """GPT-OSS's clamped gate, float32: gate * sigmoid(1.702 gate) * (up + 1) with gate <= limit, |up| <= limit."""
    gate, up = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


# Sampler --------------------------------------------------------------------------------------------------------------


def allowed(masks: TokenMasks, vocab: int) -> Tensor:
    """Whether a row may draw a token: [R, vocab] bool."""
    words = masks.words[masks.rows.clamp(min=0)]  # [R, ceil(V / 32)]
    bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1  # [R, ceil(V / 32), 32]
    return bits.flatten(1)[:, :vocab].bool() | (masks.rows < 0).unsqueeze(1)


def penalize(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """logits [R, V] float32, output_counts [R, V] int32, in_prompt [R, V] uint8, the penalties [R] float32 -> [R, V].

    The repetition penalty divides positive and multiplies negative logits of tokens in the prompt or the output. Of
    tokens in the output, the frequency penalty is subtracted once per occurrence, the presence penalty once.
    """
    repetition, frequency, presence = (value.unsqueeze(1) for value in (repetition, frequency, presence))
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where((in_prompt > 0) | (output_counts > 0), repeated, logits)
    return logits - frequency * output_counts - presence * (output_counts > 0)


def add_bias(logits: Tensor, ids: Tensor, values: Tensor, until: Tensor, positions: Tensor) -> Tensor:
    """Add values [R, B] to logits [R, V] at ids [R, B], where the drawn token's position [R] is before until [R, B]."""
    counting = torch.where(positions.unsqueeze(1) < until, values, 0.0)
    return logits.scatter_add(1, ids.long(), counting)


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """Draw a token for each row: logits [R, V] float32, seeds [R, 2] int32 (low and high word), the others [R] -> [R].

    temperature 0 takes the largest logit. Otherwise a token stays if its logit is among the top_k largest (0: all), if
    it is in the smallest set of likeliest tokens whose probability among those reaches top_p, and if it is at least
    min_p times as likely as the best; logits equal to a threshold stay. The draw adds Gumbel noise, a function of
    (seed, position, token) alone, and takes the largest: exact, without a cumulative sum.
    """
    rows = zip(logits, temperature, top_k, top_p, min_p, seeds, positions, strict=True)
    return torch.stack([_draw_row(*row) for row in rows]).int()


def _draw_row(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)
    weight = torch.exp(scaled - scaled.max())
    order = _order(scaled)
    ones = torch.ones_like(order)
    keep = order >= _threshold(order, ones, torch.where(top_k > 0, top_k, logits.numel()).clamp(max=logits.numel()))
    mass = torch.where(keep, weight * 2.0**40, 0.0).long()  # integers: their sums do not depend on the order
    target = (top_p.double() * mass.sum()).ceil().long().clamp(min=1)
    keep &= (order >= _threshold(order, mass, target)) | (top_p >= 1)
    keep &= weight >= min_p
    noisy = torch.where(keep, scaled + gumbel(logits.numel(), seed, position), -math.inf)
    return torch.where(temperature > 0, noisy, logits).argmax()


def _order(x: Tensor) -> Tensor:
    """float32 -> int64, 0 .. 2^32 - 1, in the order of the floats."""
    bits = x.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + 2**31


def _threshold(order: Tensor, mass: Tensor, target: Tensor) -> Tensor:
    """The largest t for which the mass [V] int64 of tokens with order [V] >= t is at least target: a radix search."""
    threshold = torch.zeros((), dtype=torch.int64, device=mass.device)
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        digits = order >> shift & (1 << bits) - 1
        histogram = torch.zeros(1 << bits, dtype=torch.int64, device=mass.device).scatter_add(0, digits, mass)
        from_top = histogram.flip(0).cumsum(0).flip(0)
        digit = (from_top >= target).sum() - 1
        target = target - (from_top - histogram).take(digit)  # what remains for the tokens with this digit
        mass = torch.where(digits == digit, mass, 0)
        threshold = threshold | digit << shift
    return threshold


def gumbel(count: int, seed: Tensor, position: Tensor) -> Tensor:
    """Standard Gumbel noise [count] float32, one value a token, from seed [2] int32 and position []: counter-based."""

    def mix(x: Tensor) -> Tensor:  # a bijective 32-bit finaliser; int32 products wrap
        x = (x ^ (x >> 16 & 0xFFFF)) * 0x21F0AAAD
        x = (x ^ (x >> 15 & 0x1FFFF)) * 0x735A2D97
        return x ^ (x >> 15 & 0x1FFFF)

    key = mix(mix(seed[0] + position * 0x1E3779B1) ^ seed[1])
    bits = mix(mix(torch.arange(count, dtype=torch.int32, device=seed.device) ^ key) + mix(key ^ 0x5BD1E995))
    uniform = ((bits.long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32  # small values keep their precision: large noise
    return -torch.log(-torch.log1p(-uniform))


def top_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [R, V] float32, tokens [R] -> log probability [R] of the tokens; ids, values [R, count] of the best."""
    values = logits - torch.stack([row.logsumexp(0) for row in logits]).unsqueeze(1)
    best = values.topk(count, dim=-1)
    return values.gather(1, tokens.long().unsqueeze(1)).squeeze(1), best.indices, best.values
