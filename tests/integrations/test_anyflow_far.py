"""AnyFlow FAR: diffusers' own pipeline, model and kernel, tiny, with and without head forcing.

Ours is SDPA, theirs flex attention: on latents of size 5 they end up less than 1e-6 apart, and everything
that is a difference is more than 1e-3. Bit for bit, on one kernel, is what the conformance kit compares.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.adapters.base import Memo
from headforcing.errors import (
    ChunkOrderError,
    PatchedModuleError,
    ProfileError,
    StreamShapeError,
    UnsupportedModelError,
)
from headforcing.integrations.anyflow_far import AnyFlowFAR
from headforcing.measure.profiler import Protocol, profile_heads
from headforcing.roles import Anchor, Full, Local, Memory, SlidingWindow
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil
from headforcing.testing import snapshot
from headforcing.types import AttentionCall
from tests.hosts.anyflow_far import AnyFlowFARHost

diffusers: Any = pytest.importorskip(
    "diffusers", minversion="0.42", reason="AnyFlow FAR came with diffusers 0.42"
)
pytest.importorskip("transformers", reason="the pipeline of AnyFlow FAR requires transformers")

pytestmark = pytest.mark.xdist_group("diffusers")  # imports it once
HEADS, LAYERS = 2, 2
SMALL = {"num_attention_heads": HEADS, "attention_head_dim": 16, "num_layers": LAYERS, "ffn_dim": 32}
CHUNKS = (1, 2, 2, 1)
ENDS = torch.tensor(list(itertools.accumulate(CHUNKS)))
CLOSE, APART = 1e-5, 1e-3
MIXED = [(Local(recent=1), Full()), (Anchor(1, 1), SlidingWindow(4, positions="absolute"))]


def made(chunks: Sequence[int] = CHUNKS, limit: int = 3) -> Any:
    """A model with random weights; by default its last chunk meets a coarse frame."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.AnyFlowFARTransformer3DModel(
            **SMALL,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            rope_max_seq_len=64,
            chunk_partition=tuple(chunks),
            full_chunk_limit=limit,
        )
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def play(
    model: Any, chunks: Sequence[int] = CHUNKS, seed: int = 0, batch: int = 1,
    size: tuple[int, int] = (8, 16), **more: Any,
) -> Tensor:  # fmt: skip
    """A video of the real pipeline, `[B, C, F, h, w]`."""
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    pipeline = diffusers.AnyFlowFARPipeline(None, None, model, None, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    said, unsaid = (torch.randn(batch, 3, 16, generator=generator) for _ in range(2))
    guided = {"negative_prompt_embeds": unsaid} if more.get("guidance_scale", 1) > 1 else {}
    out: Tensor = pipeline(
        prompt_embeds=said,
        latents=torch.randn(batch, 4, sum(chunks), *size, generator=generator),
        height=16,  # of latents that are given, nothing is asked
        width=16,
        num_frames=4 * sum(chunks) - 3,
        num_inference_steps=2,
        output_type="latent",
        chunk_partition=list(chunks),
        return_dict=False,
        **guided,
        **more,
    )[0]
    return out


def forced(roles: Any, model: Any = None, adapter: AnyFlowFAR | None = None, **how: Any) -> Tensor:
    """The same with head forcing, which is removed afterwards."""
    with hf.apply_head_forcing(made() if model is None else model, roles, adapter=adapter) as handle:
        return play(handle._model, **how)


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return play(made())


# What the host does -------------------------------------------------------------------------------


def test_a_clean_pass_runs_the_video_again_and_makes_one_more_chunk_coarse() -> None:
    """The facts that the adapter is built on; 32 tokens per frame, coarsely 8."""
    heard = []

    def hear(module: nn.Module, args: Any, kwargs: Any) -> None:
        flag, read = kwargs["kv_cache_flag"], ("num_cached_compressed_tokens", "num_cached_full_tokens")
        write = ("num_compressed_tokens", "num_full_tokens")
        counted = [flag[name] for name in (write if flag["is_cache_step"] else read)]
        heard.append((flag["is_cache_step"], kwargs["hidden_states"].shape[1], *counted))

    model = made()
    model.blocks[0].attn1.register_forward_pre_hook(hear, with_kwargs=True)
    play(model)
    assert [call for call, _ in itertools.groupby(heard)] == [
        (False, 32, 0, 0),
        (True, 32, 0, 32),
        (False, 64, 0, 32),
        (True, 96, 0, 96),
        (False, 64, 0, 96),
        (True, 136, 8, 128),
        (False, 32, 8, 128),
    ]


# What is equal ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "limit", "size"),
    [
        (CHUNKS, 3, (8, 16)),
        pytest.param((2, 2, 2), 2, (16, 16), marks=pytest.mark.slow),
        ((1, 1, 1), 4, (8, 8)),
    ],
    ids=["coarse", "coarse at once, queries fill a block", "all full"],
)
def test_with_full_heads_the_video_is_the_pipelines(
    chunks: Sequence[int], limit: int, size: tuple[int, int]
) -> None:
    model, how = made(chunks, limit), {"chunks": chunks, "size": size}
    expected = play(model, **how)
    found = forced(Full(), model, **how)
    assert 0 < apart(found, expected) < CLOSE
    assert apart(forced(Local(recent=1), model, **how), expected) > APART


