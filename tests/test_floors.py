"""The rules of the source tree, read with `ast`: imports go down only, and what code may not do."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folders below `headforcing.`, lowest floor first; a file belongs to the deepest folder that is named here.
# "" is headforcing/__init__.py.
FLOORS = [
    {"errors", "types"},
    {"roles", "adapters"},
    {"roles.maps", "stores"},
    {"attention", "attention.backends"},
    {"apply"},
    {"measure", "measure.metrics", "measure.classifiers", "measure.plots", "roles.maps.importers"},
    {"integrations", "testing", "demo", ""},
    {"cli", "__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

# One file each, so that a file can be added or removed alone: no imports between neighbours.
ALONE = {
    "attention.backends",
    "measure.metrics",
    "measure.classifiers",
    "roles.maps.importers",
    "integrations",
}
ONLY = {
    "roles": {"errors", "types", "roles"},
    "adapters": {"errors", "types", "roles", "adapters"},
    "integrations": {"errors", "types", "roles", "adapters"},
    "stores": {"errors", "types", "roles", "stores"},
    "attention.backends": {"errors", "types", "attention", "attention.backends"},
}
BY_FOLDER = {("headforcing.adapters.base", "headforcing.integrations")}  # find_adapter lists the folder
AT_IMPORT = {*sys.stdlib_module_names, "torch", "einops", "numpy", "headforcing"}  # integrations
LAZY = {"diffusers", "transformers", "matplotlib", "typer", "imageio", "huggingface_hub"}

MAY_PRINT = {"headforcing.cli"}
IMPORT_CALLS = {"importlib.import_module", "import_module", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_CALLS = {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN_NUMBERS = {1560, 32760}
MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS = 350, 50, 8
MORE_PARAMETERS = {
    ("headforcing.apply", "apply_head_forcing"): 9,  # the front door
    ("headforcing.adapters.rope_triton", "_rotate"): 19,  # a kernel is given every size and stride by itself
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("headforcing", *parts) if parts[0] == "integrations" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for folder in ("headforcing", "integrations")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imports(module: str, tree: ast.AST, known: set[str]) -> set[str]:
    """Absolute names of the imported modules, whatever the form of the import."""
    is_package = any(name.startswith(f"{module}.") for name in known)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                parent = module.split(".")[: -up or None]
                base = ".".join([*parent, *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & known
            found |= {base} if names - known else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORT_CALLS:
            found |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def folder(module: str) -> str:
    """`headforcing.stores.ring` -> `stores`; `headforcing.roles.maps.file` -> `roles.maps`."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in names if name in FLOOR), ".".join(parts))


