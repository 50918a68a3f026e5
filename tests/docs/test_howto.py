"""The lines of docs/how-to run, on stand-ins or on tiny models of diffusers, in the middle of a video."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headforcing.apply import apply_head_forcing, remove_head_forcing
from headforcing.apply.handles import handles_of
from headforcing.testing import Host
from tests.docs.pages import ROOT, fences
from tests.hosts import find_host

FOLDER = ROOT / "docs" / "how-to"
REASON = re.compile(
    r'notest="requires (a checkout|the weights); tests/docs/test_howto.py runs it on a (stand-in|tiny model)"'
)
CHUNKS = 2
"""Made of a video before the first lines and after each."""


@dataclass
class Stage:
    """What the lines of a page find around them.

    Attributes:
        host: the tiny model and its calls.
        window: frames that it says it was trained on, as the original's configuration has it.
        names: whatever else the lines use.
        chunk: frames of a chunk.
    """

    host: Host
    window: int
    names: dict[str, Any] = field(default_factory=dict)
    chunk: int = 3

    def __post_init__(self) -> None:
        self.model: Any = self.host.model()
        for module in self.model.modules():
            if hasattr(module, "local_attn_size"):
                module.local_attn_size = self.window
        self.caches, self.start = self.host.caches(self.model), 0

    def space(self) -> dict[str, Any]:
        """The names that lines run with: the pipeline by all the names it has."""
        model, prompts = self.model, []
        pipeline = SimpleNamespace(
            generator=SimpleNamespace(model=model),
            transformer=model,
            denoising_step_list=[1000],
            get_module=lambda name, default: model if name == "transformer" else default,
            text_encoder=lambda text_prompts: prompts.append(text_prompts),
        )
        roles = dict.fromkeys(("pipeline", "self", "pipe", "refiner"), pipeline)
        at = {"new_prompts": {6: "a prompt"}, "cuts": {6}, "batch_size": 1}
        now = dict.fromkeys(("current_start_frame", "block_index", "chunk_index", "window_index"), 6)
        return {**roles, **at, **now, **self.names, "told": prompts}

    def run(self) -> None:
        """Goes on with the video: a noisy and a clean pass per chunk."""
        with torch.no_grad():
            for _ in range(CHUNKS):
                for draw in (1, 0):
                    self.host.call(self.model, self.caches, self.start, self.chunk, draw)
                self.start += self.chunk

    def anew(self) -> None:
        """Takes head forcing out and begins another video."""
        remove_head_forcing(self.model)
        self.caches, self.start = self.host.caches(self.model), 0


class _Refiner(Stage):
    """The first frame of SANA-WM runs alone and clean, blocks of three follow."""

    def run(self) -> None:
        if not self.start:
            with torch.no_grad():
                self.host.call(self.model, self.caches, 0, 1, 0)
            self.start = 1
        super().run()


def _rolling() -> Stage:
    stage = Stage(find_host("rolling_forcing"), 21)
    for block in stage.model.blocks:
        block.self_attn.max_attention_size = 21 * block.self_attn.frame_length
    return stage


def _streaming() -> Stage:
    stage = Stage(find_host("streamdiffusionv2"), 21)
    pipeline = SimpleNamespace(
        generator=SimpleNamespace(model=stage.model),
        num_kv_cache=stage.host.dense,
        text_encoder=lambda text_prompts: text_prompts,
    )
    stage.names["pipe"] = SimpleNamespace(pipeline_manager=SimpleNamespace(pipeline=pipeline))
    return stage


def _engine() -> Stage:
    """The engine of a world model, which denoises frame by frame."""
    stage = Stage(find_host("waypoint"), 6, chunk=1)
    stage.names["engine"] = SimpleNamespace(model=stage.model)
    return stage


PAGES: dict[str, Callable[[], Stage]] = {
    "self-forcing": lambda: Stage(find_host("self_forcing"), -1),
    "causvid": lambda: Stage(find_host("causvid"), 21),
    "longlive": lambda: Stage(find_host("longlive"), 12),
    "longlive2": lambda: Stage(find_host("longlive2"), 32),
    "reward-forcing": lambda: Stage(find_host("reward_forcing"), 9),
    "rolling-forcing": _rolling,
    "infinity-rope": lambda: Stage(find_host("infinity_rope"), 6),
    "infinity-rope#memrope": lambda: Stage(find_host("longlive"), 12),
    "krea": lambda: Stage(find_host("krea"), -1),
    "fastvideo": lambda: Stage(find_host("fastvideo"), 21),
    "streamdiffusionv2": _streaming,
    "waypoint": _engine,
    "diffusers": lambda: Stage(find_host("anyflow_far"), 12, chunk=2),
    "diffusers#sana-wm-stage-2": lambda: _Refiner(find_host("sana_wm"), 14),
}
"""A page, or a part of it behind a heading of the second level."""


def part(place: str) -> str:
    """The text of a page, or of a part of it; what has a stage of its own is left out."""
    name, _, anchor = place.partition("#")
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    own = {one.partition("#")[2] for one in PAGES if one.startswith(f"{name}#")}
    return "".join(one for one in parts if (_slug(one) == anchor if anchor else _slug(one) not in own))


def _slug(text: str) -> str:
    title = text.splitlines()[0].removeprefix("## ").lower() if text.startswith("## ") else ""
    return re.sub(r"[^a-z0-9]+", "-", title)


@pytest.mark.parametrize("place", PAGES)
def test_the_lines_of_a_page_run_in_a_video(place: str) -> None:
    stage = PAGES[place]()
    if (why := stage.host.missing()) is not None:
        pytest.skip(why)
    lines = [fence for fence in fences(part(place), "python") if fence.spared]
    assert lines
    space = stage.space()
    for fence in lines:
        if "apply_head_forcing" in fence.body:
            stage.anew()
        exec(compile(fence.body, place, "exec"), space)
        stage.run()
    (handle,) = handles_of(stage.model)
    status = handle.status()
    assert status.active
    assert not status.bypassed
    assert status.stored_bytes > 0


@pytest.mark.parametrize("place", ["self-forcing", "causvid", "rolling-forcing"])
def test_a_new_prompt_is_encoded_and_takes_effect(place: str) -> None:
    stage = PAGES[place]()
    space = stage.space()
    for fence in fences(part(place), "python"):
        exec(compile(fence.body, place, "exec"), space)
        if "switch_prompt" not in fence.body:
            stage.run()
            stage.run()
            before = space["pipeline"].handle.frames(0, 0)[0][0]
            assert len(before) > 6
    assert space["told"] == [["a prompt"]]
    stage.run()
    after = space["pipeline"].handle.frames(0, 0)[0][0]
    assert set(after) & set(before) == {0, 1, 2}, "the first frames stay, recent ones went"


def test_every_page_has_a_stage_or_no_lines() -> None:
    for page in FOLDER.glob("*.md"):
        infos = [fence.info for fence in fences(page.read_text(encoding="utf-8"), "python")]
        assert [info for info in infos if not REASON.search(info)] == []
        assert page.stem in PAGES or not infos


@pytest.mark.parametrize("first", [pytest.param("compile", marks=pytest.mark.slow), "apply"])
def test_blocks_compiled_as_fastvideo_does_change_nothing(first: str) -> None:
    def video(model: Any) -> torch.Tensor:
        caches = host.caches(model)
        with torch.no_grad():
            calls = [(start, draw) for start in range(0, 12, 3) for draw in (1, 0)]
            return torch.cat([host.call(model, caches, start, 3, draw) for start, draw in calls], 1)

    def compiled(model: Any) -> None:
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend="eager")

    host = find_host("fastvideo")
    model: Any = host.model()
    if first == "compile":
        compiled(model)
    handle = apply_head_forcing(model, host.memory)
    if first == "apply":
        compiled(model)
    assert torch.equal(video(model), video(host.model()))
    assert handle.status().active
