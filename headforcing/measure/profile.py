"""Profiles: what was measured of every head, pass by pass, and its files.

A profile is a table. A row is one pass over one chunk of one video, identified by video, start and step; the
columns are the values of the metrics, one number or series per head. Because all rows are stored, heads can
be classified again without the model, also from half of the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from headforcing.errors import ProfileError, module_names
from headforcing.roles.maps import strict_json
from headforcing.roles.maps.origin import Digest, Facts, ModelFacts, first_error

MAX_BYTES = 1 << 20
"""Largest JSON file of a profile that is read; checked before parsing."""
INDEX = ("video", "prompt", "start", "step", "clean")

Settings = Mapping[str, Any]


class ProfileFacts(Facts):
    """The facts of a profile.

    Attributes:
        model: the measured model.
        metrics: settings by name of the metric.
        protocol: how passes were chosen and what the heads attended to.
        prompts: hash of the prompts, if they were given.
        library: version of headforcing.
        torch: version of torch.
    """

    format: Literal["headforcing.profile"] = "headforcing.profile"
    version: Annotated[int, Field(ge=1, le=1)] = 1
    model: ModelFacts
    metrics: Mapping[str, Settings] = Field(min_length=1)
    protocol: Settings = Field(default_factory=dict)
    prompts: Digest | None = None
    library: str = ""
    torch: str = ""


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """The values of the metrics for every head, pass by pass.

    Attributes:
        facts: what was measured, and how.
        video: `[S]` int64, number of the video; its CFG branches share it.
        prompt: `[S]` int64, number of its prompt; if prompts are unknown, every video has its own.
        start: `[S]` int64, first frame of the chunk.
        step: `[S]` int64, which pass over the chunk, from 0.
        clean: `[S]` bool, whether it was the last pass over its chunk, which writes the cache.
        values: `[S, layers, heads, ...]` float32 by name, for example `attention_mass.first`; NaN if there
            was nothing to measure.

    Raises:
        ProfileError: the tensors do not fit together.
    """

    facts: ProfileFacts
    video: Tensor
    prompt: Tensor
    start: Tensor
    step: Tensor
    clean: Tensor
    values: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        rows = self.video.shape
        if len(rows) != 1 or not rows[0]:
            raise ProfileError(f"video is {list(rows)}: expected one number per pass, and at least one pass")
        for name in INDEX:
            column, wanted = getattr(self, name), torch.bool if name == "clean" else torch.int64
            if column.shape != rows or column.dtype != wanted:
                raise ProfileError(
                    f"{name} is {list(column.shape)} {column.dtype}: expected {list(rows)} {wanted}"
                )
        shape = (*rows, self.facts.model.layers, self.facts.model.heads)
        for name, value in self.values.items():
            if value.shape[:3] != shape or value.dtype != torch.float32:
                raise ProfileError(
                    f"{name} is {list(value.shape)} {value.dtype}: expected {[*shape, '...']} torch.float32"
                )
            if name.partition(".")[0] not in self.facts.metrics:
                known = ", ".join(self.facts.metrics)
                raise ProfileError(f"{name} belongs to no metric of the profile: {known}")

    def __len__(self) -> int:
        """Number of passes."""
        return len(self.prompt)

    def __getitem__(self, name: str) -> Tensor:
        """The values of a metric, `[S, layers, heads, ...]` float64.

        Raises:
            ProfileError: it was not measured.
        """
        if name not in self.values:
            raise ProfileError(
                f"the profile has no {name}: it has {', '.join(sorted(self.values))}; "
                f"{_how_to_measure(name.partition('.')[0])}"
            )
        return self.values[name].double()

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads per layer."""
        return self.facts.model.layers, self.facts.model.heads

    @property
    def hash(self) -> str:
        """Hash of facts and tensors."""
        parts = [strict_json.canonical(self.facts.model_dump(mode="json"))]
        for name, tensor in sorted(self._tensors().items()):
            parts += [name.encode(), str(list(tensor.shape)).encode(), tensor.numpy().tobytes()]
        return strict_json.digest(*parts)

    def mean(self, name: str) -> Tensor:
        """Mean over the passes in which it could be measured, `[layers, heads, ...]` float64."""
        return self[name].nanmean(0)

    def where(self, keep: Tensor) -> HeadProfile:
        """The passes selected by a mask `[S]` bool, or by row numbers, which may repeat.

        Raises:
            ProfileError: no pass is left.
        """
        if not (keep.any() if keep.dtype == torch.bool else len(keep)):
            raise ProfileError(f"none of the {len(self)} passes is left: measure more chunks or prompts")
        columns = {name: getattr(self, name)[keep] for name in INDEX}
        return replace(self, **columns, values={name: value[keep] for name, value in self.values.items()})

    @property
    def noisy(self) -> HeadProfile:
        """The denoising passes only; all passes, if each chunk had only one.

        Head Forcing measures "all 4 denoise steps" (third party); leaving out the clean pass, which writes
        the cache, is our choice.
        """
        return self if bool(self.clean.all()) else self.where(~self.clean)

    def save(self, path: str | Path) -> None:
        """Writes `NAME.safetensors` and `NAME.profile.json`.

        Raises:
            ProfileError: the name does not end in `.safetensors`.
        """
        tensors, facts = _paths(path)
        tensors.write_bytes(save(self._tensors()))
        document = {**self.facts.model_dump(mode="json"), "hash": self.hash}
        facts.write_text(strict_json.pretty(document), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Reads what `save` wrote.

        Raises:
            ProfileError: a file is missing or malformed, or the two do not match.
        """
        tensors, facts = _paths(path)
        try:
            with facts.open("rb") as file:
                document = strict_json.parse(file.read(MAX_BYTES + 1), MAX_BYTES)
            content = load(tensors.read_bytes())
        except OSError as error:
            raise ProfileError(f"{error.filename}: cannot be read ({error.strerror})") from error
        except KeyError as error:
            raise ProfileError(f"{path}: not a profile: torch has no dtype {error}") from error
        except (ValueError, SafetensorError) as error:
            raise ProfileError(f"{path}: not a profile: {error}") from None  # which shows the file as it is
        if not isinstance(document, dict) or not set(INDEX) <= set(content):
            raise ProfileError(f"{path}: not a profile: expected an object, and tensors {', '.join(INDEX)}")
        expected = document.pop("hash", None)
        video, prompt, start, step, clean = (content.pop(name) for name in INDEX)
        try:
            found = cls(
                ProfileFacts.model_validate(document),
                video,
                prompt,
                start,
                step,
                clean,
                dict(sorted(content.items())),
            )
        except ValidationError as error:
            raise ProfileError(f"{facts}: not a profile: {first_error(error)}") from None
        except ProfileError as error:
            raise ProfileError(f"{path}: not a profile: {error}") from error
        if found.hash != expected:
            raise ProfileError(f"{path}: content hash {found.hash}, but {facts.name} says {expected}")
        return found

    def _tensors(self) -> dict[str, Tensor]:
        columns = {name: getattr(self, name) for name in INDEX}
        every = {**columns, **self.values}
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in every.items()}


def _paths(path: str | Path) -> tuple[Path, Path]:
    """The tensors' file and the facts' file."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ProfileError(f"{path}: a profile is a file NAME.safetensors and a file NAME.profile.json")
    return path, path.with_suffix(".profile.json")


def _how_to_measure(metric: str) -> str:
    if metric in module_names("headforcing.measure.metrics"):
        return f"profile again with metrics=[..., {metric!r}]"
    return (
        "measure it with headforcing.measure.ablation.ablate_heads"
        if metric == "ablation"
        else "no metric has it"
    )
