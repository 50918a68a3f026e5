"""The demo from prompt to files: two policies on one scene, next to the ground truth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from headforcing.apply.handles import handles_of
from headforcing.demo import demo_preset, demo_roles
from headforcing.demo.contest.compare import GIVEN_CHUNKS, Policy, Rollout, make_scene, roll
from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.model.model import DemoModel, demo_model
from headforcing.demo.model.threads import one_thread
from headforcing.demo.show import draw, plots
from headforcing.demo.show.files import FILES, MADE_BY, REPORT, check_folder, replace_file, write_mp4
from headforcing.demo.show.report import Report, policy_row, spans
from headforcing.demo.show.story import FORCING, TRUTH, WINDOW, Held, Pixels, Story, Track, pixels
from headforcing.demo.world.camera import CHUNK, TOWN
from headforcing.demo.world.scene import Scene, render
from headforcing.demo.world.words import MOTIONS, POSES, format_prompt
from headforcing.errors import OptionError
from headforcing.roles import HeadRole
from headforcing.roles.maps.role_map import RoleMap

FPS = 16

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the amount done and the total."""


@dataclass(frozen=True)
class Request:
    """The options of the demo.

    Attributes:
        prompt: words for the scene; `None`: drawn from the seed.
        seconds: length of the videos, rounded to whole chunks.
        seed: of scene and noise.
        camera: `still` or `pan`.
        out: folder for the files, created if missing.
        weights: of the model; `None`: those in the package.
        roles: role-map file; `None`: the one in the package.
        preset: name of a preset instead of a role map.
    """

    prompt: str | None = None
    seconds: float = 15.0
    seed: int = 0
    camera: Literal["still", "pan"] = "pan"
    out: Path = Path("headforcing-demo")
    weights: Path | None = None
    roles: Path | None = None
    preset: str | None = None

    @property
    def policy(self) -> str:
        """The name of the second policy."""
        return "Head Forcing" if self.preset is None else f"preset {self.preset}"

    @property
    def chunks(self) -> int:
        """Chunks of each video."""
        return round(self.seconds * FPS / CHUNK)


def show(request: Request, progress: Progress = lambda *_: None) -> Report:
    """Generates the videos, writes the files and returns the report.

    Raises:
        ValueError: the prompt, the length or a file is invalid.
        FileExistsError: the folder contains files of the same names that the demo did not write.
    """
    given = GIVEN_CHUNKS[request.camera]
    if request.chunks <= given:
        raise ValueError(
            f"{request.seconds:g} seconds are {request.chunks * CHUNK} frames, but the first "
            f"{given * CHUNK} are given: use {(given + 1) * CHUNK / FPS + 0.05:.1f} seconds or more"
        )
    scene = make_scene([request.seed], request.chunks, camera=request.camera, prompt=request.prompt)
    model = load_model(request.weights)
    roles = find_roles(request, model.config)
    check_folder(request.out)
    rollouts, held = roll_both(model, roles, scene, request, progress)
    report = summarise_all(request, scene, model, rollouts)
    files = write(request.out, report, story(report, scene, rollouts), held, progress)
    return dataclasses.replace(report, files=files)


@one_thread()
def roll_both(
    model: DemoModel, roles: RoleMap, scene: Scene, request: Request, progress: Progress
) -> tuple[list[Rollout], tuple[Held, ...]]:
    """The rollouts of both policies with the same scene and noise, and the frames stored meanwhile."""
    rollouts = []
    diary = _Diary(model)
    for policy in (Policy("sliding window"), Policy(request.policy, roles)):

        def tell(index: int, _: Tensor, name: str = policy.name) -> None:
            diary.note()
            progress(name, index + 1, request.chunks)

        rollout = roll(
            model,
            policy,
            scene,
            request.chunks,
            seeds=[request.seed],
            given_chunks=GIVEN_CHUNKS[request.camera],
            callback=tell,
        )
        rollouts.append(rollout)
    return rollouts, diary.read(request.chunks, request.policy)


class _Diary:
    """Records after every chunk the frames that one head of every role stores."""

    def __init__(self, model: DemoModel) -> None:
        self._model = model
        self._held: dict[HeadRole, list[tuple[int, ...]]] = {}
        self._labels: dict[HeadRole, str] = {}

    def note(self) -> None:
        for handle in handles_of(self._model):
            for role in handle.roles.counts():
                layer, head = handle.roles.where(role)
                self._labels[role] = handle.roles.labels[layer][head]
                self._held.setdefault(role, []).append(tuple(handle.frames(layer, head)[0][0]))

    def read(self, chunks: int, policy: str) -> tuple[Held, ...]:
        """The model's own rolling cache first, then every role."""
        window = self._model.config.window - self._model.config.chunk
        rolled = [tuple(range(max(0, start - window), start)) for start in range(0, chunks * CHUNK, CHUNK)]
        memories = [Held("Sliding window: every head", tuple(rolled))]
        kinds = [type(role).__name__.lower() for role in self._held]
        for role, frames in self._held.items():
            kind = type(role).__name__.lower()
            name = kind if kinds.count(kind) == 1 else self._labels[role]
            who = f"{name} head" if len(self._held) > 1 else "every head"
            memories.append(Held(f"{policy}: {who}", tuple(frames)))
        return tuple(memories)


