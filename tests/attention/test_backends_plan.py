"""Where segments lie, what kernels are called with, and what a pass costs beside its kernel."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from headforcing.attention.backends import Part, flash, varlen
from headforcing.attention.backends.sdpa import attend as sdpa
from headforcing.attention.ragged import Layout, key_rows, plan_of
from headforcing.testing.backends import ARRANGEMENTS, Arrangement, Group, budget_of
from headforcing.testing.strategies import arrangements
from headforcing.types import Heads, runs

# Kernels that do by other means what the real ones do, and refuse what those refuse or misread.


def by_segment(q, k, v, asked, begins, used):
    """Attention of one head, segment by segment."""
    out = torch.empty_like(q)
    for i, count in enumerate(used):
        a, b, c = asked[i], asked[i + 1], begins[i]
        sides = (x.transpose(0, 1) for x in (q[a:b], k[c : c + count], v[c : c + count]))
        out[a:b] = torch.nn.functional.scaled_dot_product_attention(*sides).transpose(0, 1)
    return out


def check_rows(q, k, v, asked, begins):
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.shape[1:] == k.shape[1:] == v.shape[1:]
    assert k.shape == v.shape
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for index, rows in ((asked, q), (begins, k)):
        assert index.dtype == torch.int32
        assert index.is_contiguous()
        assert index.device == rows.device
        assert int(index[0]) == 0
        assert int(index[-1]) == len(rows)
        assert bool((index.diff() >= 0).all())
    assert len(asked) == len(begins)


def varlen_attn(q, k, v, asked, begins, longest_q, longest_k, *, seqused_k):
    """`torch.nn.attention.varlen.varlen_attn`."""
    check_rows(q, k, v, asked, begins)
    assert seqused_k.dtype == torch.int32
    assert len(seqused_k) == len(begins) - 1
    assert bool((seqused_k <= begins.diff()).all())
    assert (longest_q, longest_k) == (int(asked.diff().max()), int(seqused_k.max()))
    return by_segment(q, k, v, asked.tolist(), begins.tolist(), seqused_k.tolist())


def flash_attn_varlen_func(q, k, v, asked, begins, longest_q, longest_k):
    """`flash_attn.flash_attn_varlen_func`: every key of a sequence counts."""
    check_rows(q, k, v, asked, begins)
    assert longest_q == int(asked.diff().max())
    assert longest_k >= int(begins.diff()[asked.diff() > 0].max())
    return by_segment(q, k, v, asked.tolist(), begins.tolist(), begins.diff().tolist())


FOLDED = {
    "varlen": functools.partial(varlen.attend_with, varlen_attn),
    "flash": functools.partial(flash.attend_with, flash_attn_varlen_func),
}
EACH = ["varlen", "flash"]
SPARE = Arrangement((Group((0, 2), 130, spare=2), Group((1,), 5, spare=1)), batch=2)


@pytest.mark.parametrize("name", EACH)
@given(arrangement=arrangements(), shuffle=st.randoms(use_true_random=False), seed=st.integers(0, 99))
@example(SPARE, None, 0)
@example(ARRANGEMENTS[-1], None, 0)  # two lengths of queries, each more than a block
def test_folded_heads_attend_as_each_by_itself(name, arrangement, shuffle, seed):
    """Whatever the kernel is told agrees with what it should compute; nothing unseen leaks in."""
    parts = arrangement.parts(seed=seed)
    if shuffle is not None:
        shuffle.shuffle(parts)  # parts need not come in the order of memory
    before = [x.clone() for part in parts for x in (part.q, part.k, part.v)]
    out = FOLDED[name](parts, arrangement.num_heads)
    budget_of(parts, arrangement.num_heads).check(out, f"{name}, {arrangement}")
    after = [x for part in parts for x in (part.q, part.k, part.v)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@given(arrangements())
def test_keys_in_one_storage_are_read_in_place(arrangement):
    parts = arrangement.parts()
    plan = plan_of(Layout.of(parts))
    if arrangement.shared or len(parts) > 1:  # a single part may lie well by itself
        assert plan.packed != arrangement.shared
    k, v = key_rows(parts, plan)
    for rows, x in ((k, parts[0].k), (v, parts[0].v)):
        same = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert same == (not plan.packed)
    without = plan_of(Layout.of(parts), gaps=False)
    assert without.ends == without.begins[1:]


@given(arrangements())
def test_a_plan_says_where_every_token_is(arrangement):
    """The specification: row by row, through the plan, what the parts hold."""
    parts = arrangement.parts()
    plan = plan_of(Layout.of(parts))
    k, v = key_rows(parts, plan)
    for part, q_run, k_run in zip(parts, plan.q_runs, plan.k_runs, strict=True):
        for sample in range(part.q.shape[0]):
            for head in range(part.q.shape[2]):
                begin, asked = k_run.at((sample, head)), q_run.at((sample, head))
                number = plan.begins.index(begin)
                assert plan.asked[number] == asked
                assert plan.queries[number] == part.q.shape[1]
                assert plan.asked[number + 1] - asked == part.q.shape[1]
                assert plan.used[number] == part.k.shape[1]
                span = slice(begin, begin + plan.used[number])
                assert torch.equal(k[span, 0], part.k[sample, :, head])
                assert torch.equal(v[span, 0], part.v[sample, :, head])
    assert list(plan.begins) == sorted(set(plan.begins))
    assert len(plan.used) == sum(part.q.shape[0] * part.q.shape[2] for part in parts)


def test_what_is_packed_comes_longest_first():
    parts = Arrangement((Group((0,), 3), Group((1, 2), 9), Group((3,), 5)), batch=2, shared=False).parts()
    assert plan_of(Layout.of(parts)).used == (9,) * 4 + (5,) * 2 + (3,) * 2


# Memory by hand: what can be read in place and what cannot.


def part_of(heads, k, v, num_heads=3):
    return Part(Heads(heads, num_heads), torch.randn(k.shape[0], 4, k.shape[2], k.shape[3]), k, v)


D = 8
FLAT = [torch.randn(400 * D) for _ in range(4)]


def two(*keys, values=None, storages=1):
    """Heads 0 and 2 that see 5 keys, head 1 that sees 7, at offsets and strides of sample, token, head."""
    parts = []
    for number, (heads, count) in enumerate([((0, 2), 5), ((1,), 7)]):
        sides = []
        for side, (offset, *strides) in enumerate((keys[number], (values or keys)[number])):
            flat = FLAT[side + 2 * (number % storages)]
            sides.append(flat.as_strided((2, count, len(heads), D), (*strides, 1), offset))
        parts.append(part_of(heads, *sides))
    return parts


ONE_BY_ONE = (0, 10 * D, D, 5 * D), (20 * D, 7 * D, D, 0)
FURTHER = (33 * D, 10 * D, D, 5 * D), (53 * D, 7 * D, D, 0)
MEMORY = {
    "role by role": (two(*ONE_BY_ONE), True),
    "other roles first": (two((14 * D, 10 * D, D, 5 * D), (0, 7 * D, D, 0)), True),
    "sample by sample": (two((0, 17 * D, D, 5 * D), (10 * D, 17 * D, D, 0)), True),
    "head by head": (two((0, 5 * D, D, 20 * D), (40 * D, 7 * D, D, 0)), True),
    "far apart": (two((D, 60 * D, D, 30 * D), (150 * D, 70 * D, D, 0)), True),
    "values further on": (two(*ONE_BY_ONE, values=FURTHER), True),
    "keys further on": (two(*FURTHER, values=ONE_BY_ONE), True),
    "values elsewhere": (two(*ONE_BY_ONE, values=(ONE_BY_ONE[0], FURTHER[1])), False),
    "two storages": (two(*ONE_BY_ONE, storages=2), False),
    "tokens apart": (two((0, 20 * D, 2 * D, 10 * D), (40 * D, 14 * D, 2 * D, 0)), False),
    "token by token": (two((0, 10 * D, 2 * D, D), (20 * D, 7 * D, D, 0)), False),
    "no whole rows": (two((3, 10 * D, D, 5 * D), (20 * D + 3, 7 * D, D, 0)), False),
    "a shared row": (two((0, 10 * D, D, 5 * D), (19 * D, 7 * D, D, 0)), False),
    "one for both samples": (two((0, 10 * D, D, 5 * D), (20 * D, 0, D, 0)), False),
    "unevenly mixed": (two((0, 40 * D, D, 14 * D), (5 * D, 25 * D, D, 0)), False),
}


@pytest.mark.parametrize(("parts", "in_place"), MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_memory_by_hand(name, parts, in_place):
    assert plan_of(Layout.of(parts)).packed != in_place
    budget_of(parts, 3).check(FOLDED[name](parts, 3), name)


# What a pass costs beside its kernel.

VIEWS = {"as_strided", "slice", "select", "transpose", "unsqueeze", "view", "alias", "detach"}


class Listing(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def idle(q, *rest, **more):
    """A kernel that costs nothing."""
    return q


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=range(len(ARRANGEMENTS)))
@pytest.mark.parametrize("module", [varlen, flash], ids=list(FOLDED))
def test_a_pass_copies_queries_and_results_once_and_nothing_else(module, arrangement, device):
    """No `cat`, no gather, no index made, nothing read from the device or sent to it."""
    parts = arrangement.parts(device)
    layout = Layout.of(parts)
    packed = plan_of(layout).packed
    module.attend_with(idle, parts, arrangement.num_heads)
    with Listing() as listing:
        module.attend_with(idle, parts, arrangement.num_heads)
    copies = sum(1 + len(runs(part.heads.indices)) for part in parts) + packed * 2 * len(parts)
    assert listing.names.count("copy_") == copies
    rest = set(listing.names) - VIEWS - {"copy_"}
    assert rest <= {"empty", "new_empty", "empty_strided", "set_"}, rest


def test_a_plan_is_made_once_and_not_kept_for_ever():
    first, second = (ARRANGEMENTS[1].parts(seed=seed) for seed in (1, 2))
    assert plan_of(Layout.of(first)) is plan_of(Layout.of(second))
    caches = (plan_of, varlen._starts, flash._starts)
    assert all(cache.cache_parameters()["maxsize"] for cache in caches)


def test_storages_are_told_apart_by_their_memory_and_not_remembered():
    layouts = []
    for _ in range(3):
        parts = Arrangement((Group((0,), 3), Group((1,), 4)), shared=False).parts()
        layouts.append(Layout.of(parts))
    assert layouts[0] == layouts[1] == layouts[2]


# Planted bugs: kernels that misread what they are told are found out.


def test_a_kernel_that_reads_all_the_room_is_found_out():
    def careless(q, k, v, asked, begins, *longest, seqused_k):
        return by_segment(q, k, v, asked.tolist(), begins.tolist(), begins.diff().tolist())

    parts = SPARE.parts()
    with pytest.raises(AssertionError):
        budget_of(parts, 3).check(varlen.attend_with(careless, parts, 3), "all the room")


def tiled(q, k, v, asked, begins, *longest, seqused_k):
    """FlashAttention-3: weights behind `seqused_k` are zero, but values are read by whole tiles of 64."""
    out = torch.empty_like(q)
    for i, used in enumerate(seqused_k.tolist()):
        rows, first = slice(int(asked[i]), int(asked[i + 1])), int(begins[i])
        read = min(math.ceil(used / 64) * 64, len(k) - first)
        scores = q[rows, 0] @ k[first : first + read, 0].T * q.shape[-1] ** -0.5
        scores[:, used:] = -torch.inf
        out[rows, 0] = scores.softmax(-1) @ v[first : first + read, 0]
    return out


def test_where_unread_rows_count_as_zero_times_themselves_there_are_none(monkeypatch):
    parts = SPARE.parts()
    budget = budget_of(parts, 3)
    budget.check(varlen.attend_with(tiled, parts, 3, gaps=False), "packed")
    with pytest.raises(AssertionError):
        budget.check(varlen.attend_with(tiled, parts, 3, gaps=True), "in place")
    assert varlen.leaves_gaps()
    for active, leaves in (("FA3", False), ("FA4", False), ("mine", False), ("FA2", True)):
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda found=active: found)
        assert varlen.leaves_gaps() == leaves


@pytest.mark.parametrize("name", EACH)
def test_the_stand_ins_agree_with_sdpa_on_one_head(name):
    parts = Arrangement((Group((0,), 40),), frames=1).parts()
    torch.testing.assert_close(FOLDED[name](parts, 1), sdpa(parts, 1))
