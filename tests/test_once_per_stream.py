"""`OncePerStream`: made once per key and stream, nothing too much, and nothing while a graph is captured."""

from __future__ import annotations

import pytest
import torch

from headforcing import types
from headforcing.types import OncePerStream

CUDA = torch.device("cuda", 0)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The stream that is current; `None`: a graph is captured."""
    now: list[int | None] = [0]
    monkeypatch.setattr(types, "stream_of", lambda device: now[0])
    return now


def test_every_stream_has_its_own(stream: list[int | None]) -> None:
    once = OncePerStream(lambda device, key: object(), 4)
    first = once(CUDA, "a")
    assert once(CUDA, "a") is first
    stream[0] = 7
    other = once(CUDA, "a")
    assert other is not first
    stream[0] = 0
    assert once(CUDA, "a") is first


def test_a_graph_takes_what_there_is_and_makes_nothing(stream: list[int | None]) -> None:
    once = OncePerStream(lambda device, key: object(), 4)
    stream[0] = 7
    made = once(CUDA, "a")
    stream[0] = None
    assert once(CUDA, "a") is made
    with pytest.raises(RuntimeError, match="run the same pass once before you capture it"):
        once(CUDA, "b")


def test_what_was_not_asked_for_longest_is_dropped(stream: list[int | None]) -> None:
    calls: list[int] = []
    once = OncePerStream(lambda device, key: calls.append(key), 3)
    for key in (0, 1, 2, 0, 3, 0, 1):
        once(CUDA, key)
    assert calls == [0, 1, 2, 3, 1]
    assert once._made.cache_info().currsize == 3


def test_on_a_cpu_there_is_one_stream() -> None:
    assert types.stream_of(torch.device("cpu")) == 0
    assert types.numbers_on(torch.device("cpu"), (2, 3)) is types.numbers_on(torch.device("cpu"), (2, 3))
