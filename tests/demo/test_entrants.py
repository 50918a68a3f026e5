"""What competes on the demo model, and the controls it gets."""

from __future__ import annotations

import pytest
import torch

from headforcing import Local, RoleMap, SlidingWindow
from headforcing.demo import demo_preset, demo_roles
from headforcing.demo.contest.compare import Policy, make_scene, roll
from headforcing.demo.contest.entrants import (
    SHUFFLES,
    attended_frames,
    controls,
    entrant,
    scattered,
    shuffled,
    stored_frames,
    streaming,
)
from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.model.model import DemoModel
from headforcing.errors import OptionError, RoleMapError, RoleMapMismatchError
from headforcing.roles.maps.presets import PRESETS

CONFIG = DemoConfig()
LABELLED = [name for name, preset in PRESETS.items() if preset.labels_needed()]


@pytest.mark.filterwarnings("ignore::headforcing.errors.ForeignRolesWarning")  # the weights are random
def test_every_preset_runs_on_the_demo_model():
    model = DemoModel().randomize(torch.Generator().manual_seed(0)).eval()
    scene = make_scene([1], 9, camera="still")
    for name in PRESETS:
        made = roll(model, Policy(name, entrant(name, CONFIG).roles), scene, 9, seeds=[1], given_chunks=1)
        assert made.video.isfinite().all()


def test_an_entrant_is_a_preset_or_a_file(tmp_path):
    assert entrant("memrope", CONFIG).roles == demo_preset("memrope")
    demo_roles().save(tmp_path / "mine.json")
    found = entrant(str(tmp_path / "mine.json"), CONFIG)
    assert (found.name, found.roles) == ("mine", demo_roles())
    RoleMap.uniform(Local(), 2, 6).save(tmp_path / "small.json")
    (tmp_path / "bad.json").write_text("{}")
    for name, error in (("small", RoleMapMismatchError), ("bad", RoleMapError), ("absent", OptionError)):
        with pytest.raises(error):
            entrant(str(tmp_path / f"{name}.json"), CONFIG)


def test_frames_are_means_over_the_heads():
    roles = RoleMap(((Local(1), SlidingWindow(21)),))
    assert stored_frames(roles, CONFIG) == attended_frames(roles, CONFIG) == (4 + 21) / 2
    assert stored_frames(demo_preset("full"), CONFIG) is attended_frames(demo_preset("full"), CONFIG) is None


@pytest.mark.parametrize("frames", [4, 5, 6, 7, 21])
def test_streaming_llm_has_a_sink_and_where_it_can_recent_frames(frames):
    role = streaming(frames, CONFIG).layers[0][0].fit(CONFIG.window, CONFIG.chunk)
    assert role.window == frames
    assert 1 <= role.sink <= CONFIG.chunk
    assert role.sink + CONFIG.chunk < frames or frames == 4


@pytest.mark.parametrize("name", LABELLED)
def test_shuffles_keep_the_numbers_of_roles(name):
    roles = demo_preset(name)
    inside, anywhere = shuffled(roles, 0), scattered(roles, 0)
    assert [sorted(map(str, row)) for row in inside.layers] == [sorted(map(str, row)) for row in roles.layers]
    assert anywhere.counts().keys() == roles.counts().keys()
    assert all(anywhere.counts()[role] == count for role, count in roles.counts().items())
    assert len({shuffled(roles, seed) for seed in range(4)}) > 1
    assert shuffled(roles, 1) == shuffled(roles, 1)
    assert scattered(roles, 1) == scattered(roles, 1) != anywhere


@pytest.mark.slow
def test_controls_have_the_frames_and_the_bytes():
    kinds = {name: [one.kind for one in controls(entrant(name, CONFIG), CONFIG)] for name in PRESETS}
    assert kinds["full"] == kinds["streaming_llm"] == []
    assert kinds["infinity_rope"] == ["as many attended and bytes"]
    for name in LABELLED:
        assert kinds[name][-1] == "shuffled"
    attended, heavy, drawn = controls(entrant("pyramid_forcing", CONFIG), CONFIG)
    assert [one.roles.layers[0][0].window for one in (attended, heavy)] == [9, CONFIG.window]
    assert len(set(drawn.draws)) == SHUFFLES


def test_positions_beyond_the_trained_range_are_known():
    beyond = {name for name in PRESETS if not entrant(name, CONFIG).bounded}
    assert {"full", "dummy_forcing", "forcing_kv"} <= beyond
    assert beyond.isdisjoint({"sliding_window", "streaming_llm", "memrope", "head_forcing"})