def test_without_padding_it_is_the_pipelines_where_nothing_is_padded(plain: Tensor) -> None:
    assert apart(forced(Full(), adapter=AnyFlowFAR(padding=1)), plain) > APART
    model, how = made((2, 2, 2), 2), {"chunks": (2, 2, 2), "size": (16, 16)}  # 128 queries
    expected = play(model, **how)
    assert apart(forced(Full(), model, AnyFlowFAR(padding=1), **how), expected) < CLOSE


class Hiding:
    """A processor like diffusers', which hides from every head what a window over frames would not hold."""

    def __init__(self, windows: Sequence[int]) -> None:
        self.windows = torch.tensor(windows)[:, None, None]
        self.cached: list[Tensor] = []

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None, kv_cache: Any = None, kv_cache_flag: Any = None,
    ) -> Tensor:  # fmt: skip
        x = hidden_states
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        zeros = 0
        if kv_cache_flag["is_cache_step"]:
            self.cached = [k, v]
        else:
            zeros = -x.shape[1] % 128
            if kv_cache_flag["num_cached_chunks"]:
                k, v = (torch.cat(pair, 2) for pair in zip(self.cached, (k, v), strict=True))
        q, k = (turned(y, rotary_emb[name]) for y, name in ((q, "query"), (k, "key")))
        frames, chunks = places(rotary_emb["key"])
        seen = self.seen(frames, chunks, chunks[-x.shape[1] :, None])
        self.watch(q, k, frames, chunks)
        k, v = (nn.functional.pad(y, (0, 0, 0, zeros)) for y in (k, v))
        seen = nn.functional.pad(seen, (0, zeros), value=True)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def seen(self, frames: Tensor, chunks: Tensor, asking: Tensor) -> Tensor:
        """Which tokens those of the chunks `asking` see, `[H, L, M]`."""
        return (chunks == asking) | ((chunks < asking) & (frames >= ENDS[asking] - self.windows))

    def watch(self, q: Tensor, k: Tensor, frames: Tensor, chunks: Tensor) -> None:
        """For what listens."""


