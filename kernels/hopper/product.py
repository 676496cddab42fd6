"""Launch geometry of common/product.cuh, by which the dense layers of a prefill step multiply."""

import torch

CONSUMERS = 3  # warpgroups of a block, 64 weight rows each
TOKENS = 128  # of a block
DEPTH = 64  # columns of a stage
STAGES = 6
THREADS = 128 * (CONSUMERS + 1)
# The stages of tokens, each consumer's 64 outputs a token, 8 apart, and room to align them.
SHARED_BYTES = STAGES * TOKENS * DEPTH * 2 + CONSUMERS * TOKENS * (64 + 8) * 2 + 1024


def product_defines() -> dict[str, int]:
    """The macros of common/product.cuh."""
    return {"CONSUMERS": CONSUMERS, "TOKENS": TOKENS, "DEPTH": DEPTH, "STAGES": STAGES, "SHARED_BYTES": SHARED_BYTES}


def product_grid(rows: int, tiles: int, device: torch.device) -> tuple[int, int, int]:
    """A block a multiprocessor, or an item: `rows` weight rows by `tiles` tiles of tokens."""
    items = -(-rows // (64 * CONSUMERS)) * tiles
    return min(items, torch.cuda.get_device_properties(device).multi_processor_count), 1, 1
