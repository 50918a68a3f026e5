"""The second stage of SANA-WM: the refiner of diffusers and its own loop, tiny, with and without roles."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.errors import (
    ChunkOrderError,
    PatchedModuleError,
    RoleError,
    StreamError,
    StreamShapeError,
    UnsupportedModelError,
)
from headforcing.integrations import sana_wm
from headforcing.integrations.sana_wm import SanaWM
from headforcing.roles import Full, HeadRole, Local, SlidingWindow
from headforcing.testing import check_adapter, check_names, snapshot
from tests.hosts.sana_wm import DIFFUSERS, FPS, GRID, TOKENS, SanaWMHost

if (MISSING := SanaWMHost().missing()) is not None:
    pytest.skip(MISSING, allow_module_level=True)

pytestmark = pytest.mark.xdist_group("diffusers")  # imports it once
CPU, CHANNELS, WORDS, FRAMES = torch.device("cpu"), 5, 6, 18
LONG = 100
"""Frames that a window holds which forgets nothing here."""
WINDOW = Local(10, 1, positions="adjoining")
"""What the pipeline keeps: one first frame, and the last ten, which it sits right before."""
LATER = Local(3, 1, positions="adjoining"), Local(1), Full(), SlidingWindow(6, 2)


class Twin(Local):
    """The same memory under another name, so that heads are grouped."""


TWIN = Twin(10, 1, positions="adjoining")


def made(rope: str = "split", gated: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    host = SanaWMHost()
    host.rope_type, host.gated = rope, gated
    return host.model(dtype)


@functools.cache
def refiner_class() -> Any:
    """The pipeline, whose prompt is random numbers."""
    module = importlib.import_module("diffusers.pipelines.sana_wm.refiner")

    class Refiner(module.SanaWMLTX2Refiner):  # type: ignore[misc, name-defined]
        batch = 1

        def _encode_prompt(self, prompt: str, device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            words = noise(self.batch, WORDS, 8, seed=len(prompt)).to(dtype)
            return words, torch.ones(self.batch, WORDS)

    return Refiner


def refined(model: Any, frames: int = FRAMES, seed: int = 0, batch: int = 1, **options: Any) -> Tensor:
    """A video from diffusers' own loop."""
    diffusers = importlib.import_module("diffusers")
    kind = refiner_class()
    pipeline = kind.__new__(kind)
    diffusers.DiffusionPipeline.__init__(pipeline)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    parts = dict.fromkeys(("connectors", "tokenizer", "text_encoder", "vae"))
    pipeline.register_modules(transformer=model, scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.batch = batch
    latents = noise(batch, CHANNELS, frames, *GRID, seed=seed)
    options = {"fps": FPS, "output_type": "latent", **options}
    out: Tensor = pipeline(latents, "a prompt", generator=torch.Generator().manual_seed(9), **options)
    return out


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def plain(rope: str = "split", gated: bool = False, **options: Any) -> Tensor:
    return refined(made(rope, gated), **options)


def forced(model: Any, roles: Any, **options: Any) -> hf.HeadForcing:
    return hf.apply_head_forcing(model, roles, **options)


@pytest.fixture
def model() -> Any:
    return made()


# The pipeline's own loop --------------------------------------------------------------------------


WAYS = [
    (rope, gated, dtype, store)
    for rope, gated in (("split", False), ("interleaved", True))
    for dtype in (torch.float32, torch.bfloat16)
    for store in ("lean", "reference", "ring")
]
FAST_WAYS = [("split", False, torch.float32, "ring"), ("interleaved", True, torch.bfloat16, "ring")]


@pytest.mark.parametrize(
    ("rope", "gated", "dtype", "store"),
    [pytest.param(*way, marks=() if way in FAST_WAYS else pytest.mark.slow) for way in WAYS],
)
def test_its_window_is_a_role_bit_for_bit(rope: str, gated: bool, dtype: torch.dtype, store: str) -> None:
    model = made(rope, gated, dtype)
    expected = refined(model)
    forced(model, WINDOW, store=store)
    assert torch.equal(refined(model), expected)


@pytest.mark.parametrize(
    ("rope", "gated"), [pytest.param("split", False, marks=pytest.mark.slow), ("interleaved", True)]
)
def test_every_head_is_turned_as_itself(rope: str, gated: bool) -> None:
    """Two groups of heads that remember alike, so that each is rotated without the other."""
    model = made(rope, gated)
    forced(model, [[WINDOW, TWIN, TWIN, WINDOW]] * 2)
    assert torch.equal(refined(model), plain(rope, gated))


@pytest.mark.parametrize(
    ("sink", "held", "frames"),
    [
        (1, 5, 12),
        (2, 8, 18),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 11, 14), (2, 8, 24), (3, 11, 25))),
    ],
)
def test_other_sinks_and_windows_and_shorter_last_blocks(sink: int, held: int, frames: int) -> None:
    model = made()
    options = {"frames": frames, "sink_size": sink, "kv_max_frames": held}
    handle = forced(
        model, Local(held - sink, sink, positions="adjoining"), adapter=SanaWM(kv_max_frames=held)
    )
    assert handle.status().window == held + 3
    assert torch.equal(refined(model, **options), plain(**options))


