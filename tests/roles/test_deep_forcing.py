"""Deep Forcing: when the window is full, tokens that recent queries ask for stay between sink and recents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headforcing as hf
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.scene import sample_scene
from headforcing.errors import RoleError, StreamShapeError, WindowError
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores import STORES, store_class
from headforcing.types import Chunk, Heads
from tests.examples import examples

HEADS, TOKENS, DIM = 2, 3, 4


def encode(x: torch.Tensor, positions) -> torch.Tensor:
    """Stands for RoPE: turns the first two channels by the position."""
    angle = torch.tensor(positions, dtype=x.dtype)[:, None, None] * 0.3
    first, second = x[..., 0], x[..., 1]
    turned = [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
    return torch.cat([torch.stack(turned, -1), x[..., 2:]], -1)


def frames_of(video: int, first: int, count: int, batch: int = 1) -> torch.Tensor:
    """Random queries, keys and values of frames, `[3, B, F, P, H, D]`, a function of the frame's number."""
    made = []
    for frame in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * video + frame)
        made.append(torch.randn(3, batch, 1, TOKENS, HEADS, DIM, generator=generator))
    return torch.cat(made, 2)


def run(role: Participating, chunk: int, until: int, store: str = "ring", batch: int = 1, look=None):
    """A store that was written to, a noisy pass before every clean one; `look` sees it after each chunk."""
    made = store_class(store)({role: Heads(range(HEADS), HEADS)}, window=64, layer=0)
    for start in range(0, until, chunk):
        noise = frames_of(9, start, chunk, batch)
        made.write(Chunk(start, noise[1], noise[2], None, noise[0]))
        made.view(role, "denoise", encode)
        made.view_compressed(role, encode)
        q, k, v = frames_of(1, start, chunk, batch)
        made.write(Chunk(start, k, v, None, q))
        if look is not None:
            look(start, made.view(role, "denoise", encode), made.view_compressed(role, encode))
    return made


def by_definition(role: Participating, chunk: int, until: int, sample: int = 0, batch: int = 1):
    """Whole frames and chosen tokens `(frame, token)` that a chunk sees, by plain loops in float64."""
    whole: list[int] = []
    chosen: list[tuple[int, int]] = []
    told = {}
    for start in range(0, until, chunk):
        if len(whole) + (role.chosen if chosen else 0) + chunk > role.window:
            recent = whole[len(whole) - max(role.recent - chunk, 0) :]
            gone = [f for f in whole if f >= role.sink and f not in recent]
            queries = range(max(0, start - role.recent), start)
            asked = torch.zeros(HEADS, DIM, dtype=torch.float64)
            for place, frame in enumerate(queries, role.sink + 1):
                for token in range(TOKENS):
                    asked += encode(frames_of(1, frame, 1, batch)[0].double(), [place])[sample, 0, token]
            scores = {}
            for frame, token in chosen + [(f, t) for f in gone for t in range(TOKENS)]:
                k = encode(frames_of(1, frame, 1, batch)[1].double(), [role.sink])[sample, 0, token]
                scores[frame, token] = float((k * asked).sum())
            best = sorted(scores, key=lambda at: -scores[at])[: role.chosen * TOKENS]
            chosen = sorted(best)
            whole = whole[: role.sink] + recent
        told[start] = list(whole), list(chosen)
        whole = whole + list(range(start, start + chunk))
    return told


def check(role: Participating, chunk: int, until: int, store: str, seen_tokens=None) -> int:
    told, checked = by_definition(role, chunk, until), 0

    def look(start, view, beside) -> None:
        nonlocal checked
        whole, chosen = told[start]
        assert list(view.frames) == whole + list(range(start, start + chunk))
        gap = 1 if chosen else 0
        places = [i if i < role.sink else i + gap for i in range(len(view.frames))]
        assert list(view.positions) == places
        assert max(places) < role.window
        if not chosen:
            assert beside is None
            return
        for index, (frame, token) in enumerate(chosen):
            _, k, v = frames_of(1, frame, 1)
            torch.testing.assert_close(beside[0][:, index], encode(k, [role.sink])[:, 0, token])
            torch.testing.assert_close(beside[1][:, index], v[:, 0, token])
        assert beside[0].shape[1] == len(chosen) == role.chosen * TOKENS
        checked += 1

    run(role, chunk, until, store, look=look)
    return checked


