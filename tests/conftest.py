"""Settings that every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tests.examples import CI

# Counts in the tests are in hundredths of CI: a fast run takes 40 of them, the long one 1,000.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=4 * CI // 10)
settings.register_profile("dev", deadline=None, max_examples=CI // 5)
settings.register_profile(
    "nightly", deadline=None, max_examples=10 * CI, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate)
)  # tests/mutants.py asks whether a test fails, not how
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)  # two busy cores and a barrier per operator would wait for each other

# They run real repositories: see tests/upstream/conftest.py.
collect_ignore_glob = [] if os.environ.get("HEADFORCING_UPSTREAM") else ["upstream/*"]


def pytest_collection_finish() -> None:
    """Leak checks walk what tests make, not the million objects of imported modules, which stay anyway."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a module left behind (compiled graphs, caches) is not walked again in the next."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("no process group of our own")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
