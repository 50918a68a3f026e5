"""Metrics say what their definitions say, and find heads that were made to look somewhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headforcing.attention.backends import Part
from headforcing.attention.observation import Observation
from headforcing.errors import OptionError, module_names
from headforcing.measure.classifiers.pyramid_forcing import dominant_period
from headforcing.measure.metrics import Look, Metric, find_metric
from headforcing.measure.metrics.mass_ratio import MassRatio
from headforcing.measure.metrics.output_regret import OutputRegret, candidates
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.types import AttentionCall, Chunk, Heads
from tests.examples import examples

WINDOW = 12
DIM = 8


class Timeline:
    """Stands for a stream: an object that a weak reference can follow."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observation(q, k, v, frames, start, *, layer=0, timeline=None) -> Observation:
    """An attention call without RoPE; q `[B, F, P, H, D]`, k and v `[B, n, P, H, D]`."""
    batch, chunk, tokens, heads, dim = q.shape
    call = AttentionCall(torch.zeros(batch, chunk * tokens, 1), start, (chunk, 1, tokens), None, {})
    part = Part(Heads(range(heads), heads), *(x.flatten(1, 2) for x in (q, k, v)))
    weights = torch.einsum("blhd,bmhd->bhlm", part.q, part.k) / math.sqrt(dim)
    out = torch.einsum("bhlm,bmhd->blhd", weights.softmax(-1), part.v)
    own = Chunk(start, k[:, -chunk:], v[:, -chunk:])
    places = tuple(range(len(frames)))
    return Observation(
        layer,
        call,
        timeline or Timeline(),
        own,
        q,
        [part],
        [tuple(frames)],
        [places],
        out,
        lambda x, at: x,
        sizes=None,
        edited=False,
    )


@st.composite
def calls(draw):
    """An observation with random tensors: the first frames may be gone, or only they may be left."""
    chunk, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    start = draw(st.integers(1, 20))
    count = draw(st.integers(1, min(start, WINDOW - chunk)))
    history = sorted(draw(st.sets(st.integers(0, start - 1), min_size=count, max_size=count)))
    frames = (*history, *range(start, start + chunk))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = seeded(draw(st.integers(0, 1000)))
    scale = draw(st.sampled_from([0.1, 1.0, 6.0]))
    shape = (batch, len(frames), tokens, heads, DIM)
    k, v = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    q = torch.randn((batch, chunk, *shape[2:]), generator=generator, dtype=torch.float64)
    return observation(q, k, v, frames, start)


def softmax_by_frame(seen: Observation, rows=None) -> torch.Tensor:
    """The definition: the whole attention matrix, summed over the tokens of a frame, `[B, H, n]`."""
    part, tokens = seen.parts[0], seen.call.tokens_per_frame
    q = part.q if rows is None else part.q[:, rows]
    weights = torch.einsum("blhd,bmhd->bhlm", q, part.k) / math.sqrt(DIM)
    return weights.softmax(-1).mean(2).unflatten(-1, (-1, tokens)).sum(-1)


@given(calls())
def test_masses_are_those_of_the_full_softmax(seen):
    share = softmax_by_frame(seen)
    look = Look(seen, WINDOW)
    torch.testing.assert_close(look.share, share, atol=1e-12, rtol=0)
    found = find_metric("attention_mass").measure(look)
    history, frames = look.history, seen.frames[0]
    torch.testing.assert_close(found["own"], share[..., history:].sum(-1), atol=1e-12, rtol=0)
    if frames[0] == 0:
        torch.testing.assert_close(found["first"], share[..., 0], atol=1e-12, rtol=0)
        torch.testing.assert_close(found["middle"], share[..., 1:history].sum(-1), atol=1e-12, rtol=0)
    else:
        assert found["first"].isnan().all()
        assert found["middle"].isnan().all()
    by_age = found["by_age"]
    assert by_age.shape[-1] == WINDOW - 1
    for age in range(1, by_age.shape[-1] + 1):
        frame = seen.call.start - age
        if frame in frames:
            assert torch.equal(by_age[..., age - 1], look.share[..., frames.index(frame)])
        else:
            assert by_age[..., age - 1].isnan().all()


