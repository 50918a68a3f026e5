"""Many prompts in one video: scenes that begin, end and return, and metrics for them.

A prompt names the light and what moves; the model invents the town. So a scene that returns can only look as
before if the heads still store it. Two metrics measure this: the similarity of a returning scene to its first
appearance, and the similarity of scenes that should have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from headforcing.apply import apply_head_forcing
from headforcing.apply.handle import HeadForcing
from headforcing.demo.contest.compare import Policy, SeededPipeline, make_scene
from headforcing.demo.model.model import DemoModel
from headforcing.demo.model.pipeline import ChunkCallback
from headforcing.demo.model.threads import one_thread
from headforcing.demo.show.story import Held
from headforcing.demo.world.camera import CHUNK
from headforcing.demo.world.metrics import LANDMARK_ROWS, actors_recognised
from headforcing.demo.world.sprites import LANDMARKS
from headforcing.demo.world.words import POSES, parse_prompt
from headforcing.roles import HeadRole
from headforcing.roles.maps.role_map import RoleMap

PROMPTS = (
    "day summer balloon red car blue",
    "night winter calm bus yellow",
    "dusk autumn plane white car green",
    "day summer balloon red car blue",
    "day winter balloon purple bus red",
    "night winter calm bus yellow",
)
MODES = ("recall", "cut", "smooth", "continue")
WRONG = "recall of another scene"
"""A control: the same number of frames is recalled, but of another scene."""
SETTLE = 2
"""First chunks of a scene that are not evaluated, if it has at least four times as many."""


@dataclass(frozen=True)
class Script:
    """The prompts of a video, one per scene; a repeated prompt is a scene that returns.

    Attributes:
        prompts: `parse_prompt` texts without camera words.
        chunks: of each scene.
    """

    prompts: tuple[str, ...] = PROMPTS
    chunks: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(" ".join(prompt.split()) for prompt in self.prompts))
        if len(self.prompts) < 2 or self.chunks < 2:
            raise ValueError(
                f"{len(self.prompts)} prompts of {self.chunks} chunks: expected at least 2 of each"
            )
        for number, prompt in enumerate(self.prompts, 1):
            parse_prompt(prompt)
            if set(prompt.split()) & set(POSES):
                raise ValueError(f"prompt {number}: the camera stands still, leave it out of {prompt!r}")
        for number, pair in enumerate(zip(self.prompts, self.prompts[1:], strict=False), 1):
            if pair[0] == pair[1]:
                raise ValueError(
                    f"prompts {number} and {number + 1} are both {pair[0]!r}: that is one scene, use more "
                    "chunks instead"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """A letter for every scene, the same for the same prompt."""
        places = list(dict.fromkeys(self.prompts))
        return tuple(_letter(places.index(prompt)) for prompt in self.prompts)

    @property
    def returns(self) -> dict[int, int]:
        """The scenes that return, each with the scene that was the first of its prompt."""
        firsts = {scene: self.prompts.index(prompt) for scene, prompt in enumerate(self.prompts)}
        return {scene: first for scene, first in firsts.items() if first < scene}

    @property
    def frames(self) -> int:
        """Frames of the whole video."""
        return len(self.prompts) * self.chunks * CHUNK

    def scene_at(self, frame: int) -> int:
        """The scene that a frame belongs to."""
        return frame // (self.chunks * CHUNK)

    def judged(self, scene: int) -> slice:
        """The frames of a scene that are evaluated."""
        begin, settle = scene * self.chunks, SETTLE * (self.chunks >= 4 * SETTLE)
        return slice((begin + settle) * CHUNK, (begin + self.chunks) * CHUNK)

    def words(self, videos: int) -> Tensor:
        """Word ids for the pipeline, `[videos, chunks of the video, words]`."""
        ids = torch.stack([parse_prompt(prompt) for prompt in self.prompts])
        return ids.repeat_interleave(self.chunks, 0).expand(videos, -1, -1)


@dataclass(frozen=True)
class Played:
    """A batch of videos of a script in one mode.

    Attributes:
        mode: one of `MODES`, or `WRONG`.
        video: `[B, 3, T, 48, 72]` in [-1, 1].
        memories: frames stored by a head of every role in the first video, chunk by chunk.
        stored_bytes: keys, values and marks stored at the end, counted from the tensors.
    """

    mode: str
    video: Tensor
    memories: tuple[Held, ...]
    stored_bytes: int


@dataclass(frozen=True)
class Found:
    """The metrics, one number per video, `[B]`; NaN if there is nothing to measure.

    Attributes:
        returned: correlation of the towns of a returning scene and of its first appearance (`alike`), mean.
        leaked: the same for scenes with different prompts, mean over all pairs.
        halves: the same for the two halves of one scene, mean; an upper bound in practice.
        actors: share of what should fly and drive that is recognised in the evaluated frames.
        at_once: the same in the first chunk of every scene except the first.
    """

    returned: Tensor
    leaked: Tensor
    halves: Tensor
    actors: Tensor
    at_once: Tensor

    @property
    def distance(self) -> Tensor:
        """Return minus leak; NaN without returning scenes."""
        return self.returned - self.leaked


@one_thread()
def play(
    model: DemoModel,
    roles: RoleMap | HeadRole,
    script: Script,
    mode: str,
    seeds: Sequence[int],
    callback: ChunkCallback | None = None,
) -> Played:
    """Generates a video per seed, with the same noise in every mode.

    Args:
        model: the demo model, without head forcing; restored afterwards.
        roles: the roles of the heads.
        script: the scenes.
        mode: the prompt switch between them. `recall` recalls scenes that return, and cuts otherwise; any
            other mode of `switch_prompt` is used for all scenes.
        seeds: of the noise.
        callback: see `DemoPipeline.generate`.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in (*MODES, WRONG):
        raise ValueError(f"mode is {mode!r}: expected one of {', '.join((*MODES, WRONG))}")
    pipeline = SeededPipeline(model, Policy(mode), seeds)
    held: dict[str, list[tuple[int, ...]]] = {}
    with apply_head_forcing(model, roles) as handle:

        def chunk_ended(index: int, clean: Tensor) -> None:
            for name, frames in stored_now(handle).items():
                held.setdefault(name, []).append(frames)
            if (index + 1) % script.chunks == 0 and index + 1 < len(script.prompts) * script.chunks:
                begin_scene(handle, script, (index + 1) // script.chunks, mode)
            if callback is not None:
                callback(index, clean)

        words, noise = script.words(len(seeds)), torch.Generator()
        video = pipeline.generate(words, generator=noise, callback=chunk_ended)
        stored = handle.status().stored_bytes
    memories = tuple(Held(name, tuple(frames)) for name, frames in held.items())
    return Played(mode, video, memories, stored)


def begin_scene(handle: HeadForcing, script: Script, scene: int, mode: str) -> None:
    """Marks the scene that ended and switches to `scene`."""
    if mode not in ("recall", WRONG):
        handle.switch_prompt(mode)  # type: ignore[arg-type]
        return
    handle.mark(script.names[scene - 1])
    if scene in script.returns:
        shown = script.returns[scene] + (mode == WRONG)
        handle.switch_prompt("recall", mark=script.names[shown])
    else:
        handle.switch_prompt("cut")


def stored_now(handle: HeadForcing) -> dict[str, tuple[int, ...]]:
    """Frames of the first video that a head of every role stores now, by the name of the role."""
    found = {}
    for role, heads in handle.roles.counts().items():
        layer, head = handle.roles.where(role)
        who = f"{handle.roles.labels[layer][head]}, {heads} {'head' if heads == 1 else 'heads'}"
        found[who] = tuple(handle.frames(layer, head)[0][0])
    return found


def measure(video: Tensor, script: Script) -> Found:
    """The metrics of a video."""
    nothing = video.new_full((video.shape[0],), torch.nan)
    spans = [video[:, :, script.judged(scene)] for scene in range(len(script.prompts))]
    scenes = [background(span) for span in spans]
    others = [pair for pair in combinations(range(len(scenes)), 2) if _differ(script, *pair)]
    back = [alike(scenes[scene], scenes[first]) for scene, first in script.returns.items()]
    halves = [[background(half) for half in span.chunk(2, 2)] for span in spans]
    begins = [scene * script.chunks * CHUNK for scene in range(len(script.prompts))]
    at_once = [(video[:, :, begin : begin + CHUNK], script.prompts[n]) for n, begin in enumerate(begins) if n]
    return Found(
        returned=torch.stack(back).mean(0) if back else nothing,
        leaked=torch.stack([alike(scenes[a], scenes[b]) for a, b in others]).mean(0),
        halves=torch.stack([alike(a, b) for a, b in halves]).mean(0),
        actors=torch.stack([_actors(*each) for each in zip(spans, script.prompts, strict=True)]).nanmean(0),
        at_once=torch.stack([_actors(*each) for each in at_once]).nanmean(0),
    )


def background(video: Tensor) -> Tensor:
    """The town of a video `[B, 3, T, 48, 72]` without what moves: the median of the landmarks' rows."""
    return video[..., LANDMARK_ROWS, :].median(2).values


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two towns `[B, 3, h, w]`: 1 is the same, 0 unrelated.

    It is that of the differences between neighbouring pixels in a row: all towns have the same sky and the
    same ground, and the light may differ.
    """
    a, b = (image.double().diff(dim=-1) for image in (a, b))
    norm = (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).sqrt()
    return (a * b).sum((1, 2, 3)) / norm.masked_fill(norm == 0, torch.nan)


def _actors(video: Tensor, prompt: str) -> Tensor:
    """Share of what a prompt lets fly and drive that is recognised; landmarks of the video may hide it."""
    asked = make_scene([0], camera="still", prompt=prompt)
    asked = replace(asked, kind=torch.full_like(asked.kind, len(LANDMARKS)))
    return torch.cat([actors_recognised(one[None], asked).double() for one in video]).nanmean(1)


def _differ(script: Script, a: int, b: int) -> bool:
    return script.prompts[a] != script.prompts[b]


def _letter(place: int) -> str:
    letter, lap = chr(ord("A") + place % 26), place // 26
    return letter if not lap else f"{letter}{lap + 1}"
