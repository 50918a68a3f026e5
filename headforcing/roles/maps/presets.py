"""Published methods by name: their roles, and how many heads have which.

One entry of `PRESETS` per method. Methods that treat all heads alike need nothing else; the others need a
label for every head, which belongs to a checkpoint and has to be imported or measured. The docstring of each
says what was left out, and which of its numbers follow the window of the model.

Sources publish numbers for a window of 21 frames. A number that is tied to it is scaled to the window of the
model by one rule, `scaled`; one that is tied to a chunk follows the chunk; all others stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from headforcing.errors import WindowError
from headforcing.roles import Anchor, Full, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.maps.preset import ALL, CHUNK, WINDOW, Preset, Roles
from headforcing.roles.maps.role_map import RoleMap
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave


def scaled(number: int, window: int) -> int:
    """A number published for a window of 21 frames, for another window: rounded down, at least 1."""
    return max(1, number * window // WINDOW)


def _check_room(preset: str, needed: int, window: int, chunk: int) -> None:
    """Refuses to attend to more frames than the window, where no role compares itself with it.

    Raises:
        WindowError: `needed` frames, current chunk included, are more.
    """
    if needed > window:
        raise WindowError(
            f"{preset} attends to {needed} frames with a chunk of {chunk}, but the model was trained on "
            f"{window}: use shorter chunks, or a preset that requires less, such as head_forcing"
        )


def _everything(window: int, chunk: int) -> Roles:
    """Every head stores every frame at its true position: the dense KV cache, which grows."""
    return {ALL: Full()}


def _rolled(window: int, chunk: int) -> Roles:
    """Every head attends to the last `window` frames: what the base model does once its window overflows."""
    return {ALL: SlidingWindow(window)}


def _streaming_llm(window: int, chunk: int) -> Roles:
    """Every head attends to the first chunk and the last frames. The source counts tokens, here frames.

    Both together follow the window. It has to have room for two chunks.
    """
    _check_room("streaming_llm", 2 * chunk, window, chunk)
    return {ALL: SlidingWindow(window, sink=chunk)}


def _infinity_rope(window: int, chunk: int) -> Roles:
    """Every head attends to the first frame and the last five, current chunk included.

    Read in its released code: a window of 6 frames with a sink of 1, keys stored before RoPE, positions
    counted from 0 in every pass. Its KV flush at a new prompt keeps exactly these frames, which is
    `switch_prompt("continue")` here. The six frames stay at any window. Not taken over: the hard cut, which
    moves the first chunk of the new scene to position 45.
    """
    return {ALL: SlidingWindow(6, sink=1)}


def _head_forcing(window: int, chunk: int) -> Roles:
    """Local, anchor and memory heads; the paper gives no numbers, those of `headforcing.roles` are ours.

    Memory heads fill the window of the model that they are applied to. The other numbers stay.
    """
    return {"anchor": Anchor(), "local": Local(), "memory": Memory()}


def _pyramid_forcing(window: int, chunk: int) -> Roles:
    """Waves attend to a cycle of frames, anchors to every sixth frame, veils to merged blocks.

    The numbers are those of its released configuration (code); `headforcing.roles.pyramid_forcing` says
    which details are our choice. The distance of old frames (`near`, `far`), the number of cycles or of sixth
    frames (`cap`) and the length of a merged block follow the window; the other numbers stay. At any window,
    a wave head stores at most 26/21 of it, rounded up, beside the current chunk; copies that the `ring` store
    makes for query frames come on top, `lean` makes none. Merged blocks leave no room for long chunks: at the
    published window, for more than 4 frames.
    """
    near, part = scaled(18, window), scaled(4, window)
    anchor = Strided(near=near, far=window, cap=part)
    _check_room("pyramid_forcing", anchor.sink + anchor.cap + anchor.recent + chunk, window, chunk)
    return {
        "wave": Wave(near=near, far=window, cap=part),
        "anchor": anchor,
        "veil": Veil(near=near, far=window, block=part),
    }


def _dummy_forcing(window: int, chunk: int, context: int = 1) -> Roles:
    """Sink heads attend to the first frame, neighbours to the last chunks, dummies to the last frame.

    Third party: these frames in addition to the current chunk, at their true positions. What neighbours
    attend to follows the chunk; the window has to have room for it. Not taken over: the
    project labels heads in every video, after its first chunk, and stores everything until then; here labels
    are given and apply from the first chunk on. Positions leave the range the model was trained on, as in
    the source.
    """
    _check_room("dummy_forcing", (context + 1) * chunk, window, chunk)
    return {
        "sink": Anchor(1, positions="absolute"),
        "neighbour": Local(context * chunk, positions="absolute"),
        "dummy": Local(1, positions="absolute"),
    }


def _forcing_kv(window: int, chunk: int) -> Roles:
    """Static heads attend to the first and the last frame, dynamic ones also to a frame's worth of patches.

    The patches are those that moved most. Read in its released code, with its positions and sizes. The sizes
    stay at any window that has room for three frames and a chunk. Not taken over: in the source, all heads
    behave as static until the second chunk, which makes no difference; and it selects patches for the first
    video of a batch, here they are selected per video.
    """
    _check_room("forcing_kv", 3 + chunk, window, chunk)
    return {"static": Local(1, sink=1, positions="absolute"), "dynamic": Dynamic()}


def _memrope(window: int, chunk: int) -> Roles:
    """Every head attends to first frames, a slow and a fast average of evicted frames, and last frames.

    Read in its released code: 12 frames, 3 of them first ones, averages with weights 0.01 and 0.1. The 12
    frames stay at any window, as in the source, whose base models have 12 (LongLive) and 21. Not taken over:
    averages per patch whose fast weight follows the motion, an option that is off by default there.
    """
    return {ALL: Averaging()}


def _deep_forcing(window: int, chunk: int) -> Roles:
    """Every head attends to ten first frames, tokens that recent queries attend to most, and last frames.

    From the paper, where first frames are a share of the window: all its numbers follow the window.
    `headforcing.roles.deep_forcing` says which details are our choice; above all, we use the queries of
    finished frames only, where the source also uses those of the noisy chunk.
    """
    sink, recent, chosen = (scaled(number, window) for number in (10, 4, 2))
    return {ALL: Participating(window, sink, recent, chosen)}


_ALL_PRESETS = (
    Preset("full", _everything, "the dense KV cache"),
    Preset("sliding_window", _rolled, "the rolling cache of Self Forcing, arXiv:2506.08009"),
    Preset("streaming_llm", _streaming_llm, "arXiv:2309.17453"),
    Preset("infinity_rope", _infinity_rope, "arXiv:2511.20649"),
    Preset("memrope", _memrope, "arXiv:2603.12513"),
    Preset("deep_forcing", _deep_forcing, "arXiv:2512.05081"),
    Preset(
        "head_forcing",
        _head_forcing,
        "arXiv:2605.14487",
        classifier="head_forcing",
        published={"anchor": 90, "local": 54, "memory": 216},
        counted="25 % anchors, then 20 % of the rest local (third party), rounded up",
    ),
    Preset(
        "pyramid_forcing",
        _pyramid_forcing,
        "arXiv:2605.13111",
        classifier="pyramid_forcing",
        importer="pyramid_forcing",
        published={"wave": 156, "anchor": 172, "veil": 32},
        counted="counted in its published labels for Self Forcing",
    ),
    Preset(
        "dummy_forcing",
        _dummy_forcing,
        "arXiv:2601.20499",
        classifier="dummy_forcing",
        published={"dummy": 180},
        counted="half of the 360 heads are dummies; the split of the others is not published",
    ),
    Preset(
        "forcing_kv",
        _forcing_kv,
        "arXiv:2605.09681",
        classifier="mass_ratio",
        importer="forcing_kv",
        published={"static": 141, "dynamic": 219},
        counted="counted in its published labels for Self Forcing, with layer 0 static",
        first_layer="static",
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL_PRESETS}
"""Every preset by its name."""


def head_forcing(labels: Sequence[Sequence[str]]) -> RoleMap:
    """Head Forcing with our default numbers; `labels[layer][head]` is `anchor`, `local` or `memory`.

    Applied to a model, memory heads fill its window.

    Raises:
        RoleMapError: another label, or a malformed table.
    """
    return PRESETS["head_forcing"].labelled(labels)


def pyramid_forcing(labels: Sequence[Sequence[str]], window: int = WINDOW) -> RoleMap:
    """Pyramid Forcing with its released numbers; `labels[layer][head]` is `wave`, `anchor` or `veil`.

    Args:
        labels: a label for every head.
        window: frames the model was trained on, which the numbers are scaled to. A model with a smaller
            window refuses the map.

    Raises:
        RoleMapError: another label, or a malformed table.
    """
    return PRESETS["pyramid_forcing"].labelled(labels, window)


def dummy_forcing(
    labels: Sequence[Sequence[str]], chunk: int = CHUNK, *, window: int = WINDOW, context: int = 1
) -> RoleMap:
    """Dummy Forcing; `labels[layer][head]` is `sink`, `neighbour` or `dummy`.

    Args:
        labels: a label for every head.
        chunk: frames of a chunk.
        window: frames the model was trained on.
        context: chunks that a neighbour attends to; 1 in the source, 2 in its interactive mode.

    Raises:
        RoleError: `chunk` or `context` is not a valid number.
        RoleMapError: another label, or a malformed table.
        WindowError: these chunks and the current one are more frames than the window.
    """
    found = PRESETS["dummy_forcing"].labelled(labels, window, chunk)
    if context == 1:
        return found
    return RoleMap.from_labels(found.labels, _dummy_forcing(window, chunk, context), found.origin)


def forcing_kv(labels: Sequence[Sequence[str]]) -> RoleMap:
    """Forcing-KV with its released numbers, at any window; `labels[layer][head]` is `static` or `dynamic`.

    The heads of layer 0 are static whatever their labels, as in the source.

    Raises:
        RoleMapError: another label, or a malformed table.
    """
    return PRESETS["forcing_kv"].labelled(labels)


def commit_forcing(roles: RoleMap, window: int) -> RoleMap:
    """Commit Forcing: in the clean pass every head attends to the newest frames only.

    Args:
        roles: the role map to change.
        window: newest frames in the clean pass, current chunk included; 3 to 21 in its released runs.
    """
    layers = tuple(
        tuple(dataclasses.replace(role, clean_window=window) for role in layer) for layer in roles.layers
    )
    return RoleMap(layers, roles.origin, roles.labels)
