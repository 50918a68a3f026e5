"""Plants small bugs in roles, stores, maps and attention, and asks whether the tests notice: `make mutants`.

A mutant is the tree with one expression or statement changed: a comparison turned round, a bound moved by
one, a check left out. Each runs in a copy of the tree, never in the tree itself, against the few test files
that concern the changed module, until the first failure or a time limit; Hypothesis does not shrink what it
finds. A mutant is *killed* if a test fails, has *survived* if all pass, and is *timed out* if the limit came
first.

    python tests/mutants.py                              # --most 240 mutants, drawn evenly from all modules
    python tests/mutants.py --sample 20 --seed 3         # some of them
    python tests/mutants.py --only headforcing/stores    # of some modules
    python tests/mutants.py --list                       # which there are, without running them
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

ROOT = Path(__file__).parents[1]
FAULTS, THREADS = "tests/stores/test_faults.py", "tests/apply/test_threads.py"
FINITE, ERRORS = "tests/gpu/test_finite.py", "tests/test_errors.py"
GOLDEN, SWITCH = "tests/roles/test_golden.py", "tests/apply/test_prompt_switch.py"
STORES = [
    ERRORS,
    "tests/stores/test_front.py",
    "tests/stores/test_buffers.py",
    "tests/stores/test_stores.py",
    "tests/attention/test_rerun.py",
    "tests/stores/test_shots.py",
    "tests/roles/test_rolling.py",
]
MAPS = [
    ERRORS,
    *(
        f"tests/roles/maps/test_{name}.py"
        for name in ("role_map", "versions", "foreign_roles", "role_map_fuzz")
    ),
]
ATTENTION = [
    ERRORS,
    "tests/attention/test_phases.py",
    "tests/attention/test_rerun.py",
    "tests/attention/test_skipping.py",
    "tests/integrations/test_parity.py",
]
RAGGED = ["tests/attention/test_ragged.py", "tests/attention/test_backends.py"]
TESTS: dict[str, list[str]] = {
    "headforcing/roles/": [GOLDEN, *STORES],
    "headforcing/roles/positions.py": ["tests/roles/test_positions.py", GOLDEN, *STORES],
    "headforcing/roles/head_forcing.py": [ERRORS, "tests/roles/test_episodic.py", GOLDEN, *STORES],
    "headforcing/roles/episodic.py": ["tests/roles/test_episodic.py", GOLDEN, *STORES],
    "headforcing/roles/deep_forcing.py": ["tests/roles/test_deep_forcing.py", *STORES],
    "headforcing/roles/forcing_kv.py": ["tests/roles/test_forcing_kv.py", *STORES],
    "headforcing/roles/memrope.py": ["tests/roles/test_memrope.py", *STORES],
    "headforcing/roles/blocks.py": ["tests/roles/test_pyramid.py", *STORES],
    "headforcing/roles/pyramid_forcing.py": ["tests/roles/test_pyramid.py", GOLDEN, *STORES],
    "headforcing/roles/reward_forcing.py": ["tests/roles/test_reward_forcing.py", *STORES],
    "headforcing/roles/rolling_forcing.py": ["tests/roles/test_rolling.py", *STORES],
    "headforcing/stores/": [*STORES, SWITCH, "tests/stores/test_accounting.py", FAULTS],
    "headforcing/stores/checks.py": [*STORES, SWITCH, FINITE],
    "headforcing/stores/fork.py": [FAULTS],
    "headforcing/stores/shifts.py": ["tests/stores/test_shots.py", *STORES],
    "headforcing/roles/maps/": MAPS,
    "headforcing/roles/maps/fingerprint.py": [
        "tests/roles/maps/test_fingerprint.py",
        "tests/roles/maps/test_other_weights.py",
    ],
    "headforcing/roles/maps/hub.py": ["tests/roles/maps/test_hub.py"],
    "headforcing/roles/maps/importers/": ["tests/roles/maps/test_importers.py"],
    "headforcing/roles/maps/preset": [
        "tests/roles/maps/test_presets.py",
        "tests/roles/maps/test_preset_windows.py",
        GOLDEN,
        "tests/roles/maps/test_importers.py",
    ],
    "headforcing/attention/": [*ATTENTION, SWITCH],
    "headforcing/attention/module.py": [*ATTENTION, SWITCH, "tests/attention/test_compile.py"],
    "headforcing/attention/layer_state.py": [*ATTENTION, SWITCH, "tests/apply/test_lifecycle.py"],
    "headforcing/attention/activity.py": [*ATTENTION, SWITCH, THREADS],
    "headforcing/attention/stream.py": [*ATTENTION, SWITCH, THREADS, FINITE],
    "headforcing/attention/compile.py": ["tests/attention/test_compile.py"],
    "headforcing/attention/ragged.py": RAGGED,
    "headforcing/attention/part.py": RAGGED,
    "headforcing/attention/requirements.py": RAGGED,
    "headforcing/attention/backends/": RAGGED,
    "headforcing/attention/skipped.py": ["tests/attention/test_skipping.py"],
    "headforcing/attention/read_facts.py": ["tests/attention/test_changed.py"],
}
"""The test files that concern a module, quick ones first; of two names that fit, the longer one counts."""

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: of the file, from the root of the tree.
        line: where the change begins.
        kind: what was done.
        before, after: the text that is replaced, and by what.
        span: offsets in bytes of the text that is replaced.
    """

    path: str
    line: int
    kind: str
    before: str
    after: str
    span: tuple[int, int]

    @property
    def tests(self) -> tuple[str, ...]:
        """The test files that run on it."""
        return tuple(TESTS[max((name for name in TESTS if self.path.startswith(name)), key=len)])

    def source(self, text: bytes) -> bytes:
        """The file with the change."""
        return text[: self.span[0]] + self.after.encode() + text[self.span[1] :]


