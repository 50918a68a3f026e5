"""The documentation tells the truth: its Python runs, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.model.model import DemoModel
from tests.docs.pages import FENCE, PAGES, ROOT, commands, fences


def run_python(text: str, name: str) -> int:
    """Runs the fences of one page in one namespace; returns how many."""
    namespace = {"__name__": "__main__"}
    tested = [fence for fence in fences(text, "python") if not fence.spared]
    for fence in tested:
        source = "\n" * (fence.line - 1) + fence.body  # a traceback shows the line of the page
        exec(compile(source, name, "exec"), namespace)
    return len(tested)


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def console_commands() -> set[str]:
    typer = pytest.importorskip("typer")
    cli = pytest.importorskip("headforcing.cli", exc_type=ModuleNotFoundError)
    return set(getattr(typer.main.get_command(cli.app), "commands", {}))


def unknown(text: str) -> list[str]:
    """Targets and commands that a page names and that do not exist."""
    missing = []
    for _, words, spared in commands(text):
        if spared:
            continue
        names = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        if words[0] == "make":
            missing += [f"make {name}" for name in names if name not in make_targets()]
        elif words[0] == "headforcing":
            missing += [f"headforcing {n}" for n in names[:1] if n not in console_commands()]
    return missing


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


LONGEST = ROOT / "docs" / "measuring.md"
"""It profiles every head of a model, and ablates each."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page == LONGEST else ()) for page in PAGES],
    ids=page_id,
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(page.read_text(encoding="utf-8"), str(page))


def test_the_python_of_the_longest_page_runs_on_a_smaller_model(tmp_path, monkeypatch):
    """A third of the layers, with random weights."""

    def smaller():
        model = DemoModel(DemoConfig(layers=2)).randomize(torch.Generator().manual_seed(1))
        return model.eval().requires_grad_(False)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("headforcing.demo.demo_model", smaller)
    run_python(LONGEST.read_text(encoding="utf-8"), str(LONGEST))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_commands_of_a_page_exist(page):
    assert unknown(page.read_text(encoding="utf-8")) == []


def test_fences_of_a_page_share_their_names_and_failures_show():
    page = "```python\nx = 1\n```\ntext\n\n- item\n\n    ```python\n    assert x == {}\n    ```\n"
    assert run_python(page.replace("{}", "1"), "page") == 2
    with pytest.raises(AssertionError):
        run_python(page.replace("{}", "2"), "page")


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent != ROOT], ids=page_id)
def test_the_site_can_read_the_fences_of_a_page(page):
    """Beside a bare language it knows attributes in braces only; anything else breaks all that follows."""
    infos = [match["info"].strip() for match in FENCE.finditer(page.read_text(encoding="utf-8"))]
    assert [info for info in infos if not re.fullmatch(r"\w*|\{\.\w+( \w+=\"[^\"]+\")*\}", info)] == []


def test_only_a_reason_spares_a_fence():
    assert run_python('```python notest="requires a GPU"\n1 / 0\n```\n', "page") == 0
    assert run_python('```{.python notest="requires a GPU"}\n1 / 0\n```\n', "page") == 0
    assert run_python('```{.python title="a"}\n1\n```\n', "page") == 1
    with pytest.raises(ZeroDivisionError):
        run_python('```python notest=""\n1 / 0\n```\n', "page")


def test_a_command_that_does_not_exist_is_found():
    assert unknown("```bash\n$ A=1 make test && make -j2 check  # both\n```\n") == []
    assert unknown("```bash\nmake tset\n```\n") == ["make tset"]


def test_the_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(links) > 20
    assert [path for path, _, _ in links if not (ROOT / path).exists()] == []
    missing = [
        f"{path}#{place}"
        for path, _, place in links
        if place and place not in headings((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert missing == []


def headings(text: str) -> set[str]:
    """The places in a page that a link may name."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


def test_the_porting_guide_names_every_question_of_an_adapter():
    adapter = pytest.importorskip("headforcing.adapters.base").Adapter
    said = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
    public = [name for name in vars(adapter) if not name.startswith("_")]
    questions = [name for name in public if callable(getattr(adapter, name))]
    assert len(questions) > 15
    assert [name for name in questions if not re.search(rf"`{name}[(`]", said)] == []
