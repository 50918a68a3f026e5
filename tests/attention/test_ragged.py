"""Where sequences lie, what kernels are called with, and what a pass costs beside its kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from headforcing.attention.backends import Part, flash, varlen
from headforcing.attention.backends.sdpa import attend as sdpa
from headforcing.attention.ragged import CallLayout, attend_ragged, index_tensors, key_rows, ragged_layout
from headforcing.attention.requirements import Requirements
from headforcing.testing.backends import ARRANGEMENTS, Arrangement, Group, budget_of
from headforcing.types import Heads
from tests.strategies import arrangements

# A kernel that does by other means what the real ones do, and refuses what those refuse or misread.


def by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
    """`varlen_attn` and `flash_attn_varlen_func`: every key of a sequence counts."""
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.shape[1:] == k.shape[1:] == v.shape[1:]
    assert k.shape == v.shape
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for index, rows in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        assert index.dtype == torch.int32
        assert index.is_contiguous()
        assert index.device == rows.device
        assert int(index[0]) == 0
        assert int(index[-1]) == len(rows)
        assert bool((index.diff() >= 0).all())
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    asking = cu_seqlens_q.diff() > 0
    assert max_q == int(cu_seqlens_q.diff().max())
    assert max_k == int(cu_seqlens_k.diff()[asking].max())
    return attended(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist())


def attended(q, k, v, q_starts, k_starts):
    out = torch.empty_like(q)
    for i in range(len(q_starts) - 1):
        a, b, c, d = *q_starts[i : i + 2], *k_starts[i : i + 2]
        if a == b:
            continue
        sides = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        out[a:b] = torch.nn.functional.scaled_dot_product_attention(*sides).transpose(0, 1)
    return out


SPARE = Arrangement((Group((0, 2), 130, spare=2), Group((1,), 5, spare=1)), batch=2)


def layout_of(parts, gaps=True):
    return ragged_layout(CallLayout.of(parts), gaps)


@given(arrangement=arrangements(), shuffle=st.randoms(use_true_random=False), seed=st.integers(0, 99))
@example(SPARE, None, 0)
@example(ARRANGEMENTS[-1], None, 0)  # two lengths of queries, each more than a tile
def test_folded_heads_attend_as_each_by_itself(arrangement, shuffle, seed):
    """Whatever the kernel is given agrees with what it should compute; nothing unseen leaks in."""
    parts = arrangement.parts(seed=seed)
    if shuffle is not None:
        shuffle.shuffle(parts)  # parts need not come in the order of memory
    before = [x.clone() for part in parts for x in (part.q, part.k, part.v)]
    out = attend_ragged(by_sequence, parts, arrangement.num_heads)
    budget_of(parts, arrangement.num_heads).check(out, f"{arrangement}")
    after = [x for part in parts for x in (part.q, part.k, part.v)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@given(arrangements())
def test_keys_in_one_storage_are_read_in_place(arrangement):
    parts = arrangement.parts()
    layout = layout_of(parts)
    if arrangement.shared or len(parts) > 1:  # a single part may lie well by itself
        assert layout.packed != arrangement.shared
    k, v = key_rows(parts, layout)
    for rows, x in ((k, parts[0].k), (v, parts[0].v)):
        same = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert same == (not layout.packed)
    without = layout_of(parts, gaps=False)
    assert not without.gaps
    assert len(without.cu_seqlens_q) == sum(part.q.shape[0] * part.q.shape[2] for part in parts) + 1


@given(arrangements())
def test_a_layout_says_where_every_token_is(arrangement):
    """The specification: row by row, through the layout, what the parts hold."""
    parts = arrangement.parts()
    layout = layout_of(parts)
    k, v = key_rows(parts, layout)
    sequences = list(zip(layout.cu_seqlens_q, layout.cu_seqlens_k, strict=True))
    found = set()
    for part, q_rows, k_rows in zip(parts, layout.q_rows, layout.k_rows, strict=True):
        for sample in range(part.q.shape[0]):
            for head in range(part.q.shape[2]):
                starts = q_rows.start((sample, head)), k_rows.start((sample, head))
                number = sequences.index(starts)
                ends = sequences[number + 1]
                assert ends[0] - starts[0] == part.q.shape[1]
                assert ends[1] - starts[1] == part.k.shape[1]
                assert torch.equal(k[starts[1] : ends[1], 0], part.k[sample, :, head])
                assert torch.equal(v[starts[1] : ends[1], 0], part.v[sample, :, head])
                found.add(number)
    rest = set(range(len(sequences) - 1)) - found
    assert all(sequences[number][0] == sequences[number + 1][0] for number in rest), "nobody asks for these"
    assert layout.gaps == bool(rest)


def test_what_is_packed_comes_longest_first():
    parts = Arrangement((Group((0,), 3), Group((1, 2), 9), Group((3,), 5)), batch=2, shared=False).parts()
    starts = torch.tensor(layout_of(parts).cu_seqlens_k)
    assert starts.diff().tolist() == [9] * 4 + [5] * 2 + [3] * 2


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
def test_memory_by_hand(parts, in_place):
    assert layout_of(parts).packed != in_place
    budget_of(parts, 3).check(attend_ragged(by_sequence, parts, 3), "by hand")


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
@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=range(len(ARRANGEMENTS)))
def test_a_pass_copies_queries_and_results_once_and_nothing_else(arrangement, gaps, device):
    """No `cat`, no gather, no index made, nothing read from the device or sent to it."""
    parts = arrangement.parts(device)
    packed = layout_of(parts, gaps).packed
    attend_ragged(idle, parts, arrangement.num_heads, gaps=gaps)
    with Listing() as listing:
        attend_ragged(idle, parts, arrangement.num_heads, gaps=gaps)
    assert listing.names.count("copy_") + listing.names.count("index_copy_") == (2 + packed * 2) * len(parts)
    rest = set(listing.names) - VIEWS - {"copy_", "index_copy_"}
    assert rest <= {"empty", "new_empty", "empty_strided", "set_"}, rest


def test_a_layout_is_computed_once_and_not_kept_for_ever():
    first, second = (ARRANGEMENTS[1].parts(seed=seed) for seed in (1, 2))
    assert layout_of(first) is layout_of(second)
    assert ragged_layout.cache_parameters()["maxsize"] == index_tensors.most


def test_storages_are_told_apart_by_their_memory_and_not_remembered():
    layouts = []
    for _ in range(3):
        parts = Arrangement((Group((0,), 3), Group((1,), 4)), shared=False).parts()
        layouts.append(CallLayout.of(parts))
    assert layouts[0] == layouts[1] == layouts[2]


# Planted bugs: kernels that misread what they are told are found out.


def test_a_kernel_that_reads_what_lies_behind_is_found_out():
    def careless(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
        starts = cu_seqlens_k.tolist()
        gaps = (cu_seqlens_q.diff() == 0).tolist()
        behind = [starts[i + gap] for i, gap in enumerate([*gaps, False])]
        return attended(q, k, v, cu_seqlens_q.tolist(), behind)

    parts = SPARE.parts()
    with pytest.raises(AssertionError):
        budget_of(parts, 3).check(attend_ragged(careless, parts, 3), "the gaps")


def tiled(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
    """FlashAttention-3: weights behind a sequence are zero, but values are read by whole tiles of 64."""
    out = torch.empty_like(q)
    for i in range(len(cu_seqlens_q) - 1):
        (a, b), (first, end) = (starts[i : i + 2].tolist() for starts in (cu_seqlens_q, cu_seqlens_k))
        read = min(math.ceil((end - first) / 64) * 64, len(k) - first)
        scores = q[a:b, 0] @ k[first : first + read, 0].T * q.shape[-1] ** -0.5
        scores[:, end - first :] = -torch.inf
        out[a:b, 0] = scores.softmax(-1) @ v[first : first + read, 0]
    return out


def test_where_rows_behind_count_as_zero_times_themselves_there_are_none(monkeypatch):
    parts = SPARE.parts()
    budget = budget_of(parts, 3)
    budget.check(attend_ragged(tiled, parts, 3, gaps=False), "packed")
    with pytest.raises(AssertionError):
        budget.check(attend_ragged(tiled, parts, 3, gaps=True), "in place")
    assert varlen.is_flash_2()
    for active, allows in (("FA3", False), ("FA4", False), ("mine", False), ("FA2", True)):
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda found=active: found)
        assert varlen.is_flash_2() == allows


@pytest.mark.parametrize("active", ["FA2", "FA3"])
@pytest.mark.parametrize("module", [varlen, flash])
def test_each_backend_calls_its_kernel(module, active, monkeypatch):
    """FlashAttention-3 in PyTorch is no matter of flash-attn."""

    class Here(Requirements):
        def load(self):
            return tiled if module is varlen and active == "FA3" else by_sequence

    monkeypatch.setattr(module, "REQUIREMENTS", Here())
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active)
    parts = SPARE.parts()
    budget_of(parts, 3).check(module.attend(parts, 3), active)


def test_the_stand_in_agrees_with_sdpa_on_one_head():
    parts = Arrangement((Group((0,), 40),), frames=1).parts()
    torch.testing.assert_close(attend_ragged(by_sequence, parts, 1), sdpa(parts, 1))
