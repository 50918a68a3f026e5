"""Runs many cases of one repository in a process of its own.

The repositories claim the same top-level names, so no two of them fit into one process. Called as
`python -m upstream.runner JOB`, where the job file names the checkout, the cases and the folder
for the results: `tensors.safetensors` and `report.json`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import fastvideo, krea, longlive2, shims
from .scenarios import SCENARIOS, Case

PIPELINES = {
    "CausVid": "causvid.models.wan.causal_inference",
    "FastVideo": fastvideo.STAGES,
    "realtime-video": "release_server",
    "streamdiffusionv2": "models.wan.causal_stream_inference",
}
PREPARE = {"FastVideo": fastvideo.prepare, "LongLive2": longlive2.prepare, "realtime-video": krea.prepare}


def main(job_path: Path) -> None:
    """Run the cases of a job file."""
    job = json.loads(job_path.read_text())
    torch.set_num_threads(1)
    tensors: dict[str, Tensor] = {}
    report: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        shims.make_importable(Path(job["checkout"]))
        PREPARE.get(job["repository"], lambda: None)()
        importlib.import_module(PIPELINES.get(job["repository"], "pipeline"))
        shims.use_plain_attention()
        for name, dtype, policy in job["cases"]:
            case = Case(job["repository"], SCENARIOS[name], dtype, policy)
            report[str(case)] = _attempt(case, tensors)
    output = Path(job["output"])
    save_file(tensors, output / "tensors.safetensors")
    (output / "report.json").write_text(json.dumps(report))


def _attempt(case: Case, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Run one case; a failure is that case's result and does not end the others."""
    from .drivers import run

    try:
        outcome = run(case)
    except Exception:
        return {"error": traceback.format_exc()}
    found = asdict(outcome)
    for name, value in found.pop("tensors").items():
        tensors[f"{case}/{name}"] = value.contiguous().clone()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
