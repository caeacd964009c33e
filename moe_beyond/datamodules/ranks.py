"""Ranks of a fit: which shards each reads, and values that all of them receive."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import distributed

from moe_beyond.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def rank_and_ranks() -> tuple[int, int]:
    """Return the number of this process among the processes of a fit, from 0, and their number (default: 0, 1)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks in their order; every rank must call this.

    Args:
        value: Value of this rank.
    """
    ranks = rank_and_ranks()[1]
    values: list[Any] = [value] * ranks
    if ranks > 1:
        distributed.all_gather_object(values, value)
    return values


def shared_map(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function to items, of which each rank takes every n-th, as `shards_of_rank` does.

    Args:
        function: Function of an item.
        items: Items, the same on all ranks.

    Returns:
        Result of each item, on every rank.

    Raises:
        UserError: The function raised it on any rank.
    """
    rank, ranks = rank_and_ranks()
    results: list[Result] = []
    error: UserError | None = None
    try:
        results = [function(item) for item in items[rank::ranks]]
    except UserError as raised:  # the other ranks would wait for this one forever
        error = raised
    parts = gather((results, None if error is None else str(error)))
    if error is not None:
        raise error
    if message := next((message for _, message in parts if message is not None), None):
        raise UserError(message)
    return [parts[number % ranks][0][number // ranks] for number in range(len(items))]


def shards_of_rank(shards: int, ranks: int, rank: int) -> list[int]:
    """Return the indices of the shards that a rank reads: every n-th, or all if there are fewer shards than ranks.

    Args:
        shards: Number of shards.
        ranks: Number of processes.
        rank: Number of the process.
    """
    return list(range(shards)) if shards < ranks else list(range(rank, shards, ranks))
