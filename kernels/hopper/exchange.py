"""How many rows an exchange area needs, and a kernel's arguments for it; common/exchange.cuh says how it is used."""

from torch import Tensor

from kernels.ops import ExchangeArea, Peers


def one_shot_rows(rows: int, ranks: int) -> int:
    """Rows of an exchange area by which every rank sums all of `rows` rows: one from each rank."""
    return ranks * rows


def two_shot_rows(rows: int, ranks: int) -> int:
    """Rows of an exchange area by which each row is summed by one rank: the rows that a rank sums, from each, and the
    sums of all."""
    return ranks * -(-rows // ranks) + rows


def exchange_arguments(peers: Peers, area: ExchangeArea, needed: int) -> tuple[Tensor | None, int, int]:
    """What a kernel takes that exchanges `needed` bytes: memories, offset, rank.

    Raises ValueError where they do not fit the area.
    """
    if area.memories is not None and needed > area.bytes:
        raise ValueError(f"an exchange of {needed} bytes in an area of {area.bytes}: more rows than `join` was given")
    return area.memories, area.offset, peers.rank
