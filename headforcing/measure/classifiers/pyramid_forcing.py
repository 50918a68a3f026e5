"""Pyramid Forcing (arXiv:2605.13111): anchor, wave and veil heads by the sign and period of their logits.

What is known of its rule (paper and readme, through a third party): the series is the mean pre-softmax logit
of the last query frame on every frame of the history; 80 % positive entries make an anchor, 80 % negative a
veil; of the rest, a dominant period compared with 6.4 frames makes a wave; the remaining heads are labelled
by their mean logit. The period: first difference, mean subtracted, Hann window, rFFT, harmonics added with
decaying weights. Its calibration code is not public, so this is a re-implementation and may give other labels
than the published ones.

Our choices: weights 1/h of harmonics h = 1..3 (the paper's are unpublished); `<=` at 6.4 frames; powers
are averaged over passes, while the paper votes over prompts; which passes count (see `classify`).
Not `scipy.signal.periodogram`: here, series of different lengths share one spectrum, each with its window.

The labels get the roles of its preset (`headforcing.roles.maps.presets`), for the window of the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headforcing.errors import OptionError, ProfileError
from headforcing.measure.classifiers import Classification, as_margin, share, table
from headforcing.measure.profile import HeadProfile
from headforcing.roles.maps.presets import PRESETS

GRID = 256
"""Points of the zero-padded Fourier transform; 6.4 frames are one of its periods."""
WEIGHTS = (1.0, 1 / 2, 1 / 3)
"""Weights of the harmonics h = 1, 2, 3 of a period."""
NAMES = ("anchor", "wave", "veil")


def classify(profile: HeadProfile, *, polarity: float = 0.8, period: float = 6.4) -> Classification:
    """Labels `anchor`, `wave` or `veil` from `qk_logits`, over the noisy passes.

    A pass counts for a head if it attended to the ages 1, 2, ..., n without a gap and n is at least two
    periods, so that a gap does not look like a wave, and a wave can be distinguished from a slope.

    Args:
        profile: with the metric `qk_logits`.
        polarity: smallest share of logits with one sign.
        period: longest dominant period of a wave, in frames.

    Raises:
        OptionError: the share is outside [0, 1], or the period is below 2.
        ProfileError: the logits were not measured, or no pass of some head counts.
    """
    if not 2 <= period < math.inf:
        raise OptionError(f"period is {period!r}: expected at least 2 frames")
    settings = {"polarity": share("polarity", polarity), "period": float(period)}
    logits = _contiguous(profile, math.ceil(2 * period))
    entries = (~logits.isnan()).sum((0, 2)).double()
    positive, negative = (logits > 0).sum((0, 2)) / entries, (logits < 0).sum((0, 2)) / entries
    mean, found = logits.nansum((0, 2)) / entries, dominant_period(logits)
    anchor, veil, wave = positive >= polarity, negative >= polarity, found <= period
    rest = torch.where(mean >= 0, 0, 2)
    code = torch.where(anchor, 0, torch.where(veil, 2, torch.where(wave, 1, rest)))
    margins = [  # of every test, in order; a head stops at the first test that decides
        as_margin((positive - polarity).abs(), positive),
        as_margin((negative - polarity).abs(), negative),
        as_margin((found - period).abs(), found).nan_to_num(1.0),
        as_margin(mean.abs(), mean),
    ]
    model = profile.facts.model
    running = torch.stack(margins).cummin(0).values
    asked = torch.where(anchor, 0, torch.where(veil, 1, torch.where(wave, 2, 3)))
    return Classification(
        "pyramid_forcing",
        table([NAMES[number] for number in code.tolist()], profile.shape[1]),
        running.gather(0, asked[None])[0].view(profile.shape),
        PRESETS["pyramid_forcing"].roles(model.window, model.chunk),
        settings,
        ("qk_logits",),
    )


def dominant_period(series: Tensor) -> Tensor:
    """The dominant period of a series, in frames.

    Periods range from two samples to the number of differences of the longest series; those above half of it
    are poorly resolved. A spectrum does not depend on the direction of time, so the order may be oldest or
    newest first.

    Args:
        series: `[n]`, or `[passes, heads, n]`, whose power is averaged over passes; NaN after the end
            of a shorter series; a series of NaN is ignored.

    Returns:
        `[]` or `[heads]` float64; NaN if a series is a straight line, which has no period.
    """
    if series.dim() == 1:
        return dominant_period(series[None, None])[0]
    longest = int((~series.isnan()).sum(2).max())
    waves = _windowed(series[..., : max(longest, 2)].double())
    power = mean_power(waves)  # [heads, GRID / 2 + 1]
    highest = power.shape[1] - 1
    folded = torch.zeros_like(power)
    for harmonic, weight in enumerate(WEIGHTS, 1):
        bins = torch.arange(0, highest // harmonic + 1)
        folded[:, bins] += weight * power[:, bins * harmonic]
    lowest = math.ceil(GRID / max(waves.shape[2], 2))
    best = folded[:, lowest:].argmax(1) + lowest
    flat = waves.square().sum((0, 2)) <= 1e-12 * series.double().square().nansum((0, 2))
    return (GRID / best.double()).masked_fill(flat, torch.nan)


def mean_power(waves: Tensor) -> Tensor:
    """Mean over passes of `|rfft(waves, GRID)| ** 2`, `[passes, heads, t] -> [heads, GRID / 2 + 1]`.

    The power is a quadratic form in the samples, so their products are averaged first and transformed once,
    instead of once per pass.
    """
    rows = waves.permute(1, 2, 0).contiguous()  # [heads, t, passes]
    products = rows @ rows.mT / waves.shape[0]
    times = torch.arange(waves.shape[2], dtype=torch.float64)
    angle = 2 * math.pi * times[:, None] * torch.arange(GRID // 2 + 1) / GRID
    cosine, sine = angle.cos(), angle.sin()
    return ((products @ cosine) * cosine + (products @ sine) * sine).sum(1).clamp_min(0)


def _windowed(series: Tensor) -> Tensor:
    """First differences minus their mean, times a Hann window of their length, then zeros."""
    steps = series.diff(dim=2)
    there = ~steps.isnan()
    length = there.sum(2)
    steps = steps.nan_to_num(0.0)
    mean = steps.sum(2) / length.clamp_min(1)
    at = torch.arange(steps.shape[2], dtype=torch.float64)
    ends = torch.arange(steps.shape[2] + 1)[:, None]
    hann = (math.pi * (at + 1) / (ends + 1)).sin().square() * (at < ends)  # one row per length
    return steps.sub_(mean[..., None]).mul_(hann[length])


def _contiguous(profile: HeadProfile, least: int) -> Tensor:
    """Logits by age `[S, all heads, A]`, NaN for passes that do not count."""
    logits = profile.noisy["qk_logits.by_age"].flatten(1, 2)
    seen = logits.isfinite()
    count = seen.sum(2, keepdim=True)
    counts = (seen == (torch.arange(logits.shape[2]) < count)).all(2) & (count[..., 0] >= least)
    without = (~counts.any(0)).nonzero()
    if len(without):
        layer, head = divmod(int(without[0]), profile.shape[1])
        raise ProfileError(
            f"in no pass did layer {layer}, head {head} attend to the last {least} frames or more without a "
            f"gap (the most of any head is {int(count.max())}): measure chunks from frame {least} on, with a "
            f"history of last frames and a window of at least {least + profile.facts.model.chunk} frames"
        )
    return logits.masked_fill_(~counts[..., None], torch.nan)
