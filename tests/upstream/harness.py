"""Finds the checkouts, and runs the cases of each in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import headforcing

from .scenarios import REPOSITORIES, UNTOUCHED, Case

VARIABLE = "HEADFORCING_UPSTREAM"
NEEDED = ("diffusers", "easydict", "einops", "ftfy", "regex", "tqdm", "transformers")
TIME_LIMIT = 7200  # of wall time: a loaded machine must not reach it
MARKS = [pytest.mark.upstream, pytest.mark.timeout(TIME_LIMIT + 60)]


@dataclass
class Result:
    """What the runner reports about one case; see `bench.Outcome`."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    passes: int = 0
    calls: int | None = None


def largest_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return (first.double() - second.double()).abs().max().item()


def assert_identical(expected: Result, found: Result) -> None:
    """Fail with the largest differences unless all result tensors are bit-identical."""
    if expected.tensors.keys() != found.tensors.keys():
        pytest.fail(f"results are {sorted(found.tensors)}, expected {sorted(expected.tensors)}")
    differences = {
        name: largest_difference(value, found.tensors[name])
        for name, value in expected.tensors.items()
        if not torch.equal(value, found.tensors[name])
    }
    if differences:
        pytest.fail(f"not bit-identical, largest differences: {differences}")


def checkout_of(repository: str, module: str | None = None) -> Path:
    """Return the folder of a checkout that has a module, or skip the test with the reason."""
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{VARIABLE} is not set; it names a folder with a checkout of {repository}")
    checkout = Path(root) / repository
    module = module or REPOSITORIES[repository]
    if not (checkout / module.replace(".", "/")).with_suffix(".py").is_file():
        pytest.skip(f"{VARIABLE} has no checkout of {repository} at {checkout}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{repository} requires packages that are not installed: {', '.join(missing)}")
    return checkout.resolve()


class Upstream:
    """Runs the selected cases, one process per repository, when the first one is asked for."""

    def __init__(self, selected: Iterable[Case], folder: Path) -> None:
        self._selected = list(selected)
        self._folder = folder
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._reports: dict[str, dict[str, Any]] = {}
        self._ended: dict[str, str] = {}

    def pair(self, case: Case) -> tuple[Result, Result]:
        """Return the untouched run and the run of the case's policy."""
        return self.result(case.under(UNTOUCHED)), self.result(case)

    def result(self, case: Case) -> Result:
        """Return what one case left behind; a case that raised fails the test."""
        if case.repository not in self._reports | self._ended:
            self._run(case.repository)
        if case.repository in self._ended:
            pytest.fail(f"the runner ended with:\n{self._ended[case.repository]}", pytrace=False)
        report = self._reports[case.repository][str(case)]
        if "error" in report:
            pytest.fail(f"{case} raised:\n{report['error']}", pytrace=False)
        prefix = f"{case}/"
        tensors = {
            name.removeprefix(prefix): value
            for name, value in self._tensors[case.repository].items()
            if name.startswith(prefix)
        }
        return Result(tensors, **report)

    def _run(self, repository: str) -> None:
        folder = self._folder / repository
        folder.mkdir(parents=True)
        job = {
            "repository": repository,
            "checkout": str(checkout_of(repository)),
            "cases": self._wanted(repository),
            "output": str(folder),
        }
        job_path = folder / "job.json"
        job_path.write_text(json.dumps(job))
        done = _call_runner(job_path)
        if done.returncode != 0:
            self._ended[repository] = done.stderr
            return
        self._tensors[repository] = load_file(folder / "tensors.safetensors")
        self._reports[repository] = json.loads((folder / "report.json").read_text())

    def _wanted(self, repository: str) -> list[tuple[str, str, str]]:
        """List the selected cases and the untouched runs that they are compared with."""
        own = [case for case in self._selected if case.repository == repository]
        wanted = dict.fromkeys(item for case in own for item in (case.under(UNTOUCHED), case))
        return [(case.scenario.name, case.dtype, case.policy) for case in wanted]


def _call_runner(job_path: Path) -> subprocess.CompletedProcess[str]:
    package = Path(__file__).parent
    library = str(Path(headforcing.__file__).parents[1])  # the one that is tested here
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package.parent), library]),
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", f"{package.name}.runner", str(job_path)],
        cwd=job_path.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
