"""What both trainings share: processes, steps that can be repeated, checkpoints, averages, a log.

A step draws all its random numbers from the seed, its number and the process, so that a training which was
stopped goes on as if nothing had happened. Gradients are means over the processes.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.demo_training.autoencoder
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .muon import Muon

logger = logging.getLogger(__name__)

Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a step, and what the log says of it."""


class Training:
    """Trains a module with Muon for the matrices of `matrices` and AdamW for the rest.

    Args:
        model: the module; parameters without gradient are left alone.
        matrices: names of parameters for Muon, two-dimensional.
        out: folder of `checkpoint.safetensors`, `weights.safetensors` and `log.jsonl`.
        steps: to train.
        rate: peak learning rate of Muon; AdamW gets 0.7 of it.
        hold: share of the steps before the cosine decay.
        average: decay of the average of the weights.
        seed: of everything.

    Attributes:
        average: of the weights, what is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Sequence[str],
        out: Path,
        *,
        steps: int,
        rate: float,
        hold: float,
        average: float,
        seed: int,
    ) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        self.model, self.out, self.seed = model, out, seed
        self.steps, self.rate, self.hold = steps, rate, hold
        named = {name: part for name, part in model.named_parameters() if part.requires_grad}
        hidden = [named[name] for name in matrices if name in named]
        rest = [part for name, part in named.items() if name not in set(matrices)]
        self.parameters = [*hidden, *rest]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=0.7 * rate, betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if hidden:
            self.optimizers.append(Muon(hidden, rate))
        self._peaks = [0.7 * rate, rate]

        def blend(old: Sequence[Tensor], new: Sequence[Tensor], count: Tensor) -> None:
            share = 1 - min(average, (int(count) + 1) / (int(count) + 20))
            torch._foreach_lerp_(list(old), list(new), share)

        self.average = AveragedModel(model, multi_avg_fn=blend, use_buffers=True)
        self.step = 0
        self._means: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.safetensors").exists():
            self._resume()

    def draws(self, step: int, rank: int | None = None) -> torch.Generator:
        """The random numbers of a step, different for every process; with `rank` those of that process."""
        rank = self.rank if rank is None else rank
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + rank)

    def run(self, loss: Loss, *, log_every: int = 50, save_every: int = 200) -> None:
        """Trains up to the last step, from wherever the checkpoint is."""
        self._say(
            {
                "command": shlex.join(sys.orig_argv),
                "seed": self.seed,
                "torch": torch.__version__,
                "at": self.step,
            }
        )
        began, first = time.perf_counter(), self.step
        while self.step < self.steps:
            for optimizer, peak in zip(self.optimizers, self._peaks, strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = peak * self._schedule()
                optimizer.zero_grad()
            value, report = loss(self.step, self.draws(self.step))
            value.backward()  # type: ignore[no-untyped-call]
            self._share_gradients()
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            self.average.update_parameters(self.model)
            self._remember({"loss": value.detach(), "gradient": norm, **report})
            if self.step % log_every == 0:
                seconds = (time.perf_counter() - began) / (self.step - first)
                self._say({"step": self.step, "seconds_per_step": round(seconds, 3), **self._means})
            if self.step % save_every == 0 or self.step == self.steps:
                self._save()

    def _schedule(self) -> float:
        """Share of the learning rate: warm up, hold, cosine."""
        done = max(self.step / self.steps - self.hold, 0.0) / (1 - self.hold)
        return min(1.0, (self.step + 1) / 60) * max(0.5 * (1 + math.cos(math.pi * done)), 0.02)

    def _share_gradients(self) -> None:
        if self.world == 1:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        flat /= self.world
        for parameter, mean in zip(self.parameters, flat.split([p.numel() for p in parts]), strict=True):
            parameter.grad = mean.view_as(parameter)

    def _remember(self, report: dict[str, Tensor]) -> None:
        for name, tensor in report.items():
            value = float(tensor)
            if not math.isnan(value):
                old = self._means.get(name, value)
                self._means[name] = round(0.97 * old + 0.03 * value, 6)

    def _say(self, facts: dict[str, object]) -> None:
        if self.rank == 0:
            line = json.dumps(facts)
            logger.info(line)
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _save(self) -> None:
        """Everything that a later process needs; complete or not there at all."""
        if self.rank:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in state.items()}
        part = self.out / ".checkpoint.part"
        copied = {name: value.clone().contiguous() for name, value in tensors.items()}
        save_file(copied, part, metadata={"step": str(self.step), "means": json.dumps(self._means)})
        part.replace(self.out / "checkpoint.safetensors")
        self.average.module.save_weights(self.out / "weights.safetensors")

    def _resume(self) -> None:
        from safetensors import safe_open

        path = self.out / "checkpoint.safetensors"
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
            self._means = json.loads(file.metadata()["means"])

        def below(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
            }

        self.model.load_state_dict(below("model."))
        self.average.load_state_dict(below("average."))
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in below(f"optimizer.{number}.").items():
                index, field = name.split(".")
                state.setdefault(int(index), {})[field] = value
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
