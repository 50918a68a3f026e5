"""Every backend in the folder against attention in float64; a new file is tested without editing this one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import headforcing as hf
from headforcing.attention import backends
from headforcing.attention import part as part_module
from headforcing.attention.backends import Part, auto, find_backend, flash, requirements_of, varlen
from headforcing.attention.backends.sdpa import attend as sdpa
from headforcing.attention.part import num_queries
from headforcing.attention.ragged import CallLayout, attend_ragged, ragged_layout
from headforcing.attention.requirements import Case, Requirements
from headforcing.errors import OptionError, module_names
from headforcing.roles import Anchor, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.testing import check_backend
from headforcing.testing.backends import ARRANGEMENTS, budget_of
from headforcing.types import Heads
from tests.hosts.rig import Rig

NAMES = module_names(backends.__name__)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROOT = Path(__file__).parents[2]


def case(device: str, dtype: torch.dtype, dim: int = 16) -> Case:
    return Case.of(torch.empty(1, 1, 1, dim, dtype=dtype, device=device))


# Every backend in the folder: it attends as the budget allows, or says why it does not.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_attends_or_says_why_not(name, dtype, device, request):
    reason = requirements_of(name).why_not(case(device, dtype))
    if reason is None:
        check_backend(find_backend(name), device=device, dtypes=[dtype])
        return
    parts = ARRANGEMENTS[0].parts(device, dtype)
    module = backends.named_module(backends.__name__, name)
    with pytest.raises(OptionError) as error:
        module.attend(parts, ARRANGEMENTS[0].num_heads)
    for piece in (repr(name), reason, device, str(dtype).removeprefix("torch."), "sdpa", "auto"):
        assert piece in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_is_documented_and_states_its_requirements(name):
    assert f"`{name}`" in (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert isinstance(requirements_of(name), Requirements)


@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_a_kernel_without_gradients_refuses_to_drop_them(name, monkeypatch):
    parts = ARRANGEMENTS[0].parts()
    parts[0].v.requires_grad_()
    module = backends.named_module(backends.__name__, name)
    monkeypatch.setattr(module, "REQUIREMENTS", Requirements())
    with pytest.raises(OptionError, match="no gradients"):
        module.attend(parts, 3)


# Parts of one role that lie side by side take one call of `sdpa`.


def by_query_frame(samples: int = 1, step: int = 9) -> list[Part]:
    """A role of two heads that reads per query frame, three of 4 tokens, and another role."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(samples, count, 2, 16, generator=generator) for count in (12, 30, 30))
    pair, other = Heads((0, 2), 3), Heads((1,), 3)
    frames = [slice(first, first + 4) for first in (0, 4, 8)]
    found = [
        Part(pair, q[:, own], k[:, at : at + 9], v[:, at : at + 9], own)
        for own, at in zip(frames, (0, step, 18), strict=True)
    ]
    return [*found, Part(other, q[:, :, :1], k[:, :, :1], v[:, :, :1], slice(0, 12))]


@pytest.mark.parametrize(("samples", "step", "expected"), [(1, 9, 2), (2, 9, 4), (1, 10, 4)])
def test_query_frames_attend_in_one_call_where_they_lie_side_by_side(samples, step, expected, monkeypatch):
    parts = by_query_frame(samples, step)
    apart = [Part(p.heads, p.q.clone(), p.k.clone(), p.v.clone(), p.rows) for p in parts]
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *x: calls.append(1) or attend(*x)
    )
    found = sdpa(parts, 3)
    assert len(calls) == expected
    assert torch.equal(found, sdpa(apart, 3))
    assert len(calls) == expected + 4


def test_query_frames_in_the_place_of_others_are_found(monkeypatch):
    right = part_module.side_by_side
    monkeypatch.setattr(
        part_module,
        "side_by_side",
        lambda every: None if (found := right(every)) is None else found.flip(0),
    )
    parts = by_query_frame()
    apart = [Part(p.heads, p.q.clone(), p.k.clone(), p.v.clone(), p.rows) for p in parts]
    assert not torch.equal(sdpa(parts, 3), sdpa(apart, 3))


# The check sees what is wrong.


def shorter(parts, num_heads):
    """Forgets the last key."""
    return sdpa([Part(p.heads, p.q, p.k[:, :-1], p.v[:, :-1], p.rows) for p in parts], num_heads)


