"""Profiling measures what it says, tells passes and videos apart, and disturbs nothing."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headforcing as hf
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import NOISE_LEVELS, DemoPipeline
from headforcing.demo.world.scene import sample_scene
from headforcing.errors import AlreadyAppliedError, OptionError, ProfileError
from headforcing.measure.metrics import Look, Metric
from headforcing.measure.profile import HeadProfile
from headforcing.measure.profiler import METRICS, Protocol, profile_heads
from headforcing.roles import Full, Local, SlidingWindow
from tests.examples import examples

CONFIG = DemoConfig(dim=64, heads=4, layers=3)
LATENTS = (CONFIG.channels, CONFIG.chunk, *CONFIG.grid)
CHUNKS = 9
PASSES = 1 + len(NOISE_LEVELS)
OWN_CACHE = SlidingWindow(21, positions="absolute")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> DemoModel:
    return DemoModel(CONFIG).randomize(seeded()).eval().requires_grad_(False)


def make(model: DemoModel, chunks: int = CHUNKS, pipeline: DemoPipeline | None = None) -> torch.Tensor:
    prompts = sample_scene(2, seeded(1)).prompts(torch.arange(chunks))
    return (pipeline or DemoPipeline(model)).generate(prompts, generator=seeded(2))


def expected_masses(model: DemoModel, window: int) -> torch.Tensor:
    """By the definition, `[S, layers, heads, 3]`: the dense softmax over the keys of every call."""
    role, rows = SlidingWindow(window, sink=1, positions="compact"), []

    def attend(parts, num_heads):
        [part] = parts
        if part.k.shape[1] > part.q.shape[1]:
            q, k = part.q.double(), part.k.double()
            weights = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
            weights = weights.softmax(-1).mean(2)  # [B, H, M]
            tokens = CONFIG.tokens_per_frame
            regions = weights[..., :tokens], weights[..., tokens : -q.shape[1]], weights[..., -q.shape[1] :]
            rows.append(torch.stack([region.sum(-1) for region in regions], -1))
        sides = (x.transpose(1, 2) for x in (part.q, part.k, part.v))
        return torch.nn.functional.scaled_dot_product_attention(*sides).transpose(1, 2)

    with hf.apply_head_forcing(model, role, backend=attend, window=window):
        make(model)
    passes = [torch.stack(rows[first : first + 3], 1) for first in range(0, len(rows), 3)]
    return torch.cat(passes)


@pytest.mark.parametrize("window", [21, 12])
def test_the_masses_are_those_of_the_definition(model, window):
    profile = profile_heads(model, lambda: make(model), ["attention_mass"], protocol=Protocol(window=window))
    found = torch.stack([profile[f"attention_mass.{name}"] for name in ("first", "middle", "own")], -1)
    torch.testing.assert_close(found, expected_masses(model, window), atol=1e-6, rtol=0)
    assert found.std() > 0.01
    assert profile.facts.model.window == window


def test_every_pass_is_a_row(model):
    profile = profile_heads(model, lambda: make(model))
    assert len(profile) == 2 * (CHUNKS - 1) * PASSES
    rows = set(zip(profile.video.tolist(), profile.start.tolist(), profile.step.tolist(), strict=True))
    starts, steps = range(3, 3 * CHUNKS, 3), range(PASSES)
    assert rows == {(prompt, start, step) for prompt in (0, 1) for start in starts for step in steps}
    assert torch.equal(profile.clean, profile.step == PASSES - 1)
    assert len(profile.noisy) == len(profile) * (PASSES - 1) // PASSES
    for name, shape in {
        "attention_mass.first": (),
        "qk_logits.by_age": (20,),
        "output_regret.p95": (7,),
    }.items():
        assert profile[name].shape == (len(profile), 3, 4, *shape)
    assert [name for name in METRICS if name in profile.facts.metrics] == list(METRICS)


@pytest.mark.parametrize(
    "metrics",
    [
        pytest.param(["attention_mass"], id="one", marks=pytest.mark.slow),
        pytest.param(list(METRICS), id="all"),
    ],
)
def test_measuring_changes_no_bit_and_draws_no_random_numbers(model, metrics):
    own, videos = make(model, 12), []
    state = torch.random.get_rng_state()
    for history, queries in ((OWN_CACHE, None), (OWN_CACHE, 2), (None, None)):
        protocol = Protocol(history=history, queries=queries)
        profile_heads(model, lambda: videos.append(make(model, 12)), metrics, protocol=protocol)
    assert torch.equal(torch.random.get_rng_state(), state)
    with hf.apply_head_forcing(model, SlidingWindow(21, sink=1, positions="compact")):
        with_sink = make(model, 12)
    assert torch.equal(videos[0], own)  # 36 frames through a window of 21: the model's own cache
    assert torch.equal(videos[1], own)
    assert torch.equal(videos[2], with_sink)
    assert torch.equal(videos[2][:, :, :21], own[:, :, :21])
    assert not torch.equal(with_sink, own)
    assert torch.equal(make(model, 12), own)


class Writes(Metric):
    """A metric with a bug: it writes to what it is shown."""

    name = "writes"

    def measure(self, look: Look):
        look.seen.out.mul_(1.5)
        return {"x": look.share[..., 0]}


def test_a_metric_that_disturbs_would_be_seen(model):
    own, videos = make(model), []
    profile_heads(model, lambda: videos.append(make(model)), [Writes()], protocol=Protocol(history=OWN_CACHE))
    assert not torch.equal(videos[0], own)


def test_a_head_with_equal_keys_looks_everywhere_alike(model):
    attention = model.blocks[1].self_attn
    head = slice(16, 32)  # layer 1, head 1: equal keys, so the mass follows the lengths
    attention.k.weight[head] = 0
    attention.k.bias[head] = 0
    profile = profile_heads(model, lambda: make(model, 7), ["attention_mass"])
    past = profile.start.double()
    torch.testing.assert_close(profile["attention_mass.own"][:, 1, 1], 3 / (past + 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(profile["attention_mass.first"][:, 1, 1], 1 / (past + 3), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_layers_are_told_by_module_not_by_call_order(model):
    straight = profile_heads(model, lambda: make(model))

    def with_stray_calls() -> None:
        pipeline = DemoPipeline(model)
        prompts = sample_scene(2, seeded(1)).prompts(torch.arange(CHUNKS))

        def disturb(index: int, clean: torch.Tensor) -> None:
            x, grid = torch.zeros(2, 48, CONFIG.dim), torch.tensor([[3, 4, 4]] * 2)
            for start in (0, 48):  # one layer alone, with a history of its own
                model.blocks[2].self_attn(
                    x, torch.full((2,), 48), grid, model.freqs, None, stray[index], start
                )

        stray = []
        for _ in range(CHUNKS):
            fresh = {name: torch.zeros(2, 96, 4, 16) for name in "kv"}
            fresh |= {f"{name}_end_index": torch.zeros(1, dtype=torch.long) for name in ("global", "local")}
            stray.append(fresh)
        pipeline.generate(prompts, generator=seeded(2), callback=disturb)

    disturbed = profile_heads(model, with_stray_calls)
    assert disturbed.hash == straight.hash


def videos_of(profile: HeadProfile) -> list[int]:
    """The video of every clean pass over the chunk at frame 3, in order."""
    return profile.video[(profile.start == 3) & profile.clean].tolist()


def test_videos_are_told_apart(model):
    same = DemoPipeline(model)

    def one_after_the_other(fresh: bool) -> None:
        for _ in range(3):
            make(model, 2, None if fresh else same)

    for fresh in (True, False):
        profile = profile_heads(model, lambda f=fresh: one_after_the_other(f), ["mass_ratio"])
        assert videos_of(profile) == [0, 1, 2, 3, 4, 5]
        assert torch.equal(profile.prompt, profile.video)


def test_branches_of_one_video_share_its_number(model):
    """Classifier-free guidance: two caches, called in turn for the same chunk."""

    def guided() -> None:
        branches = [DemoPipeline(model), DemoPipeline(model)]
        for pipeline in branches:
            pipeline._prepare(2, 3)
        context = sample_scene(2, seeded(1)).prompts(torch.arange(1))[:, 0]
        for _ in range(2):  # the second video on the same caches
            for pipeline in branches:
                pipeline._prepare(2, 3)
            for index in range(3):
                for _ in range(2):
                    for pipeline in branches:
                        pipeline._predict(torch.randn(2, *LATENTS, generator=seeded(3)), 1.0, context, index)

    profile = profile_heads(model, torch.no_grad()(guided), ["mass_ratio"])
    assert videos_of(profile) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert profile.step.unique().tolist() == [0, 1]
    assert int(profile.clean.sum()) == len(profile) // 2


def test_run_is_called_with_every_prompt(model):
    asked, told = [], []

    def run(prompt: str) -> None:
        asked.append(prompt)
        make(model, 3)

    profile = profile_heads(
        model, run, ["mass_ratio"], prompts=["a", "b"], progress=lambda *what: told.append(what)
    )
    assert asked == ["a", "b"]
    assert videos_of(profile) == [0, 1, 2, 3]
    assert torch.equal(profile.prompt, profile.video // 2)  # a batch of two videos per prompt
    assert profile.facts.prompts is not None
    again = profile_heads(model, run, ["mass_ratio"], prompts=["b", "a"])
    assert again.facts.prompts != profile.facts.prompts
    assert told == [(n, None, "frames") for n in (3, 6, 9)] + [(1, 2, "prompts")] + told[:3] + [
        (2, 2, "prompts")
    ]


def test_only_the_chunks_asked_for_are_measured(model):
    protocol = Protocol(starts={6, 12})
    some = profile_heads(model, lambda: make(model), protocol=protocol)
    every = profile_heads(model, lambda: make(model))
    assert some.start.unique().tolist() == [6, 12]
    keep = (every.start == 6) | (every.start == 12)
    for name in some.values:
        assert torch.equal(some.values[name].nan_to_num(-1), every.values[name][keep].nan_to_num(-1)), name
    assert torch.equal(some.clean, every.clean[keep])


@pytest.mark.slow
def test_some_queries_estimate_all(model):
    every = profile_heads(model, lambda: make(model))
    few = [profile_heads(model, lambda: make(model), protocol=Protocol(queries=8, seed=s)) for s in (0, 0, 1)]
    assert few[0].hash == few[1].hash != few[2].hash
    for name in ("attention_mass.own", "mass_ratio.ratio", "output_regret.mean"):
        torch.testing.assert_close(few[0].mean(name), every.mean(name), atol=0.08, rtol=0.1)
        assert not torch.equal(few[0].mean(name), every.mean(name))
    plenty = profile_heads(model, lambda: make(model), protocol=Protocol(queries=1000))
    assert torch.equal(plenty["attention_mass.own"], every["attention_mass.own"])


def test_a_dense_history_is_measured_too(model):
    profile = profile_heads(model, lambda: make(model, 12), protocol=Protocol(history=Full()))
    assert int(profile.start.max()) == 33
    total = sum(profile[f"attention_mass.{name}"] for name in ("first", "middle", "own"))
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


def test_the_model_is_left_as_it_was_when_the_run_fails(model):
    own = make(model)

    def fail() -> None:
        make(model, 2)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        profile_heads(model, fail)
    assert torch.equal(make(model), own)


def test_nothing_of_a_video_outlives_it(model):
    alive: list[weakref.ref[torch.Tensor]] = []

    def run() -> None:
        for _ in range(2):
            pipeline = DemoPipeline(model)
            make(model, 3, pipeline)
            alive.append(weakref.ref(pipeline.kv_cache[0]["k"]))
            del pipeline
            gc.collect()
            assert alive[-1]() is None

    profile_heads(model, run)


def test_what_cannot_be_measured_is_refused(model):
    with pytest.raises(ProfileError, match="at least two chunks"):
        profile_heads(model, lambda: make(model, 1))
    with pytest.raises(ProfileError, match=r"one of the frames \[4\]; those with a history start at \[3, 6"):
        profile_heads(model, lambda: make(model), protocol=Protocol(starts=[4]))
    for metrics in ([], ["mass_ratio", "mass_ratio"]):
        with pytest.raises(OptionError, match="each once"):
            profile_heads(model, lambda: make(model), metrics)
    for metrics, told in (
        (["masses"], "unknown metric"),
        ("mass_ratio", "expected a list"),
        ([3], "not a metric"),
    ):
        with pytest.raises(OptionError, match=told):
            profile_heads(model, lambda: make(model), metrics)
    for prompts in ([], "a prompt"):
        with pytest.raises(OptionError, match="expected a list of at least one prompt"):
            profile_heads(model, lambda p: make(model), prompts=prompts)
    with hf.apply_head_forcing(model, SlidingWindow(21, sink=1)) as handle:
        with pytest.raises(AlreadyAppliedError):
            profile_heads(model, lambda: make(model))
        make(model)
        assert handle.status().active


@pytest.mark.parametrize("wrong", [{"queries": 0}, {"queries": 2.5}, {"starts": []}, {"starts": [-3]}])
def test_a_protocol_is_checked_before_anything_runs(wrong):
    with pytest.raises(OptionError, match="expected"):
        Protocol(**wrong)


def test_the_reason_why_nothing_was_measured_is_told(model):
    def with_gradients() -> None:
        model.requires_grad_(True)
        pipeline = DemoPipeline(model)
        pipeline._prepare(1, 2)
        context = sample_scene(1, seeded(1)).prompts(torch.arange(1))[:, 0]
        pipeline._predict(torch.randn(1, *LATENTS, generator=seeded(3)), 1.0, context, 0)

    with pytest.raises(ProfileError, match="does it generate with this model"):
        profile_heads(model, lambda: None)
    with pytest.raises(ProfileError, match="stores a frame"):
        profile_heads(model, lambda: make(model), ["mass_ratio"], protocol=Protocol(history=Local(0)))
    with pytest.warns(UserWarning, match="inactive"), pytest.raises(ProfileError, match="no_grad"):
        profile_heads(model, with_gradients)


class Says(Metric):
    """A metric that returns what it is told to, call by call."""

    name = "says"

    def __init__(self, *answers) -> None:
        self.answers = iter(answers)

    def measure(self, look: Look):
        return next(self.answers)(look)


@pytest.mark.parametrize(
    "answers",
    [
        [lambda look: look.share[..., 0]],
        [lambda look: {}],
        [lambda look: {"x": 1.0}],
        [lambda look: {"x": look.share[:, 0, 0]}],
        [lambda look: {"x": look.share[..., 0]}] * 4 + [lambda look: {"y": look.share[..., 0]}],
        [lambda look: {"x": look.share}] * 99,
    ],
    ids=["tensor", "nothing", "float", "no heads", "another name", "another shape"],
)
def test_a_metric_that_says_something_else_is_stopped_at_once(model, answers):
    own = make(model, 3)
    with pytest.raises(ProfileError, match="returned"):
        profile_heads(model, lambda: make(model, 3), [Says(*answers)])
    assert torch.equal(make(model, 3), own)


def test_a_model_that_changes_while_it_runs_is_refused(model):
    def run() -> None:
        make(model, 3, DemoPipeline(model, window=9))

    with pytest.raises(ProfileError, match=r"\(21, 3\) and became \(9, 3\)"):
        profile_heads(model, run, ["mass_ratio"])


def test_two_threads_are_kept_apart(model):
    alone = profile_heads(model, lambda: make(model, 4), ["attention_mass"])

    def together() -> None:
        threads = [threading.Thread(target=make, args=(model, 4)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    both = profile_heads(model, together, ["attention_mass"])
    assert len(both) == 2 * len(alone)
    once = sorted(alone["attention_mass.own"].sum((1, 2)).tolist())
    assert sorted(both["attention_mass.own"].sum((1, 2)).tolist()) == sorted(once * 2)


def test_chunks_of_different_lengths_are_measured(model):
    """An image first, then chunks, then a short one."""

    @torch.no_grad()
    def run() -> None:
        pipeline = DemoPipeline(model)
        pipeline._prepare(1, 4)
        context = sample_scene(1, seeded(1)).prompts(torch.arange(1))[:, 0]
        start = 0
        for frames in (1, 3, 3, 2):
            sample = torch.randn(1, CONFIG.channels, frames, *CONFIG.grid, generator=seeded(3))
            model(
                sample,
                t=sample.new_full((1, frames), 1.0),
                context=context,
                kv_cache=pipeline.kv_cache,
                crossattn_cache=pipeline.crossattn_cache,
                current_start=start * CONFIG.tokens_per_frame,
            )
            start += frames

    profile = profile_heads(model, run)
    assert profile.start.tolist() == [1, 4, 7]
    assert profile["attention_mass.by_age"].isfinite().sum(-1)[:, 0, 0].tolist() == [1, 4, 7]
    assert len(profile.facts.metrics["output_regret"]["roles"]) == 7


def test_a_profile_survives_its_files(model, tmp_path):
    profile = profile_heads(model, lambda: make(model, 4), base_model="none")
    path = tmp_path / "p.safetensors"
    profile.save(path)
    again = HeadProfile.load(path)
    assert again.hash == profile.hash
    assert again.facts == profile.facts
    assert again.facts.model.base_model == "none"
    with pytest.raises(ProfileError, match=r"has no output_regret\.best: it has .*profile again"):
        again["output_regret.best"]
    with pytest.raises(ProfileError, match="ablate_heads"):
        again["ablation.increase"]
    with pytest.raises(ProfileError, match=r"\.safetensors"):
        profile.save(tmp_path / "p.pt")
    with pytest.raises(ProfileError, match="cannot be read"):
        HeadProfile.load(tmp_path / "missing.safetensors")


@given(data=st.data())
@settings(max_examples=examples(60), deadline=None)
def test_a_changed_file_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("profile")
    model = DemoModel(CONFIG).randomize(seeded()).eval().requires_grad_(False)
    path = folder / "p.safetensors"
    saved = _saved(model, path)
    victim = data.draw(st.sampled_from([path, path.with_suffix(".profile.json")]))
    content = bytearray(victim.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[where] ^= data.draw(st.integers(1, 255))
    else:
        del content[where : where + data.draw(st.integers(1, 50))]
    victim.write_bytes(content)
    try:
        found = HeadProfile.load(path)
    except ProfileError:
        return
    assert found.hash == saved  # white space of the JSON


_SAVED: list[HeadProfile] = []


def _saved(model: DemoModel, path) -> str:
    if not _SAVED:
        _SAVED.append(profile_heads(model, lambda: make(model, 2), ["mass_ratio"]))
    _SAVED[0].save(path)
    return _SAVED[0].hash