def load_model(weights: Path | None) -> DemoModel:
    """The demo model, with the weights of the package or of a file.

    Raises:
        OptionError: the file cannot be read, or does not contain weights of the demo model.
    """
    if weights is None:
        return demo_model()
    try:
        return DemoModel().load_weights(weights).eval().requires_grad_(False)
    except OSError as error:
        raise OptionError(f"{weights}: cannot be read ({error.strerror or 'no such file'})") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{weights}: not weights of the demo model ({error!s:.200})") from None


def find_roles(request: Request, config: DemoConfig) -> RoleMap:
    """The preset, with the demo model's labels if heads differ, or the map of the file or the package.

    Raises:
        ValueError: a preset and a file are given, or there is no such preset.
    """
    if request.preset is None:
        return demo_roles() if request.roles is None else RoleMap.load(request.roles)
    if request.roles is not None:
        raise OptionError("a preset and a role-map file are given: leave one out")
    return demo_preset(request.preset, config.window, config.chunk)


def summarise_all(request: Request, scene: Scene, model: DemoModel, rollouts: list[Rollout]) -> Report:
    """The report, without files."""
    given, frames = GIVEN_CHUNKS[request.camera] * CHUNK, request.chunks * CHUNK
    early, late = spans(frames, given, model.config.window)
    words = format_prompt(scene.prompts(torch.zeros(1, dtype=torch.long))[0, 0])
    return Report(
        prompt=" ".join(word for word in words.split() if word not in (*POSES, *MOTIONS)),
        camera=request.camera,
        seed=request.seed,
        frames=frames,
        trained=model.config.window,
        given=given,
        early=early,
        late=late,
        policies=tuple(policy_row(rollout, model, frames - given, early, late) for rollout in rollouts),
    )


def story(report: Report, scene: Scene, rollouts: list[Rollout]) -> Story:
    """The content of the pictures."""
    truth = render(scene, torch.arange(report.frames)).video
    names = {"sliding window": "The model's own sliding window"}
    tracks = [Track("Ground truth", TRUTH, pixels(truth[0]))]
    for rollout, colour in zip(rollouts, (WINDOW, FORCING), strict=True):
        name = names.get(rollout.policy.name, rollout.policy.name)
        tracks.append(Track(name, colour, pixels(rollout.video[0]), rollout.psnr[0].double().numpy()))
    times = report.frames / report.trained
    offset = scene.camera.offset(torch.arange(report.frames))[0]
    return Story(
        tuple(tracks),
        headline=f"One prompt, one seed, {times:.1f} × the trained length",
        byline=f"“{report.prompt}” · camera {report.camera} · seed {report.seed} · "
        f"continues {report.given} rendered frames · 72 × 48 pixels, enlarged",
        fps=FPS,
        trained=report.trained,
        given=report.given,
        camera=offset.double().numpy() / TOWN if report.camera == "pan" else None,
    )


def write(
    out: Path, report: Report, story: Story, held: tuple[Held, ...], progress: Progress
) -> tuple[str, ...]:
    """Writes the files and returns their absolute paths."""
    paths = {name: (out / name).resolve() for name in FILES}
    files = tuple(str(path) for path in paths.values())
    document = {"made_by": MADE_BY, **dataclasses.replace(report, files=files).to_dict()}
    replace_file(paths[REPORT], lambda path: path.write_text(json.dumps(document, indent=2) + "\n", "utf-8"))

    def drawn_frames() -> Iterable[Pixels]:
        for index, frame in enumerate(draw.draw_video(story)):
            progress("drawing", index + 1, story.frames)
            yield frame

    replace_file(paths["demo.mp4"], lambda path: write_mp4(path, drawn_frames(), draw.SIZE, FPS))
    replace_file(paths["contact_sheet.png"], lambda path: draw.draw_sheet(story).save(path))
    title = f"Stored frames of one head per role, over {story.frames} frames"
    replace_file(paths["memory.png"], lambda path: plots.draw_memory(held, CHUNK, title).savefig(path))
    last = "Frames that one head of every role remembers at the end"
    replace_file(
        paths["strip.png"], lambda path: draw.draw_strip(held, story.tracks[-1].video, last).save(path)
    )
    return files
