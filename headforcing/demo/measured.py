"""What was measured on the demo model, data of the package: a role map, its stability, labels by preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from headforcing.demo.model.attention import DemoConfig
from headforcing.errors import OptionError, RoleMapError
from headforcing.measure.classifiers import Labels
from headforcing.measure.stability_report import StabilityReport
from headforcing.roles.maps import strict_json
from headforcing.roles.maps.origin import Facts, Measurement, ModelFacts, Origin, first_error
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap

FILE = "labels.json"
MAX_BYTES = 1 << 20
"""Largest file that is read; checked before parsing."""


class Labelled(Facts):
    """The labels of one classifier.

    Attributes:
        measurement: the classifier, its thresholds, and what it was measured on.
        labels: `labels[layer][head]`.
    """

    measurement: Measurement
    labels: list[list[str]]


class LabelFile(Facts):
    """Labels of one model for several presets.

    Attributes:
        model: the model, with the fingerprint of its attention weights.
        presets: labels by the name of the preset.
    """

    format: Literal["headforcing.demo-labels"] = "headforcing.demo-labels"
    version: Annotated[int, Field(ge=1, le=1)] = 1
    model: ModelFacts
    presets: Mapping[str, Labelled]

    def to_json(self) -> str:
        """The file's text."""
        return strict_json.pretty(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str | bytes) -> LabelFile:
        """The labels that `to_json` wrote.

        Raises:
            RoleMapError: the document is invalid.
        """
        try:
            return cls.model_validate(strict_json.parse(text, MAX_BYTES))
        except ValidationError as error:
            raise RoleMapError(f"not a file of labels: {first_error(error)}") from None
        except ValueError as error:
            raise RoleMapError(f"not a file of labels: {error}") from error


def demo_roles() -> RoleMap:
    """The role map measured on the demo model; its `origin` says how."""
    with resources.as_file(resources.files("headforcing.demo") / "roles.json") as path:
        return RoleMap.load(path)


def demo_stability() -> StabilityReport:
    """How stable the labels of `demo_roles` are."""
    with resources.as_file(resources.files("headforcing.demo") / "stability.json") as path:
        return StabilityReport.load(path)


def label_file() -> LabelFile:
    """The label file of the package."""
    return LabelFile.from_json((resources.files("headforcing.demo") / FILE).read_bytes())


def labels(preset: str) -> Labels:
    """Labels of the demo model's heads for a preset with several roles, `labels[layer][head]`.

    Raises:
        OptionError: there are none for a preset of that name.
    """
    known = label_file().presets
    if preset not in known:
        raise OptionError(
            f"the demo model has no labels for {preset!r}: expected one of {', '.join(known)}; other presets "
            "treat all heads alike, or add it to benchmarks/demo_training/labelled.py and measure again"
        )
    return tuple(tuple(row) for row in known[preset].labels)


def demo_preset(name: str, window: int = 21, chunk: int = 3) -> RoleMap:
    """A preset for the demo model, with labels if heads differ; `origin` says how they were measured.

    Args:
        name: name of the preset.
        window: frames the model was trained on.
        chunk: frames of a chunk.

    Raises:
        OptionError: there is no such preset, or it has no labels.
    """
    if name not in PRESETS:
        raise OptionError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    preset, config = PRESETS[name], DemoConfig()
    if not preset.labels_needed():
        return preset.uniform(config.layers, config.heads, window, chunk)
    found, file = preset.labelled(labels(name), window, chunk), label_file()
    origin = Origin(
        model=file.model, measurement=file.presets[name].measurement, notes=dict(found.origin.notes)
    )
    return replace(found, origin=origin)
