"""Published memories by name: which roles they give to which heads, and how many heads of each there are.

One entry of `PRESETS` per method. Methods that treat all heads alike need nothing else; the others need a
label for every head, which belongs to a checkpoint and has to be imported or measured. What a preset does
not take over from its source, it says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from headforcing.roles import Anchor, Full, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.maps.preset import ALL, Preset, Roles
from headforcing.roles.maps.role_map import RoleMap
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave


def _everything(window: int, chunk: int) -> Roles:
    """Every head keeps everything at its true position: the dense cache, growing."""
    return {ALL: Full()}


def _rolled(window: int, chunk: int) -> Roles:
    """Every head sees the last `window` frames: what the base model does past its training."""
    return {ALL: SlidingWindow(window)}


def _streaming_llm(window: int, chunk: int) -> Roles:
    """Every head sees the first chunk and the last frames; on frames, where the source has tokens."""
    return {ALL: SlidingWindow(window, sink=chunk)}


def _infinity_rope(window: int, chunk: int) -> Roles:
    """Every head sees the first frame and the last five, own chunk included.

    Read in its released code: a window of 6 frames with a sink of 1, keys kept before RoPE and placed from 0
    in every pass. Its flush at a new prompt keeps just these frames: `switch_prompt("continue")` here. Not
    taken over: at its hard cut the first chunk of the new scene sits at 45 and after.
    """
    return {ALL: SlidingWindow(6, sink=1)}


def _head_forcing(window: int, chunk: int) -> Roles:
    """Local, anchor and memory heads; the paper does not say their numbers, `headforcing.roles` does."""
    return {"anchor": Anchor(), "local": Local(), "memory": Memory()}


def _pyramid_forcing(window: int, chunk: int) -> Roles:
    """Waves read by cycles, anchors every sixth frame, veils merged blocks.

    The numbers are those of its released configuration (code); `headforcing.roles.pyramid_forcing` says
    which edges are our choice.
    """
    return {"wave": Wave(), "anchor": Strided(), "veil": Veil()}


def _dummy_forcing(window: int, chunk: int, context: int = 1) -> Roles:
    """Sink heads see the first frame, neighbours the last chunks, dummies the last frame.

    Third party: these frames beside the own chunk, at their true positions. Not taken over: the project
    labels heads anew in every video, after its first chunk, and keeps everything until then; here labels
    are given and count from the first chunk on. Positions leave the range the model was trained on, as
    they do there.
    """
    return {
        "sink": Anchor(1, positions="absolute"),
        "neighbour": Local(context * chunk, positions="absolute"),
        "dummy": Local(1, positions="absolute"),
    }


def _forcing_kv(window: int, chunk: int) -> Roles:
    """Static heads see the first and the last frame, dynamic ones a frame's worth of moving pieces as well.

    Read in its released code, positions and sizes as there. Not taken over: heads are told apart after the
    second chunk there, and see what static heads see until then, which is the same; the choice of pieces is
    made per video of a batch, not for the first one.
    """
    return {"static": Local(1, sink=1, positions="absolute"), "dynamic": Dynamic()}


def _memrope(window: int, chunk: int) -> Roles:
    """Every head sees first frames, a slow and a fast average of what left, and last frames.

    Read in its released code: 12 frames, 3 of them first ones, averages with weights 0.01 and 0.1. Not taken
    over: averages per patch whose fast weight follows the motion, which are off there unless asked for.
    """
    return {ALL: Averaging()}


def _deep_forcing(window: int, chunk: int) -> Roles:
    """Every head sees ten first frames, tokens that recent queries ask for, and last frames.

    From the paper; the numbers are for its window of 21 frames and follow another window. Which edges are our
    choice is said in `headforcing.roles.deep_forcing`: above all, queries are those of finished frames, where
    the source takes the noisy chunk's as well.
    """
    sink, recent, chosen = (max(1, part * window // 21) for part in (10, 4, 2))
    return {ALL: Participating(window, sink, recent, chosen)}


_ALL_PRESETS = (
    Preset("full", _everything, "the dense cache"),
    Preset("sliding_window", _rolled, "the rolled cache of Self Forcing, arXiv:2506.08009"),
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
        counted="25 % anchors, then 20 % of the rest local (third party); rounded up, 360 heads",
    ),
    Preset(
        "pyramid_forcing",
        _pyramid_forcing,
        "arXiv:2605.13111",
        classifier="pyramid_forcing",
        importer="pyramid_forcing",
        published={"wave": 156, "anchor": 172, "veil": 32},
        counted="counted in its published labels of Self Forcing",
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
        counted="counted in its published labels of Self Forcing, layer 0 static",
        first_layer="static",
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL_PRESETS}
"""Every preset by its name."""


def head_forcing(labels: Sequence[Sequence[str]]) -> RoleMap:
    """Head Forcing with its default numbers; `labels[layer][head]` is `anchor`, `local` or `memory`.

    Raises:
        RoleMapError: another label, or a malformed table.
    """
    return PRESETS["head_forcing"].labelled(labels)


def pyramid_forcing(labels: Sequence[Sequence[str]]) -> RoleMap:
    """Pyramid Forcing with its released numbers; `labels[layer][head]` is `wave`, `anchor` or `veil`.

    Raises:
        RoleMapError: another label, or a malformed table.
    """
    return PRESETS["pyramid_forcing"].labelled(labels)


def dummy_forcing(labels: Sequence[Sequence[str]], chunk: int = 3, *, context: int = 1) -> RoleMap:
    """Dummy Forcing; `labels[layer][head]` is `sink`, `neighbour` or `dummy`.

    Args:
        labels: a label for every head.
        chunk: frames of a chunk.
        context: chunks that a neighbour sees, 1 there, 2 in its interactive mode.

    Raises:
        RoleError: the number of frames is none.
        RoleMapError: another label, or a malformed table.
    """
    found = PRESETS["dummy_forcing"].labelled(labels, chunk=chunk)
    if context == 1:
        return found
    return RoleMap.from_labels(found.labels, _dummy_forcing(0, chunk, context), found.origin)


def forcing_kv(labels: Sequence[Sequence[str]]) -> RoleMap:
    """Forcing-KV with its released numbers; `labels[layer][head]` is `static` or `dynamic`.

    The heads of layer 0 are static whatever their labels, as there.

    Raises:
        RoleMapError: another label, or a malformed table.
    """
    return PRESETS["forcing_kv"].labelled(labels)


def commit_forcing(roles: RoleMap, window: int) -> RoleMap:
    """Any map with Commit Forcing: the clean pass of every head sees the newest frames only.

    Args:
        roles: what is kept, and what denoising passes see.
        window: the `clean_window` of every role; 3 to 21 frames in its released runs.
    """
    layers = tuple(
        tuple(dataclasses.replace(role, clean_window=window) for role in layer) for layer in roles.layers
    )
    return RoleMap(layers, roles.origin, roles.labels)
