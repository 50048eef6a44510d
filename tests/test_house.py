"""The house's rules (room order, state, caps), held by a test: what a reader may rely on everywhere."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "engine" / "trilith"

# A line may import the lines below it; rooms on one line may not import each other.
LINES = (
    ("__main__",),
    ("cli",),
    ("parity", "doctor"),
    ("runner",),
    ("measure",),
    ("trainer", "pipeline_engine"),
    ("feed",),
    ("stepping",),
    ("preflight",),
    ("build", "planner"),
    ("zero",),
    ("pipeline", "optim", "checkpoint", "data", "monitor", "peft"),
    ("models",),
    ("layers",),
    ("process_groups",),
    ("comm", "precision", "host_memory"),
    ("rng",),
    ("kernels",),
    ("sharding", "topology"),
    ("config",),
    ("failpoints",),
    ("errors",),
)
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 500, 80, 8
# Functions that mirror an op's schema may take as many parameters as the op has.
SCHEMA_MIRRORS = ("kernels/",)
HOOKS = (
    "register_hook",
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_post_accumulate_grad_hook",
    "register_multi_grad_hook",
)


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


FILES = python_files(ROOT / "engine", ROOT / "launcher")
ALL_FILES = FILES + python_files(ROOT / "benchmarks", ROOT / "tests") + [ROOT / "setup.py"]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(node: ast.ImportFrom, name: str) -> str:
    """What `from module import name` imports: a submodule where there is one, else the module."""
    module = node.module or ""
    for root in ("engine", "launcher"):
        place = ROOT / root / Path(*module.split("."), name)
        if place.with_suffix(".py").exists() or place.is_dir():
            return f"{module}.{name}"
    return module


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, inside a function) of every import of a file."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}:{node.lineno}: relative import"
            found.extend((name, node.lineno, inside) for name in sorted({imported(node, a.name) for a in node.names}))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return  # names for the type checker only
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(tree(path), False)
    return found


def test_room_order() -> None:
    level = {name: index for index, line in enumerate(LINES) for name in line}
    wrong = []
    for path in python_files(PACKAGE):
        here = room(path)
        if here == "__init__":
            continue
        assert here in level, f"{named(path)}: the room `{here}` has no place in the order of rooms"
        for module, line, _ in imports(path):
            parts = module.split(".")
            if parts[0] in ("tests", "benchmarks"):
                wrong.append(f"{named(path)}:{line} imports {module}")
            if parts[0] == "trilith_launcher" and here not in ("cli", "runner", "parity"):
                wrong.append(f"{named(path)}:{line}: only commands may use the launcher")
            if parts[0] != "trilith" or len(parts) == 1:
                continue
            there = parts[1]
            if there != here and level.get(there, -1) <= level[here]:
                wrong.append(f"{named(path)}:{line}: {here} may not import {there}")
    assert not wrong, "\n".join(wrong)


def test_launcher_stands_alone() -> None:
    for path in python_files(ROOT / "launcher"):
        for module, line, _ in imports(path):
            assert not module.startswith("trilith.") and module != "trilith", f"{named(path)}:{line}: {module}"


def test_no_cycles() -> None:
    """No import cycle between files, counting imports inside functions too."""
    names = {".".join(p.relative_to(ROOT / "engine").with_suffix("").parts): p for p in python_files(PACKAGE)}
    graph = {}
    for name, path in names.items():
        targets = set()
        for module, _, _ in imports(path):
            if module in names:
                targets.add(module)
            elif f"{module}.__init__" in names:
                targets.add(f"{module}.__init__")
        graph[name] = targets - {name}
    state: dict[str, int] = {}

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, "import cycle: " + " -> ".join((*trail, name))
        if name not in state:
            state[name] = 1
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            state[name] = 2

    for name in graph:
        walk(name, ())


LATE = (
    "matplotlib",
    "tokenizers",
    "pyarrow",
    "tensorboard",
    "torch.utils.tensorboard",
    "rich",
    "yappi",
    "numpy",
)


def test_imports_stand_at_the_top() -> None:
    wrong = []
    for path in python_files(PACKAGE):
        for module, line, inside in imports(path):
            late = module.startswith(LATE) or (room(path) in ("cli", "__init__") and module.startswith("trilith"))
            if inside and not late:
                wrong.append(f"{named(path)}:{line}: {module} is imported inside a function")
    assert not wrong, "\n".join(wrong)


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id in ("list", "dict", "set", "defaultdict", "deque", "Counter")
    )


def test_no_global_state() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Global):
                wrong.append(f"{named(path)}:{node.lineno}: global {node.names}")
        for statement in tree(path).body:
            value = getattr(statement, "value", None)
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            names = [getattr(t, "id", "") for t in targets]
            if isinstance(statement, ast.Assign | ast.AnnAssign) and value is not None and names != ["__all__"]:
                if is_mutable(value):
                    wrong.append(f"{named(path)}:{statement.lineno}: mutable value at module level")
    assert not wrong, "\n".join(wrong)


def test_hooks_live_in_zero_only() -> None:
    wrong = []
    for path in python_files(PACKAGE):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in HOOKS and room(path) != "zero":
                wrong.append(f"{named(path)}:{node.lineno}: {node.attr}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled() -> None:
    wrong = []
    for path in FILES:
        for module, line, _ in imports(path):
            if module.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve"):
                wrong.append(f"{named(path)}:{line}: {module}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
                if (node.arg, node.value.value) in (("allow_pickle", True), ("weights_only", False)):
                    wrong.append(f"{named(path)}:{node.value.lineno}: {node.arg}={node.value.value}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", ALL_FILES, ids=named)
def test_file_length(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_function_size() -> None:
    wrong = []
    for path in ALL_FILES:
        for node in functions(path):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                wrong.append(f"{named(path)}:{node.lineno}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_parameter_count() -> None:
    wrong = []
    for path in FILES:
        if path.is_relative_to(PACKAGE) and str(path.relative_to(PACKAGE)).startswith(SCHEMA_MIRRORS):
            continue
        for node in functions(path):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([n for n in names if n not in ("self", "cls", "ctx")])
            if count > MAX_PARAMETERS:
                wrong.append(f"{named(path)}:{node.lineno}: {node.name} takes {count} parameters")
    assert not wrong, "\n".join(wrong)


def test_public_names_are_documented() -> None:
    wrong = []
    for path in FILES:
        if not ast.get_docstring(tree(path)):
            wrong.append(f"{named(path)}: no docstring")
        bodies: list[ast.Module | ast.ClassDef] = [tree(path)]
        bodies += [n for n in tree(path).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        for body in bodies:
            for node in body.body:
                public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                overload = any(
                    ast.unparse(d) == "overload" or "setter" in ast.unparse(d)
                    for d in getattr(node, "decorator_list", ())
                )
                autograd = isinstance(body, ast.ClassDef) and getattr(node, "name", "") in (
                    "forward",
                    "backward",
                )
                if public and not overload and not autograd and not ast.get_docstring(node):  # type: ignore[arg-type]
                    wrong.append(f"{named(path)}:{node.lineno}: {node.name} has no docstring")  # type: ignore[attr-defined]
    assert not wrong, "\n".join(wrong)
