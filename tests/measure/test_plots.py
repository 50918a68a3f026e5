"""Pictures draw what the data say, leave matplotlib as it was, and are the same for the same data."""

from __future__ import annotations

import io
import itertools
import math
import sys
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headforcing.errors import HeadForcingError, ProfileError, RoleMapError
from headforcing.measure.budget import fit_budget
from headforcing.measure.classifiers import Classification
from headforcing.measure.profile import HeadProfile, ProfileFacts
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.maps.origin import ModelFacts
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores.reference import ReferenceStore
from headforcing.types import Chunk, Heads
from tests.profiles import random_profile

matplotlib = pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")

from headforcing.measure import plots  # noqa: E402
from headforcing.measure.plots import frames, style  # noqa: E402

LABELS = [
    ["local", "local", "anchor", "local"],
    ["memory", "local", "anchor", "local"],
    ["memory", "memory", "local", "local"],
]
COUNTS = Counter(name for row in LABELS for name in row)
ROLES = {"local": Local(), "anchor": Anchor(), "memory": Memory(), "full": Full()}
PLACES = {"local": (0.8, 0.05, 0.15), "anchor": (0.2, 0.7, 0.1), "memory": (0.2, 0.1, 0.7)}
WINDOW, CHUNK = 9, 3


def profile(labels=LABELS, **changes: torch.Tensor) -> HeadProfile:
    """Two prompts, two chunks, two passes each; shares by label; mass falls with age."""
    rows = list(itertools.product((0, 1), (3, 6), (0, 1)))
    layers, heads, ages = len(labels), len(labels[0]), WINDOW - CHUNK
    shape = (len(rows), layers, heads)
    shares = torch.tensor([[PLACES.get(name, (0.3, 0.3, 0.4)) for name in row] for row in labels])
    by_age = torch.full((*shape, ages), math.nan)
    for number, (_, start, _) in enumerate(rows):
        by_age[number, ..., :start] = 0.5 ** torch.arange(1, start + 1)
        by_age[number, ..., start - 1] = 0.9  # frame 0
    values = {f"attention_mass.{name}": shares[..., i].expand(shape).clone() for i, name in enumerate(
        ("own", "first", "middle")
    )}  # fmt: skip
    values |= {"attention_mass.by_age": by_age}
    values |= {f"attention_mass.{name}": value for name, value in changes.items()}
    facts = ProfileFacts(
        model=ModelFacts(
            layers=layers, heads=heads, head_dim=4, window=WINDOW, chunk=CHUNK, model_class="Model"
        ),
        metrics={"attention_mass": {}},
    )
    prompt, start, step = (torch.tensor(column) for column in zip(*rows, strict=True))
    return HeadProfile(
        facts=facts, video=prompt, prompt=prompt, start=start, step=step, clean=step == 1, values=values
    )