def goes_down(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    here = folder(module)
    if here not in FLOOR:
        return [f"{module} has no floor: give its folder one in tests/test_floors.py"]
    problems = []
    for target in imports(module, tree, known):
        if target.split(".")[0] != "headforcing" or target == module or (module, target) in BY_FOLDER:
            continue
        there = folder(target)
        if FLOOR.get(there, 99) > FLOOR[here]:
            problems.append(f"{module} imports {target}, which is above it")
        if here in ALONE and there == here and target != f"headforcing.{here}":
            problems.append(f"{module} imports its neighbour {target}")
        if here in ONLY and there not in ONLY[here]:
            problems.append(f"{module} imports {target}: {here} know only {sorted(ONLY[here])}")
    return problems


def upstream_stays_lazy(module: str, tree: ast.Module, known: set[str]) -> list[str]:
    if folder(module) != "integrations":
        return []
    top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    names = {name.split(".")[0] for name in imports(module, top, known)}
    return [f"{module} imports {name} at module level" for name in names - AT_IMPORT]


def is_safe(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    problems = []
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for name in {name.split(".")[0] for name in imports(module, tree, known)} & FORBIDDEN_MODULES:
        problems.append(f"{module} imports {name}")
    for node in ast.walk(tree):
        line = f"{module}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Name | ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            name = ".".join([aliases.get(head, head), *([rest] if rest else [])])
            if name in FORBIDDEN_CALLS:
                problems.append(f"{line}: {name}")
            if name == "print" and module not in MAY_PRINT:
                problems.append(f"{line}: print")
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if {ast.unparse(c) if c else "" for c in caught} & {"", "Exception", "BaseException"}:
                problems.append(f"{line}: broad except")
        if isinstance(node, ast.Constant) and node.value in FORBIDDEN_NUMBERS:
            problems.append(f"{line}: {node.value} comes from the model, not from the code")
    return problems


def is_small(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    problems = []
    methods = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for child in node.body
        if not any(ast.unparse(d) == "staticmethod" for d in getattr(child, "decorator_list", []))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1
            if lines > MAX_FUNCTION:
                problems.append(f"{module}.{node.name} has {lines} lines of code")
            a = node.args
            count = len([*a.posonlyargs, *a.args, *a.kwonlyargs]) + bool(a.vararg) + bool(a.kwarg)
            most = MORE_PARAMETERS.get((module, node.name), MAX_PARAMETERS)
            if count - (id(node) in methods) > most:
                problems.append(f"{module}.{node.name} has {count} parameters")
    return problems


def is_short(source: str) -> bool:
    return len(source.splitlines()) <= MAX_LINES


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other: what remains when every leaf has been taken away."""
    while leaves := {m for m, targets in graph.items() if not targets & graph.keys()}:
        graph = {m: targets for m, targets in graph.items() if m not in leaves}
    return sorted(graph)


RULES = [goes_down, upstream_stays_lazy, is_safe, is_small]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    assert [said for module, tree in TREES.items() for said in rule(module, tree, set(FILES))] == []


def test_no_file_is_long():
    sources = {module: path.read_text(encoding="utf-8") for module, path in FILES.items()}
    assert [module for module, source in sources.items() if not is_short(source)] == []
    assert not is_short("x = 1\n" * (MAX_LINES + 1))


def test_modules_do_not_import_each_other():
    graph = {module: imports(module, tree, set(FILES)) - {module} for module, tree in TREES.items()}
    assert cycles(graph) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_importing_the_package_loads_no_optional_framework():
    loaded = "import json, sys, headforcing; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd=ROOT
    )
    modules = {name.split(".")[0] for name in json.loads(answer.stdout)}
    assert "headforcing" in modules
    assert modules & LAZY == set()


KNOWN = {
    "headforcing",
    *(f"headforcing.{name}" for name in FLOOR if name),
    *(f"headforcing.{folder}.{file}" for folder in ALONE for file in ("one", "two")),
}

BAD = [
    (goes_down, "headforcing.types", "import headforcing.roles"),
    (goes_down, "headforcing.types", "from headforcing.roles import HeadRole"),
    (goes_down, "headforcing.types", "from headforcing import roles"),
    (goes_down, "headforcing.types", "from . import roles"),
    (goes_down, "headforcing.types", "from .stores.one import X"),
    (goes_down, "headforcing.types", "def f():\n    from headforcing import apply"),
    (goes_down, "headforcing.types", "import_module('headforcing.apply')"),
    (goes_down, "headforcing.attention.module", "import headforcing as hf"),
    (goes_down, "headforcing.adapters.base", "from headforcing.integrations.one import ADAPTER"),
    (goes_down, "headforcing.apply", "from headforcing.integrations import one"),
    (goes_down, "headforcing.measure.metrics.one", "from headforcing.measure.metrics.two import X"),
    (goes_down, "headforcing.measure.metrics.one", "from . import two"),
    (goes_down, "headforcing.measure.metrics.one", "from .two import X"),
    (goes_down, "headforcing.measure.metrics", "from .two import X"),
    (goes_down, "headforcing.roles.one", "from .maps.file import X"),
    (goes_down, "headforcing.stores.one", "from ..adapters.rope import rotate"),
    (goes_down, "headforcing.stores.one", "from headforcing.attention.backends import one"),
    (goes_down, "headforcing.attention.backends.one", "from headforcing.roles import HeadRole"),
    (goes_down, "headforcing.integrations.one", "from headforcing.integrations import two"),
    (goes_down, "headforcing.integrations.one", "from headforcing.roles.maps.role_map import RoleMap"),
    (goes_down, "headforcing.integrations.one", "import headforcing"),
    (goes_down, "headforcing.unheard_of", ""),
    (upstream_stays_lazy, "headforcing.integrations.one", "from wan.modules import model"),
    (is_safe, "headforcing.apply", "import pickle"),
    (is_safe, "headforcing.apply", "from pickle import loads"),
    (is_safe, "headforcing.apply", "torch.load('x')"),
    (is_safe, "headforcing.apply", "import torch as t\nt.load('x')"),
    (is_safe, "headforcing.apply", "from torch import load as read\nread('x')"),
    (is_safe, "headforcing.apply", "eval('x')"),
    (is_safe, "headforcing.apply", "exec('x')"),
    (is_safe, "headforcing.apply", "yaml.load(x)"),
    (is_safe, "headforcing.apply", "print('x')"),
    (is_safe, "headforcing.apply", "try:\n    f()\nexcept:\n    pass"),
    (is_safe, "headforcing.apply", "try:\n    f()\nexcept Exception:\n    pass"),
    (is_safe, "headforcing.apply", "try:\n    f()\nexcept (OSError, Exception) as e:\n    pass"),
    (is_safe, "headforcing.apply", "x = 3 * 1560"),
    (is_safe, "headforcing.apply", "def f(n=32_760): ..."),
    (is_small, "headforcing.apply", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION + 1)),
    (is_small, "headforcing.apply", "def f(a, b, c, d, e, f, g, *, h, i): ..."),
    (is_small, "headforcing.apply", "class A:\n    def f(self, a, b, c, d, e, f, g, h, i): ..."),
    (is_small, "headforcing.apply", "def apply_head_forcing(a, b, c, d, e, f, g, h, i, j): ..."),
    (is_small, "headforcing.attention.layer_state", "def apply_head_forcing(a, b, c, d, e, f, g, h, i): ..."),
]

GOOD = [
    (goes_down, "headforcing.roles", "from headforcing.roles.positions import place"),
    (goes_down, "headforcing.stores.one", "from headforcing.stores import KVStore"),
    (goes_down, "headforcing.stores.one", "from ..types import Chunk"),
    (goes_down, "headforcing.integrations.one", "from headforcing.adapters import base, rope"),
    (goes_down, "headforcing.cli", "import headforcing as hf\nfrom headforcing import demo"),
    (upstream_stays_lazy, "headforcing.integrations.one", "def f():\n    import wan"),
    (upstream_stays_lazy, "headforcing.integrations.one", "import math\nimport torch.nn as nn"),
    (is_safe, "headforcing.apply", "model.eval()\nstr.print\nx = '1560'"),
    (is_safe, "headforcing.apply", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
    (is_safe, "headforcing.cli", "print('x')"),
    (is_small, "headforcing.apply", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
    (is_small, "headforcing.apply", "def f():\n" + '    """Says."""\n' + "    x = 1\n" * MAX_FUNCTION),
]


@pytest.mark.parametrize(("rule", "module", "source"), BAD)
def test_the_rule_finds_the_planted_bug(rule, module, source):
    assert rule(module, ast.parse(source), KNOWN)


@pytest.mark.parametrize(("rule", "module", "source"), GOOD)
def test_the_rule_lets_good_code_pass(rule, module, source):
    assert rule(module, ast.parse(source), KNOWN) == []
