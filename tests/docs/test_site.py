"""What is looked at in the built documentation, on sites of three files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"index.md": "[two](two.md#place)\n", "two.md": "::: headforcing.types\n"}
BUILT = {
    "index.html": '<a href="two/#place">two</a><img src="a.png"><a href="https://example.org">there</a>',
    "two/index.html": '<h2 id="place"><h2 id="headforcing.types"><a href="..">up</a><a href="#place"></a>',
    "a.png": "",
    "404.html": '<a href="/anywhere/"></a>',
}


def checked(folder: Path, **changed: str | None) -> list[str]:
    """What is said of a site with some of its files changed, or left out."""
    for name, text in SOURCES.items():
        (folder / "docs").mkdir(exist_ok=True)
        (folder / "docs" / name).write_text(text, encoding="utf-8")
    built: dict[str, str | None] = {**BUILT}
    built |= {f"{name.replace('__', '/')}.html": text for name, text in changed.items()}
    for name, content in built.items():
        path = folder / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content, encoding="utf-8")
    command = [sys.executable, str(ROOT / ".ci" / "check_site.py"), "docs", "site"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()
    assert done.returncode == (1 if said else 0)
    return [line.removeprefix("site: ") for line in said]


def test_a_whole_site_passes(tmp_path: Path) -> None:
    assert checked(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("two__index", None, "two.md was not built: two/index.html is missing"),
        (
            "two__index",
            '<h2 id="place"></h2>::: headforcing.types',
            "two/index.html: nothing about headforcing.types",
        ),
        ("index", '<a href="three/">', "index.html: three/ leads nowhere"),
        ("index", '<a href="../outside.html">', "index.html: ../outside.html leads nowhere"),
        ("index", '<a href="two/#other">', "index.html: two/#other: there is no such place"),
        ("index", '<a href="#here">', "index.html: #here: there is no such place"),
        ("index", '<img src="b.png">', "index.html: b.png leads nowhere"),
        ("index", '<script src="https://example.org/a.js">', "index.html: fetches https://example.org/a.js"),
        (
            "index",
            '<link rel="stylesheet" href="//example.org/a.css">',
            "index.html: fetches //example.org/a.css",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    assert said in checked(tmp_path, **{name: text})


def test_a_link_to_where_a_page_really_is_may_stay(tmp_path: Path) -> None:
    assert (
        checked(tmp_path, index='<link rel="canonical" href="https://example.org/"><a href="two/index.html">')
        == []
    )
