"""Whether what the documentation shows works with an installed wheel, each line in a process of its own.

    python .ci/check_wheel.py                          # builds a wheel
    python .ci/check_wheel.py dist/headforcing-*.whl

The wheel is installed into an empty environment that borrows the dependencies of this one. There, every
import line of README.md and docs/ runs in a process that has imported nothing but torch, so that no line
lives on what another one imported. Every `headforcing ...` line has options that its `--help` knows, and runs
as well, in the order of the pages and without a network, unless it takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SLOW = {"compare", "demo", "scenes"}
"""Commands that draw videos; the tests run them."""
CLONE = ("tests", "examples", "benchmarks")
"""Folders of a clone that some pages import from; `headforcing` is to come from the wheel."""
DATA = ("roles.json", "stability.json", "labels.json")
MODEL = "save it as my_model.py"


class Shown(NamedTuple):
    """A line of a page."""

    place: str
    words: list[str]
    spared: bool


def main() -> None:
    """Ends with 1 where a line does not work."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wheel = Path(sys.argv[1]) if sys.argv[1:] else build(folder / "dist")
        python = environment(wheel, folder / "venv")
        here = scratch(folder / "here", python)
        lines, shown = documented()
        problems = [*failed_imports(python, lines, here), *failed_commands(python, shown, here)]
    if problems:
        sys.exit("\n".join(["the documentation does not work with the wheel:", *problems]))
    print(f"{wheel.name}: {len(lines)} import lines and {len(shown)} commands of the documentation work")


def build(folder: Path) -> Path:
    """A wheel of this clone."""
    _run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)])
    return next(folder.glob("*.whl"))


def environment(wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment that has the wheel; a path entry lends it our dependencies.

    A path entry does not activate an editable installation next to them.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            *"install -q --no-deps --no-index".split(),
            str(wheel),
        ]
    )
    site = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    where = _run([str(python), "-I", "-c", "import headforcing; print(headforcing.__file__)"]).strip()
    if site not in Path(where).parents:
        sys.exit(f"headforcing was imported from {where}, not from the wheel")
    return python


def scratch(folder: Path, python: Path) -> Path:
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


# Imports ------------------------------------------------------------------------------------------------


def failed_imports(python: Path, lines: dict[str, str], here: Path) -> Iterator[str]:
    """What is said of the lines that raise."""
    told = subprocess.run(
        [str(python), __file__, "--forks"],
        input=json.dumps(list(lines)),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here)},
        check=True,
    )
    for line, said in json.loads(told.stdout).items():
        yield f"{lines[line]}: {line}\n  {said}"


def forks() -> None:
    """Runs each line in a child of its own; tells as JSON what those say that failed."""
    import torch  # noqa: F401  once for all children

    print(json.dumps({line: said for line in json.load(sys.stdin) if (said := _forked(line))}))


def _forked(line: str) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            exec(line, {})  # noqa: S102
        except BaseException as error:
            os.write(writer, traceback.format_exception_only(error)[-1].strip().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    status = os.waitpid(child, 0)[1]
    return said or (f"ended with status {status}" if status else "")


# Commands -----------------------------------------------------------------------------------------------


def failed_commands(python: Path, shown: list[Shown], here: Path) -> Iterator[str]:
    """What is said of commands with options that do not exist, and of those that fail."""
    helped: dict[tuple[str, ...], str] = {}
    for place, words, spared in shown:
        command = _command(python, words, helped, here)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        unknown = sorted(options - set(re.findall(r"--[\w-]+", helped[command])))
        if unknown:
            yield f"{place}: headforcing {' '.join(command)} has no {', '.join(unknown)}"
        elif command[0] not in SLOW and (said := _failure(python, words, spared, here)):
            yield f"{place}: headforcing {' '.join(words)}\n  {said}"


def _command(
    python: Path, words: list[str], helped: dict[tuple[str, ...], str], here: Path
) -> tuple[str, ...]:
    """The words that name the command; notes what its `--help` says."""
    count = 1
    while True:
        command = tuple(words[:count])
        if command not in helped:
            helped[command] = _headforcing(python, [*command, "--help"], here).stdout
        if "COMMAND [ARGS]" not in helped[command] or count == len(words):
            return command
        count += 1


def _failure(python: Path, words: list[str], spared: bool, here: Path) -> str:
    """What a command ends with that it should not; one that cannot work here has to say so cleanly."""
    done = _headforcing(python, words, here)
    clean = done.returncode in (0, 1, 2) and "Traceback" not in done.stderr if spared else not done.returncode
    return "" if clean else "\n  ".join([f"exit code {done.returncode}", *done.stderr.splitlines()[-4:]])


def _headforcing(python: Path, words: list[str], here: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python.with_name("headforcing")), *words],
        cwd=here,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    forks() if sys.argv[1:] == ["--forks"] else main()
