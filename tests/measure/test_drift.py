"""Curves of drift show means over videos, bands by resampling them, and nothing where nothing is known."""

from __future__ import annotations

import io
import math

import pytest
import torch

from headforcing.errors import ProfileError

matplotlib = pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")

from headforcing.measure import plots  # noqa: E402
from headforcing.measure.plots.drift import STEP  # noqa: E402


def falling(videos=4, frames=30, at=30.0):
    """Known after frame 6, one video a decibel above the other."""
    table = at - 0.1 * torch.arange(frames).expand(videos, -1) + torch.arange(videos)[:, None]
    table[:, :STEP] = math.nan
    return table


def line(ax, label):
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found.get_xydata()


def test_a_point_is_the_mean_over_videos_and_a_step():
    table = falling()
    ax = plots.drift_curves({"a": table}, 21, "dB")
    points = line(ax, "a")
    assert math.isnan(points[0, 1])
    for number, (where, mean) in enumerate(points[1:], 1):
        part = table[:, number * STEP : (number + 1) * STEP]
        assert where == number * STEP + (STEP - 1) / 2
        assert mean == pytest.approx(float(part.mean()), abs=1e-4)
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert edges.min() >= float(table.nan_to_num(99.0).min())
    assert edges.max() <= float(table.nan_to_num(0.0).max())
    assert edges.max() - edges.min() > 1
    assert ax.get_ylabel() == "dB"


def test_one_video_has_no_band_and_a_gap_is_a_gap():
    table = falling(1)
    table[:, 12:18] = math.nan
    ax = plots.drift_curves({"a": table}, 60, "dB")
    assert not ax.collections
    assert np.isnan(line(ax, "a")[:, 1]).tolist() == [True, False, True, False, False]


def test_a_panel_per_name_with_its_control_and_the_others_behind():
    values = {name: falling(at=at) for name, at in (("a", 30.0), ("b", 25.0), ("c", 20.0), ("d", 15.0))}
    panels = plots.drift_panels(values, 21, "dB", {"b": falling(at=28.0)}, "as many frames")
    assert [ax.get_title(loc="left") for ax in panels] == list(values)
    lines = [len(ax.lines) for ax in panels]
    assert lines == [lines[0], lines[0] + 1, lines[0], lines[0]]
    figure = panels[0].figure
    (legend,) = figure.legends
    assert "as many frames" in [text.get_text() for text in legend.get_texts()]
    assert len({ax.get_ylim() for ax in panels}) == 1
    assert len(plots.drift_panels({"a": falling()}, 60, "dB")) == 1


def test_the_same_data_give_the_same_picture():
    pictures = []
    for _ in range(2):
        figure = plots.drift_curves({"a": falling(), "b": falling(at=20.0)}, 21, "dB").figure
        pictures.append(io.BytesIO())
        figure.savefig(pictures[-1], format="png")
    assert pictures[0].getvalue() == pictures[1].getvalue()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ProfileError, match="at least one"):
        plots.drift_curves({}, 21, "dB")
    with pytest.raises(ProfileError, match="drift_panels"):
        plots.drift_curves({str(number): falling() for number in range(6)}, 21, "dB")
    with pytest.raises(ProfileError, match=r"a is \[5\]"):
        plots.drift_panels({"a": torch.zeros(5)}, 21, "dB")
    with pytest.raises(ProfileError, match="controls of b"):
        plots.drift_panels({"a": falling()}, 21, "dB", {"b": falling()})
