"""The processes that hold one model: rank 0 tells the others what to do next, and all agree after every token and step.

With one process nothing is sent. What is done is in `work.py`.
"""

from typing import Any

import torch
import torch.distributed as dist


class Team:
    """`device`: that of the model."""

    def __init__(self, device: torch.device):
        self.device, self.size, self.rank = device, dist.get_world_size(), dist.get_rank()

    def tell(self, message: Any = None) -> Any:
        """What rank 0 gives, on every rank."""
        if self.size == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, states: list[int]) -> list[int]:
        """Small numbers as rank 0 has them, on every rank."""
        if self.size == 1:
            return states
        shared = torch.tensor(states, dtype=torch.uint8, device=self.device)
        dist.broadcast(shared, src=0)
        return shared.tolist()
