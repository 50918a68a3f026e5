"""Whether what the documentation shows works with an installed wheel, each line in a process of its own.

    python .ci/check_wheel.py         # builds them
    python .ci/check_wheel.py dist    # a folder with a wheel, and the sdist it was made from

The wheel is installed into an empty environment that borrows the dependencies of this one. There, every
import line of README.md and docs/ runs in a process that has imported nothing but torch, so that no line
lives on what another one imported. Every `headforcing ...` line has options that its `--help` knows, and runs
as well, in the order of the pages and without a network, unless it takes minutes. The sdist has all that
the repository has, and the description on a package index no link that leads nowhere there.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
import traceback
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SLOW = {"compare", "demo", "scenes"}
"""Commands that draw videos; the tests run them."""
ONCE = {"presets", "profile"}
"""Commands that take some seconds; their first line runs."""
CLONE = ("tests", "examples", "benchmarks")
"""Folders of a clone that some pages import from; `headforcing` is to come from the wheel."""
DATA = ("roles.json", "stability.json", "labels.json")
MODEL = "save it as my_model.py"
CLEAN, CRASH = (1, 2), 70
"""Exit codes of a command that says what it lacks, and of a traceback."""

Job = str | list[str]


class Shown(NamedTuple):
    """A command of a page."""

    place: str
    words: list[str]
    spared: bool

    @property
    def command(self) -> tuple[str, ...]:
        """The words that name it."""
        return tuple(self.words[: 1 + (self.words[0] == "roles")])


class End(NamedTuple):
    """How a process ended, and what it said."""

    code: int
    said: str

    def last(self) -> str:
        """Its last lines, and the code."""
        return "\n".join(f"    {line}" for line in [*self.said.splitlines()[-4:], f"exit code {self.code}"])


def main() -> None:
    """Ends with 1 where a line does not work."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        dist = Path(sys.argv[1]) if sys.argv[1:] else build(folder / "dist")
        python = environment(next(dist.glob("*.whl")), folder / "venv")
        here = scratch(folder / "here")
        lines, shown = documented()
        problems = [*failed_imports(python, lines, here), *failed_commands(python, shown, here)]
        problems += [*lost(next(dist.glob("*.tar.gz"))), *dead_links(python)]
    if problems:
        sys.exit("\n".join(["with the installed wheel:", *problems]))
    print(f"{len(lines)} import lines and {len(shown)} commands of the documentation work with the wheel")


def build(folder: Path) -> Path:
    """A folder with an sdist of this clone, and the wheel that is built from it."""
    _run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)])
    return folder


def environment(wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment that has the wheel; a path entry lends it our dependencies.

    A path entry does not activate an editable installation next to them.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    _run([*install, str(wheel)])
    site = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    where = _run([str(python), "-I", "-c", "import headforcing; print(headforcing.__file__)"]).strip()
    if site not in Path(where).parents:
        sys.exit(f"headforcing was imported from {where}, not from the wheel")
    return python


def scratch(folder: Path) -> Path:
    """A folder with what the lines of the pages find around them."""
    from tests.docs.pages import fences

    data = folder / "headforcing" / "demo"
    data.mkdir(parents=True)
    for name in CLONE:
        (folder / name).symlink_to(ROOT / name)
    for name in DATA:
        text = (ROOT / "headforcing" / "demo" / name).read_text(encoding="utf-8")
        (data / name).write_text(text, encoding="utf-8")
    page = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    (model,) = [fence.body for fence in fences(page, "python") if MODEL in fence.body]
    (folder / "my_model.py").write_text(model, encoding="utf-8")
    prompts = (ROOT / "examples" / "prompts.txt").read_text(encoding="utf-8").splitlines()[:4]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    (folder / "head_class.csv").write_text("-1,1,2,2\n1,1,-1,2\n", encoding="utf-8")
    return folder


def documented() -> tuple[dict[str, str], list[Shown]]:
    """The import lines of all pages with the first place that has them, and the commands."""
    from tests.docs.pages import PAGES, commands, imports

    lines: dict[str, str] = {}
    shown = []
    for page in PAGES:
        name, text = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")
        for number, line in imports(text):
            lines.setdefault(line, f"{name}:{number}")
        for command in commands(text):
            words = command.words[2:] if command.words[:2] == ["python", "-m"] else command.words
            if words[0] == "headforcing":
                shown.append(Shown(f"{name}:{command.line}", words[1:], command.spared))
    return lines, shown


def lost(sdist: Path) -> Iterator[str]:
    """Files of the repository that the sdist does not have."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in _run(["git", "-C", str(ROOT), "ls-files"]).splitlines():
        if name not in names and name != ".gitignore":
            yield f"{sdist.name} lacks {name}"


def dead_links(python: Path) -> Iterator[str]:
    """Links of the description that would be relative to the page of a package index."""
    code = "from importlib.metadata import metadata as m; print(m('headforcing').get_payload())"
    text = _run([str(python), "-I", "-c", code])
    if "# headforcing" not in text:
        yield "the wheel has no description"
    for link in re.findall(r"\]\((?!https?:|#)([^)]*)\)", text):
        yield f"the description links to {link}"


# What runs in a process of its own -----------------------------------------------------------------------


def ends(python: Path, jobs: list[Job], here: Path) -> list[End]:
    """How import lines, and words after `headforcing`, end; one after the other in a folder."""
    done = subprocess.run(
        [str(python), __file__, "--forks"],
        input=json.dumps(jobs),
        stdout=subprocess.PIPE,
        text=True,
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(here), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return [End(*end) for end in json.loads(done.stdout)]


def forks() -> None:
    """Runs every job in a child of its own of this process, which imports nothing but torch."""
    import torch  # noqa: F401

    print(json.dumps([_forked(job) for job in json.load(sys.stdin)]))


def _forked(job: Job) -> End:
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if not child:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = _job(job)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        return End(code, file.read().decode())


def _job(job: Job) -> int:
    try:
        if isinstance(job, str):
            exec(job, {})  # noqa: S102
        else:
            sys.argv = ["headforcing", *job]
            runpy.run_module("headforcing", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return CRASH
    return 0


def failed_imports(python: Path, lines: dict[str, str], here: Path) -> Iterator[str]:
    """What is said of the lines that raise."""
    for line, end in zip(lines, ends(python, list(lines), here), strict=True):
        if end.code:
            yield f"{lines[line]}: {line}\n{end.last()}"


def failed_commands(python: Path, shown: list[Shown], here: Path) -> Iterator[str]:
    """What is said of commands with options that do not exist, and of those that fail."""
    helps = list(dict.fromkeys(line.command for line in shown))
    told = dict(zip(helps, ends(python, [[*words, "--help"] for words in helps], here), strict=True))
    to_run, seen = [], set(SLOW)
    for line in shown:
        options = {word.partition("=")[0] for word in line.words if word.startswith("--")}
        if unknown := sorted(options - set(re.findall(r"--[\w-]+", told[line.command].said))):
            yield f"{line.place}: headforcing {' '.join(line.command)} has no {', '.join(unknown)}"
        elif line.command[0] not in seen:
            to_run.append(line)
        seen |= ONCE & {line.command[0]}
    for line, end in zip(to_run, ends(python, [line.words for line in to_run], here), strict=True):
        if end.code and not (line.spared and end.code in CLEAN):
            yield f"{line.place}: headforcing {' '.join(line.words)}\n{end.last()}"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    forks() if sys.argv[1:] == ["--forks"] else main()
