"""Train the demo model: `python -m benchmarks.demo_training.train --steps 8000 --finetune-steps 1000`.

Stage 1 is flow matching with teacher forcing: every chunk is predicted from its noisy self and the
clean chunks before it, and those clean chunks are corrupted the way a long rollout drifts. Stage 2
repeats it on context that the model generated itself. Videos are drawn fresh for every step; runs
are scheduled in steps, so equal arguments give equal data on every machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.model.model import DemoModel

from .examples import (
    BASE,
    FINETUNE,
    Example,
    Predict,
    Sampler,
    Stage,
    base_examples,
    finetune_examples,
)
from .model import init_weights, predict_all

logger = logging.getLogger(__name__)


def optimizers(model: DemoModel, stage: Stage) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the blocks, AdamW for the rest, each with its share of the rate."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_hidden = name.startswith("blocks.") and name.endswith(".weight") and parameter.ndim == 2
        (hidden if is_hidden else rest).append(parameter)
    muon = torch.optim.Muon(hidden, stage.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, 1.0), (adam, 0.7)]


def average_of(model: DemoModel, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, which moves faster at the beginning."""

    def move(average: Tensor, value: Tensor, steps: Tensor | int) -> Tensor:
        return average.lerp(value, 1 - min(decay, float(steps) / (float(steps) + 20)))

    average = AveragedModel(model, avg_fn=move)
    average.update_parameters(model)  # the first one copies
    return average


class Trainer:
    """One model, its sampler and where checkpoints go."""

    def __init__(self, model: DemoModel, sampler: Sampler, out: Path, compiled: bool) -> None:
        self.model, self.sampler, self.out = model, sampler, out
        self.predict: Predict = partial(torch.compile(predict_all) if compiled else predict_all, model)

    def run(self, stage: Stage, steps: int, log_every: int = 50, save_every: int = 500) -> None:
        """Train for `steps`; the model ends with the averaged weights."""
        if stage is FINETUNE:
            examples = finetune_examples(self.sampler, self._predict_eagerly)
        else:
            examples = base_examples(self.sampler)
        groups, average = optimizers(self.model, stage), average_of(self.model, stage.ema)
        started, smooth = time.monotonic(), _Smooth()
        for step in range(steps):
            rate = stage.rate(step, steps)
            for optimizer, share in groups:
                for group in optimizer.param_groups:
                    group["lr"] = rate * share
            smooth.add(self._step(next(examples), stage, [optimizer for optimizer, _ in groups]))
            average.update_parameters(self.model)
            if (step + 1) % log_every == 0 or step + 1 == steps:
                seconds = round(time.monotonic() - started, 1)
                record = {"stage": stage.name, "step": step + 1, "seconds": seconds, "lr": rate}
                logger.info(json.dumps(record | smooth.values))
            if (step + 1) % save_every == 0:
                self._save(average, f"{stage.name}-last")
        self.model.load_state_dict(average.module.state_dict())
        self._save(average, stage.name)

    def _save(self, average: AveragedModel, label: str) -> None:
        """Write the averaged weights next to the final file."""
        average.module.save_weights(self.out.with_name(f"{self.out.stem}-{label}.safetensors"))

    def _predict_eagerly(self, clean: Tensor, noisy: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """The prediction for regeneration, without compiling it a second time."""
        with torch.autocast(clean.device.type, dtype=torch.bfloat16):
            return predict_all(self.model, clean, noisy, t, prompts)

    def _step(self, example: Example, stage: Stage, groups: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
        """One update; the errors by kind of chunk."""
        video, chunk = example.video, self.sampler.config.chunk
        level = self.sampler.levels(stage)  # [B, chunks]
        frames = level.repeat_interleave(chunk, 1)
        mix = frames[:, None, :, None, None]
        noisy = (1 - mix) * video + mix * self.sampler.normal(*video.shape)
        with torch.autocast(video.device.type, dtype=torch.bfloat16):
            clean = self.predict(example.context, noisy, frames, example.prompts)
        error = (clean.float() - video).square().mean((1, 3, 4))
        error = error.view(level.shape[0], -1, chunk).mean(2)
        loss = (error / level.clamp(min=0.25)).mean()
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in groups:
            group.step()
        error, high = error.detach(), level > 0.9
        return {
            "loss": loss.detach(),
            "first_chunk": error[:, 0][high[:, 0]].mean(),
            "high_noise": error[:, 1:][high[:, 1:]].mean(),
            "low_noise": error[(level > 0.3) & (level < 0.6)].mean(),
        }


class _Smooth:
    """Running averages of what the steps report; kinds that a step lacks are left out."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, report: dict[str, Tensor]) -> None:
        for name, tensor in report.items():
            value = float(tensor)
            if not math.isnan(value):
                old = self.values.get(name, value)
                self.values[name] = round(0.97 * old + 0.03 * value, 6)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--steps", type=int, default=8000, help="steps of the base training")
    parser.add_argument("--finetune-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dim", type=int, default=DemoConfig.dim)
    parser.add_argument("--layers", type=int, default=DemoConfig.layers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the default")
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--init", type=Path, help="start from these weights")
    parser.add_argument("--out", type=Path, default=Path("runs/demo.safetensors"))
    parser.add_argument("--log-every", type=int, default=50)
    return parser.parse_args()


def main() -> None:
    """Train both stages and write `OUT`, plus one file per stage and the latest of each."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = _arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    config = DemoConfig(dim=given.dim, layers=given.layers)
    model = DemoModel(config)
    init_weights(model, torch.Generator().manual_seed(given.seed))
    if given.init:
        model.load_weights(given.init)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    facts = {name: str(value) for name, value in vars(given).items()} | {"parameters": size}
    logger.info(json.dumps(facts | {"torch": torch.__version__}))
    sampler = Sampler(given.batch, given.seed, device, config)
    trainer = Trainer(model.to(device), sampler, given.out, given.compile)
    for stage, steps in ((BASE, given.steps), (FINETUNE, given.finetune_steps)):
        if steps:
            trainer.run(stage, steps, given.log_every)
    model.save_weights(given.out)


if __name__ == "__main__":
    main()
