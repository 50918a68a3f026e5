"""`headforcing verify` says what `hf.verify` finds, and takes an adapter that is nowhere installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headforcing.adapters.verified import recorded
from headforcing.cli import app

MODULE = """
import torch

from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import SlidingWindow
from tests.hosts.self_forcing import SelfForcingHost

HOST = SelfForcingHost()


class OffByOne(SelfForcing):
    def own_memory(self, model):
        return [SlidingWindow(8, 1, positions="absolute") for _ in self.attentions(model)]


def make():
    model = HOST.model()

    def run(prompt=None):
        caches = HOST.caches(model)
        with torch.no_grad():
            return [HOST.call(model, caches, start, 3, draw) for start in range(0, 15, 3) for draw in (1, 0)]

    return model, run
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in a folder with a user's module, with a record of its own."""
    (tmp_path / "verified_by_hand.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *more: CliRunner().invoke(app, ["verify", "verified_by_hand:make", *more])


def test_equal_is_said_and_noted_only_where_asked(told: Any) -> None:
    result = told()
    assert (result.exit_code, recorded()) == (0, set())
    assert "equal, bit for bit, 15 frames" in result.output
    result = told("--record")
    assert result.exit_code == 0
    assert recorded()
    assert next(iter(recorded())) in result.output


def test_another_adapter_is_taken_and_what_differs_is_said(told: Any) -> None:
    result = told("--adapter", "verified_by_hand:OffByOne", "--json", "--record")
    assert (result.exit_code, recorded()) == (1, set())
    assert json.loads(result.stdout)["ok"] is False


def test_what_is_no_adapter_is_said(told: Any) -> None:
    result = told("--adapter", "verified_by_hand:HOST")
    assert result.exit_code != 0
    assert "expected a subclass of headforcing.Adapter" in " ".join(result.output.split())
