"""What StreamDiffusionV2 is refused with, and what its own memory has to be told, on a stand-in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.errors import ChunkOrderError, UnsupportedModelError
from headforcing.integrations.streamdiffusionv2 import StreamDiffusionV2
from headforcing.roles import HeadRole, SlidingWindow
from tests.hosts.standin import TOKENS
from tests.hosts.streamdiffusionv2 import StreamDiffusionV2Host

HOST = StreamDiffusionV2Host()
OWN = StreamDiffusionV2(num_kv_cache=9)


def video(
    model: nn.Module, starts: Any = range(0, 18, 3), host: StreamDiffusionV2Host = HOST
) -> list[Tensor]:
    caches = host.caches(model)
    with torch.no_grad():
        return [host.call(model, caches, start, 3, draw) for start in starts for draw in (1, 0)]


class Compact(StreamDiffusionV2):
    def own_role(self, module: nn.Module) -> HeadRole:
        role = super().own_role(module)
        assert isinstance(role, SlidingWindow)
        return replace(role, positions="compact")


def test_the_own_memory_is_that_of_the_ring() -> None:
    model = HOST.model()
    assert str(hf.verify(model, lambda: video(model), adapter=OWN).result) == "equal"


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        (StreamDiffusionV2(num_kv_cache=9, sink=2), 9),
        (StreamDiffusionV2(num_kv_cache=9, sink=4), 9),
        (StreamDiffusionV2(num_kv_cache=8), 6),
        (StreamDiffusionV2(num_kv_cache=10), 9),
        (Compact(num_kv_cache=9), 9),
    ],
    ids=["sink shorter", "sink longer", "window shorter", "window longer", "compact"],
)
def test_another_memory_is_told_from_it(wrong: StreamDiffusionV2, first: int) -> None:
    model = HOST.model()
    found = hf.verify(model, lambda: video(model), adapter=wrong)
    assert found.result == "different"
    assert found.first is not None
    assert (found.first.layer, found.first.frames) == (0, (first, first + 3))


def test_the_own_memory_is_not_guessed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"adapter=StreamDiffusionV2\(num_kv_cache=...\)"):
        hf.apply_head_forcing(HOST.model(), "own")
    assert hf.explain(HOST.model()).unknown["own memory"]


class _Batch(StreamDiffusionV2Host):
    """A sample for every start."""

    def told(self, start: int, end: int, clean: bool) -> dict[str, Any]:
        return {"current_start": torch.tensor([start, max(0, start - 3 * TOKENS)])}


@pytest.mark.parametrize("starts", [(0,), (0, 3)], ids=["at one start", "at two starts"])
def test_a_stream_batch_is_refused(starts: tuple[int, ...]) -> None:
    model = HOST.model()
    hf.apply_head_forcing(model, hf.Local())
    with pytest.raises(UnsupportedModelError, match=r"stream batch, 2 chunks .* mode='single-wo'"):
        video(model, starts, _Batch())


def test_an_adaptive_sink_is_refused_in_calls_with_a_cache() -> None:
    model: Any = HOST.model()
    for block in model.blocks:
        block.self_attn.adapt_sink_thr = 0.2
    hf.apply_head_forcing(model, hf.Local())
    HOST.uncached(model)
    with pytest.raises(UnsupportedModelError, match="set adapt_sink_threshold of the pipeline to -1"):
        video(model)


def test_positions_that_go_back_are_refused_and_a_new_video_is_not() -> None:
    model = HOST.model()
    handle = hf.apply_head_forcing(model, hf.Local())
    caches = HOST.caches(model)

    def chunk(start: int) -> Tensor:
        with torch.no_grad():
            return HOST.call(model, caches, start, 3, 0)

    first = [chunk(start) for start in (0, 3, 6, 9)]
    with pytest.raises(ChunkOrderError, match=r"after 12 frames, .* back to frame 6 \(t_refresh\)"):
        chunk(6)
    assert torch.equal(chunk(9), first[-1])
    assert all(torch.equal(chunk(start), made) for start, made in zip((0, 3), first, strict=False))
    handle.reset()
    assert torch.equal(chunk(0), first[0])
