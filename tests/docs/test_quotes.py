"""Messages that the documentation quotes are those of the code.

A message is a quotation, lines that begin with `>`, whose parts that differ from case to case are `…`.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PAGES = [ROOT / "docs" / "faq.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
QUOTE = re.compile(r"^(?:> .*\n)+", re.MULTILINE)
GAP = "…"


def quoted(page: Path) -> list[str]:
    """The messages of a page."""
    found = QUOTE.findall(page.read_text(encoding="utf-8"))
    return [flat(" ".join(line.removeprefix(">") for line in one.splitlines())) for one in found]


@cache
def said() -> str:
    """Every text of the package, one per line, with gaps for what is put in."""
    texts = []
    for folder in ("headforcing", "integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(one.value) if isinstance(one, ast.Constant) else GAP for one in node.values]
                    texts.append(flat("".join(parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(flat(node.value))
    return "\n".join(texts)


def flat(text: str) -> str:
    return re.sub(f"{GAP}+", GAP, " ".join(text.split()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_quoted_is_said(page: Path) -> None:
    assert [message for message in quoted(page) if message not in said()] == []


def test_there_is_something_quoted_and_other_words_are_not_said() -> None:
    assert sum(len(quoted(page)) for page in PAGES) > 10
    assert "switch quantisation of its KV cache off" in said()
    assert "switch quantization of its KV cache off" not in said()
