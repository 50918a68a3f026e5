"""The demo model's cache behaves like Self Forcing's, and training sees what generation sees."""

from __future__ import annotations

import pytest
import torch

from benchmarks.demo_training.model import predict_chunks
from headforcing.demo.model.attention import grid_phases, rotate
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.scene import render, sample_scene
from headforcing.demo.world.words import PROMPT_WORDS

CONFIG = DemoConfig(dim=96, layers=2)
TOKENS = CONFIG.tokens_per_frame
CHUNKS = 7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> DemoModel:
    return DemoModel(CONFIG).randomize(seeded()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip() -> tuple[torch.Tensor, torch.Tensor]:
    """Frames, and prompts."""
    scene = sample_scene(2, seeded(1))
    return render(scene, torch.arange(21)).video, scene.prompts(torch.arange(CHUNKS))


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(2, CONFIG.channels, 21, *CONFIG.grid, generator=seeded(4))


def chunk_of(frames: torch.Tensor, index: int) -> torch.Tensor:
    return frames[:, :, 3 * index : 3 * index + 3]


@pytest.mark.parametrize("which", [[0, 2, 3, 6], [5], [*range(CHUNKS)]])
def test_the_cached_path_equals_teacher_forcing(model, clip, latents, which):
    _, prompts = clip
    noisy = torch.randn(latents.shape, generator=seeded(2))
    levels = torch.rand(2, CHUNKS, generator=seeded(3))
    some = torch.cat([chunk_of(noisy, index) for index in which], 2)
    dense = predict_chunks(model, latents, some, which, levels[:, which], prompts)
    pipeline = DemoPipeline(model)
    pipeline._prepare(2, CHUNKS)
    for index in range(CHUNKS):
        for cross in pipeline.crossattn_cache:
            cross["is_init"] = False
        call = {
            "context": prompts[:, index],
            "kv_cache": pipeline.kv_cache,
            "crossattn_cache": pipeline.crossattn_cache,
            "current_start": index * 3 * TOKENS,
        }
        if index in which:
            out = model(chunk_of(noisy, index), t=levels[:, index], **call)
            torch.testing.assert_close(out, chunk_of(dense, which.index(index)), atol=1e-4, rtol=0)
        model(chunk_of(latents, index), t=torch.zeros(2), **call)
    assert dense.std() > 0.1


def test_without_a_cache_the_model_is_causal_over_chunks(model, clip, latents):
    _, prompts = clip
    levels = torch.zeros(2)
    changed = latents.clone()
    changed[:, :, 9:] *= -1
    before, after = (model(frames, levels, prompts) for frames in (latents, changed))
    torch.testing.assert_close(before[:, :, :9], after[:, :, :9], atol=1e-5, rtol=0)
    assert (before[:, :, 9:] - after[:, :, 9:]).abs().max() > 0.1


@pytest.mark.parametrize("word", range(PROMPT_WORDS))
def test_every_word_of_a_chunk_matters(model, clip, latents, word):
    _, prompts = clip
    other = prompts.clone()
    other[:, 3, word] = other[:, 3, word].roll(1) - 1
    before, after = (model(latents, torch.ones(2), words) for words in (prompts, other))
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert (before[:, :, 9:12] - after[:, :, 9:12]).abs().max() > 1e-2


@pytest.mark.parametrize(("window", "sink"), [(9, 0), (9, 3), (12, 4)])
def test_eviction_keeps_the_sink_and_the_latest_frames(model, clip, window, sink):
    video, prompts = clip
    everything = DemoPipeline(model, window=-1)
    everything.generate(prompts, generator=seeded(), first_chunk=video)
    rolled = DemoPipeline(model, window=window, sink=sink)
    rolled.generate(prompts, generator=seeded(), first_chunk=video)
    first_layer, whole = rolled.kv_cache[0], everything.kv_cache[0]
    recent = window - sink
    kept = [*range(sink), *range(21 - recent, 21)]
    tokens = torch.arange(21 * TOKENS).view(21, TOKENS)[kept].flatten()
    for name in ("k", "v"):
        assert torch.equal(first_layer[name], whole[name][:, tokens])
    assert int(first_layer["global_end_index"]) == 21 * TOKENS
    assert int(first_layer["local_end_index"]) == window * TOKENS


@pytest.mark.parametrize("window", [9, 21, -1])
def test_a_second_video_on_used_caches_equals_one_on_fresh_caches(model, clip, window):
    _, prompts = clip
    pipeline = DemoPipeline(model, window=window)
    pipeline.generate(prompts.flip(0), generator=seeded(5))
    buffer = pipeline.kv_cache[0]["k"]
    second = pipeline.generate(prompts, generator=seeded(6))
    assert pipeline.kv_cache[0]["k"] is buffer
    fresh = DemoPipeline(model, window=window).generate(prompts, generator=seeded(6))
    assert torch.equal(second, fresh)


def test_the_callback_sees_every_chunk_and_changes_nothing(model, clip):
    video, prompts = clip
    seen: list[torch.Tensor] = []

    def keep(index: int, chunk: torch.Tensor) -> None:
        assert index == len(seen)
        seen.append(chunk)

    pipeline = DemoPipeline(model)
    first = video[:, :, :3]
    watched = pipeline.generate(prompts, 9, generator=seeded(), first_chunk=first, callback=keep)
    quiet = pipeline.generate(prompts, 9, generator=seeded(), first_chunk=first)
    assert torch.equal(watched, quiet)
    assert torch.equal(torch.cat(seen, 2), watched)
    assert (watched[:, :, :3] - first).square().mean() < 0.01
    assert watched.shape == (2, 3, 27, 48, 72)


def test_a_full_cache_without_eviction_is_an_error(model, clip, latents):
    _, prompts = clip
    pipeline = DemoPipeline(model, window=-1)
    pipeline._prepare(2, 1)
    call = {"context": prompts[:, 0], "kv_cache": pipeline.kv_cache}
    model(latents[:, :, :3], torch.zeros(2), **call)
    with pytest.raises(ValueError, match="use a larger cache"):
        model(latents[:, :, 3:6], torch.zeros(2), **call, current_start=3 * TOKENS)


def test_frames_past_the_rope_table_are_an_error(model):
    with pytest.raises(ValueError, match="past the RoPE table of 1024"):
        grid_phases(model.freqs, (3, *CONFIG.grid), 1022)


def test_rotation_keeps_lengths_and_depends_on_distance_only(model):
    x = torch.randn(1, 3 * TOKENS, 6, 16, generator=seeded())
    near, far = (rotate(x, grid_phases(model.freqs, (3, *CONFIG.grid), start)) for start in (0, 500))
    torch.testing.assert_close(near.norm(dim=-1), x.norm(dim=-1))
    products = [torch.einsum("blhd,bmhd->bhlm", y, y) for y in (near, far)]
    torch.testing.assert_close(*products, atol=1e-4, rtol=1e-4)


def test_a_window_without_room_is_refused(model):
    with pytest.raises(ValueError, match="does not fit sink 3"):
        DemoPipeline(model, window=5, sink=3)


def test_window_and_sink_reach_every_attention_module(model):
    DemoPipeline(model, window=12, sink=3)
    modules = [block.self_attn for block in model.blocks]
    assert {module.local_attn_size for module in modules} == {12}
    assert {module.max_attention_size for module in modules} == {12 * TOKENS}
    assert {module.sink_size for module in modules} == {3}
    assert model.local_attn_size == 12


def test_weights_survive_a_file(model, clip, latents, tmp_path):
    _, prompts = clip
    path = tmp_path / "weights.safetensors"
    model.half().float().save_weights(path)
    copy = DemoModel(CONFIG).load_weights(path)
    assert torch.equal(model(latents, torch.ones(2), prompts), copy(latents, torch.ones(2), prompts))
    with pytest.raises(ValueError, match="this model is"):
        DemoModel(DemoConfig(dim=96, layers=1)).load_weights(path)
