"""Where measured roles come from: which model, which weights, which measurement.

The same words stand in a profile and in a role-map file, so that a map can be followed back to what it
was measured on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def _unicode(text: str) -> str:
    text.encode()  # a lone surrogate raises what pydantic reports like its own errors
    return text


Text = Annotated[str, AfterValidator(_unicode)]
"""Text that can be written to a file; pydantic alone lets lone surrogates pass."""
Scalar = Text | int | float | bool | None
Count = Annotated[int, Field(ge=1, le=1 << 20)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Facts(BaseModel):
    """A strict, frozen record that can be written as JSON."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelFacts(Facts):
    """The model that was measured.

    Attributes:
        layers: causal self-attention layers.
        heads: heads per layer.
        head_dim: channels per head, `D`.
        window: frames the model was trained on.
        chunk: frames of a chunk, `F`.
        model_class: name of its class; says little in this field, but is quick to read.
        base_model: the checkpoint by its public name, where the user gave one.
        fingerprint: hash of the attention weights, see `headforcing.roles.maps.fingerprint`.
    """

    layers: Count
    heads: Count
    head_dim: Count
    window: Count
    chunk: Count
    model_class: Text
    base_model: Text | None = None
    fingerprint: Digest | None = None


class Measurement(Facts):
    """How roles were found.

    Attributes:
        method: name of the classifier.
        settings: its thresholds.
        metric: names of the metrics it read.
        profile: hash of the profile it read.
        prompts: hash of the prompts, in order.
        videos: how many videos were measured.
        seeds: of noise and sampling, where known.
        library: version of headforcing.
    """

    method: Text
    settings: Mapping[Text, Scalar] = Field(default_factory=dict)
    metric: Annotated[Sequence[Text], AfterValidator(tuple)] = ()
    profile: Digest | None = None
    prompts: Digest | None = None
    videos: Annotated[int, Field(ge=0)] = 0
    seeds: Annotated[Sequence[int], AfterValidator(tuple)] = ()
    library: Text = ""


class Origin(Facts):
    """Everything a role map knows about where it comes from.

    Attributes:
        model: the model it was measured on.
        measurement: how its roles were found.
        stability: key numbers of its stability report.
        notes: anything else, as flat facts.
    """

    model: ModelFacts | None = None
    measurement: Measurement | None = None
    stability: Mapping[Text, Scalar] = Field(default_factory=dict)
    notes: Mapping[Text, Scalar] = Field(default_factory=dict)


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong with a document, with its place: `/model/layers: Field required`."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"/{'/'.join(map(str, first['loc']))}: {first['msg']}"