def test_blocks_of_another_length() -> None:
    model = made()
    forced(model, WINDOW, adapter=SanaWM(block_size=4))
    assert torch.equal(refined(model, block_size=4), plain(block_size=4))


def test_two_videos_in_one_batch(model: Any) -> None:
    forced(model, WINDOW)
    assert torch.equal(refined(model, batch=2), plain(batch=2))


def test_roles_that_remember_longer_than_the_window_get_it(model: Any) -> None:
    """The pipeline cuts its history to ten frames; what it would do without that is what `Full` does."""
    forced(model, Full())
    out = refined(model)
    assert torch.equal(out, plain(kv_max_frames=LONG))
    assert not torch.equal(out, plain())


def test_a_second_and_a_third_video(model: Any) -> None:
    handle = forced(model, WINDOW)
    assert torch.equal(refined(model), plain())
    assert torch.equal(refined(model, seed=3, fps=24.0), plain(seed=3, fps=24.0))
    assert torch.equal(refined(model, frames=12), plain(frames=12))
    gc.collect()
    assert handle.status().streams == ()


@pytest.mark.parametrize(
    "role", [LATER[0], *(pytest.param(role, marks=pytest.mark.slow) for role in LATER[1:3]), LATER[3]]
)
def test_other_roles_make_another_video(model: Any, role: HeadRole) -> None:
    handle = forced(model, role)
    out = refined(model)
    assert not torch.equal(out, plain())
    assert bool(out.isfinite().all())
    assert torch.equal(out[:, :, :4], plain()[:, :, :4])  # sink and first block have nothing to forget
    handle.remove()
    assert torch.equal(refined(model), plain())


def test_one_head_of_another_role_is_heard(model: Any) -> None:
    roles: list[list[HeadRole]] = [[WINDOW] * 4, [WINDOW] * 3 + [Local(1)]]
    forced(model, roles)
    assert not torch.equal(refined(model), plain())


def test_heads_of_two_roles_attend_as_under_a_mask() -> None:
    """Beside a processor of our own that masks single heads, with everything held."""
    module = importlib.import_module(DIFFUSERS)

    def masked(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        seen = torch.ones(1, q.shape[1], 1, k.shape[2], dtype=torch.bool)
        seen[:, ::2, :, : max(k.shape[2] - q.shape[2] - 2 * TOKENS, 0)] = False
        return nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dispatch_attention_fn", masked)
        patch.setattr(module.SanaWMLTX2AudioVideoAttnProcessor, "__call__", _unmasked(module))
        expected = refined(made(), kv_max_frames=LONG)
    model = made()
    forced(model, [[Local(2, positions="absolute"), Full()] * 2] * 2)
    assert torch.allclose(refined(model), expected, atol=1e-5)
    assert not torch.allclose(plain(kv_max_frames=LONG), expected, atol=1e-3)


def _unmasked(module: Any) -> Any:
    """The processor of cross-attention, which is not to be masked."""
    original, dispatch = module.SanaWMLTX2AudioVideoAttnProcessor.__call__, module.dispatch_attention_fn

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "dispatch_attention_fn", dispatch)
            return original(self, *args, **kwargs)

    call.__signature__ = importlib.import_module("inspect").signature(original)  # type: ignore[attr-defined]
    return call


