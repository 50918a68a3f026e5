"""Role maps that need no measuring, by name.

Head Forcing itself is not among them: its roles belong to a checkpoint, so it takes a measured map. For
the same reason the labels of Dummy Forcing and of Pyramid Forcing are arguments. What a preset does not take
over from its source, it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headforcing.origin import Origin
from headforcing.pyramid import Strided, Veil, Wave
from headforcing.role_map import RoleMap
from headforcing.roles import Anchor, Full, Local, SlidingWindow

Preset = Callable[[int, int, int, int], RoleMap]
"""Builds a map from layers, heads, window and chunk (frames)."""


def full(layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Every head keeps everything at its true position: the dense cache, growing."""
    return RoleMap.uniform(Full(), layers, heads)


def sliding_window(layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Every head sees the last `window` frames: what the base model does past its training."""
    return RoleMap.uniform(SlidingWindow(window), layers, heads)


def streaming_llm(layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Every head sees the first chunk and the last frames (arXiv:2309.17453, on frames)."""
    return RoleMap.uniform(SlidingWindow(window, sink=chunk), layers, heads)


def infinity_rope(layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Every head sees the first frame and the last five, own chunk included (arXiv:2511.20649).

    Third party: a sink of 1 in a window of 6 frames, keys kept before RoPE and placed relative to the own
    chunk in every pass. Inferred: the window counts the sink, and the sink stands right before the recent
    frames, which is `compact`. Not taken over: the cache flush when the prompt changes, and the jump of 45
    positions at a cut.
    """
    return RoleMap.uniform(SlidingWindow(6, sink=1), layers, heads)


PRESETS: dict[str, Preset] = {f.__name__: f for f in (full, sliding_window, streaming_llm, infinity_rope)}


def dummy_forcing(labels: Sequence[Sequence[str]], chunk: int = 3, *, context: int = 1) -> RoleMap:
    """Sink heads see the first frame, neighbours the last chunks, dummies the last frame (arXiv:2601.20499).

    Third party: these frames beside the own chunk, at their true positions. Not taken over: the project
    labels heads anew in every video, after its first chunk, and keeps everything until then; here labels
    are given and count from the first chunk on. Positions leave the range the model was trained on, as
    they do there.

    Args:
        labels: `sink`, `neighbour` or `dummy` for every head, `labels[layer][head]`.
        chunk: frames of a chunk.
        context: chunks that a neighbour sees, 1 there, 2 in its interactive mode.

    Raises:
        RoleError: the number of frames is none.
        RoleMapError: another label, or a malformed table.
    """
    roles = {
        "sink": Anchor(1, positions="absolute"),
        "neighbour": Local(context * chunk, positions="absolute"),
        "dummy": Local(1, positions="absolute"),
    }
    return RoleMap.from_labels(labels, roles, Origin(notes={"roles": "Dummy Forcing, arXiv:2601.20499"}))


def pyramid_forcing(labels: Sequence[Sequence[str]]) -> RoleMap:
    """Waves read by cycles, anchors every sixth frame, veils merged blocks (arXiv:2605.13111).

    The numbers are those of its released configuration (code); `headforcing.pyramid` says which edges are
    our choice. Labels come from its table (`headforcing.importers`), or from the classifier of that name.

    Args:
        labels: `wave`, `anchor` or `veil` for every head, `labels[layer][head]`.

    Raises:
        RoleMapError: another label, or a malformed table.
    """
    roles = {"wave": Wave(), "anchor": Strided(), "veil": Veil()}
    return RoleMap.from_labels(labels, roles, Origin(notes={"roles": "Pyramid Forcing, arXiv:2605.13111"}))