def places(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Frame and chunk of every token, by its row of RoPE."""
    times = freqs[0, 0, :, 0]
    frames = nn.functional.pad((times[1:] != times[:-1]).cumsum(0), (1, 0))
    return frames, torch.bucketize(frames, ENDS, right=True)


def turned(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(-2).to(x.dtype)


@pytest.mark.parametrize(
    "windows", [*(pytest.param(pair, marks=pytest.mark.slow) for pair in ((3, 3), (4, 4))), (2, 6)]
)
def test_heads_with_windows_are_the_pipeline_with_hidden_keys(windows: Sequence[int], plain: Tensor) -> None:
    """Of full and of coarse frames, in noisy passes and where the past is encoded again."""
    model = made()
    for block in model.blocks:
        block.attn1.set_processor(Hiding(windows))
    roles = [[SlidingWindow(window, positions="absolute") for window in windows]] * LAYERS
    found = forced(roles)
    assert apart(found, play(model)) < CLOSE
    assert apart(found, plain) > APART


def test_the_reference_with_nothing_hidden_is_the_pipeline(plain: Tensor) -> None:
    model = made()
    for block in model.blocks:
        block.attn1.set_processor(Hiding((6, 6)))
    assert apart(play(model), plain) < CLOSE


@pytest.mark.slow
def test_it_is_equal_in_a_second_video_in_batches_with_guidance_and_behind_given_frames() -> None:
    model = made()
    given = {"video_latents": torch.randn(1, 3, 4, 8, 16, generator=torch.Generator().manual_seed(3))}
    ways: list[dict[str, Any]] = [
        {"seed": 0},
        {"seed": 1, "batch": 2},
        {"seed": 2, "guidance_scale": 3.0},
        given,
        {"seed": 0, "chunks": (1, 2)},
    ]
    expected = [play(model, **way) for way in ways]
    handle = hf.apply_head_forcing(model, Full())
    for way, one in zip([*ways, *ways], [*expected, *expected], strict=True):
        assert apart(play(model, **way), one) < CLOSE, way
    assert len(handle.status().streams) == 0  # the pipeline dropped its caches


def test_mixed_heads_make_another_video_and_samples_of_a_batch_do_not_meet(plain: Tensor) -> None:
    model = made()
    found = forced(MIXED, model)
    assert apart(found, plain) > APART
    assert torch.equal(forced(MIXED, model), found)
    both = forced(MIXED, model, batch=2, seed=5)
    assert both.isfinite().all()
    assert apart(both[:1], both[1:]) > APART


def test_a_video_may_be_longer_than_the_configured_one_with_bounded_positions() -> None:
    """Which the pipeline allows as well, at positions that it was not trained on."""
    seen = set[float]()
    model = made((2, 2, 2))
    with hf.apply_head_forcing(model, Local(recent=2, sink=1)) as handle:
        with handle.observe(lambda call: seen.update(*call.positions)):
            out = play(model, (2,) * 6, size=(8, 8))
        window = handle.status().window
    assert out.isfinite().all()
    assert window == 6
    assert max(seen) < window <= 11


def test_the_hosts_buffers_are_free_while_we_are_in() -> None:
    host = AnyFlowFARHost()
    model = host.model()
    caches = host.caches(model)
    handle = hf.apply_head_forcing(model, Local(recent=1))
    with torch.no_grad():
        host.call(model, caches, 0, 2, 1)
    assert handle.status().released_bytes > 0
    sizes = {
        buffer.untyped_storage().nbytes() for layer in caches["kv"].values() for buffer in layer.values()
    }
    assert sizes == {4}


# Beside other libraries ---------------------------------------------------------------------------


def adapt(model: Any) -> None:
    lora = pytest.importorskip("peft").LoraConfig(
        r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter(lora)
    model.eval().requires_grad_(False)


@pytest.mark.parametrize("first", ["lora", pytest.param("head forcing", marks=pytest.mark.slow)])
def test_lora_of_diffusers_counts_before_and_after_apply(first: str, plain: Tensor) -> None:
    model, alone = made(), made()
    adapt(alone)
    expected = play(alone)
    assert apart(expected, plain) > APART
    if first == "lora":
        adapt(model)
    handle = hf.apply_head_forcing(model, Full())
    if first == "head forcing":
        adapt(model)
    assert apart(play(model), expected) < CLOSE
    model.disable_adapters()
    assert apart(play(model), plain) < CLOSE
    model.enable_adapters()
    handle.remove()
    assert torch.equal(play(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("first", ["offload", "head forcing"])
def test_group_offload_is_the_same_with_it(kind: str, first: str, plain: Tensor) -> None:
    """Blocks are given copies of the cache dicts then, with the same tensors."""
    model, cpu = made(), torch.device("cpu")
    expected = forced(MIXED)

    def offload() -> None:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(cpu, cpu, offload_type=kind, **blocks)

    if first == "offload":
        offload()
    handle = hf.apply_head_forcing(model, MIXED)
    if first == "head forcing":
        offload()
    assert torch.equal(play(model), expected)
    if first == "offload":
        handle.remove()
        assert torch.equal(play(model), plain)


def test_it_is_saved_as_if_it_was_not_there(tmp_path: Path, plain: Tensor) -> None:
    model = made()
    model.save_pretrained(tmp_path / "before")
    hf.apply_head_forcing(model, MIXED)
    model.save_pretrained(tmp_path / "while")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "diffusion_pytorch_model.safetensors" in names
    for name in names:
        assert (tmp_path / "while" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    loaded = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(tmp_path / "while").eval()
    assert torch.equal(play(loaded), plain)


def test_it_is_removed_without_a_trace(plain: Tensor) -> None:
    model = made()
    play(model)  # the model keeps a table of RoPE from its first video on
    before = snapshot(model)
    handle = hf.apply_head_forcing(model, MIXED)
    assert apart(play(model), plain) > APART
    handle.remove()
    assert before.diff(snapshot(model)) == []
    assert torch.equal(play(model), plain)


# What is refused ----------------------------------------------------------------------------------


class Takes:
    """A processor that is called otherwise."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None) -> Tensor:
        return hidden_states


def test_another_processor_is_refused_before_and_after_apply(plain: Tensor) -> None:
    model = made()
    known = model.blocks[1].attn1.processor
    handle = hf.apply_head_forcing(model, Full())
    model.blocks[1].attn1.set_processor(Takes())
    with pytest.raises(
        PatchedModuleError, match=r"the processor is a Takes now.*remove head forcing.*or restore"
    ):
        play(model)
    model.blocks[1].attn1.set_processor(known)
    assert apart(play(model), plain) < CLOSE
    handle.remove()
    for block in model.blocks:
        block.attn1.set_processor(Takes())
    assert AnyFlowFAR().why_not(model) is not None
    known._parallel_config = object()
    model = made()
    model.blocks[0].attn1.set_processor(known)
    with pytest.raises(PatchedModuleError, match="undo enable_parallelism"):
        forced(Full(), model)


def test_caches_that_skip_attention_are_refused_and_offloading_is_not() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    model = made()
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=["blocks"],
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_pyramid_attention_broadcast(model, config)
    with pytest.raises(PatchedModuleError, match=r"attn1: a cache of diffusers \(pyramid.*disable_cache"):
        hf.apply_head_forcing(model, Full())
    model = made()
    model._cache_config = object()
    with pytest.raises(PatchedModuleError, match=r"the model: a cache of diffusers \(enable_cache\)"):
        hf.apply_head_forcing(model, Full())
    model._cache_config = None
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    hf.apply_head_forcing(model, Full()).remove()


def test_roles_that_choose_by_content_are_served_while_all_frames_are_full() -> None:
    role = Memory(1, 1, 1)
    chunks = (1,) * 6
    assert forced(role, made(chunks, 7), chunks=chunks, size=(4, 8)).isfinite().all()
    with pytest.raises(
        StreamShapeError, match=r"chose frames by content, but the first \d frames are coarse"
    ):
        forced(role, made(chunks, 3), chunks=chunks, size=(4, 8))


def test_roles_that_average_frames_are_served_while_all_frames_are_full() -> None:
    role, chunks = Averaging(5, 1, 0.1, 0.5), (1,) * 7
    assert forced(role, made(chunks, 8), chunks=chunks, size=(4, 8)).isfinite().all()
    with pytest.raises(StreamShapeError, match="keeps more than whole frames, but after frames of"):
        forced(role, made(chunks, 3), chunks=chunks, size=(4, 8))


def test_roles_that_read_per_query_are_served_and_those_that_merge_patches_are_not(plain: Tensor) -> None:
    found = forced(Strided(1, 1, 5, 5, period=2, cap=1))
    assert found.isfinite().all()
    assert apart(found, plain) > APART
    with pytest.raises(UnsupportedModelError, match="takes no patch"):
        hf.apply_head_forcing(made(), Veil(1, 1, 5, 5, blocks=1, block=1, patch=2))


def test_a_prompt_switch_is_refused_with_what_to_do() -> None:
    host = AnyFlowFARHost()
    model = host.model()
    handle = hf.apply_head_forcing(model, Full())
    caches = host.caches(model)
    host.call(model, caches, 0, 2, 0)
    with pytest.raises(UnsupportedModelError, match="pass the new prompt to the pipeline"):
        handle.switch_prompt("cut")


def test_a_clean_pass_that_skips_a_chunk_is_refused_and_after_a_reset_it_is_whole() -> None:
    host, plain = AnyFlowFARHost(), AnyFlowFARHost()
    model, alone = host.model(), plain.model()
    handle = hf.apply_head_forcing(model, Full())
    caches, kept = host.caches(model), plain.caches(alone)
    for start, draw in ((0, 0), (2, 1), (2, 0)):
        host.call(model, caches, start, 2, draw)
        expected = plain.call(alone, kept, start, 2, draw)
    with pytest.raises(
        ChunkOrderError, match="covers 8 frames, its last chunk from 6 on, but the video has 4"
    ):
        host.call(model, caches, 6, 2, 0)
    handle.reset()
    assert torch.equal(host.call(model, caches, 2, 2, 0), expected)  # a clean pass brings all there is


def test_calls_that_are_not_of_whole_frames_are_refused() -> None:
    model = made()
    adapter, module = AnyFlowFAR(), model.blocks[0].attn1
    freqs = model.rope._forward_full_frame(2, 2, 4, torch.device("cpu")).flatten(0, 2)[None, None]
    arguments = {
        "hidden_states": torch.randn(1, 8, 32),
        "rotary_emb": {"query": freqs[:, :, -8:], "key": freqs},
        "kv_cache": {"full_cache": torch.zeros(1), "compressed_cache": torch.zeros(1)},
        "kv_cache_flag": {
            "is_cache_step": False,
            "num_cached_compressed_tokens": 0,
            "num_cached_full_tokens": 8,
        },
    }
    call = adapter.read(module, (), arguments)
    assert call is not None
    assert (call.start, call.grid) == (1, (1, 2, 4))
    for wrong in (7, 16):
        flag = {**arguments["kv_cache_flag"], "num_cached_full_tokens": wrong}
        with pytest.raises(StreamShapeError, match=r"frames begin at \(0, 8, 16\)"):
            adapter.read(module, (), {**arguments, "kv_cache_flag": flag})
    clean = {**arguments, "kv_cache_flag": {"is_cache_step": True}, "hidden_states": torch.randn(1, 16, 32)}
    call = adapter.read(module, (), clean)
    assert call is not None
    with pytest.raises(StreamShapeError, match="mask None: expected a BlockMask"):
        adapter.split(module, call)


# Measuring ----------------------------------------------------------------------------------------


class Weighing(Hiding):
    """Notes down how much attention of the last chunk of a call falls on itself, and on the first frame."""

    def __init__(self) -> None:
        super().__init__((6,) * HEADS)
        self.found: list[Tensor] = []

    def watch(self, q: Tensor, k: Tensor, frames: Tensor, chunks: Tensor) -> None:
        own, first = chunks == chunks[-1], frames == 0
        if not own.all():
            logits = q[:, :, -int(own.sum()) :] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            share = logits.softmax(-1).mean(2)[0]
            self.found.append(torch.stack([share[:, own].sum(-1), share[:, first].sum(-1)]))


def test_of_a_call_over_several_chunks_the_last_one_is_shown() -> None:
    """The others are recomputed: what their heads attend to was shown when they were made."""
    model, shown, calls = made(), [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    with hf.apply_head_forcing(model, Full()) as handle:
        with handle.observe(lambda seen: shown.append(seen.layer)):
            play(model)
        assert len(shown) == len(calls) < handle.status().calls


def test_a_profile_tells_where_heads_look_among_full_and_coarse_frames() -> None:
    model, beside = made(), made()
    weighing = [Weighing() for _ in beside.blocks]
    for block, one in zip(beside.blocks, weighing, strict=True):
        block.attn1.set_processor(one)
    play(beside)
    metrics = ["attention_mass", "mass_ratio", "qk_logits"]
    profile = profile_heads(model, lambda: play(model), metrics, protocol=Protocol(history=Full()))
    assert profile.start.tolist() == [1, 1, 1, 3, 3, 3, 5, 5]
    assert profile.video.unique().tolist() == [0]  # chunks that run again are no new video
    own, first = torch.stack([torch.stack(one.found) for one in weighing], 2).unbind(1)
    assert torch.allclose(profile.values["attention_mass.own"], own, atol=1e-5)
    assert torch.allclose(profile.values["attention_mass.first"], first, atol=1e-5)
    assert first.std() > 1e-4


def test_what_compares_candidates_needs_frames_of_one_grid_without_padding() -> None:
    model, adapter, early = made(), AnyFlowFAR(padding=1), Protocol(starts=(1,), history=Full())

    def run() -> None:
        play(model)

    profile = profile_heads(model, run, ["output_regret"], protocol=early, adapter=adapter)
    assert profile.start.unique().tolist() == [1]
    for wrong in ({"adapter": adapter, "protocol": Protocol(history=Full())}, {"protocol": early}):
        with pytest.raises(ProfileError, match=r"output_regret: .* leave this metric out, or choose other"):
            profile_heads(model, run, ["output_regret"], **wrong)  # type: ignore[arg-type]


# Bugs ---------------------------------------------------------------------------------------------


class OneLongChunk(AnyFlowFAR):
    """The clean pass as the last chunk alone, and what was written before stays."""

    def split(self, module: nn.Module, call: AttentionCall) -> Sequence[AttentionCall]:
        return list(super().split(module, call))[-1:]


class SeesFillers(AnyFlowFAR):
    def tokens(self, x: Tensor, frames: Sequence[int | None], call: AttentionCall) -> Tensor:
        pad = super().tokens(x[:, :0], (), call)
        return torch.cat([x.flatten(1, 2), pad], 1)


class TurnsInTimeOnly(AnyFlowFAR):
    def project(self, module: Any, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(module, call)
        return (q, module.norm_k(module.to_k(call.x)).view(q.shape) if k.shape == q.shape else k, v)


class PadsCleanPasses(AnyFlowFAR):
    def tokens(self, x: Tensor, frames: Sequence[int | None], call: AttentionCall) -> Tensor:
        out = super().tokens(x, frames, call)
        clean = call.arguments["kv_cache_flag"]["is_cache_step"]
        return torch.cat([out, torch.zeros_like(out[:, :96])], 1) if clean else out


class ForgetsWhatIsCoarse(AnyFlowFAR):
    """Takes the first tokens of every frame but the own, as if all were coarse."""

    def tokens(self, x: Tensor, frames: Sequence[int | None], call: AttentionCall) -> Tensor:
        fewer = [0 if frame is not None and frame < call.start else frame for frame in frames]
        return super().tokens(x, fewer, call)


class ProjectsTwice(AnyFlowFAR):
    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        return self.join(module, [out.flatten(2)], call)


BUGS = [
    OneLongChunk,
    SeesFillers,
    TurnsInTimeOnly,
    PadsCleanPasses,
    ForgetsWhatIsCoarse,
    ProjectsTwice,
]


FOUND_FAST = (SeesFillers, TurnsInTimeOnly, ForgetsWhatIsCoarse)


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, id=bug.__name__, marks=() if bug in FOUND_FAST else pytest.mark.slow) for bug in BUGS],
)
def test_a_planted_bug_is_seen(bug: type[AnyFlowFAR], plain: Tensor) -> None:
    try:
        found = forced(Full(), adapter=bug())
    except (ChunkOrderError, RuntimeError):
        return
    assert apart(found, plain) > CLOSE