PICTURES = {
    "head_map": lambda ax: plots.head_map(LABELS, torch.rand(3, 4, generator=seeded()), ax, per_head=True),
    "roles_per_layer": lambda ax: plots.roles_per_layer(LABELS, ax),
    "mass_by_age": lambda ax: plots.mass_by_age(profile(), LABELS, ax),
    "mass_scatter": lambda ax: plots.mass_scatter(profile(), LABELS, ax),
    "budget_curve": lambda ax: plots.budget_curve(fit_budget(random_profile(0), frames=80), ax),
    "frames_kept": lambda ax: plots.frames_kept({"memory": Memory()}, WINDOW, CHUNK, 6, ax),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def one(answer):
    return answer if not isinstance(answer, np.ndarray) else answer[0]


def pixels(figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return bytes(canvas.buffer_rgba())


def cells(ax) -> dict[str, int]:
    """Cells per role of a head map."""
    return {c.get_label(): len(c.get_paths()) for c in ax.collections if not c.get_label().startswith("_")}


def heights(ax) -> dict[str, list[float]]:
    """Bars per role."""
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}


TWICE = ("head_map", "mass_by_age", "frames_kept")
"""Drawn twice in the fast run."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TWICE else pytest.mark.slow) for name in PICTURES]
)
def test_pictures_return_axes_and_repeat_themselves(name):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    first, second = one(PICTURES[name](None)), one(PICTURES[name](None))
    assert isinstance(first, Axes)
    assert first.figure is not second.figure
    assert pixels(first.figure) == pixels(second.figure)
    texts = [io.StringIO(), io.StringIO()]
    with matplotlib.rc_context({"svg.hashsalt": "fixed"}):
        for ax, text in zip((first, second), texts, strict=True):
            ax.figure.savefig(text, format="svg", metadata={"Date": None})
    assert texts[0].getvalue() == texts[1].getvalue()
    given_axes = Figure().add_subplot()
    assert one(PICTURES[name](given_axes)) is given_axes


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_leave_matplotlib_alone(name):
    import matplotlib.pyplot as plt

    settings, figures = dict(matplotlib.rcParams), plt.get_fignums()
    PICTURES[name](None)
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == figures


def test_a_picture_that_there_is_not_is_no_attribute():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        plots.nothing_like_it  # noqa: B018


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'headforcing\[plot\]'") as found:
        plots.roles_per_layer(LABELS)
    assert isinstance(found.value, HeadForcingError)


@pytest.mark.parametrize(
    "shape",
    [
        *((1, 1), (1, 12), (6, 4)),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((30, 12), (40, 40))),
    ],
)
def test_the_head_map_has_a_cell_per_head_and_bars_with_their_counts(shape):
    layers, heads = shape
    labels = [
        [("local", "anchor", "memory")[(row * h + h) % 3] for h in range(heads)] for row in range(layers)
    ]
    ax = plots.head_map(labels, per_head=True)
    counts = Counter(name for row in labels for name in row)
    assert cells(ax) == counts
    above, beside = ax.child_axes
    for name in counts:
        assert heights(above)[name] == [row.count(name) for row in labels]
        widths = [bar.get_width() for bars in beside.containers if bars.get_label() == name for bar in bars]
        assert widths == [sum(row[head] == name for row in labels) for head in range(heads)]
    pixels(ax.figure)


def test_cells_sit_at_layer_and_head():
    ax = plots.head_map(LABELS, per_layer=False)
    assert not ax.child_axes
    for collection in ax.collections:
        for path in collection.get_paths():
            layer, head = path.vertices[:4].mean(0).round().astype(int)
            assert LABELS[layer][head] == collection.get_label()


def test_squares_grow_with_the_margin_and_a_missing_one_is_a_cross():
    margin = torch.linspace(0, 0.3, 12).view(3, 4)
    margin[2, 1] = math.nan
    ax = plots.head_map(LABELS, margin)
    sides = {}
    for collection in ax.collections:
        if (collection.get_gid() or "").startswith("margin:"):
            for path in collection.get_paths():
                layer, head = path.vertices[:4].mean(0).round().astype(int)
                sides[layer * 4 + head] = float(np.ptp(path.vertices[:, 0]))
    assert sorted(sides) == [i for i in range(12) if i != 9]
    assert [sides[i] for i in sorted(sides)] == sorted(sides.values())
    crosses = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [tuple(map(tuple, line.get_xydata())) for line in crosses] == [((2.0, 1.0),)]


@pytest.mark.parametrize("fill", [math.nan, 0.0])
def test_margins_that_say_nothing_are_drawn(fill):
    pixels(plots.head_map(LABELS, torch.full((3, 4), fill)).figure)


SHORT = ["local0", "local3", "anchor3+3", "memory3+3+3", "memory3+12+3", "anchor1"]


@pytest.mark.parametrize(
    "name",
    [
        "margin",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("head_map", "bars", "roles_per_layer")),
    ],
)
def test_pictures_fit_into_somebodys_grid(name):
    from matplotlib.figure import Figure

    labels = [[SHORT[(4 * layer + head) % 6] for head in range(4)] for layer in range(6)]
    draw = {
        "head_map": lambda ax: plots.head_map(labels, ax=ax, per_layer=False),
        "bars": lambda ax: plots.head_map(labels, ax=ax),
        "margin": lambda ax: plots.head_map(labels, torch.rand(6, 4), ax, per_layer=False),
        "roles_per_layer": lambda ax: plots.roles_per_layer(labels, ax),
    }
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(2, 4)
    for ax in panels.flat:
        draw[name](ax)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(figure)
    for ax in panels.flat:
        box, legend = ax.get_window_extent(), ax.get_legend().get_window_extent()
        assert box.width > 1.9 * figure.dpi
        assert box.height > (0.8 if name in ("bars", "roles_per_layer") else 1.2) * figure.dpi
        assert legend.width < 1.1 * box.width
        assert not box.overlaps(legend)
    assert {len(ax.get_legend().get_texts()) for ax in panels.flat} == {6}


def test_bars_are_the_counts_of_the_layers():
    drawn = heights(plots.roles_per_layer(LABELS))
    assert drawn == {name: [row.count(name) for row in LABELS] for name in COUNTS}
    assert list(drawn) == list(heights(plots.roles_per_layer(LABELS[::-1]))) == ["local", "anchor", "memory"]


def test_a_role_map_and_a_classification_give_the_names():
    roles = RoleMap(((Local(), Memory(1, 4, 2)), (Anchor(), Memory(1, 2, 2))))
    names = [name for row in style.labels_of(roles) for name in row]
    assert [names[0], names[2]] == ["local", "anchor"]
    assert names[1] != names[3]
    assert all(name.startswith("memory") for name in names[1::2])
    labels = tuple(map(tuple, LABELS))
    found = Classification("m", labels, torch.zeros(3, 4), ROLES, {}, ("attention_mass",))
    assert style.labels_of(found) == labels
    assert cells(plots.head_map(found)) == COUNTS


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=12, unique=True), st.randoms())
def test_colours_depend_on_names_and_not_on_their_order(names, random):
    shuffled = random.sample(names, len(names))
    colours = style.role_colours(names)
    assert style.role_colours([*shuffled, *names]) == colours
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in colours.values())


def test_colours_are_fixed_and_distinct():
    known = {"anchor": "#E69F00", "local": "#0072B2", "memory": "#009E73"}
    assert style.role_colours(known) == known
    assert style.role_colours(["memory1+8+9"]) == {"memory1+8+9": known["memory"]}
    names = ["local", "anchor", "memory", "wave", "veil", "static", "dynamic", "memory3", "memory12", "other"]
    assert len({style.role_colours([name])[name] for name in names[:7]}) == 7
    many = [*names, *(f"kind {letter}" for letter in "abcdefghijklmnop")]
    assert len(set(style.role_colours(many).values())) == len(many)
    assert style.ordered(["local12", "memory", "local3"]) == ["local3", "local12", "memory"]


@pytest.mark.parametrize(
    "name",
    [
        *("head_map", "mass_by_age"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("roles_per_layer", "mass_scatter")),
    ],
)
def test_many_labels_and_one_layer_are_drawn(name):
    many = [[f"kind {chr(97 + layer)}{head}" for head in range(5)] for layer in range(4)]
    for labels in (many, many[:1], [["local"]]):
        data = (profile(labels), labels) if name.startswith("mass") else (labels,)
        ax = getattr(plots, name)(*data)
        assert len(ax.get_legend().get_texts()) == len({label for row in labels for label in row})
        pixels(ax.figure)


def test_every_head_is_a_dot_where_its_shares_say():
    ax = plots.mass_scatter(profile(), LABELS)
    dots = {c.get_label(): c.get_offsets() for c in ax.collections}
    assert {label: len(places) for label, places in dots.items()} == {
        f"{name} ({count})": count for name, count in COUNTS.items()
    }
    corners = {"own": (0, 0), "first": (1, 0), "middle": (0.5, 3**0.5 / 2)}
    for name, (own, first, middle) in PLACES.items():
        expected = np.array([own, first, middle]) @ np.array(list(corners.values()))
        assert np.allclose(dots[f"{name} ({COUNTS[name]})"], expected, atol=1e-6)


def test_a_head_that_was_not_measured_has_no_dot_and_is_counted():
    first = profile()["attention_mass.first"].float()
    first[:, 0, 0] = math.nan  # never known
    first[0, 0, 1] = math.nan  # known in other passes
    ax = plots.mass_scatter(profile(first=first), LABELS)
    assert sum(len(c.get_offsets()) for c in ax.collections) == 11
    assert any(text.get_text() == "1 of 12 heads\nnot measured" for text in ax.texts)


def test_shares_that_do_not_add_up_are_refused():
    with pytest.raises(ProfileError, match="add up"):
        plots.mass_scatter(profile(own=torch.full((8, 3, 4), 0.5)), LABELS)


def lines(ax) -> dict[str, list[float]]:
    return {line.get_label(): line.get_ydata().tolist() for line in ax.lines if line.get_label() in COUNTS}


def test_the_line_is_the_median_by_age_without_frame_0():
    ax = plots.mass_by_age(profile(), LABELS)
    expected = [0.5**age for age in range(1, 6)]  # frame 0 is 3 or 6 frames old
    for name in COUNTS:
        assert lines(ax)[name] == pytest.approx(expected)
    markers = {
        (round(float(bars.lines[0].get_ydata()[0]), 4), float(bars.lines[0].get_xdata()[0]) > 3)
        for bars in ax.containers
    }
    assert markers == {(own, False) for own, *_ in PLACES.values()} | {(x[1], True) for x in PLACES.values()}


def test_the_clean_pass_does_not_count():
    by_age = profile()["attention_mass.by_age"].float()
    by_age[1::2] = 0.77
    ax = plots.mass_by_age(profile(by_age=by_age), LABELS)
    assert lines(ax)["local"][:5] == pytest.approx([0.5**age for age in range(1, 6)])


def test_ages_that_nobody_saw_are_no_part_of_the_axis():
    by_age = torch.nn.functional.pad(profile()["attention_mass.by_age"].float(), (0, 9), value=math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded, plain = (plots.mass_by_age(p, LABELS) for p in (profile(by_age=by_age), profile()))
        assert pixels(padded.figure) == pixels(plain.figure)
    assert padded.get_xlim() == (-2, 8)  # current chunk, five ages, frame 0


def test_ages_without_a_number_are_gaps():
    nothing = torch.full((8, 3, 4, 6), math.nan)
    ax = plots.mass_by_age(profile(by_age=nothing), LABELS)
    assert all(math.isnan(value) for values in lines(ax).values() for value in values)
    pixels(ax.figure)
    empty = {name: torch.full((8, 3, 4), math.nan) for name in ("own", "first", "middle")}
    with pytest.raises(ProfileError, match="only NaN"):
        plots.mass_by_age(profile(by_age=nothing, **empty), LABELS)


def drawn_frames(ax, name: str) -> list[set[tuple[float, float, float]]]:
    """Left edge, lower and upper edge of the boxes of one kind."""
    [found] = [c for c in ax.collections if c.get_label() == name]
    boxes = [path.vertices[:4] for path in found.get_paths()]
    return sorted((float(b[:, 0].min()), float(b[:, 1].min()), float(b[:, 1].max())) for b in boxes)


@dataclass(frozen=True)
class EverySecond(HeadRole):
    """A role of a user: every second row."""

    def capacity(self, chunk: int) -> int | None:
        return 6

    def retain(self, table):
        return range(0, len(table), 2)[:6]


@pytest.mark.parametrize(
    "role", [Local(2), Anchor(1, 2), Memory(), Full(), SlidingWindow(7, 2), EverySecond()], ids=str
)
def test_frames_are_those_that_a_store_keeps(role):
    role = role.fit(WINDOW, CHUNK)
    store = ReferenceStore({role: Heads([0], 1)}, window=WINDOW, layer=0)
    kept = list(frames.simulate(role, WINDOW, CHUNK, 7))
    for number, at in enumerate(kept):
        kv = torch.randn(1, CHUNK, 2, 1, 4, generator=seeded())
        store.write(Chunk(number * CHUNK, kv, kv))
        view = store.view(role, "denoise", lambda x, _: x)
        assert (*at.frames, *range(at.start, at.start + CHUNK)) == view.frames
        assert at.positions == view.positions
        for frame in store.frames(role)[0][: len(at.frames)]:
            assert frame in at.frames or at.candidates[0] <= frame < at.candidates[1]


def test_panels_show_frames_own_chunks_and_what_content_decides():
    panels = plots.frames_kept(ROLES, WINDOW, CHUNK, 6)
    assert [ax.get_title(loc="left") for ax in panels] == ["local", "anchor", "memory", "full"]
    local, anchor, memory, full = panels
    assert drawn_frames(local, "stored") == [(3.0 * t, 3.0 * t - 1, 3.0 * t) for t in range(1, 6)]
    assert drawn_frames(anchor, "stored") == [(3.0 * t, 0.0, 1.0) for t in range(1, 6)]
    assert len(drawn_frames(full, "stored")) == 3 * (1 + 2 + 3 + 4 + 5)
    for ax in panels:
        assert drawn_frames(ax, "current chunk") == [(3.0 * t, 3.0 * t, 3.0 * t + 3) for t in range(6)]
    assert all(not drawn_frames(ax, frames.CHOSEN) for ax in (local, anchor, full))
    assert drawn_frames(memory, frames.CHOSEN) == [(9.0, 1.0, 6.0), (12.0, 1.0, 9.0), (15.0, 1.0, 12.0)]
    assert any("2 of these" in text.get_text() for text in memory.texts)


def test_strips_show_the_rope_positions_of_the_last_chunk():
    panels = plots.frames_kept({"anchor": Anchor(), "full": Full()}, WINDOW, CHUNK, 6)
    places = []
    for ax in panels:
        [strip] = ax.child_axes
        [drawn] = [c for c in strip.collections if c.get_gid() == "positions"]
        places.append([float(path.vertices[:, 0].min()) for path in drawn.get_paths()])
    assert places == [[0.0, 6.0, 7.0, 8.0], [float(frame) for frame in range(18)]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(RoleMapError, match="labels"):
        plots.head_map(["local", "anchor"])
    with pytest.raises(RoleMapError, match="same number"):
        plots.roles_per_layer([["local"], ["local", "anchor"]])
    with pytest.raises(RoleMapError, match="no heads"):
        plots.head_map([])
    with pytest.raises(ProfileError, match="margin is"):
        plots.head_map(LABELS, torch.zeros(4, 3))
    for picture in (plots.mass_by_age, plots.mass_scatter):
        with pytest.raises(ProfileError, match="2 layers x 4 heads"):
            picture(profile(), LABELS[:2])
    with pytest.raises(ProfileError, match="by_age has 3 axes"):
        plots.mass_by_age(profile(by_age=torch.zeros(8, 3, 4)), LABELS)
    with pytest.raises(RoleMapError, match="one for each of local, anchor"):
        plots.frames_kept({"local": Local(), "anchor": Anchor()}, WINDOW, CHUNK, 4, np.array([None]))
    with pytest.raises(RoleMapError, match="at least one"):
        plots.frames_kept({}, WINDOW, CHUNK, 4)


def test_the_tests_find_planted_bugs(monkeypatch):
    from headforcing.measure.plots import ages, grid

    monkeypatch.setattr(grid, "_where", lambda labels, name: np.argwhere(np.equal(np.array(labels).T, name)))
    with pytest.raises((AssertionError, IndexError)):
        test_cells_sit_at_layer_and_head()
    monkeypatch.setattr(ages, "_without_first", lambda p: p["attention_mass.by_age"].nanmean(0).numpy())
    with pytest.raises(AssertionError):
        test_the_line_is_the_median_by_age_without_frame_0()
    monkeypatch.setattr(frames, "_between", lambda known, start: (0, start))
    with pytest.raises(AssertionError):
        test_panels_show_frames_own_chunks_and_what_content_decides()
    monkeypatch.setattr(style, "ordered", lambda names: list(dict.fromkeys(names)))
    with pytest.raises(AssertionError):
        test_bars_are_the_counts_of_the_layers()


def test_the_curve_of_a_budget_and_what_was_bought():
    found = {f"{frames} frames": fit_budget(random_profile(0), frames=frames) for frames in (40, 120)}
    ax = plots.budget_curve(found)
    line, *dots = ax.get_lines()
    assert list(zip(*line.get_data(), strict=True)) == list(found["40 frames"].curve)
    assert [tuple(map(float, *zip(*dot.get_data(), strict=True))) for dot in dots] == [
        (budget.frames, budget.error) for budget in found.values()
    ]
    other = fit_budget(random_profile(0), frames=40, by="output_regret.mean")
    both = plots.budget_curve({"p95": found["40 frames"], "mean": other})
    assert (len(both.get_lines()), both.get_ylabel()) == (4, "total error")
    assert ax.get_ylabel() == "total output_regret.p95"
    with pytest.raises(ProfileError, match="no budget"):
        plots.budget_curve({})