def longer(parts, num_heads):
    """Sees a key twice."""
    again = [Part(p.heads, p.q, *(torch.cat([x, x[:, :1]], 1) for x in (p.k, p.v)), p.rows) for p in parts]
    return sdpa(again, num_heads)


def sharper(parts, num_heads):
    """Scales by one percent more."""
    return sdpa([Part(p.heads, 1.01 * p.q, p.k, p.v, p.rows) for p in parts], num_heads)


def rounded(parts, num_heads):
    """Computes in bfloat16."""
    low = [Part(p.heads, *(x.bfloat16() for x in (p.q, p.k, p.v)), p.rows) for p in parts]
    return sdpa(low, num_heads).to(parts[0].q.dtype)


def mixed_up(parts, num_heads):
    """Turns samples round, or heads where there is one."""
    return sdpa(parts, num_heads).roll(1, 2)


def askew(parts, num_heads):
    """Returns a view."""
    out = sdpa(parts, num_heads)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def greedy(parts, num_heads):
    """Changes what it was given."""
    out = sdpa(parts, num_heads)
    parts[0].k.mul_(2)
    return out


def wider(parts, num_heads):
    """Answers in another dtype."""
    return sdpa(parts, num_heads).double()


WRONG = [shorter, longer, sharper, rounded, mixed_up, askew, greedy, wider]


@pytest.mark.parametrize("attend", WRONG, ids=lambda attend: attend.__name__)
def test_the_check_finds_what_is_wrong(attend):
    with pytest.raises(AssertionError):
        check_backend(attend)


def unfused(parts, num_heads):
    """Operators of the dtype one by one: rounds after every step."""
    batch, _, _, dim = parts[0].q.shape
    out = parts[0].q.new_empty(batch, num_queries(parts), num_heads, dim)
    for part in parts:
        q, k, v = (x.transpose(1, 2) for x in (part.q, part.k, part.v))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        part.heads.put(out[:, part.rows], (weights @ v).transpose(1, 2))
    return out


