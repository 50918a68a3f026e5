"""Muon (Jordan et al. 2024) for several processes.

Not `torch.optim.Muon`: that multiplies in bfloat16, which takes 60 times as long as float32 on a CPU without
instructions for it, and every process would do all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Steps along the momentum with all its singular values near 1; matrices only.

    Args:
        matrices: parameters.
        lr: learning rate; an update has the size of one of AdamW.
        momentum: of the gradient, Nesterov's.
        decay: of the weights.
    """

    def __init__(
        self, matrices: Sequence[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update; every process orthogonalises its share of the matrices."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            updates = []
            for number, matrix in enumerate(group["params"]):
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(state["momentum"], group["momentum"])
                updates.append(orthogonal(ahead) if number % world == rank else torch.zeros_like(ahead))
            if world > 1:
                flat = torch.cat([update.flatten() for update in updates])
                dist.all_reduce(flat)
                sizes = [update.numel() for update in updates]
                parts = flat.split(sizes)
                updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
            for matrix, update in zip(group["params"], updates, strict=True):
                scale = 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values moved to about 1, by Newton and Schulz."""
    a, b, c = COEFFICIENTS
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
