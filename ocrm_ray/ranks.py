"""The processes that train a network together, as torch.distributed numbers them; without a group there is one.

Every rank is given all data of a step and takes its share; what the ranks find is added up or joined, so that results
do not depend on how many there are. All ranks must come to every function here that asks the others, in one order.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor


def num_ranks() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This one, from 0; rank 0 writes files and answers for all."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def add_up(values: Tensor) -> Tensor:
    """Sum of every rank's ``values``, in their place."""
    return _reduced(values, torch.distributed.ReduceOp.SUM)


def largest(number: int) -> int:
    """Of every rank's ``number``."""
    return int(_reduced(torch.tensor(number), torch.distributed.ReduceOp.MAX))


def joined(items: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of all ranks; of one key the last rank's."""
    if num_ranks() == 1:
        return items
    found: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(found, items)
    return {key: value for part in found for key, value in part.items()}


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if num_ranks() == 1:
        return values
    moved = values.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(moved, operation)
    return values.copy_(moved)
