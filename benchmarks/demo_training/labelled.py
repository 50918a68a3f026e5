"""Measures the labels of the demo model for the presets whose heads differ, and writes them down.

    python -m benchmarks.demo_training.labelled                # the file of the package
    python -m benchmarks.demo_training.labelled --out my.json

One profile, 32 videos inside the trained range, as for the maps of docs/role-maps.md; every classifier with
its defaults.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from headforcing.demo.measured import FILE, LabelFile, Labelled
from headforcing.demo.profiled import profile_demo
from headforcing.measure.classifiers import find_classifier
from headforcing.measure.labels import measured_map
from headforcing.measure.profile import HeadProfile

CLASSIFIERS = {
    "head_forcing": "head_forcing",
    "pyramid_forcing": "pyramid_forcing",
    "forcing_kv": "mass_ratio",
    "dummy_forcing": "dummy_forcing",
}
"""Which classifier labels heads for which preset."""
METRICS = ("attention_mass", "mass_ratio", "qk_logits")
"""What they read."""
PACKAGED = Path(__file__).parents[2] / "headforcing" / "demo" / FILE


def label_heads(profile: HeadProfile | None = None) -> LabelFile:
    """The labels for every preset.

    Args:
        profile: with the metrics of `METRICS`; default: measured on the demo model, which takes a quarter
            of a minute.
    """
    profile = profile_demo(metrics=METRICS) if profile is None else profile
    found = {}
    for preset, name in CLASSIFIERS.items():
        labels = find_classifier(name)(profile)
        measurement = measured_map(labels, profile).origin.measurement
        assert measurement is not None
        found[preset] = Labelled(measurement=measurement, labels=[list(row) for row in labels.labels])
    return LabelFile(model=profile.facts.model, presets=found)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGED)
    parser.parse_args().out.write_text(label_heads().to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
