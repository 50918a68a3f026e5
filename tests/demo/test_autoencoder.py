"""The autoencoder of the demo codes every frame by itself."""

from __future__ import annotations

import torch

from headforcing.demo.model.autoencoder import Autoencoder, autoencoder
from headforcing.demo.world.camera import GRID
from headforcing.demo.world.scene import render, sample_scene


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_frames_are_coded_by_themselves():
    model = autoencoder()
    video = render(sample_scene(2, seeded()), torch.arange(6)).video
    latents = model.encode(video)
    assert latents.shape == (2, 48, 6, *GRID)
    for frame in (0, 4):
        torch.testing.assert_close(
            model.encode(video[:, :, frame : frame + 1]), latents[:, :, frame : frame + 1]
        )
    whole = model.decode(latents)
    parts = torch.cat([model.decode(part) for part in latents.split(3, 2)], 2)
    torch.testing.assert_close(whole, parts)
    assert whole.abs().max() <= 1


def test_a_pixel_reaches_only_the_latents_around_it():
    model = autoencoder()
    video = torch.zeros(1, 3, 1, 48, 72)
    dotted = video.clone()
    dotted[..., 2, 2] = 1
    changed = (model.encode(video) != model.encode(dotted)).any(1)[0, 0]
    assert changed[0, 0]
    assert not changed[3:].any()
    assert not changed[:, 3:].any()


def test_latents_have_unit_variance_and_pictures_are_crisp():
    model = autoencoder()
    scene = sample_scene(16, seeded(90_000))
    rendering = render(scene, torch.arange(0, 21, 5))
    latents = model.encode(rendering.video)
    assert abs(float(latents.std()) - 1) < 0.1
    error = (model.decode(latents) - rendering.video).square().mean(1) / 4
    moving = rendering.moving.any(2)
    assert -10 * torch.log10(error.mean()) > 30
    assert -10 * torch.log10(error[moving].mean()) > 22


def test_weights_survive_a_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = autoencoder()
    model.save_weights(path)
    copy = Autoencoder().load_weights(path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), copy.state_dict().values(), strict=True)
    )
