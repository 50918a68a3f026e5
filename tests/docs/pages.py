"""What the pages of the documentation show: their fences, the commands and the imports in them."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+) *(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)
NOTEST = re.compile(r'\bnotest="[^"]+"')
PLACEHOLDER = re.compile(r"<[^<>|]+>")  # as in --revision <full hash of a commit>


class Fence(NamedTuple):
    line: int  # of the first line inside
    info: str
    body: str

    @property
    def spared(self) -> bool:
        """Whether it says why it cannot run here."""
        return NOTEST.search(self.info) is not None


class Command(NamedTuple):
    line: int
    words: list[str]
    spared: bool


def fences(text: str, language: str) -> list[Fence]:
    found = []
    for match in FENCE.finditer(text):
        info, indent = match["info"].strip(), match["indent"]
        if re.split(r"[\s{]", info.removeprefix("{."))[0] == language:
            body = re.sub(f"^{indent}", "", match["body"], flags=re.MULTILINE)
            found.append(Fence(text.count("\n", 0, match.start("body")) + 1, info, body))
    return found


def commands(text: str) -> list[Command]:
    """The commands of a page; a placeholder is forty zeros, a hash that no commit has."""
    found = []
    for fence in fences(text, "bash"):
        body = fence.body.replace("\\\n", "\0")  # a continued line counts as the line it begins on
        line = fence.line
        for whole in body.splitlines():
            for part in re.split(r"&&|;|\|", PLACEHOLDER.sub("0" * 40, whole.strip().removeprefix("$ "))):
                words = shlex.split(part.replace("\0", " "), comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                found += [Command(line, words, fence.spared)] if words else []
            line += 1 + whole.count("\0")
    return found


def imports(text: str) -> list[tuple[int, str]]:
    """The import statements of a page, on whatever level, with their lines.

    What a fence that cannot run here imports of other packages is left out.
    """
    found = []
    for fence in fences(text, "python"):
        for node in ast.walk(ast.parse(textwrap.dedent(fence.body))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                first = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
                if first.split(".")[0] == "headforcing" or not fence.spared:
                    found.append((fence.line + node.lineno - 1, ast.unparse(node)))
    return sorted(found)
