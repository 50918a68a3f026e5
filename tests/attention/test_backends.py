"""Every backend in the folder against attention in float64; a new file is tested without editing this one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import headforcing as hf
from headforcing.attention import backends
from headforcing.attention.backends import Part, auto, find_backend, flash, needs_of, varlen
from headforcing.attention.backends.sdpa import attend as sdpa
from headforcing.attention.needs import Case, Needs
from headforcing.attention.ragged import Layout, plan_of
from headforcing.errors import OptionError, module_names
from headforcing.roles import Anchor, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.testing import check_backend
from headforcing.testing.backends import ARRANGEMENTS, budget_of
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
    reason = needs_of(name).why_not(case(device, dtype))
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
def test_a_backend_is_documented_and_has_its_table(name):
    assert f"`{name}`" in (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert isinstance(needs_of(name), Needs)


@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_a_kernel_without_gradients_refuses_to_drop_them(name, monkeypatch):
    parts = ARRANGEMENTS[0].parts()
    parts[0].v.requires_grad_()
    module = backends.named_module(backends.__name__, name)
    monkeypatch.setattr(module, "NEEDS", Needs())
    with pytest.raises(OptionError, match="no gradients"):
        module.attend(parts, 3)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_budget_is_of_the_size_of_rounding(dtype):
    """Not so wide that everything passes: some units of the dtype, and of float32 for sums over many."""
    for arrangement in ARRANGEMENTS:
        budget = budget_of(arrangement.parts(dtype=dtype), arrangement.num_heads)
        units = 16 * torch.finfo(dtype).eps + 1000 * torch.finfo(torch.float32).eps
        assert budget.allowed.max() < units * max(1, budget.exact.abs().max())


# `auto` chooses by stated conditions.

HERE = needs_of("varlen").missing() is None
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TABLE = [
    (Case("cuda", BF16, 128, (9, 0)), "varlen"),
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
def test_auto_chooses_by_a_table(asked, expected):
    assert auto.choose(asked) == (expected if HERE else "sdpa")


def test_what_pytorch_was_built_with_counts_on_cuda_alone():
    needs, other = Needs(flash_built=True), Needs()
    assert "built without it" in str(needs.why_not(Case("cuda", BF16, 128, (9, 0), flash_built=False)))
    assert needs.why_not(Case("cuda", BF16, 128, (9, 0))) is None
    assert needs.why_not(Case("cpu", BF16, 128, flash_built=False)) is None
    assert other.why_not(Case("cuda", BF16, 128, (9, 0), flash_built=False)) is None
    for device in DEVICES:
        told = torch.backends.cuda.is_flash_attention_available()
        assert case(device, BF16).flash_built is (device != "cuda" or told)


def test_auto_does_not_take_another_one_when_a_kernel_fails(monkeypatch):
    def broken(parts, num_heads):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(auto, "_chosen", lambda case: broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        auto.attend(ARRANGEMENTS[0].parts(), 3)


# What is not there is said when roles are applied, before anything changes.


def test_a_backend_that_is_not_installed_is_refused_at_apply():
    missing = needs_of("flash").missing()
    if missing is None:
        pytest.skip("flash-attn is installed")
    rig = Rig()
    with pytest.raises(
        OptionError, match=r"backend 'flash'.*flash_attn.*pip install 'headforcing\[flash-attn"
    ):
        hf.apply_head_forcing(rig.model, Local(recent=1), backend="flash")
    assert not [module for module in rig.model.modules() if "HeadForced" in type(module).__name__]


def test_an_older_function_is_told_from_the_one_that_is_needed():
    old = Needs(
        function="headforcing.attention.backends.sdpa:attend", argument="seqused_k", remedy="get a newer one"
    )
    assert "seqused_k, which is unknown here: get a newer one" in str(old.missing())
    with pytest.raises(OptionError, match="get a newer one"):
        old.load()
    assert "nowhere" in str(Needs(function="headforcing.attention.backends.sdpa:nowhere").missing())


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

ROLES = [
    [Anchor(1, 1), Local(1), Anchor(1, 1), Memory(1, 2, 1)],
    [Wave(1, 1, period=2, cap=1), Local(1), Veil(1, 1, blocks=1, block=2, patch=2), SlidingWindow(6)],
]


def film(backend, dtype=torch.float32, store="ring"):
    """Five chunks of a model with roles that see parts, read per frame and keep digests."""
    rig = Rig(window=9, dtype=dtype)
    with hf.apply_head_forcing(rig.model, ROLES, window=9, backend=backend, store=store) as handle:
        video = torch.stack(rig.video(rig.caches(), 5))
        return video.double(), handle.status()


def follows(q, k, v, asked, begins, longest_q, longest_k, seqused_k):
    """What `varlen_attn` computes, by other means."""
    out = torch.empty_like(q)
    for i, used in enumerate(seqused_k.tolist()):
        (a, b), c = asked[i : i + 2].tolist(), int(begins[i])
        sides = (x.transpose(0, 1) for x in (q[a:b], k[c : c + used], v[c : c + used]))
        out[a:b] = torch.nn.functional.scaled_dot_product_attention(*sides).transpose(0, 1)
    return out


@pytest.fixture(scope="module")
def exact():
    return film("sdpa", FP64)[0]


@pytest.mark.parametrize("store", ["ring", "reference"])
@pytest.mark.parametrize(
    "backend",
    ["auto", functools.partial(varlen.attend_with, follows)],
    ids=["auto", "varlen without its kernel"],
)
def test_a_video_is_as_exact_as_that_of_sdpa(backend, store, exact):
    """Errors grow through layers and chunks as they do for `sdpa`, whose own error is the measure."""
    video, status = film(backend, store=store)
    allowed = 4 * (film("sdpa")[0] - exact).abs().max()
    assert (video - exact).abs().max() <= allowed
    assert status.backend == (backend if isinstance(backend, str) else "partial")


def test_a_video_in_inference_mode():
    rig = Rig(window=9)
    plain, _ = film("auto")
    with hf.apply_head_forcing(rig.model, ROLES, window=9, backend="auto"), torch.inference_mode():
        again = torch.stack(rig.video(rig.caches(), 5)).double()
    assert torch.equal(plain, again)


WHOLE = (Local(), Anchor(), Memory(), SlidingWindow(6))
BESIDE = (Averaging(9), Anchor(), Participating(9, 1, 3, 1), Dynamic(1, pieces=2, positions="compact"))


def plans_of(row, chunks, batch=1):
    """Where the parts of every call of a video lay, passes with noise first."""
    plans = []

    def noting(parts, num_heads):
        plans.append(plan_of(Layout.of(parts)))
        return sdpa(parts, num_heads)

    rig = Rig(9)
    hf.apply_head_forcing(rig.model, [row] * 2, window=9, backend=noting)
    caches = rig.caches(batch)
    for start in range(0, 3 * chunks, 3):
        for draw in (1, 0):
            rig.call(caches, start, 3, draw=draw)
    return plans


@pytest.mark.parametrize("row", [WHOLE, BESIDE], ids=["whole frames", "and what is kept beside them"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_ring_store_is_read_in_place(batch, row):
    """Where all that is kept is seen, nothing is copied for a kernel that takes rows, warm-up included."""
    plans = plans_of(row, 12, batch)
    assert not any(plan.packed for plan in plans)
    assert plans[-1] is plans[-2], "the plan of a full memory is made once"


@pytest.mark.parametrize("row", [(Wave(),) * 4, (Wave(), Strided(), Veil(), Wave())], ids=["one", "many"])
def test_what_query_frames_see_is_read_in_place_once_memories_are_full(row):
    plans = plans_of(row, 24)
    settled = plans[len(plans) // 2 :]
    assert not any(plan.packed for plan in settled)
    assert len(settled[0].q_runs) == 3 * len(set(row)), "one per role and query frame"


def test_the_same_backend_by_name_and_function_is_one_application():
    rig = Rig()
    handle = hf.apply_head_forcing(rig.model, Local(1), backend="auto")
    assert hf.apply_head_forcing(rig.model, Local(1), backend=auto.attend) is handle
    with pytest.raises(hf.errors.AlreadyAppliedError):
        hf.apply_head_forcing(rig.model, Local(1), backend="sdpa")
    assert flash.attend is not varlen.attend
