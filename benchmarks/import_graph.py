"""Draws docs/assets/architecture.svg: the folders of the package, and the way of one attention call.

    python benchmarks/import_graph.py            # draws it anew
    python benchmarks/import_graph.py --check    # ends with 1 where the picture is old

Floors come from tests/test_floors.py, arrows from the code. An arrow is an import between folders, thicker
where more modules take part; those that a longer way replaces are left out. The numbers are the way of one
attention call.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "assets" / "architecture.svg"
TITLE = {"": "headforcing", "__main__": "python -m"}
SAYS = {
    "types": "data of one call",
    "errors": "every error",
    "roles": "which frames a head keeps",
    "adapters": "how a base model is read",
    "stores": "where keys and values live",
    "roles.maps": "which head has which role",
    "attention": "one attention call",
    "attention.backends": "softmax attention",
    "apply": "put in, ask, take out",
    "measure": "what heads do",
    "integrations": "one file per base model",
    "testing": "for those who extend",
    "demo": "a small model and its world",
    "cli": "commands",
    "": "public names",
}
COLUMN = {
    **{"cli": 1, "": 0, "demo": 1, "testing": 2, "integrations": 3, "measure": 0, "apply": 1},
    **{"attention": 1, "attention.backends": 2, "roles.maps": 0, "stores": 1},
    **{"roles": 1, "adapters": 3, "types": 1, "errors": 2},
}
"""Where a folder stands on its floor, so that no arrow runs behind another one."""
UP = ("attention.backends", "attention")  # the data that backends are given
CALL = {  # the way of one attention call: what happens where, numbered in order
    "attention": "1 forward",
    "integrations": "2 read, project   8 output",
    "stores": "3 write   5 view",
    "roles": "4 retain, visible",
    "adapters": "6 rotate",
    "attention.backends": "7 attend",
}


def edges() -> tuple[list[list[str]], Counter[tuple[str, str]]]:
    """The floors, lowest first, and how many imports go from folder to folder."""
    rules = runpy.run_path(str(ROOT / "tests" / "test_floors.py"))
    inside = {"measure.metrics", "measure.classifiers", "measure.plots", "roles.maps.importers"}
    home = {name: name.rpartition(".")[0] if name in inside else name for name in rules["FLOOR"]}
    home["__main__"] = "cli"
    found: Counter[tuple[str, str]] = Counter()
    for module, tree in rules["TREES"].items():
        here = home[rules["folder"](module)]
        for target in rules["imports"](module, tree, set(rules["FILES"])):
            if target.split(".")[0] != "headforcing" or (module, target) in rules["BY_FOLDER"]:
                continue
            if (there := home[rules["folder"](target)]) != here and (here, there) != UP:
                found[here, there] += 1
    floors = [sorted(set(map(home.get, names)) - {""} | ({""} & names)) for names in rules["FLOORS"]]
    seen: set[str] = set()
    once = [[n for n in names if n not in seen and not seen.add(n)] for names in floors]  # type: ignore[func-returns-value]
    return [names for names in once if names], found


def needed(found: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    """Imports that no longer way through other folders replaces."""
    below: dict[str, set[str]] = {}
    for here, there in found:
        below.setdefault(here, set()).add(there)

    def reach(start: str, without: str) -> set[str]:
        todo, seen = list(below.get(start, set()) - {without}), set()
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                todo += below.get(one, set())
        return seen

    return [(here, there) for here, there in found if there not in reach(here, there)]


def draw() -> None:
    """Writes the picture."""
    floors, found = edges()
    figure = Figure(figsize=(10, 1.25 * len(floors)), layout="constrained")
    ax = figure.subplots()
    middle = {n: (2.5 * COLUMN[n] + 1.25, 1.25 * height) for height, ns in enumerate(floors) for n in ns}
    for name, (x, y) in middle.items():
        called = CALL.get(name, "")
        box = FancyBboxPatch(
            (x - 1.08, y - 0.3), 2.16, 0.6, boxstyle="round,pad=0.02,rounding_size=0.1", zorder=3,
            facecolor="#fff4e0" if called else "#f4f6f8", edgecolor="#d95f02" if called else "#8a949e",
        )  # fmt: skip
        ax.add_patch(box)
        title = TITLE.get(name, name.replace("attention.", "").replace("roles.", "roles/"))
        ax.text(x, y + 0.16, title, ha="center", va="center", weight="bold", fontsize=9, zorder=4)
        ax.text(x, y - 0.02, SAYS.get(name, ""), ha="center", va="center", fontsize=7, zorder=4)
        ax.text(x, y - 0.19, called, ha="center", va="center", fontsize=7, color="#a04000", zorder=4)
    for here, there in needed(found):
        arrow(ax, middle[here], middle[there], 0.6 + 0.12 * found[here, there] ** 0.5)
    ax.set(xlim=(0, 10), ylim=(-0.5, 1.25 * (len(floors) - 1) + 0.5))
    ax.axis("off")
    matplotlib.rcParams.update({"svg.hashsalt": "headforcing", "svg.fonttype": "none"})
    figure.savefig(PICTURE, metadata={"Date": None, "Description": shown(found)})


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], width: float) -> None:
    """Draws an arrow between two boxes, from edge to edge."""
    (x0, y0), (x1, y1) = start, end
    across, down = (1.1 if x1 > x0 else -1.1, 0.0) if y0 == y1 else (0.0, -0.33)
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": "#98a2ac", "zorder": 2}
    ax.add_patch(FancyArrowPatch((x0 + across, y0 + down), (x1 - across, y1 - down), lw=width, **style))


def shown(found: Counter[tuple[str, str]]) -> str:
    """The imports as text, as they are noted in the picture."""
    return json.dumps(sorted(f"{here or 'headforcing'} > {there or 'headforcing'}" for here, there in found))


def is_current() -> bool:
    """Whether the picture shows the imports that the code has."""
    noted = re.search(
        r"<dc:description>(.*?)</dc:description>", PICTURE.read_text(encoding="utf-8"), re.DOTALL
    )
    text = "" if noted is None else noted[1].strip().replace("&gt;", ">").replace("&quot;", '"')
    return text == shown(edges()[1])


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if is_current() else f"{PICTURE} is old: python benchmarks/import_graph.py")
    draw()