@pytest.mark.parametrize("store", sorted(STORES))
@pytest.mark.parametrize("chunk", [1, 3])
def test_tokens_are_those_that_recent_queries_ask_for(store, chunk):
    assert check(Participating(), chunk, 72, store) > 40 / chunk


@settings(max_examples=examples(12, nightly=250))
@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 2), st.integers(1, 3), st.integers(0, 5))
def test_any_numbers(sink, recent, chosen, chunk, more):
    role = Participating(sink + chosen + max(recent, chunk) + more, sink, recent, chosen)
    assert role.fit(64, chunk) == role
    check(role, chunk, 24, "ring")


def test_the_window_fills_and_empties_as_published():
    """Ten first frames, two frames of tokens, four last ones; every second chunk finds the window full."""
    seen = {}

    def look(start, view, beside) -> None:
        tokens = 0 if beside is None else beside[0].shape[1]
        seen[start] = len(view.frames) + tokens / TOKENS

    run(Participating(), 3, 60, look=look)
    assert [seen[start] for start in range(15, 42, 3)] == [18, 21, 16, 19, 16, 19, 16, 19, 16]


class Forgetful(Participating):
    """Planted: chooses by the oldest queries it was told, not by the last."""

    def compressed(self):
        made = super().compressed()
        first = made.add
        made.add = lambda past: first(past) if made._queries is None else None
        return made


def test_the_definition_catches_a_planted_bug():
    with pytest.raises(AssertionError):
        check(Forgetful(), 3, 72, "ring")


def test_every_sample_of_a_batch_chooses_on_its_own():
    kept = []
    run(Participating(), 3, 30, batch=2, look=lambda start, view, beside: kept.append(beside))
    for sample in (0, 1):
        _, chosen = by_definition(Participating(), 3, 30, sample, 2)[27]
        for index, (frame, token) in enumerate(chosen):
            v = frames_of(1, frame, 1, 2)[2]
            torch.testing.assert_close(kept[-1][1][sample, index], v[sample, 0, token])


def test_both_stores_are_equal_bit_for_bit_and_memory_is_bounded():
    one, two, sizes = [], [], []

    def copied(view, beside) -> list[torch.Tensor]:
        return [x.clone() for x in (view.k, view.v, *(beside or ()))]

    run(Participating(), 3, 90, "reference", look=lambda _, *seen: one.append(copied(*seen)))
    made = run(Participating(), 3, 90, "ring", look=lambda _, *seen: two.append(copied(*seen)))
    for a, b in zip(one, two, strict=True):
        assert len(a) == len(b)
        assert all(map(torch.equal, a, b))
    for start in range(90, 900, 3):
        q, k, v = frames_of(1, start % 60, 3)
        made.write(Chunk(start, k, v, None, q))
        made.view_compressed(Participating(), encode)
        sizes.append(made.nbytes())
    assert len(set(sizes)) == 1


def test_a_chunk_without_queries_is_refused_before_anything_changes():
    made = run(Participating(), 3, 24)
    before = made.nbytes(), made.committed, made.pending
    _, k, v = frames_of(1, 24, 3)
    with pytest.raises(StreamShapeError, match="chooses by queries"):
        made.write(Chunk(24, k, v))
    assert (made.nbytes(), made.committed, made.pending) == before


@pytest.mark.parametrize("wrong", [{"positions": "absolute"}, {"chosen": 0}, {"recent": 0}, {"sink": -1}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RoleError):
        Participating(**wrong)


def test_a_role_without_room_is_refused():
    with pytest.raises(WindowError, match="at least 16"):
        Participating(15).fit(21, 3)


def test_a_model_with_such_heads_runs_in_both_stores_and_survives_a_file():
    model = DemoModel(DemoConfig(dim=64, heads=4, layers=2)).randomize(torch.Generator().manual_seed(0))
    model = model.eval().requires_grad_(False)
    roles = RoleMap(((Participating(), Participating(12, 4, 4, 1), hf.Local(2), Participating()),) * 2)
    assert RoleMap.from_json(roles.to_json()) == roles
    prompts = sample_scene(1, torch.Generator().manual_seed(1)).prompts(torch.arange(9))
    videos = []
    for store in sorted(STORES):
        with hf.apply_head_forcing(model, roles, store=store):
            videos.append(DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(2)))
    assert all(torch.equal(videos[0], video) for video in videos[1:])