@given(calls(), st.integers(0, 3), st.integers(0, 2))
def test_the_ratio_is_recent_mass_over_what_is_not_sink(seen, recent, sink):
    share, frames = softmax_by_frame(seen), seen.frames[0]
    near = [i for i, frame in enumerate(frames) if frame >= seen.call.start - recent and frame >= sink]
    rest = [i for i, frame in enumerate(frames) if frame >= sink]
    expected = share[..., near].sum(-1) / share[..., rest].sum(-1)
    found = MassRatio(recent, sink).measure(Look(seen, WINDOW))["ratio"]
    if near == rest:
        assert found.isnan().all()
        return
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@given(calls())
def test_logits_are_those_of_the_last_query_frame(seen):
    part, tokens = seen.parts[0], seen.call.tokens_per_frame
    logits = torch.einsum("blhd,bmhd->bhlm", part.q[:, -tokens:], part.k) / math.sqrt(DIM)
    expected = logits.unflatten(-1, (-1, tokens)).mean((2, -1))  # [B, H, n]
    found = find_metric("qk_logits").measure(Look(seen, WINDOW))["by_age"]
    for column, frame in enumerate(seen.frames[0][: -seen.call.grid[0]]):
        age = seen.call.start - frame
        if age <= found.shape[-1]:
            torch.testing.assert_close(found[..., age - 1], expected[..., column], atol=1e-12, rtol=0)


