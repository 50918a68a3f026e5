"""The optimizer and the weight average of the demo's training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Newton-Schulz), for hidden matrices.

    Matrices of one shape are treated as one batch, which is what makes it cheap at this size.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; every parameter needs a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = _orthogonal(torch.stack([self._momentum(p, group) for p in parameters]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=scale)

    def _momentum(self, parameter: nn.Parameter, group: dict[str, float]) -> Tensor:
        """Nesterov momentum of one parameter's gradient."""
        state, gradient = self.state[parameter], parameter.grad
        if gradient is None:
            raise RuntimeError("Muon needs a gradient for every parameter")
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        blend: Tensor = torch.lerp(gradient, average, float(group["momentum"]))
        return blend


def _orthogonal(matrices: Tensor) -> Tensor:
    """Push the singular values of `[N, rows, columns]` towards one, in bf16; float32 comes back."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16().contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


class Average:
    """Exponential moving average of the weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the current weights; faster at the beginning."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 20))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)
