"""The stability report finds what was planted, and says so where nothing can be said."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial

import pytest
import torch

from headforcing.errors import OptionError, ProfileError
from headforcing.measure.classifiers import (
    find_classifier,
    head_forcing,
    mass_ratio,
    output_regret,
    pyramid_forcing,
)
from headforcing.measure.compare import compare_labels
from headforcing.measure.labels import measured_map
from headforcing.measure.stability import stability
from headforcing.measure.stability_report import StabilityReport
from tests.profiles import profile_of, random_profile

LAYERS, HEADS, PROMPTS, STARTS, STEPS = 6, 8, 12, 2, 2
ROWS = PROMPTS * STARTS * STEPS
PROMPT = torch.arange(PROMPTS).repeat_interleave(STARTS * STEPS)
START = torch.tensor([21, 30]).repeat_interleave(STEPS).repeat(PROMPTS)
STEP = torch.arange(STEPS).repeat(STARTS * PROMPTS)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(seed: int = 0) -> torch.Tensor:
    """What tells heads apart, `[layers, heads]`."""
    return draw(seed, LAYERS, HEADS)


def planted(signal: torch.Tensor, noise: float = 0.05, seed: int = 1):
    """A profile of a mass ratio, the signal broadcast to every pass, with noise per prompt."""
    by_prompt = draw(seed, PROMPTS, LAYERS, HEADS)[PROMPT]
    return profile_of(
        {"mass_ratio.ratio": (signal + noise * by_prompt).expand(ROWS, LAYERS, HEADS)},
        prompt=PROMPT,
        start=START,
        step=STEP,
    )


by_half = partial(mass_ratio.classify, static=0.0)
"""Every second head is static: the signals above have mean 0."""


def check_stable(profile, classify=by_half):
    report = stability(profile, classify, draws=40)
    assert report.stable
    assert not report.reasons
    assert report.prompts_needed in (1, 2)
    assert min(report.halves.kappa, report.chunks.kappa, report.steps.kappa) > 0.8
    assert str(report).startswith("stable map")


def test_a_planted_map_is_stable():
    check_stable(planted(heads()))


def test_the_check_fails_where_it_should():
    by_step = heads(0) * (STEP == 0).view(-1, 1, 1) + heads(5) * (STEP == 1).view(-1, 1, 1)
    for profile in (planted(0 * heads(), noise=1.0), planted(by_step)):
        with pytest.raises(AssertionError):
            check_stable(profile)


def test_noise_is_no_stable_map():
    report = stability(planted(0 * heads(), noise=1.0), by_half, draws=40)
    assert not report.stable
    assert abs(report.halves.kappa) < 0.3
    assert report.prompts_needed is None
    assert len(report.boundary) > LAYERS * HEADS / 2
    assert str(report).startswith("no stable map")
    assert any(reason.startswith("halves disagree") for reason in report.reasons)
    assert abs(report.columns["mass_ratio.ratio"].raw) < 0.3


def test_agreement_by_chance_is_not_enough():
    rare = partial(mass_ratio.classify, static=1.0)
    signal = heads().clamp(max=0.8)
    report = stability(planted(signal, noise=0.6), rare, draws=20)
    between = (report.halves.kappa + report.halves.agreement) / 2
    assert report.halves.agreement - report.halves.kappa > 0.2
    assert not stability(planted(signal, noise=0.6), rare, draws=20, target=between).stable


def test_labels_of_the_layer_alone():
    layer = torch.tensor([-2.0, 1, -1, 2, -3, 3]).double()[:, None].expand(LAYERS, HEADS)
    report = stability(planted(layer, noise=0.2), by_half, draws=40)
    assert report.stable
    assert report.depth == {"static": pytest.approx(1), "dynamic": pytest.approx(1)}
    assert report.depth_by_chance == pytest.approx(5 / 47)
    column = report.columns["mass_ratio.ratio"]
    assert column.raw > 0.95
    assert abs(column.within_layer) < 0.3


def test_labels_of_the_head_alone():
    report = stability(planted(heads()), by_half, draws=40)
    assert report.columns["mass_ratio.ratio"].within_layer > 0.95
    assert report.depth["static"] < 0.5


@pytest.mark.parametrize(("line", "index"), [("steps", STEP), ("chunks", START == 30)])
def test_labels_of_the_step_or_the_chunk_are_caught(line, index):
    first, second = heads(0), heads(5)
    where = (index > 0).view(-1, 1, 1)
    report = stability(planted(torch.where(where, first, second)), by_half, draws=20)
    assert not report.stable
    assert [reason.split()[0] for reason in report.reasons] == [line]
    assert getattr(report, line).kappa < 0.5
    other = {"steps": "chunks", "chunks": "steps"}[line]
    assert getattr(report, other).kappa > 0.8


def test_steps_are_noisy_steps():
    """A clean pass that disagrees is no step."""
    profile = planted(heads())
    profile.values["mass_ratio.ratio"][STEP == 1] *= -1
    noisy_only = profile_of(dict(profile.values), prompt=PROMPT, start=START, step=STEP, clean=STEP == 1)
    assert stability(profile, by_half, draws=5).steps.kappa < 0
    report = stability(noisy_only, by_half, draws=5)
    assert report.steps is None
    assert report.stable
    assert report.unjudged == ("steps: not tested, because only one was measured",)


def test_a_chunk_with_clean_passes_only_is_no_chunk():
    profile = planted(heads())
    profile.values["mass_ratio.ratio"][START == 30] *= -1
    clean = (START == 30) | (STEP == 1)
    report = stability(
        profile_of(dict(profile.values), prompt=PROMPT, start=START, step=STEP, clean=clean), by_half, draws=5
    )
    assert (report.chunks, report.steps) == (None, None)
    assert report.stable


def test_passes_that_are_all_clean_count():
    profile = planted(heads())
    clean = profile_of(dict(profile.values), prompt=PROMPT, start=START, step=STEP, clean=STEP >= 0)
    assert stability(clean, by_half, draws=5) == stability(profile, by_half, draws=5)


def test_too_few_prompts_for_a_point_of_the_curve_speak_against_nothing():
    """Single prompts say too little of every head; two or more do not."""
    profile = planted(heads())

    def classify(part):
        if len(part.prompt.unique()) < 2:
            raise ProfileError("too few")
        return by_half(part)

    one_chunk = profile.where(START == 21)
    report = stability(one_chunk.where(one_chunk.step == 0), classify, draws=8)
    assert report.stable
    assert report.curve[0].prompts == 2
    assert any(line.startswith("1 prompts: not tested") for line in report.unjudged)


def test_a_resample_that_cannot_be_classified_is_a_reason():
    profile = planted(heads())

    def classify(part):
        if len(part) == len(profile) and len(part.prompt.unique()) < PROMPTS:
            raise ProfileError("drawn twice")
        return by_half(part)

    report = stability(profile, classify, draws=4)
    assert (report.votes, report.stable) == (None, False)
    assert report.reasons == ("votes: a resample cannot be classified: drawn twice",)


def test_the_summary_says_what_was_not_judged():
    assert "unjudged" not in stability(planted(heads()), by_half, draws=4).summary()
    report = stability(planted(heads()).where(START == 21), by_half, draws=4)
    assert report.summary()["unjudged"] == "; ".join(report.unjudged)
    assert "chunks: not tested, because only one was measured" in report.unjudged


@pytest.mark.parametrize("module", [head_forcing, output_regret], ids=["head_forcing", "output_regret"])
def test_the_lines_are_those_of_their_definition(module):
    profile = random_profile(4, layers=4, heads=6, prompts=5, noise=0.6)
    report = stability(profile, module.classify, draws=10)
    for line, column, values in (("chunks", profile.start, (21, 30)), ("steps", profile.step, (0, 1))):
        maps = [module.classify(profile.where(column == value)).labels for value in values]
        expected = compare_labels(*maps)
        got = getattr(report, line)
        assert (got.pairs, got.kappa) == (1, pytest.approx(expected.kappa))
        assert got.agreement == pytest.approx(expected.agreement)
        assert {name: got.jaccard[name] for name in expected.jaccard} == pytest.approx(expected.jaccard)
    assert report.halves.pairs == 10
    scalars = {"attention_mass.first", "attention_mass.own"}  # middle is not read
    assert set(report.columns) == (scalars if module is head_forcing else set())


def test_votes_and_the_boundary():
    signal = heads()
    signal = signal.sign() * (1 + signal.abs())
    profile = planted(signal, noise=0.3)
    doubtful = profile.values["mass_ratio.ratio"][:, 2, 3]
    doubtful -= doubtful.mean() - 0.01  # this head hangs on which prompts were drawn
    report = stability(profile, by_half, draws=100)
    labels = by_half(profile).labels
    assert report.labels == labels
    assert [(head.layer, head.head) for head in report.boundary] == [(2, 3)]
    [head] = report.boundary
    assert head.label == labels[2][3]
    assert {head.label, head.runner_up} == {"static", "dynamic"}
    assert 0.3 < head.votes < 0.9
    assert report.votes[2][3] == head.votes
    assert sum(share == 1 for row in report.votes for share in row) == LAYERS * HEADS - 1


def test_the_curve_rises_and_says_how_many_prompts():
    noisy = stability(planted(heads(), noise=1.0), by_half, draws=80)
    assert [point.prompts for point in noisy.curve] == [1, 2, 4, 6]
    kappas = [point.kappa for point in noisy.curve]
    assert kappas == sorted(kappas)
    assert noisy.curve[-1].kappa == noisy.halves.kappa
    reached = stability(planted(heads(), noise=1.0), by_half, draws=80, target=kappas[2])
    assert reached.prompts_needed == 4


def test_what_cannot_be_judged_is_said():
    whole = planted(heads())
    one_prompt = stability(whole.where(PROMPT == 0), by_half, draws=5)
    assert (one_prompt.halves, one_prompt.votes, one_prompt.curve) == (None, None, ())
    assert not one_prompt.stable
    assert "1 prompts are too few" in one_prompt.reasons[0]
    assert one_prompt.columns["mass_ratio.ratio"].raw is None
    one_start = stability(whole.where(START == 21), by_half, draws=5)
    assert one_start.chunks is None
    assert one_start.stable
    assert [line.split(":")[0] for line in one_start.unjudged] == ["chunks"]
    one_step = stability(whole.where(STEP == 0), by_half, draws=5)
    assert (one_step.steps, one_step.stable) == (None, True)
    one = stability(whole.where(torch.tensor([0])), by_half, draws=5)
    assert [line.split(":")[0] for line in one.unjudged] == ["halves", "chunks", "steps", "votes"]
    assert not one.stable
    three = stability(whole.where(PROMPT < 3), by_half, draws=5)
    assert not three.stable
    assert three.halves.kappa > 0.8
    for report in (one_prompt, one_start, one_step, one, three):
        assert StabilityReport.from_json(report.to_json()) == report
        assert all(line in str(report) for line in (*report.reasons, *report.unjudged))


def test_a_part_that_cannot_be_classified_is_said():
    profile = random_profile(0, prompts=4)
    early = profile.start == 21
    profile.values["qk_logits.by_age"][early] = (
        profile.values["qk_logits.by_age"][early].clone().index_fill_(3, torch.arange(9, 18), torch.nan)
    )
    report = stability(profile, pyramid_forcing.classify, draws=5)
    assert report.chunks is None
    assert not report.stable
    assert [
        line for line in report.reasons if line.startswith("chunks: a part cannot be classified: in no pass")
    ]
    assert report.summary()["stable"] is False
    with pytest.raises(ProfileError):
        stability(profile.where(early), pyramid_forcing.classify, draws=5)


def test_one_label_everywhere_agrees_with_itself_and_says_nothing():
    flat = stability(planted(0 * heads() - 3), by_half, draws=5)
    assert (flat.halves.kappa, flat.steps.kappa) == (1, 1)
    assert flat.halves.jaccard == {"static": None, "dynamic": 1.0}
    assert flat.depth == {"static": None, "dynamic": None}
    assert not flat.stable
    assert flat.reasons == ("all heads have the same label: there is nothing to compare",)


def test_many_chunks_are_compared_by_halves():
    profile = planted(heads())
    many = profile_of(
        dict(profile.values), prompt=PROMPT, start=21 + 3 * torch.arange(ROWS), step=torch.zeros_like(STEP)
    )
    assert stability(many, by_half, draws=5).chunks.pairs == 1


def test_a_report_is_the_same_every_time_and_draws_no_global_random_numbers():
    state = torch.random.get_rng_state()
    profile = random_profile(1, prompts=5, noise=1.0)
    first, again = (stability(profile, head_forcing.classify, draws=10, seed=3) for _ in range(2))
    assert first == again
    assert stability(profile, head_forcing.classify, draws=10, seed=4) != first
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"draws": 0}, {"draws": 1.5}, {"target": 1.5}, {"target": float("nan")}])
def test_impossible_options(options):
    with pytest.raises(OptionError, match="expected"):
        stability(random_profile(0), head_forcing.classify, **options)


def test_a_classifier_that_changes_its_labels():
    def named_by_size(profile):
        found = head_forcing.classify(profile)
        names = {name: f"{name}{len(profile)}" for name in found.roles}
        return dataclasses.replace(
            found,
            labels=tuple(tuple(names[label] for label in row) for row in found.labels),
            roles={names[name]: role for name, role in found.roles.items()},
        )

    with pytest.raises(OptionError, match="for the whole profile"):
        stability(random_profile(0), named_by_size)


@pytest.mark.parametrize("name", ["head_forcing", "mass_ratio", "output_regret", "pyramid_forcing"])
def test_a_report_survives_its_file(name, tmp_path):
    profile = random_profile(0, prompts=5)
    report = stability(profile, find_classifier(name), draws=5)
    report.save(tmp_path / "stability.json")
    assert StabilityReport.load(tmp_path / "stability.json") == report
    found = find_classifier(name)(profile)
    roles = measured_map(found, profile, stability=report.summary())
    assert roles.origin.stability["stable"] == report.stable
    assert roles.origin.stability["halves_kappa"] == report.halves.kappa


def test_malformed_reports_are_refused(tmp_path):
    good = stability(random_profile(0, prompts=4), output_regret.classify, draws=5).to_dict()
    broken = [
        "",
        "[]",
        "{}",
        json.dumps({**good, "version": 2}),
        json.dumps({**good, "more": 1}),
        json.dumps({**good, "target": "0.8"}),
        json.dumps({**good, "halves": {**good["halves"], "kappa": 2}}),
        json.dumps(good).replace('"seed"', '"draws": 5, "seed"'),
        json.dumps({**good, "target": float("nan")}),
    ]
    for text in broken:
        with pytest.raises(ProfileError, match="stability report: "):
            StabilityReport.from_json(text)
    with pytest.raises(ProfileError, match="cannot be read"):
        StabilityReport.load(tmp_path / "none.json")


def test_a_check_of_a_large_model_is_quick():
    """360 heads, 40 prompts, 160 noisy passes and as many draws as there are by default."""
    profile = random_profile(0, layers=30, heads=12, prompts=40).noisy
    began = time.process_time()
    stability(profile, head_forcing.classify)
    assert time.process_time() - began < 10  # about 1 s on a quiet machine