def test_a_long_run_stays_bounded(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    handle = forced(model, "streaming_llm")

    def look(observation: Any) -> None:
        places = [place for part in observation.positions for place in part]
        seen.append((int(max(places)), handle.status().stored_bytes))

    with handle.observe(look):
        out = refined(model, frames=60)
    assert bool(out.isfinite().all())
    assert max(place for place, _ in seen) == handle.status().window - 1 == 13
    half = seen[len(seen) // 2 :]
    assert len({size for _, size in half[:-20]}) == 1  # the last block is shorter


def test_roles_that_see_less_in_the_clean_pass(model: Any) -> None:
    forced(model, dataclasses.replace(WINDOW, clean_window=6))
    out = refined(model)
    assert bool(out.isfinite().all())
    assert torch.equal(out[:, :, :7], plain()[:, :, :7])  # two blocks, before which the clean pass saw all
    assert not torch.equal(out, plain())


def test_its_own_cache_is_left_empty(model: Any) -> None:
    module, held = importlib.import_module(DIFFUSERS), []

    class Watched(module.SanaWMRefinerKVLayerCache):  # type: ignore[misc, name-defined]
        def store_history(self, history_k: Tensor, history_v: Tensor) -> None:
            held.append(history_k.numel() + history_v.numel())
            super().store_history(history_k, history_v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SanaWMRefinerKVLayerCache", Watched)
        refined(model)
        assert min(held) > 0
        held.clear()
        handle = forced(model, WINDOW)
        refined(model)
        assert set(held) == {0}
        handle.remove()
        held.clear()
        refined(model)
        assert min(held) > 0


def test_the_other_kind_of_rotation_keeps_what_the_kit_asks() -> None:
    host = SanaWMHost()
    host.rope_type, host.gated = "interleaved", True
    names = [name for name in check_names() if "rotation" in name or "keys" in name]
    report = check_adapter(None, host, only=names)
    report.raise_if_failed()
    assert report.count("passed") == len(names) >= 6


# Coming, going and neighbours ---------------------------------------------------------------------


def test_nothing_is_left_after_remove(model: Any) -> None:
    refined(model)  # diffusers leaves its own marks
    before = snapshot(model)
    handle = forced(model, Local(1))
    refined(model)
    handle.remove()
    assert before.diff(snapshot(model)) == []
    assert torch.equal(refined(model), plain())


@pytest.mark.parametrize("level", [pytest.param("block_level", marks=pytest.mark.slow), "leaf_level"])
@pytest.mark.parametrize("first", [pytest.param("they come first", marks=pytest.mark.slow), "we come first"])
def test_group_offloading(model: Any, level: str, first: str) -> None:
    groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
    if first == "we come first":
        forced(model, WINDOW)
    model.enable_group_offload(CPU, CPU, level, **groups)
    if first != "we come first":
        forced(model, WINDOW)
    assert torch.equal(refined(model), plain())


@pytest.mark.parametrize("first", ["they come first", pytest.param("we come first", marks=pytest.mark.slow)])
def test_lora(model: Any, first: str) -> None:
    peft = pytest.importorskip("peft")
    other = made()

    def adapted(model: Any) -> None:
        torch.manual_seed(1)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        model.requires_grad_(False)

    adapted(other)
    expected = refined(other)
    assert not torch.equal(expected, plain())
    if first == "they come first":
        adapted(model)
    handle = forced(model, WINDOW)
    if first == "we come first":
        adapted(model)
    assert torch.equal(refined(model), expected)
    model.unload_lora()
    assert torch.equal(refined(model), plain())
    handle.remove()
    assert torch.equal(refined(model), plain())


@pytest.mark.parametrize(
    "kind",
    [
        "PyramidAttentionBroadcastConfig",
        *(pytest.param(f"{kind}CacheConfig", marks=pytest.mark.slow) for kind in ("Faster", "TaylorSeer")),
    ],
)
def test_caches_that_skip_attention_are_refused(model: Any, kind: str) -> None:
    hooks = importlib.import_module("diffusers.hooks")
    now = {"current_timestep_callback": lambda: 500}
    options = {"spatial_attention_block_skip_range": 2, **now} if "Taylor" not in kind else {}
    if kind == "FasterCacheConfig":
        options["tensor_format"] = "BFCHW"
    model.enable_cache(getattr(hooks, kind)(**options))
    before = snapshot(model)
    with pytest.raises(PatchedModuleError, match=r"disable_cache\(\)"):
        forced(model, WINDOW)
    assert before.diff(snapshot(model)) == []
    model.disable_cache()
    forced(model, WINDOW)
    assert torch.equal(refined(model), plain())


# Processors ---------------------------------------------------------------------------------------


class Foreign:
    """A processor that is called as those of other models."""

    def __call__(self, attn: Any, hidden_states: Tensor, rotary_emb: Any = None) -> Tensor:
        return hidden_states


def test_a_foreign_processor_in_one_layer_is_refused_with_its_reason(model: Any) -> None:
    model.transformer_blocks[1].attn1.set_processor(Foreign())
    said = r"cannot be served: transformer_blocks\.1\.attn1 has the processor Foreign.*set_processor\(\)"
    with pytest.raises(UnsupportedModelError, match=said):
        forced(model, Full())
    with pytest.raises(
        UnsupportedModelError, match=r"transformer_blocks\.1\.attn1 has the processor Foreign"
    ):
        forced(model, Full(), adapter=SanaWM())
    assert "has the processor Foreign" in str(hf.explain(model).refused)


def test_a_processor_of_the_same_kind_is_known_by_its_signature(model: Any) -> None:
    kind = type(model.transformer_blocks[0].attn1.processor)
    for block in model.transformer_blocks:
        block.attn1.set_processor(type("Own", (kind,), {})())
    assert find_adapter(model).name == "sana_wm"


def test_a_processor_exchanged_while_applied_is_not_passed_over(model: Any) -> None:
    handle = forced(model, WINDOW)
    own = model.transformer_blocks[0].attn1.processor
    model.transformer_blocks[0].attn1.set_processor(Foreign())
    with pytest.raises(PatchedModuleError, match="has the processor Foreign"):
        refined(model)
    model.transformer_blocks[0].attn1.set_processor(own)
    assert torch.equal(refined(model), plain())
    handle.remove()


def test_parallel_attention_is_refused(model: Any) -> None:
    model.transformer_blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(UnsupportedModelError, match=r"works in parallel.*enable_parallelism\(\)"):
        forced(model, Full())


def test_only_attention_to_the_video_is_ours(model: Any) -> None:
    names = [name for name, _ in find_adapter(model).attentions(model)]
    assert names == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    found = hf.explain(model)
    assert (found.adapter, found.window, found.chunk, found.unknown) == ("sana_wm", 14, 3, {})


# Frames by their rows of RoPE ---------------------------------------------------------------------


@pytest.fixture
def calls(model: Any) -> Iterator[Any]:
    """Passes of the model over frames, on one cache."""
    module = importlib.import_module(DIFFUSERS)
    cache = module.SanaWMRefinerKVCache(2)

    def call(frames: Any, mode: str = "inject", **changes: Any) -> Any:
        batch, fps = changes.pop("batch", 1), changes.pop("fps", FPS)
        rows = model.build_rotary_emb_for_absolute_positions(batch, list(frames), *GRID, CPU, fps)
        arguments = {
            "hidden_states": noise(batch, len(list(frames)) * TOKENS, CHANNELS, seed=1),
            "encoder_hidden_states": noise(batch, WORDS, 8, seed=2),
            "timestep": torch.zeros(batch, len(list(frames)) * TOKENS),
            "video_rotary_emb": rows,
            "kv_cache": cache,
            "kv_cache_mode": mode,
            "return_dict": False,
        }
        return model(**{**arguments, **changes})[0]

    call.cache = cache  # type: ignore[attr-defined]
    return call


def test_single_frames_and_repeats_are_counted(model: Any, calls: Any) -> None:
    seen: list[int] = []
    with forced(model, Full()).observe(lambda observation: seen.append(observation.call.start)):
        for frame in (0, 0, 1, 1, 2, 3, 3, 4):
            calls([frame], "inject" if frame else "capture_pre_rope")
        calls(range(5, 8))
        calls(range(5, 8), "inject_and_capture_post_rope")
        calls([8])
        calls([0], "capture_pre_rope", fps=24.0)  # another video, whose frames are at other times
        calls([1], fps=24.0)
    assert seen[::2] == seen[1::2] == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 8, 0, 1]


@pytest.mark.parametrize("frames", [range(5, 8), range(7, 10), [9]])
def test_frames_that_are_left_out_are_noticed(model: Any, calls: Any, frames: Any) -> None:
    forced(model, Full())
    calls(range(1), "capture_pre_rope")
    calls(range(1, 4))
    with pytest.raises(ChunkOrderError):
        calls(frames)
    calls(range(4, 7))


def test_a_block_behind_one_first_frame_that_leaves_out_another_is_noticed(model: Any, calls: Any) -> None:
    forced(model, Full())
    calls(range(1), "capture_pre_rope")
    with pytest.raises(ChunkOrderError):
        calls(range(2, 5))


def test_frames_in_another_order_are_refused(model: Any, calls: Any) -> None:
    forced(model, Full())
    calls(range(3), "capture_pre_rope")
    with pytest.raises(StreamShapeError, match="frame 1 has another RoPE position"):
        calls([0, 2, 1])


def test_samples_of_different_frames_are_refused(model: Any, calls: Any) -> None:
    forced(model, Full())
    cos, sin = model.build_rotary_emb_for_absolute_positions(2, [0, 1], *GRID, CPU, FPS)
    with pytest.raises(StreamShapeError, match="samples of one batch have different RoPE"):
        calls([0, 1], "capture_pre_rope", batch=2, video_rotary_emb=(cos, torch.stack([sin[0], -sin[1]])))


def test_rows_that_are_no_whole_frames_are_refused(model: Any, calls: Any) -> None:
    forced(model, Full())
    rows = model.build_rotary_emb_for_absolute_positions(1, [0, 1], *GRID, CPU, FPS)
    torn = tuple(table[:, :, : TOKENS + 3] for table in rows)
    with pytest.raises(StreamShapeError, match="expected whole frames"):
        calls([0, 1], "capture_pre_rope", video_rotary_emb=torn)
    with pytest.raises(StreamShapeError, match=r"8 tokens, but RoPE rows for \(2, 2, 4\)"):
        calls([0], "capture_pre_rope", video_rotary_emb=rows)


def test_a_cache_that_was_filled_before_is_refused(model: Any, calls: Any) -> None:
    calls([0], "capture_pre_rope")
    for layer in calls.cache.layer_caches:
        layer.store_sink(*layer.get_captured_pre_rope())
    calls.cache.sink_pe = model.build_rotary_emb_for_absolute_positions(1, [0], *GRID, CPU, FPS)
    forced(model, Full())
    with pytest.raises(StreamError, match="filled before apply, or is a copy"):
        calls(range(1, 4))
    calls([0], "capture_pre_rope")
    calls(range(1, 4))


def test_positions_that_no_frame_had_are_computed_like_the_hosts(model: Any, calls: Any) -> None:
    videos: list[Any] = []
    handle = forced(model, Full())
    with handle.observe(lambda observation: videos.append(observation.call.arguments["video"])):
        calls([0], "capture_pre_rope")
    with pytest.raises(RoleError, match="RoPE position 1: expected one of the 1 frames so far"):
        videos[0].turns_at(1)
    calls(range(1, 4))
    for frame, apart in ((3, 0), (4, 3e-3), (9, 2e-2), (30, 1e-1)):  # angles of float32 in the fast columns
        rows = model.build_rotary_emb_for_absolute_positions(1, [frame], *GRID, CPU, FPS)
        expected = sana_wm._turns(*rows, 1)[0]
        turns, pairs = videos[0].turns_at(frame), torch.arange(len(expected))
        temporal = pairs % 3 == len(pairs) % 3
        assert float((turns[temporal] - expected[temporal]).abs().max()) <= apart
    with pytest.raises(RoleError, match="RoPE position -1"):
        videos[0].turns_at(-1)


def test_what_was_noted_goes_with_the_cache(model: Any) -> None:
    gc.collect()
    before = len(sana_wm._VIDEOS), len(sana_wm._PASSES)
    forced(model, WINDOW)
    refined(model)
    gc.collect()
    assert (len(sana_wm._VIDEOS), len(sana_wm._PASSES)) == before


class Unused(nn.Module):
    """Nothing of a refiner."""


def test_why_not_says_what_a_refiner_has() -> None:
    reason = SanaWM().why_not(Unused())
    assert reason is not None
    assert "kv_cache_mode" in reason
    assert sana_wm.refuse(Unused()) is None
