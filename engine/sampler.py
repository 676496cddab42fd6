"""From logits to the next token of each row, inside the captured step.

Every option is a value in the state of the row's slot: one graph serves greedy, filtered, penalised and biased rows
alike. The mathematics is the kernels'.
"""

from types import ModuleType

from torch import Tensor

from graphs.buffers import TOP_LOGPROBS, Buffers


def sample(ops: ModuleType, buffers: Buffers, logits: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Draw and emit one token a row: logits [R, V] float32, slots [R], positions [R] of the tokens to be drawn."""
    state = buffers.sampling
    adjusted = ops.penalize(
        logits, buffers.output_counts[slots], buffers.in_prompt[slots], state.repetition_penalty[slots],
        state.frequency_penalty[slots], state.presence_penalty[slots],
    )
    adjusted = ops.add_bias(
        adjusted, state.bias_ids[slots], state.bias_values[slots], state.bias_until[slots], positions
    )
    tokens = ops.draw(
        adjusted, state.temperature[slots], state.top_k[slots], state.top_p[slots], state.min_p[slots],
        state.seed[slots], positions,
    )
    buffers.emit(slots, tokens, *ops.top_logprobs(logits, tokens, min(TOP_LOGPROBS, logits.shape[1])))
