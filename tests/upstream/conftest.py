"""The upstream tier: parity with checkouts that the environment names.

`HEADFORCING_UPSTREAM` names a folder that holds `Self-Forcing` (guandeh17/Self-Forcing, known to
work at 33593df), `Causal-Forcing` (thu-ml/Causal-Forcing, at 1fc7bbc), `CausVid` (tianweiy/CausVid,
at ca21150), `Infinite-Forcing` (SOTAMak1r, at b8feaf5), `One-Forcing` (Aurora-edu, at ca345b3), `LongLive`
(NVlabs/LongLive, branch v1.0, at e52d9ef), `Reward-Forcing` (JaydenLyh, at 4317f5a), `FastVideo`
(hao-ai-lab/FastVideo, at 2f3d407), `realtime-video` (krea-ai/realtime-video, at acf4b7b), `world_engine`
(Overworldai/world_engine, at 208c909; it also requires tensordict, rotary-embedding-torch and omegaconf), and
what two packages unpack to: `streamdiffusionv2` (0.1.1) and `sglang` (0.5.23). What is absent is skipped. No
weights are needed.
"""

from __future__ import annotations

import pytest

from .harness import Upstream, checkout_of
from .scenarios import Case

collect_ignore = [
    "bench.py",
    "drivers.py",
    "fastvideo.py",
    "harness.py",
    "hosts.py",
    "krea.py",
    "longlive2.py",
    "policies.py",
    "runner.py",
    "scenarios.py",
    "shims.py",
    "streamdiffusionv2.py",
    "tiny.py",
    "waypoint.py",
]


@pytest.fixture(scope="session")
def _session_upstream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    values = [spec.params.get("case") for spec in parameters if spec is not None]
    selected = [value for value in values if isinstance(value, Case)]
    return Upstream(selected, tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def upstream(case: Case, _session_upstream: Upstream) -> Upstream:
    """Return the runs of the selected cases; skip where the case's checkout is absent."""
    checkout_of(case.repository)
    return _session_upstream
