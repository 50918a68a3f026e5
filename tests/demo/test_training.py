"""The demo's training: a run that was stopped goes on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.demo_training import transformer
from benchmarks.demo_training.autoencoder import Frames
from benchmarks.demo_training.model import init_weights
from benchmarks.demo_training.muon import orthogonal
from benchmarks.demo_training.training import Training
from headforcing.demo.model.autoencoder import autoencoder
from headforcing.demo.model.model import DemoConfig, DemoModel


class Small(nn.Module):
    """A matrix for each optimizer, and a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.out = nn.Parameter(torch.randn(3, 6, generator=generator))
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return (x @ self.hidden.mT).relu() @ self.out.mT

    def save_weights(self, path: Path) -> None:
        save_file(self.state_dict(), path)


def train(out: Path, steps: int, until: int | None = None) -> Small:
    model = Small()
    training = Training(model, ["hidden"], out, steps=steps, rate=0.1, hold=0.3, average=0.9, seed=3)

    def loss(step: int, draws: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if step == until:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=draws)
        error = (model(x) - x[:, :3]).square().mean()
        return error, {"error": error.detach()}

    training.run(loss, log_every=1, save_every=2)
    return model


@pytest.mark.parametrize("until", [2, 5, 7])
def test_a_stopped_training_ends_with_the_same_bits(tmp_path, until):
    through = train(tmp_path / "through", 9)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", 9, until)
    resumed = train(tmp_path / "stopped", 9)
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    files = [(tmp_path / run / "weights.safetensors").read_bytes() for run in ("through", "stopped")]
    assert files[0] == files[1]
    lines = (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()
    begun = [json.loads(line) for line in lines if "command" in line]
    assert [line["at"] for line in begun] == [0, until // 2 * 2]
    assert begun[0]["seed"] == 3


def test_an_update_has_singular_values_near_one():
    for shape in ((6, 4), (4, 6), (32, 32)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert values.min() > 0.3
        assert values.max() < 1.3


@pytest.fixture
def small(tmp_path) -> tuple[DemoModel, Training]:
    model = DemoModel(DemoConfig(dim=96, layers=2))
    init_weights(model, torch.Generator().manual_seed(0))
    return model, Training(model, [], tmp_path, steps=9, rate=1e-3, hold=0.4, average=0.9, seed=0)


def test_a_step_sees_the_same_videos_whenever_it_is_repeated(small, monkeypatch):
    monkeypatch.setattr(transformer, "LOTS", 2)
    monkeypatch.setattr(transformer, "LOT", 2)
    _, training = small
    batches = [transformer.Videos(training, autoencoder(), 7).batch(5, training.draws(5)) for _ in range(2)]
    for name in ("latents", "prompts", "seen", "moving"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name))
    frames, moving = Frames(training).batch(5, training.draws(5))
    assert frames.shape == (32, 48, 72, 3)
    assert moving.any()
    assert not moving.all()


def test_self_made_context_keeps_what_is_new(small, monkeypatch):
    monkeypatch.setattr(transformer, "LOTS", 1)
    monkeypatch.setattr(transformer, "LOT", 2)
    model, training = small
    lot = transformer.Videos(training, autoencoder(), 7).batch(0, training.draws(0))
    made = transformer.regenerate(model, lot, lot.latents, training.draws(1))
    seen = lot.seen[:, None].expand_as(made)
    assert torch.equal(made[~seen], lot.latents[~seen])
    assert torch.equal(made[:, :, :3], lot.latents[:, :, :3])
    assert not torch.equal(made[seen], lot.latents[seen])


def test_the_loss_falls(small, monkeypatch):
    monkeypatch.setattr(transformer, "LOTS", 1)
    monkeypatch.setattr(transformer, "LOT", 2)
    model, training = small
    training.steps = 12
    videos, found = transformer.Videos(training, autoencoder(), 7), []

    def loss(step: int, draws: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        value, report = transformer.loss(model, videos.batch(0, training.draws(0)), training.draws(0), 0.0)
        found.append(float(value.detach()))
        assert set(report) == {"seen_high", "seen_middle", "new_high", "new_middle", "moving_high"}
        return value, report

    training.run(loss)
    assert found[-1] < found[0]
