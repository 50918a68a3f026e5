"""What importing and applying load: `torch._dynamo` takes seconds, and only compiled models need it.

Nor does the module of the pictures load matplotlib before one is drawn.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import headforcing as hf

hf.apply_head_forcing
assert "torch._dynamo" not in sys.modules, "by importing"

import headforcing.measure.plots

headforcing.measure.plots.head_map
assert "matplotlib" not in sys.modules, "by the module of the pictures"

from tests.hosts.rig import Rig

rig = Rig(9)
caches = rig.caches()
handle = hf.apply_head_forcing(rig.model, hf.Memory(clean_window=6))
rig.video(caches, 2)
handle.switch_prompt("smooth")
rig.video(caches, 2, first=2)
handle.remove()
assert "torch._dynamo" not in sys.modules, "by applying"
"""


def test_nothing_is_loaded_that_is_not_used() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=ROOT)