# What there is ------------------------------------------------------------------------------------


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What can be done to a node, by name, with what comes in its place."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            other = copy.deepcopy(node)
            other.ops[place] = SWAPS[type(operator)]()
            yield "comparison", other
    elif isinstance(node, ast.BinOp) and (is_joined(node.left) or is_joined(node.right)):
        return
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        other = copy.deepcopy(node)
        other.op = SWAPS[type(node.op)]()
        yield "operator", other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield "call", ast.Call(ast.Name(CALLS[node.func.id]), node.args, node.keywords)
    elif isinstance(node, ast.IfExp):
        yield "condition", ast.IfExp(node.test, node.orelse, node.body)
    elif (
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        or isinstance(node, ast.Continue | ast.Break)
    ):
        yield "left out", ast.Pass()


def is_joined(side: ast.expr) -> bool:
    """Whether an operand is a text or a list, which can be added and nothing else: any test would notice."""
    text = isinstance(side, ast.Constant) and isinstance(side.value, str)
    return text or isinstance(side, ast.JoinedStr | ast.List | ast.Tuple | ast.Set)


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are worth a change: no annotations, decorators, messages, or what only people read.

    `strict=` of `zip` only turns a fault of ours into another error.
    """
    if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__"):
        return
    if isinstance(node, ast.keyword) and node.arg in ("strict", "repr"):
        return
    yield node
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from nodes(child)


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file that is another program."""
    text = path.read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(text)
    same = ast.dump(tree)
    for node in nodes(tree):
        if not isinstance(node, ast.expr | ast.stmt):
            continue
        span = (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
        for kind, other in changes(node):
            new = ast.unparse(other)
            made = Mutant(
                path.relative_to(ROOT).as_posix(),
                node.lineno,
                kind,
                text[span[0] : span[1]].decode(),
                f"({new})" if isinstance(other, ast.expr) else new,
                span,
            )
            if ast.dump(ast.parse(made.source(text))) != same:
                yield made


def all_mutants(only: Sequence[str]) -> list[Mutant]:
    """Those of all modules in `TESTS`."""
    folders = {name for name in TESTS if name.endswith("/")}
    paths = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    named = [path for path in sorted(paths) if path.relative_to(ROOT).as_posix().startswith(tuple(only))]
    return [made for path in named for made in mutants(path)]


def drawn(found: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """Some of them, drawn by chance, as many of every file as it has."""
    chance = random.Random(seed)
    by_file: dict[str, list[Mutant]] = {}
    for one in found:
        by_file.setdefault(one.path, []).append(one)
    for members in by_file.values():
        chance.shuffle(members)
    chosen: list[Mutant] = []
    while by_file and len(chosen) < count:
        for path in chance.sample(sorted(by_file), len(by_file)):
            chosen.append(by_file[path].pop())
            if not by_file[path]:
                del by_file[path]
    return chosen[:count]


# Runs ---------------------------------------------------------------------------------------------


def copy_of_the_tree(folder: Path) -> Path:
    """What git knows of, and new files that it does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(tree: Path, tests: Sequence[str], limit: float) -> tuple[str, float, str]:
    """Killed, survived or timed out; seconds; and the first test that failed."""
    began = time.monotonic()
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-n0", "-m", "not slow", "--tb=no", "-rfE"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "HYPOTHESIS_PROFILE": "mutants"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, "-p", "no:cacheprovider", *tests],
            cwd=tree,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "timed out", time.monotonic() - began, ""
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if status not in (0, 1, 2, 3, 4):  # a signal, such as a segmentation fault
        return "killed", time.monotonic() - began, f"exit status {status}"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    first = failed[0] if failed else " ".join(lines[-1:])
    return ("survived" if status == 0 else "killed"), time.monotonic() - began, first if status else ""


def baselines(tree: Path, found: Sequence[Mutant]) -> dict[str, float]:
    """Seconds of every test file on the tree as it is.

    Raises:
        SystemExit: a test fails without any mutant.
    """
    seconds = {}
    for test in sorted({test for one in found for test in one.tests}):
        result, seconds[test], failed = run(tree, [test], 3600)
        if result != "survived":
            raise SystemExit(f"{test} fails without a mutant ({result}): {failed}")
        print(f"{seconds[test]:7.0f} s without a mutant: {test}", flush=True)
    return seconds


def table(rows: Sequence[dict[str, object]]) -> str:
    """By module: how many were killed, survived, timed out."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(str(row["path"]), Counter())[str(row["result"])] += 1
    total = sum(counts.values(), Counter())
    lines = ["| module | killed | survived | timed out |", "|---|---:|---:|---:|"]
    for name, own in [*sorted(counts.items()), ("all", total)]:
        lines.append(f"| {name} | {own['killed']} | {own['survived']} | {own['timed out']} |")
    decided = total["killed"] + total["survived"]
    share = f"{100 * total['killed'] / decided:.1f} %" if decided else "none"
    return "\n".join([*lines, "", f"{share} killed of the {decided} that were decided."])


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sample", type=int, help="run so many, drawn by chance")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--most", type=int, default=240, help="without --sample: run at most so many")
    parser.add_argument("--only", action="append", default=[], help="modules whose path begins so")
    parser.add_argument(
        "--again", type=Path, help="those that were not killed in this report of the same tree"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.json", help="the report")
    parser.add_argument("--list", action="store_true", help="name them, run nothing")
    options = parser.parse_args()
    found = all_mutants(options.only or [""])
    if not found:
        raise SystemExit(
            f"no mutants in {', '.join(options.only)}: expected paths such as headforcing/stores"
        )
    if options.again is not None:
        report = json.loads(options.again.read_text(encoding="utf-8"))
        undecided = [row for row in report["rows"] if row["result"] != "killed"]
        left = {(row["path"], *row["span"], row["after"]) for row in undecided}
        found = [one for one in found if (one.path, *one.span, one.after) in left]
    chosen = drawn(found, options.sample or options.most, options.seed)
    if options.list:
        for one in sorted(chosen, key=lambda one: (one.path, one.span)):
            print(f"{one.path}:{one.line}: {one.kind}: {one.before!r} -> {one.after!r}")
        print(f"{len(chosen)} of {len(found)}")
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            trees.put(copy_of_the_tree(Path(folder, str(number))))
        tree = trees.get()
        seconds = baselines(tree, chosen)
        trees.put(tree)

        rows: list[dict[str, object]] = []
        options.out.parent.mkdir(parents=True, exist_ok=True)

        def tried(one: Mutant) -> None:
            tree = trees.get()
            text = (tree / one.path).read_bytes()
            (tree / one.path).write_bytes(one.source(text))
            limit = 60 + 3 * sum(seconds[test] for test in one.tests)
            try:
                result, took, failed = run(tree, one.tests, limit)
            finally:
                (tree / one.path).write_bytes(text)
                trees.put(tree)
            print(
                f"{result:9} {took:5.0f} s  {one.path}:{one.line}: {one.before!r} -> {one.after!r}",
                flush=True,
            )
            with written:  # whatever ends the run, what was found is there
                rows.append({**asdict(one), "result": result, "seconds": round(took, 1), "by": failed})
                report = {"seed": options.seed, "mutants": len(found), "drawn": len(chosen), "rows": rows}
                options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

        written = Lock()
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(tried, chosen))
    print(table(rows))
    print(f"Survivors, one by one, are in {options.out}")


if __name__ == "__main__":
    main()