@given(calls(), st.integers(0, 99))
def test_followed_queries_are_the_ones_that_are_averaged(seen, seed):
    tokens, chunk = seen.call.tokens_per_frame, seen.call.grid[0]
    rows = torch.randperm(chunk * tokens, generator=seeded(seed))[: max(1, chunk * tokens // 2)]
    share = Look(seen, WINDOW, rows).share
    torch.testing.assert_close(share, softmax_by_frame(seen, rows), atol=1e-12, rtol=0)


def test_the_matrix_is_never_held_and_pieces_change_nothing(monkeypatch):
    k = torch.randn(1, 11, 4, 2, DIM, generator=seeded(), dtype=torch.float64)
    seen = observation(k[:, -3:], k, k, range(11), 8)
    whole = Look(seen, WINDOW)
    monkeypatch.setattr("headforcing.measure.metrics.MAX_LOGITS", 2 * 2 * 12 * 4)
    pieces = Look(seen, WINDOW)
    torch.testing.assert_close(pieces.share, whole.share, atol=1e-12, rtol=0)
    assert torch.equal(pieces.logits, whole.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_neither_overflow_nor_vanish(dtype):
    k = torch.zeros(1, 5, 2, 1, DIM, dtype=dtype)
    k[:, 1] = 200.0
    q = torch.full((1, 1, 2, 1, DIM), 30.0, dtype=dtype)
    share = Look(observation(q, k, k, range(5), 4), WINDOW).share
    torch.testing.assert_close(share, torch.tensor([[[0.0, 1.0, 0.0, 0.0, 0.0]]]))


LOOKS = {"first": {0}, "own": {9, 10, 11}, "middle": {2, 5}, "previous": {8}}
"""What the heads of the planted layer look at, frame 9 being the start of the chunk."""


def planted(start=9, strength=40.0, timeline=None, seed=0) -> Observation:
    """Head by head all attention on the frames of `LOOKS`; values tell frames apart."""
    chunk, tokens, frames = 3, 4, range(start + 3)
    k = torch.zeros(1, len(frames), tokens, len(LOOKS), DIM, dtype=torch.float64)
    for head, wanted in enumerate(LOOKS.values()):
        for frame in wanted & set(frames):
            k[:, frame, :, head, 0] = strength
    q = torch.zeros(1, chunk, tokens, len(LOOKS), DIM, dtype=torch.float64)
    q[..., 0] = 5.0
    v = torch.randn(k.shape, generator=seeded(seed), dtype=torch.float64)
    return observation(q, k, v, frames, start, timeline=timeline)


def test_planted_heads_are_found_by_their_mass():
    look = Look(planted(), WINDOW)
    mass = find_metric("attention_mass").measure(look)
    expected = {"first": [1, 0, 0, 0], "own": [0, 1, 0, 0], "middle": [0, 0, 1, 1]}
    for name, values in expected.items():
        torch.testing.assert_close(
            mass[name][0], torch.tensor(values, dtype=torch.float64), atol=1e-9, rtol=0
        )
    by_age = mass["by_age"][0].nan_to_num(0.0)
    assert by_age[0].argmax() == 8  # frame 0 is 9 frames old
    assert sorted(by_age[2].topk(2).indices.tolist()) == [3, 6]  # frames 5 and 2
    assert by_age[3].argmax() == 0
    ratio = MassRatio().measure(look)["ratio"][0, 1:]  # the first head has no mass behind the sink
    torch.testing.assert_close(ratio, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), atol=1e-9, rtol=0)
    logits = find_metric("qk_logits").measure(look)["by_age"][0]
    assert (logits > 0).nonzero().tolist() == [[0, 8], [2, 3], [2, 6], [3, 0]]


@pytest.mark.parametrize("period", [4, 6])
def test_a_planted_period_is_found_in_the_logits(period):
    start = 18
    series = [math.cos(2 * math.pi * age / period) for age in range(1, start + 1)]
    k = torch.zeros(1, start + 3, 2, 1, DIM, dtype=torch.float64)
    for age, value in enumerate(series, 1):
        k[:, start - age, :, 0, 0] = value * math.sqrt(DIM)
    q = torch.zeros(1, 3, 2, 1, DIM, dtype=torch.float64)
    q[..., 0] = 1.0
    look = Look(observation(q, k, k, range(start + 3), start), 21)
    found = find_metric("qk_logits").measure(look)["by_age"]
    assert found[0, 0, start:].isnan().all()
    torch.testing.assert_close(found[0, 0, :start], torch.tensor(series, dtype=torch.float64))
    assert float(dominant_period(found[0, 0])) == pytest.approx(period, rel=0.1)


def follow(metric: Metric, make, starts) -> dict[str, torch.Tensor]:
    """Shows a metric a video chunk by chunk, three passes each, and measures the last one."""
    timeline = Timeline()
    metric.begin(WINDOW, 3)
    for start in starts:
        for seed in (start + 1, start + 2, 0):
            seen = make(start, timeline, seed)
            metric.watch(seen)
    return metric.measure(Look(seen, WINDOW))


def test_planted_heads_regret_what_they_looked_at():
    roles = (Local(0), Anchor(1), Local(1), Memory(1, 5, 3))
    regret = follow(OutputRegret(roles), lambda start, at, seed: planted(start, 40.0, at, seed), (0, 3, 6, 9))
    error = regret["p95"][0]
    enough = {"first": {1, 3}, "own": {0, 1, 2, 3}, "middle": {3}, "previous": {2, 3}}
    for head, fine in enumerate(enough.values()):
        for role in range(len(roles)):
            assert (float(error[head, role]) < 1e-6) == (role in fine), (head, role)
    assert bool((regret["mean"] <= regret["p95"] + 1e-5).all())


def kept_frames(role: HeadRole, start: int) -> list[int]:
    """What a role keeps of `0 .. start - 1`, in the simplest words."""
    if isinstance(role, Local):
        first, last = role.sink, role.recent
    else:
        assert isinstance(role, Anchor | SlidingWindow)
        first = role.sink
        last = role.recent if isinstance(role, Anchor) else role.window - 3 - role.sink
    return [frame for frame in range(start) if frame < first or frame >= start - last]


@given(st.integers(0, 99))
@settings(max_examples=examples(25))
def test_regret_is_the_change_of_the_output(seed):
    """Against attention written out, with real chunks, and with a noisy pass before each clean one."""
    generator, roles = seeded(seed), (Local(2), Anchor(1, 2), SlidingWindow(8, sink=1, positions="compact"))
    history = torch.randn(2, 2, 12, 4, 3, DIM, generator=generator)  # k and v, [B, n, P, H, D]
    noise = torch.randn(2, 2, 12, 4, 3, DIM, generator=generator)

    def make(start, timeline, step):
        k, v = history[:, :, : start + 3].clone()
        if step:  # a noisy pass: other keys and values for the current chunk
            k[:, -3:], v[:, -3:] = noise[:, :, start : start + 3]
        q = 0.3 * history[0][:, start : start + 3] + 1
        return observation(q, k, v, range(start + 3), start, timeline=timeline)

    found = follow(OutputRegret(roles), make, (0, 3, 6, 9))
    seen = make(9, Timeline(), 0)
    part = seen.parts[0]
    for number, role in enumerate(roles):
        frames = [*kept_frames(role, 9), 9, 10, 11]
        k, v = (x[:, frames].flatten(1, 2) for x in history)
        weights = torch.einsum("blhd,bmhd->bhlm", part.q, k) / math.sqrt(DIM)
        change = torch.einsum("bhlm,bmhd->blhd", weights.softmax(-1), v) - seen.out
        relative = change.norm(dim=-1) / seen.out.square().sum(-1).mean(1).sqrt()[:, None]  # [B, L, H]
        torch.testing.assert_close(found["mean"][..., number], relative.mean(1), atol=1e-5, rtol=1e-5)
        p95 = torch.quantile(relative, 0.95, dim=1, interpolation="higher")
        torch.testing.assert_close(found["p95"][..., number], p95, atol=1e-5, rtol=1e-5)


def test_a_role_that_keeps_what_the_model_sees_regrets_nothing_and_a_dead_head_neither():
    metric = OutputRegret((Local(0), SlidingWindow(WINDOW, positions="compact")))

    def dead(start, timeline, seed):
        v = torch.zeros(1, start + 3, 4, 2, DIM)
        k = torch.randn(v.shape, generator=seeded(seed + start))
        return observation(k[:, -3:], k, v, range(start + 3), start, timeline=timeline)

    found = follow(metric, dead, (0, 3, 6))
    assert float(found["p95"].max()) == 0.0
    found = follow(
        OutputRegret((SlidingWindow(WINDOW, positions="compact"),)),
        lambda start, at, seed: planted(start, 1.0, at),
        (0, 3, 6, 9),
    )
    assert float(found["p95"].max()) < 1e-6


@given(st.integers(2, 40), st.integers(1, 6))
def test_candidates_fit_every_model_from_cheap_to_everything(window, chunk):
    if chunk >= window:
        return
    roles = [role.fit(window, chunk) for role in candidates(window, chunk)]
    kept = [role.capacity(chunk) for role in roles]
    assert kept == sorted(kept)
    assert kept[-1] == window - chunk
    assert len(set(roles)) == len(roles)


@pytest.mark.parametrize("numbers", [{"recent": -1}, {"sink": 1.5}, {"recent": True}])
def test_a_ratio_of_no_frames_is_refused(numbers):
    with pytest.raises(OptionError, match="numbers of frames"):
        MassRatio(**numbers)


def test_autocast_does_not_touch_the_measurement():
    k = torch.randn(1, 8, 4, 2, DIM, generator=seeded()) * 3
    seen = observation(k[:, -3:], k, k, range(8), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Look(seen, WINDOW).share
    assert torch.equal(inside, Look(seen, WINDOW).share)


def test_the_folder_is_the_list():
    for name in module_names("headforcing.measure.metrics"):
        metric = find_metric(name)
        assert metric.name == name
        assert find_metric(name) is not metric
    with pytest.raises(OptionError, match=r"unknown metric 'mass'.*attention_mass"):
        find_metric("mass")
