"""The embedded demo: a synthetic world, a small trained video model, its pipeline and metrics.

    >>> from headforcing.demo import DemoPipeline, parse_prompt
    >>> parse_prompt("day summer balloon red car blue").shape
    torch.Size([8])

Names are imported when they are first used, so that a wrong prompt is found before torch is loaded. The tools
for comparing policies are in `headforcing.demo.contest.compare`, training in `benchmarks/demo_training`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headforcing.demo.measured import demo_preset, demo_roles, demo_stability, labels
    from headforcing.demo.model.model import DemoModel, demo_model
    from headforcing.demo.model.pipeline import DemoPipeline, demo_pipeline
    from headforcing.demo.world.words import format_prompt, parse_prompt

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

_HOME = {
    "DemoModel": "model.model",
    "DemoPipeline": "model.pipeline",
    "demo_model": "model.model",
    "demo_pipeline": "model.pipeline",
    "format_prompt": "world.words",
    "parse_prompt": "world.words",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'measured')}"), name)
