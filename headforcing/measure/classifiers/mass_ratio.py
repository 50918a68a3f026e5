"""Forcing-KV (arXiv:2605.09681): static heads attend to recent frames, dynamic heads to older ones.

Documented in its code: the mass on the current chunk and the last frame before it, over the mass on
everything except the sink; at least 0.8 makes a head static. Its script excludes one sink frame, its
published map three: the metric's settings say which was measured. It measures one prompt; we use
every noisy pass.

The roles are an approximation. A static head stores the first frame and the last one, as in the source. For a
dynamic head, the source selects pieces of frames by the similarity of co-located keys after every chunk; ours
stores two whole episodic frames, selected by dissimilarity of co-located keys.
"""

from __future__ import annotations

from headforcing.measure.classifiers import Classification, as_margin, measured, share, table
from headforcing.measure.profile import HeadProfile
from headforcing.roles import Local, Memory


def classify(profile: HeadProfile, *, static: float = 0.8) -> Classification:
    """Labels `static` or `dynamic` from `mass_ratio`, over the noisy passes.

    Args:
        profile: with the metric `mass_ratio`.
        static: smallest ratio of a static head.

    Raises:
        OptionError: the ratio is outside [0, 1].
        ProfileError: the ratio was not measured.
    """
    settings = {"static": share("static", static)}
    ratio = measured(profile.noisy, "mass_ratio.ratio")
    names = ["static" if near else "dynamic" for near in (ratio >= static).flatten().tolist()]
    return Classification(
        "mass_ratio",
        table(names, profile.shape[1]),
        as_margin((ratio - static).abs(), ratio),
        {"static": Local(recent=1, sink=1), "dynamic": Memory(sink=1, episodic=2, recent=1)},
        settings,
        ("mass_ratio",),
    )
