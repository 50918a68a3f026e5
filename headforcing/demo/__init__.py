"""The embedded demo: a synthetic world, a small trained video model, its pipeline and metrics.

    >>> from headforcing.demo import DemoPipeline, parse_prompt
    >>> parse_prompt("day summer balloon red car blue").shape
    torch.Size([8])

The tools for comparing policies are in `headforcing.demo.contest.compare`, training in
`benchmarks/demo_training`; neither is imported here.
"""

from importlib import resources

from headforcing.demo.labels import demo_preset, labels
from headforcing.demo.model.model import DemoModel, demo_model
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.words import format_prompt, parse_prompt
from headforcing.measure.stability_report import StabilityReport
from headforcing.roles.maps.role_map import RoleMap

__all__ = [
    "DemoModel",
    "DemoPipeline",
    "demo_model",
    "demo_pipeline",
    "demo_preset",
    "demo_roles",
    "demo_stability",
    "format_prompt",
    "labels",
    "parse_prompt",
]


def demo_roles() -> RoleMap:
    """The role map measured on the demo model; its `origin` says how."""
    with resources.as_file(resources.files("headforcing.demo") / "roles.json") as path:
        return RoleMap.load(path)


def demo_stability() -> StabilityReport:
    """How stable the labels of `demo_roles` are."""
    with resources.as_file(resources.files("headforcing.demo") / "stability.json") as path:
        return StabilityReport.load(path)


def demo_pipeline(*, window: int | None = None, sink: int = 0) -> DemoPipeline:
    """A `DemoPipeline` with the demo model, which is `pipeline.model`."""
    return DemoPipeline(demo_model(), window=window, sink=sink)
