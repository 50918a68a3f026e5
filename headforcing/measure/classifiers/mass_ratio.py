"""Forcing-KV (arXiv:2605.09681): static heads look at what is near, dynamic heads look back.

Documented in its code: the mass on the own chunk and the last frame before it, over the mass on
everything but the sink; at least 0.8 makes a head static. Its script drops one sink frame, its published
map three: the metric's settings say which was measured. It measures one prompt; we take every noisy pass.

The roles are a translation. A static head keeps the first frame and the last one, as there. The middle
of a dynamic head is there chosen per segment, by the similarity of co-located keys, after every chunk;
ours are two whole episodic frames, chosen by how unlike their co-located keys are.
"""

from __future__ import annotations

from headforcing.measure.classifiers import Classification, as_margin, measured, share, table
from headforcing.measure.profile import HeadProfile
from headforcing.roles import Local, Memory


def classify(profile: HeadProfile, *, static: float = 0.8) -> Classification:
    """Labels `static` or `dynamic` from `mass_ratio`, over the noisy passes.

    Args:
        profile: with the metric `mass_ratio`.
        static: least ratio of a static head.

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