def in_float32(parts, num_heads):
    """Rounds the result alone."""
    wide = [Part(p.heads, *(x.float() for x in (p.q, p.k, p.v)), p.rows) for p in parts]
    return sdpa(wide, num_heads).to(parts[0].q.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attend", [unfused, in_float32], ids=lambda attend: attend.__name__)
def test_the_budget_has_room_for_every_correct_computation(attend, dtype):
    """On any CPU: it is computed from the data alone, and no kernel of the machine is its measure."""
    for dim in (16, 64, 128):
        check_backend(attend, dtypes=[dtype], dim=dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_budget_is_of_the_size_of_rounding(dtype):
    """Not so wide that everything passes: some units of the dtype, and of float32 for sums over many."""
    for arrangement in ARRANGEMENTS:
        budget = budget_of(arrangement.parts(dtype=dtype), arrangement.num_heads)
        units = 16 * torch.finfo(dtype).eps + 1000 * torch.finfo(torch.float32).eps
        assert budget.allowed.max() < units * max(1, budget.exact.abs().max())


# `auto` chooses by stated conditions.

HERE = requirements_of("varlen").missing() is None
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TABLE = [
    (Case("cuda", BF16, 128, (8, 9)), "varlen"),
    (Case("cuda", BF16, 128, (9, 0)), "sdpa"),  # cuDNN's
    (Case("cuda", BF16, 128, (10, 0)), "sdpa"),
    (Case("cuda", BF16, 128, (12, 0)), "varlen"),
    (Case("cuda", FP16, 64, (8, 0)), "varlen"),
    (Case("cuda", BF16, 256, (8, 0)), "varlen"),
    (Case("cuda", BF16, 264, (9, 0)), "sdpa"),  # too many channels
    (Case("cuda", BF16, 100, (9, 0)), "sdpa"),  # no multiple of 8
    (Case("cuda", FP32, 128, (9, 0)), "sdpa"),
    (Case("cuda", FP64, 128, (9, 0)), "sdpa"),
    (Case("cuda", FP16, 128, (7, 5)), "sdpa"),  # an older GPU
    (Case("cuda", BF16, 128, None), "sdpa"),  # `cuda` of ROCm
    (Case("cuda", BF16, 128, (9, 0), flash_built=False), "sdpa"),  # a PyTorch without FlashAttention
    (Case("cpu", BF16, 128), "sdpa"),
    (Case("cpu", FP32, 128), "sdpa"),
    (Case("mps", FP16, 128), "sdpa"),
    (Case("meta", BF16, 128), "sdpa"),
]


@pytest.mark.parametrize(("asked", "expected"), TABLE, ids=lambda value: str(value))
def test_auto_chooses_by_a_table(asked, expected, monkeypatch):
    monkeypatch.setattr(auto.cudnn, "version", lambda: auto.CUDNN_VERSION)
    assert auto.choose(asked) == (expected if HERE else "sdpa")
    monkeypatch.setattr(auto.cudnn, "version", lambda: auto.CUDNN_VERSION - 1)
    if asked.capability == (9, 0) and expected == "sdpa" and requirements_of("varlen").why_not(asked) is None:
        assert auto.choose(asked) == "varlen", "cuDNN is older"


def test_with_flash_attention_3_auto_attends_in_one_call_on_later_gpus_too(monkeypatch):
    monkeypatch.setattr(auto, "is_flash_2", lambda: False)
    for capability in ((8, 0), (9, 0), (10, 0)):
        assert auto.choose(Case("cuda", BF16, 128, capability)) == ("varlen" if HERE else "sdpa")
    assert auto.choose(Case("cuda", FP32, 128, (9, 0))) == "sdpa"


def test_what_pytorch_was_built_with_counts_on_cuda_alone():
    built, other = Requirements(flash_built=True), Requirements()
    assert "built without it" in str(built.why_not(Case("cuda", BF16, 128, (9, 0), flash_built=False)))
    assert built.why_not(Case("cuda", BF16, 128, (9, 0))) is None
    assert built.why_not(Case("cpu", BF16, 128, flash_built=False)) is None
    assert other.why_not(Case("cuda", BF16, 128, (9, 0), flash_built=False)) is None
    for device in DEVICES:
        told = torch.backends.cuda.is_flash_attention_available()
        assert case(device, BF16).flash_built is (device != "cuda" or told)


def test_auto_does_not_take_another_one_when_a_kernel_fails(monkeypatch):
    def broken(parts, num_heads):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(auto, "_chosen", lambda *_: broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        auto.attend(ARRANGEMENTS[0].parts(), 3)


# What is not there is said when roles are applied, before anything changes.


def test_a_backend_that_is_not_installed_is_refused_at_apply():
    missing = requirements_of("flash").missing()
    if missing is None:
        pytest.skip("flash-attn is installed")
    rig = Rig()
    with pytest.raises(
        OptionError, match=r"backend 'flash'.*flash_attn.*pip install 'headforcing\[flash-attn"
    ):
        hf.apply_head_forcing(rig.model, Local(recent=1), backend="flash")
    assert not [module for module in rig.model.modules() if "HeadForced" in type(module).__name__]


def test_a_library_without_the_function_is_not_enough():
    old = Requirements(function="headforcing.attention.backends.sdpa:nowhere", remedy="get a newer one")
    assert "nowhere, which is not here" in str(old.missing())
    with pytest.raises(OptionError, match="get a newer one"):
        old.load()


def test_what_cannot_run_here_says_so_at_the_first_call():
    rig = Rig()
    if not HERE:
        pytest.skip("this PyTorch has no varlen_attn")
    with (
        hf.apply_head_forcing(rig.model, Local(recent=1), backend="varlen"),
        pytest.raises(OptionError, match=r"'varlen' cannot attend in float32 on cpu.*it runs on cuda"),
    ):
        rig.call(rig.caches(), 0, 3)


# Through the whole library.

WAVE = Wave(near=6, far=9)
ROLES = [
    [Anchor(1, 1), Local(1), Anchor(1, 1), Memory(1, 2, 1)],
    [
        Wave(1, 1, 6, 9, period=2, cap=1),
        Local(1),
        Veil(1, 1, 6, 9, blocks=1, block=2, patch=2),
        SlidingWindow(6),
    ],
]


def film(backend, dtype=torch.float32, store="ring"):
    """Five chunks of a model with roles that see parts, read per frame and keep digests."""
    rig = Rig(window=9, dtype=dtype)
    with hf.apply_head_forcing(rig.model, ROLES, window=9, backend=backend, store=store) as handle:
        video = torch.stack(rig.video(rig.caches(), 5))
        return video.double(), handle.status()


def varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
    """What the kernel computes, by other means."""
    out = torch.empty_like(q)
    for i in range(len(cu_seqlens_q) - 1):
        (a, b), (c, d) = (starts[i : i + 2].tolist() for starts in (cu_seqlens_q, cu_seqlens_k))
        sides = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        out[a:b] = torch.nn.functional.scaled_dot_product_attention(*sides).transpose(0, 1)
    return out


@pytest.fixture(scope="module")
def exact():
    return film("sdpa", FP64)[0]


RAGGED = pytest.param(functools.partial(attend_ragged, varlen_attn), id="varlen without its kernel")


@pytest.mark.parametrize("store", ["ring", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [pytest.param("auto", marks=pytest.mark.slow), RAGGED])
def test_a_video_is_as_exact_as_that_of_sdpa(backend, store, exact):
    """Errors grow through layers and chunks as they do for `sdpa`, whose own error is the measure."""
    video, status = film(backend, store=store)
    allowed = 4 * (film("sdpa")[0] - exact).abs().max()
    assert (video - exact).abs().max() <= allowed
    assert status.backend == (backend if isinstance(backend, str) else "partial")


def test_a_video_in_inference_mode():
    rig, attend = Rig(window=9), functools.partial(attend_ragged, varlen_attn)
    plain, _ = film(attend)
    with hf.apply_head_forcing(rig.model, ROLES, window=9, backend=attend), torch.inference_mode():
        again = torch.stack(rig.video(rig.caches(), 5)).double()
    assert torch.equal(plain, again)


WHOLE = (Local(), Anchor(), Memory(), SlidingWindow(6))
BESIDE = (Averaging(9), Anchor(), Participating(9, 1, 3, 1), Dynamic(1, pieces=2, positions="compact"))


def layouts_of(row, chunks, batch=1):
    """Where the parts of every call of a video lay, passes with noise first."""
    layouts = []

    def noting(parts, num_heads):
        layouts.append(ragged_layout(CallLayout.of(parts)))
        return sdpa(parts, num_heads)

    rig = Rig(9)
    hf.apply_head_forcing(rig.model, [row] * 2, window=9, backend=noting)
    caches = rig.caches(batch)
    for start in range(0, 3 * chunks, 3):
        for draw in (1, 0):
            rig.call(caches, start, 3, draw=draw)
    return layouts


@pytest.mark.parametrize(
    ("batch", "row"),
    [
        (2, WHOLE),
        (1, BESIDE),
        pytest.param(1, WHOLE, marks=pytest.mark.slow),
        pytest.param(2, BESIDE, marks=pytest.mark.slow),
    ],
)
def test_the_ring_store_is_read_in_place(batch, row):
    """Where all that is kept is seen, nothing is copied for a kernel that takes rows, warm-up included."""
    layouts = layouts_of(row, 12, batch)
    assert not any(layout.packed for layout in layouts)
    assert layouts[-1] is layouts[-2], "the layout of full buffers is computed once"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param((WAVE,) * 4, marks=pytest.mark.slow),
        (WAVE, Strided(near=6, far=9), Veil(near=6, far=9, block=1), WAVE),
    ],
    ids=["one", "many"],
)
def test_what_query_frames_see_is_read_in_place_once_memories_are_full(row):
    layouts = layouts_of(row, 24)
    settled = layouts[len(layouts) // 2 :]
    assert not any(layout.packed for layout in settled)
    assert len(settled[0].q_rows) == 3 * len(set(row)), "one per role and query frame"


def test_the_same_backend_by_name_and_function_is_one_application():
    rig = Rig()
    handle = hf.apply_head_forcing(rig.model, Local(1), backend="auto")
    assert hf.apply_head_forcing(rig.model, Local(1), backend=auto.attend) is handle
    with pytest.raises(hf.errors.AlreadyAppliedError):
        hf.apply_head_forcing(rig.model, Local(1), backend="sdpa")
    assert flash.attend is not varlen.attend
