"""Whether a built site is whole: pages, API, links, and nothing fetched from elsewhere.

    python .ci/check_site.py docs site [more sites]

Zensical passes over what it does not know, as plug-ins and missing pages: what was built is read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("video", "src")}
NOT_FETCHED = {"canonical", "next", "prev", "alternate"}
API = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


class Page(HTMLParser):
    """What a page refers to, what it fetches, and where others may point."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes one tag."""
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        for name in ("src", "href"):
            if (tag, name) in FETCHED and name in given and given.get("rel") not in NOT_FETCHED:
                self.fetched.append(given[name])


@cache
def read(path: Path) -> Page:
    """A page of a site, once."""
    return Page(path.read_text(encoding="utf-8"))


def problems(docs: Path, site: Path) -> Iterator[str]:
    """What is wrong with a site that was built from `docs`."""
    for source in sorted(docs.rglob("*.md")):
        built = site / built_path(source.relative_to(docs))
        if not built.exists():
            yield f"{source.relative_to(docs)} was not built: {built.relative_to(site)} is missing"
            continue
        for name in API.findall(source.read_text(encoding="utf-8")):
            if name not in read(built).places:
                yield f"{built.relative_to(site)}: nothing about {name}"
    for built in sorted(site.rglob("*.html")):
        if built.name != "404.html":  # it is shown at any address, so its links are absolute
            yield from (f"{built.relative_to(site)}: {said}" for said in broken(built, site))


def built_path(source: Path) -> Path:
    """Where a page of Markdown ends up."""
    return source.parent / "index.html" if source.stem == "index" else source.with_suffix("") / "index.html"


def broken(built: Path, site: Path) -> Iterator[str]:
    """What a page points to that is not there, and what it fetches from elsewhere."""
    page = read(built)
    for link in page.fetched:
        if urlsplit(link).netloc:
            yield f"fetches {link}"
    for link in {*page.links, *page.fetched}:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (built.parent / unquote(parts.path)).resolve() if parts.path else built.resolve()
        target = target / "index.html" if target.is_dir() else target
        if not target.is_relative_to(site.resolve()) or not target.exists():
            yield f"{link} leads nowhere"
        elif (
            parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).places
        ):
            yield f"{link}: there is no such place"


def main() -> None:
    """Checks the sites that are named, and ends with 1 where one is not whole."""
    docs, *sites = map(Path, sys.argv[1:])
    found = [f"{site}: {said}" for site in sites for said in problems(docs, site)]
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
